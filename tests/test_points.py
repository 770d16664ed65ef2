"""Points through a field and back, and the files that hold them."""

import json

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

import helpers
from extras import points
from extras.errors import InputError
from utils import invert_points, map_points

FCSV = """# Markups fiducial file version = 5.6
# CoordinateSystem = {frame}
# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID,positionStatus,numberOfControlPoints
1,{0},{1},{2},0,0,0,1,1,1,0,apex,,,2,0
2,{3},{4},{5},0,0,0,1,1,1,0,"base, left",,,2,0
"""
CSV = "name,x,y,z,remark\napex,{0},{1},{2},a\nbase,{3},{4},{5},b\n"


def write_file(folder, suffix, frame, positions, stem="targets"):
    """A file of points at positions (N, 3), N = 2 but for .mrk.json, in the file's own frame."""
    numbers = np.ravel(positions).tolist()
    text = {".fcsv": FCSV, ".csv": CSV}.get(suffix, "").format(*numbers, frame=frame)
    if suffix == ".mrk.json":
        entries = [{"id": str(k), "label": f"F-{k}", "position": list(p)} for k, p in enumerate(positions)]
        markups = [
            {"type": "Fiducial", "coordinateSystem": frame, "coordinateUnits": "mm", "controlPoints": [entry]}
            for entry in entries
        ]
        text = json.dumps({"markups": markups})
    path = folder / f"{stem}{suffix}"
    path.write_text(text)
    return path


# -- Through a field -----------------------------------------------------------------------------------------------


def test_an_affine_field_is_inverted_exactly(rng):
    matrix, shift = np.eye(3) + rng.uniform(-0.1, 0.1, (3, 3)), rng.uniform(-2, 2, 3)
    index = np.moveaxis(np.indices((20, 18, 16), float), 0, -1)
    offset = np.array([3.0, 1, 2])
    ddf = index @ matrix.T + shift - index
    inside = rng.uniform(4, 12, (50, 3))
    there = inside @ matrix.T + shift + offset
    np.testing.assert_allclose(map_points(inside, ddf, offset), there, atol=1e-9)
    np.testing.assert_allclose(invert_points(there, ddf, offset), inside, atol=1e-3)


def test_a_smooth_field_is_inverted_also_beyond_its_border(rng):
    noise = rng.normal(size=(24, 32, 22, 3))
    ddf = 25 * np.stack([ndimage.gaussian_filter(noise[..., k], 4) for k in range(3)], axis=-1)
    assert np.abs(ddf).max() > 1
    points_there = rng.uniform(-3, 35, (200, 3))
    back = invert_points(points_there, ddf, np.array([6.0, 2, 5]))
    np.testing.assert_allclose(map_points(back, ddf, np.array([6.0, 2, 5])), points_there, atol=1e-3)


# -- Files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", points.SUFFIXES)
@pytest.mark.parametrize("frame", ["RAS", "LPS"])
def test_files_keep_their_frame_and_all_else(suffix, frame, tmp_path):
    theirs = np.array([[1.5, -2, 3], [40, 50, -60.25]])
    path = write_file(tmp_path, suffix, frame, theirs)
    file = points.read_points(path, frame if suffix == ".csv" else "file")
    np.testing.assert_allclose(file.positions, theirs * ([1, 1, 1] if frame == "RAS" else [-1, -1, 1]))
    again = tmp_path / f"again{suffix}"
    points.write_points(again, file, file.positions, [True, True])
    copy = points.read_points(again, frame if suffix == ".csv" else "file")
    np.testing.assert_allclose(copy.positions, file.positions)
    assert copy.names == file.names and copy.frame == frame
    if suffix == ".mrk.json":
        assert copy.content == file.content
    else:
        others = [name for k, name in enumerate(file.content) if k not in file.columns]
        assert len(others) > 1 and copy.content[others].equals(file.content[others]) and copy.comments == file.comments
    points.write_points(again, file, file.positions + 1, [False, True])
    copy = points.read_points(again, frame if suffix == ".csv" else "file")
    np.testing.assert_allclose(copy.positions, file.positions[1:] + 1)
    assert copy.names == file.names[1:]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.txt", "", "another ending"),
        ("a.csv", "name,x,y\na,1,2\n", "found name, x, y, expected x, y, z or r, a, s or l, p, s"),
        ("a.csv", "1,2,3\n4,5,6\n", "found 1, 2, 3, expected x, y, z"),
        ("a.csv", "x,y,z\n1,2,three\n", "ValueError"),
        ("a.csv", "x,y,z\n1,2,nan\n", "three numbers"),
        ("a.csv", "x,y,z\n", "found 0 points"),
        ("a.csv", "x,y,z\n1,2,3\n", "--points_frame"),
        ("a.csv", "x,y,z\n1,2,3,4\n", "cannot be read"),
        ("a.fcsv", "# CoordinateSystem = IJK\n1,2,3,4\n", "RAS or LPS"),
        ("a.fcsv", "1,2,3,4\n", "RAS or LPS"),
        ("a.csv", "X;Y;Z\n1;2;3\n", "--points_frame"),
        ("a.csv", "", "a header with x, y, z"),
        ("a.csv", "x1,y1,z1,x2,y2,z2\n1,2,3,4,5,6\n", "found x1, y1, z1, x2, y2, z2, expected x, y, z"),
        ("a.csv", "x,y,z,X,Y,Z\n1,2,3,4,5,6\n", "found x, y, z, X, Y, Z, expected x, y, z"),
        ("a.csv", "# CoordinateSystem = RAS\nl,p,s\n1,2,3\n", "found LPS and RAS, expected one frame"),
        ("a.mrk.json", "{", "JSONDecodeError"),
        ("a.mrk.json", '{"markups": []}', "ValueError"),
        ("a.mrk.json", '{"markups": [{"type": "ROI", "controlPoints": []}]}', "more than its points"),
        pytest.param("a.mrk.json", "[" * 10**5, "RecursionError", id="deep"),
        ("a.mrk.json", '{"markups": [{"controlPoints": [{"position": null}]}]}', "three numbers"),
    ],
)
def test_bad_files_are_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        points.read_points(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="nowhere"):
        points.read_points(tmp_path / "nowhere.csv")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(
    "header, frame",
    [
        ("name x y z", None),
        ("X Y Z", None),
        ('"label" "r" "a" "s"', "RAS"),
        ("l p s label", "LPS"),
        ("id X(mm) Y(mm) Z(mm)", None),
        ("# a remark\n# CoordinateSystem = LPS\nx y z", "LPS"),
    ],
)
def test_the_usual_spellings_of_a_table_are_read_and_kept(header, frame, separator, tmp_path):
    """Columns in the field's spellings, with the separators of spreadsheets, and the frame that they say."""
    columns = header.splitlines()[-1].split()
    where = [
        next(k for k, name in enumerate(columns) if name.strip('"').lower().split("(")[0] in [*letters])
        for letters in ("xrl", "yap", "zs")
    ]
    row = ["F-1"] * len(columns)
    for k, number in zip(where, ("1.5", "-2.25", "30"), strict=True):
        row[k] = number
    head = [*header.splitlines()[:-1], separator.join(columns)]
    path = tmp_path / "a.csv"
    path.write_text("\n".join([*head, separator.join(row)]) + "\n")
    if frame is None:
        with pytest.raises(InputError, match="--points_frame"):
            points.read_points(path)
    file = points.read_points(path, frame or "LPS")
    assert file.positions.tolist() == [[1.5, -2.25, 30] if frame == "RAS" else [-1.5, 2.25, 30]]
    points.write_points(path, file, file.positions + 1, [True])
    assert path.read_text().splitlines()[: len(head)] == [line.replace('"', "") for line in head]
    again = points.read_points(path, frame or "LPS")
    np.testing.assert_allclose(again.positions, file.positions + 1)
    assert again.names == file.names == (["F-1"] if "label" in header or "name" in header else ["0"])


def test_a_decimal_comma_is_read(tmp_path):
    path = tmp_path / "a.CSV"
    path.write_text("r;a;s\n1,5;-2,25;30\n;;\n")  # with a row that a spreadsheet left behind
    file = points.read_points(path)
    assert file.positions.tolist() == [[1.5, -2.25, 30]]
    points.write_points(path, file, file.positions, [True])
    assert path.read_text() == "r;a;s\n1,5;-2,25;30,0\n"


def test_a_row_that_begins_with_a_hash_is_a_point(tmp_path):
    (tmp_path / "a.csv").write_text("name,r,a,s\nA,1,2,3\n#2,4,5,6\n")
    assert points.read_points(tmp_path / "a.csv").names == ["A", "#2"]


def test_what_the_file_says_of_its_frame_is_not_overruled(tmp_path):
    path = write_file(tmp_path, ".mrk.json", "LPS", np.ones((2, 3)))
    with pytest.raises(InputError, match="found coordinates in LPS, expected RAS"):
        points.read_points(path, "RAS")
    assert points.read_points(path, "LPS").frame == "LPS"


def test_points_of_3d_slicer_that_were_never_placed_are_left_out(tmp_path):
    entries = [
        {"label": "placed", "position": [1.0, 2.0, 3.0], "positionStatus": "defined"},
        {"label": "not yet", "position": "", "positionStatus": "undefined"},
    ]
    path = tmp_path / "a.mrk.json"
    path.write_text(json.dumps({"markups": [{"controlPoints": entries}]}))  # without a word it is LPS
    file = points.read_points(path)
    assert file.names == ["placed"] and file.positions.tolist() == [[-1, -2, 3]]
    points.write_points(path, file, file.positions, [True])
    assert points.read_points(path).positions.tolist() == [[-1, -2, 3]]
    (tmp_path / "a.fcsv").write_text(FCSV.format(*[0] * 3, *[4] * 3, frame="RAS").replace("apex,,,2", "apex,,,0"))
    assert points.read_points(tmp_path / "a.fcsv").names == ["base, left"]


@pytest.mark.parametrize("points_on", ["fixed", "moving"])
def test_a_point_where_the_field_folds_is_left_out(points_on, tmp_path, capsys):
    """A field that mirrors the voxels about x = 8 between 5 and 11 and leaves the others as they are."""
    ddf = np.zeros((16, 16, 16, 3), np.float32)
    ddf[5:12, ..., 0] = 16 - 2 * np.arange(5, 12)[:, None, None]
    volume, offset = helpers.Volume(np.ones((16, 16, 16)), np.eye(4)), np.zeros(3)
    path = write_file(tmp_path, ".csv", "RAS", [[8, 8, 8], [2, 8, 8]])
    file = points.read_points(path, "RAS")
    points.transfer_points(file, tmp_path, points_on, volume, volume, ddf, np.eye(4), np.eye(4), offset)
    out = capsys.readouterr().out
    assert "point apex lies outside the field of view, or where the field folds" in out and ": 1 points" in out


def check_points_of_a_pair(folder, moving, fixed, run, rng):
    """Points of a pair go both ways, as SimpleITK takes them with the written fields. run: inference.py's words."""
    image = nib.load(fixed)
    inside = rng.uniform(0.35, 0.65, (40, 3)) * image.shape
    here = nib.affines.apply_affine(image.affine, inside) * [-1, -1, 1]  # LPS, about the middle of the gland
    path = write_file(folder, ".mrk.json", "LPS", here)
    words = [f"--moving={moving}", f"--fixed={fixed}"]
    status, out, err = run(*words, f"--points={path}", "--points_on=fixed")
    assert status == 0 and "targets_on_moving.mrk.json: 40 points" in out, err
    case = folder / "output" / f"{moving.name.split('.')[0]}_to_{fixed.name.split('.')[0]}"
    there = points.read_points(case / "targets_on_moving.mrk.json")
    field, inverse = (
        sitk.DisplacementFieldTransform(sitk.ReadImage(str(case / f"{name}.nii.gz"), sitk.sitkVectorFloat64))
        for name in ("displacement", "displacement_inverse")
    )
    theirs = [field.TransformPoint(point) for point in here]
    np.testing.assert_allclose(there.positions * [-1, -1, 1], theirs, atol=0.05)  # mm
    errors = np.linalg.norm([inverse.TransformPoint(point) for point in theirs] - here, axis=-1)
    assert np.median(errors) < 0.1 and errors.max() < 0.5

    far = np.concatenate([there.positions, there.positions[:1] + 500])
    beside = nib.affines.apply_affine(image.affine, [-3, *np.array(image.shape[1:]) / 2])  # still on the network's grid
    status, out, err = run(*words, f"--points={write_file(folder, '.mrk.json', 'RAS', [beside])}", "--points_on=fixed")
    assert status == 0 and "point F-0 lies outside" in out and "0 points\n" in out, (out, err)
    path = write_file(folder, ".mrk.json", "RAS", far)
    status, out, err = run(*words, f"--points={path}")
    assert status == 0 and "point F-40 lies outside" in out and "targets_on_fixed.mrk.json: 40 points" in out, err
    back = points.read_points(case / "targets_on_fixed.mrk.json")
    np.testing.assert_allclose(back.positions * [-1, -1, 1], here, atol=0.01)
