"""Files and geometry: pairing, resampling against SciPy and SimpleITK, the displacement file as ITK reads it."""

import contextlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial.transform import Rotation

import helpers
import utils
from extras import files
from extras.cross_validation import split_fold
from extras.errors import InputError
from utils import moving_offset, reference_grid, resample


def smooth_volume(rng, shape):
    return ndimage.gaussian_filter(rng.random(shape), 1.5).astype(np.float32) * 100


def header(shape, spacing, degrees=(0, 0, 0), orientation="RAS", origin=(0, 0, 0)):
    """Shape as stored and voxel-to-world matrix of a volume with the given RAS shape, spacing and turn."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = origin
    change = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
    )
    stored = nib.orientations.apply_orientation(np.empty(shape, np.uint8), change).shape
    return stored, affine @ nib.orientations.inv_ornt_aff(change, shape)


GEOMETRIES = {  # fixed and moving header
    "plain": (header((20, 22, 18), (1, 1, 1)), header((24, 20, 22), (1, 1, 1))),
    "flipped": (header((20, 22, 18), (1, 1, 1), orientation="LPI"), header((24, 20, 22), (1, 1, 1), orientation="LAS")),
    "permuted": (
        header((20, 22, 18), (1, 1.2, 1), orientation="SPR"),
        header((24, 20, 22), (1, 1, 1), orientation="ASL"),
    ),
    "oblique": (header((20, 22, 18), (1, 1, 1), (30, 0, 10)), header((24, 20, 22), (1, 1, 1), (0, -30, 20))),
    "anisotropic": (header((40, 44, 8), (0.4, 0.4, 3)), header((30, 50, 10), (0.8, 0.5, 2.5))),
    "all at once": (
        header((40, 44, 8), (0.4, 0.5, 3), (30, -10, 5), "PIR", (12, -40, 99)),
        header((30, 50, 10), (0.8, 0.5, 2.5), (-20, 15, 30), "LSP", (-300, 80, 7)),
    ),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_simpleitk_applies_our_displacement_file_and_gets_our_warped_image(name, tmp_path, rng):
    (fixed_shape, fixed_affine), (moving_shape, moving_affine) = GEOMETRIES[name]
    moving = smooth_volume(rng, moving_shape)
    fixed_grid_shape, moving_grid_shape = (10, 12, 11), (12, 12, 13)
    ddf = ndimage.gaussian_filter(rng.normal(0, 12, (*fixed_grid_shape, 3)), (2, 2, 2, 0)).astype(np.float32)
    assert np.abs(ddf).max() > 1
    displacement = utils.displacement_on(
        fixed_shape,
        fixed_affine,
        ddf,
        helpers.network_grid(fixed_affine, fixed_shape, fixed_grid_shape, 2.0),
        helpers.network_grid(moving_affine, moving_shape, moving_grid_shape, 2.0),
        moving_offset(moving_grid_shape, fixed_grid_shape),
    )
    warped = utils.warp_to_fixed(moving, moving_affine, displacement, fixed_affine)
    files.write_nifti(tmp_path / "moving.nii.gz", moving, moving_affine)
    files.write_nifti(tmp_path / "warped.nii.gz", warped, fixed_affine)
    files.write_displacement(tmp_path / "displacement.nii.gz", displacement, fixed_affine)

    field = sitk.ReadImage(str(tmp_path / "displacement.nii.gz"), sitk.sitkVectorFloat64)
    assert field.GetNumberOfComponentsPerPixel() == 3 and field.GetDimension() == 3
    ours = sitk.ReadImage(str(tmp_path / "warped.nii.gz"))
    theirs = sitk.Resample(
        sitk.ReadImage(str(tmp_path / "moving.nii.gz")),
        ours,
        sitk.DisplacementFieldTransform(field),
        sitk.sitkLinear,
        0.0,
    )
    difference = np.abs(sitk.GetArrayFromImage(ours) - sitk.GetArrayFromImage(theirs))
    assert (warped > 0).mean() > 0.2
    # At the outermost half voxel the two programs may disagree on what is still inside: not more than a few voxels.
    assert np.mean(difference > 1e-3 * np.ptp(moving)) < 1e-3

    back, affine = files.read_displacement(tmp_path / "displacement.nii.gz")
    np.testing.assert_allclose(back, displacement, atol=1e-4)
    np.testing.assert_allclose(affine, fixed_affine, atol=1e-4)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_with_headers_as_the_start_a_zero_field_moves_nothing(name, rng, capsys):
    (fixed_shape, fixed_affine), (moving_shape, moving_affine) = GEOMETRIES[name]
    fixed = helpers.Volume(smooth_volume(rng, fixed_shape), fixed_affine)
    moving = helpers.Volume(smooth_volume(rng, moving_shape), moving_affine, "mr")
    shapes = (15, 12, 16), (10, 11, 12)
    moving_net, fixed_net = helpers.pair_to_network(moving, fixed, "header", *shapes, 2.0)
    zero, offset = np.zeros((*shapes[1], 3)), moving_offset(*shapes)
    displacement = utils.displacement_on(fixed_shape, fixed_affine, zero, fixed_net.affine, moving_net.affine, offset)
    np.testing.assert_allclose(displacement, 0, atol=1e-3)
    if name == "all at once":  # whose volumes lie far apart
        assert "warning: mr: covers 0 % of the network grid" in capsys.readouterr().out


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_field_is_interpolated_as_scipy_does(name, rng):
    shape, affine = GEOMETRIES[name][0]
    other = GEOMETRIES["oblique" if name == "plain" else name][0][1]  # "plain" takes the way for oblique grids
    field = rng.random((6, 7, 8, 2)).astype(np.float32)
    to_field = np.linalg.inv(helpers.network_grid(other, shape, (6, 7, 8), 3.0)) @ affine
    theirs = [
        ndimage.affine_transform(field[..., k], to_field, output_shape=shape, order=1, mode="nearest") for k in (0, 1)
    ]
    np.testing.assert_allclose(utils.interpolate(field, to_field, shape), np.stack(theirs, -1), atol=1e-4)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_zero_field_puts_the_centres_together_in_mm(name):
    shapes = (10, 11, 12), (15, 12, 16)
    grids = [helpers.network_grid(a, s, n, 2.0) for (s, a), n in zip(GEOMETRIES[name], shapes, strict=True)]
    centre = [a[:3, :3] @ ((np.array(s) - 1) / 2) + a[:3, 3] for s, a in GEOMETRIES[name]]
    one_voxel = np.eye(4)
    one_voxel[:3, 3] = centre[0]
    zero, offset = np.zeros((*shapes[0], 3)), moving_offset(shapes[1], shapes[0])
    displacement = utils.displacement_on((1, 1, 1), one_voxel, zero, *grids, offset)
    np.testing.assert_allclose(centre[0] + displacement[0, 0, 0], centre[1], atol=1e-3)


def test_the_written_warp_is_the_warp_of_the_training_step(rng):
    """Where both volumes lie on the network grid, inference must give what the loss saw."""
    fixed_shape, moving_shape = (12, 14, 10), (17, 16, 15)
    fixed_affine, moving_affine = (
        header(fixed_shape, (3, 3, 3))[1],
        header(moving_shape, (3, 3, 3), origin=(9, 8, 7))[1],
    )
    moving = smooth_volume(rng, moving_shape)
    ddf = ndimage.gaussian_filter(rng.normal(0, 8, (*fixed_shape, 3)), (2, 2, 2, 0)).astype(np.float32)
    offset = moving_offset(moving_shape, fixed_shape)
    points = (reference_grid(fixed_shape) + offset + ddf).numpy()
    seen = resample(moving[None, ..., None], points[None])[0, ..., 0].numpy()
    grids = (
        helpers.network_grid(fixed_affine, fixed_shape, fixed_shape, 3.0),
        helpers.network_grid(moving_affine, moving_shape, moving_shape, 3.0),
    )
    displacement = utils.displacement_on(fixed_shape, fixed_affine, ddf, *grids, offset)
    written = utils.warp_to_fixed(moving, moving_affine, displacement, fixed_affine)
    inside = ((points >= 0) & (points <= np.array(moving_shape) - 1)).all(axis=-1)  # they fade out differently
    assert np.abs(ddf).max() > 0.5 and inside.mean() > 0.9
    np.testing.assert_allclose(written[inside], seen[inside], atol=1e-3 * np.ptp(moving))


def test_network_grid_does_not_depend_on_the_stored_orientation(rng):
    image = nib.Nifti1Image(smooth_volume(rng, (20, 24, 16)), header((20, 24, 16), (1, 0.8, 1.5), (20, 5, -10))[1])
    results = []
    for orientation in ("RAS", "LPS", "SAR", "PIL"):
        change = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(orientation)
        )
        stored = image.as_reoriented(change)
        volume = helpers.Volume(stored.get_fdata(dtype=np.float32), stored.affine)
        grid = helpers.network_grid(volume.affine, volume.image.shape, (10, 9, 8), 2.0)
        results.append(helpers.to_network(volume, grid, (10, 9, 8)))
        np.testing.assert_allclose(results[-1].image, results[0].image, atol=1e-4)
        np.testing.assert_allclose(results[-1].affine, results[0].affine, atol=1e-4)


def test_resampling_to_the_network_grid_agrees_with_simpleitk(rng):
    shape, affine = header((20, 24, 16), (1.5, 1.6, 2.2), (10, 5, -10), "LPS", (5, 6, 7))
    volume = smooth_volume(rng, shape)
    grid = helpers.network_grid(affine, shape, (14, 15, 16), 1.5)  # finer, so no filter comes first
    result = helpers.resample_to_grid(volume, affine, grid, (14, 15, 16))

    def to_sitk(data, affine):
        image = sitk.GetImageFromArray(data.T)
        lps = np.diag([-1, -1, 1]) @ affine[:3]
        spacing = np.linalg.norm(lps[:, :3], axis=0)
        image.SetSpacing(spacing)
        image.SetDirection((lps[:, :3] / spacing).ravel())
        image.SetOrigin(lps[:, 3])
        return image

    theirs = sitk.Resample(
        to_sitk(volume, affine), to_sitk(np.zeros((14, 15, 16), np.float32), grid), sitk.Transform(), sitk.sitkLinear
    )
    inside = (slice(1, -1),) * 3
    np.testing.assert_allclose(result[inside], sitk.GetArrayFromImage(theirs).T[inside], atol=1e-3 * np.ptp(volume))


def test_a_volume_that_lies_on_the_network_grid_passes_untouched(rng):
    shape, affine = header((10, 12, 14), (3, 3, 3), origin=(4, 5, 6))
    volume = rng.random(shape).astype(np.float32)
    assert helpers.resample_to_grid(volume, affine, helpers.network_grid(affine, shape, shape, 3.0), shape) is volume


def ultrasound(rng, background=0):
    """A smooth image of whole numbers from 5 to 205, and around it, in a quarter of the volume, one value."""
    image = smooth_volume(rng, (24, 24, 24))
    image = np.round(5 + 200 * (image - image.min()) / np.ptp(image))
    image[:6] = background
    return helpers.Volume(image.astype(np.float32), np.diag([2.0, 2, 2, 1]), "us.nii.gz")


def on_grid(volume, shape=(16, 16, 16)):
    grid = helpers.network_grid(volume.affine, volume.image.shape, shape, 3.0)
    return helpers.to_network(volume, grid, shape).image


@pytest.mark.parametrize("padding", [-1000, -32768, 5000, 32767])
def test_padding_does_not_count_and_is_named(padding, capsys):
    plain = on_grid(ultrasound(np.random.default_rng(0)))
    assert not capsys.readouterr().out  # the black background of every ultrasound gets no warning
    padded = on_grid(ultrasound(np.random.default_rng(0), padding))
    assert capsys.readouterr().out == f"warning: us.nii.gz: 25 % of its voxels are {padding}, taken as padding\n"
    inside = slice(6, None)  # beyond the border, where it is interpolated
    np.testing.assert_allclose(padded[inside], plain[inside], atol=1e-6)
    np.testing.assert_allclose(padded[:3], 0 if padding < 0 else 1, atol=1e-3)
    assert 0.9 < np.ptp(padded[inside]) <= 1


def test_padding_beyond_a_background_does_not_count_either(capsys):
    plain = on_grid(ultrasound(np.random.default_rng(0)))
    both = ultrasound(np.random.default_rng(0))
    both.image[:3] = -1024
    np.testing.assert_allclose(on_grid(both), plain, atol=1e-6)
    assert "12 % of its voxels are -1024" in capsys.readouterr().out


def test_what_the_network_grid_does_not_see_does_not_count(rng, capsys):
    """A border of any width and value around what the grid covers changes nothing."""
    volume = ultrasound(rng)
    plain = on_grid(volume)
    for width, value in ((4, 0), (30, 0), (30, 900)):
        wide = helpers.Volume(np.pad(volume.image, width, constant_values=value), volume.affine, "us.nii.gz")
        inside = (slice(1, -1),) * 3  # beyond it, the border of the image is interpolated
        np.testing.assert_allclose(on_grid(wide)[inside], plain[inside], atol=1e-3)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("levels", [2, 3, 8])
def test_an_image_of_few_values_keeps_them(levels, rng):
    image = rng.integers(0, levels, (16, 16, 16)).astype(np.float32)
    unit = helpers.to_unit_range(helpers.Volume(image, np.eye(4)), np.ones(image.shape, bool))
    assert unit.min() == 0 and unit.max() == 1 and np.isfinite(unit).all()


def test_coarser_grids_keep_the_mass_of_a_small_label():
    shape, affine = header((60, 60, 60), (0.5, 0.5, 0.5))
    for start in range(24, 30):
        label = np.zeros(shape, np.float32)
        label[start : start + 6, start : start + 6, start : start + 6] = 1  # 27 mm^3, the size of one coarse voxel
        grid = helpers.network_grid(affine, shape, (10, 10, 10), 3.0)
        coarse = helpers.resample_to_grid(label, affine, grid, (10, 10, 10))
        assert coarse.sum() * 27 == pytest.approx(27, rel=0.15)


# -- Data sets -----------------------------------------------------------------------------------------------------


def test_pairs_are_found_by_name_and_folds_part_patients(example, tmp_path):
    pairs = helpers.find_pairs(example / "train")
    assert [pair.case for pair in pairs] == ["train00", "train01", "train02"]
    assert all(pair.true_displacement.exists() for pair in pairs)
    many = [helpers.Pair(f"case{n}", f"patient{n % 7}", "", "") for n in range(30)]
    held_out = []
    for fold in range(3):
        rest, test = split_fold(many, 3, fold)
        assert not {p.patient for p in rest} & {p.patient for p in test} and len(rest) + len(test) == 30
        held_out += test
    assert sorted(p.case for p in held_out) == sorted(p.case for p in many)
    with pytest.raises(InputError, match="7 patients"):
        split_fold(many, 8, 0)


def test_a_name_that_no_table_could_hold_is_refused():
    assert helpers.case_name("Müller #1 $us.nii.gz") == "Müller #1 $us"
    with pytest.raises(InputError, match="expected one in UTF-8"):
        helpers.case_name("M\udcfcller.nii.gz")  # as Python has a file name that is not UTF-8


def test_patients_csv_is_read(tmp_path):
    (tmp_path / "patients.csv").write_text("case,patient\na,p1\nb, p1\nb,p1\n")  # a space makes no other patient
    assert helpers.read_patients(tmp_path / "patients.csv") == {"a": "p1", "b": "p1"}
    for folder in helpers.FOLDERS:
        (tmp_path / folder).mkdir()
        for case in ("a", "b"):
            (tmp_path / folder / f"{case}.nii.gz").touch()
    assert {pair.patient for pair in helpers.find_pairs(tmp_path)} == {"p1"}
    (tmp_path / "patients.csv").write_text("case,patient\na,p1\nc,p1\n")
    with pytest.raises(InputError, match="no patient for case b"):
        helpers.find_pairs(tmp_path)
    (tmp_path / "patients.csv").write_text("case,patient\na,p1\nb,p1\nb,p2\n")
    with pytest.raises(InputError, match="a case of two patients"):
        helpers.find_pairs(tmp_path)


@pytest.fixture(scope="module")
def prepared(example):
    return helpers.PreparedPairs(helpers.find_pairs(example / "train"), "centre", (36, 36, 32), (24, 32, 22), 3.0)


def sample_batch(prepared, numbers, step, seed, **settings):
    rng = np.random.default_rng([seed, step])
    return helpers.read_batch(prepared, helpers.draw_pairs(rng, prepared, numbers, **settings))


def test_batches_repeat_themselves_and_hold_what_they_should(prepared):
    arguments = {"batch_size": 3, "labels_per_pair": 0, "inter_subject_fraction": 0, "seed": 1}
    batch, again = (sample_batch(prepared, range(3), 7, **arguments) for _ in range(2))
    other = sample_batch(prepared, range(3), 8, **arguments)
    for name, array in batch.items():
        np.testing.assert_array_equal(array, again[name])
    assert any((batch[name] != other[name]).any() for name in batch)
    most = max(prepared.label_counts)
    assert batch["moving_image"].shape == (3, 36, 36, 32, 1) and batch["fixed_labels"].shape == (3, 24, 32, 22, most)
    assert batch["fixed_image"].min() >= 0 and batch["fixed_image"].max() <= 1
    present = batch["fixed_labels"].max(axis=(1, 2, 3)) > 0
    np.testing.assert_array_equal(batch["mask"], present)


def test_one_label_per_pair_and_pairs_across_patients(prepared):
    one = sample_batch(prepared, range(3), 0, 0, batch_size=4, labels_per_pair=1, inter_subject_fraction=0)
    assert one["mask"].sum(axis=1).tolist() == [1] * 4 and one["mask"].any(axis=0).sum() > 1
    crossed = sample_batch(prepared, range(3), 0, 0, batch_size=8, labels_per_pair=0, inter_subject_fraction=1)
    np.testing.assert_array_equal(crossed["mask"], np.eye(1, crossed["mask"].shape[1]).repeat(8, axis=0))
    for moving, fixed in zip(crossed["moving_image"], crossed["fixed_image"], strict=True):
        owners = [k for k in range(3) if np.array_equal(moving, prepared[k]["moving_image"])]
        assert len(owners) == 1 and not np.array_equal(fixed, prepared[owners[0]]["fixed_image"])


def test_a_3d_file_is_one_label_and_a_label_off_the_grid_is_named(tmp_path, rng, capsys):
    affine = np.diag([2.0, 2, 2, 1])
    label = np.zeros((30, 30, 30), np.float64)
    label[1:3, 1:3, 1:3] = 1  # in a corner, which a grid of 8 voxels of 3 mm does not reach
    paths = {}
    for side in ("moving", "fixed"):
        paths[f"{side}_image"], paths[f"{side}_labels"] = (tmp_path / f"{side}_{n}.nii.gz" for n in ("image", "labels"))
        files.write_nifti(paths[f"{side}_image"], smooth_volume(rng, (30, 30, 30)), affine)
        files.write_nifti(paths[f"{side}_labels"], label, affine)
    pair = helpers.Pair("a", "a", **paths)
    moving, _ = helpers.read_pair(pair)
    assert moving.labels.shape == (30, 30, 30, 1)
    small = helpers.PreparedPairs([pair], "centre", (8, 8, 8), (8, 8, 8), 3.0)
    assert f"labels of {paths['moving_image']}: label 0 lies outside" in capsys.readouterr().out
    assert helpers.whole_pair(small, 0)["mask"].tolist() == [[0]]


def test_a_map_of_integers_is_one_label_for_each(tmp_path):
    affine, stored = np.diag([2.0, 2, 2, 1]), np.zeros((6, 6, 6), np.int16)
    stored[1:3, 1:3, 1:3], stored[3:5, 3:5, 3:5] = 1, 2
    image = helpers.Volume(stored.astype(np.float32), affine)
    path = tmp_path / "labels.nii.gz"
    files.write_nifti(path, stored, affine)
    for volumes in (stored, stored[..., None]):  # a fourth dimension of one is as good as none
        files.write_nifti(path, volumes, affine)
        labels, is_map = helpers.read_labels(path, image)
        assert is_map and labels.shape == (6, 6, 6, 2)
        for k in (0, 1):
            np.testing.assert_array_equal(labels[..., k], stored == k + 1)
    for kind in (np.uint8, np.int16):  # as nibabel stores floating point in these, with a scale factor
        image_like = nib.Nifti1Image(stored.astype(float), affine)
        image_like.set_data_dtype(kind)
        nib.save(image_like, path)
        assert not np.isin(files.read_nifti(path)[0], (0, 1, 2)).all()
        np.testing.assert_array_equal(helpers.read_labels(path, image)[0], labels)
    seven = np.arange(6**3).reshape(6, 6, 6) % 8  # in eight bits a 1 of these is 0.988
    image_like = nib.Nifti1Image(seven.astype(float), affine)
    image_like.set_data_dtype(np.uint8)
    nib.save(image_like, path)
    np.testing.assert_array_equal(helpers.read_labels(path, image)[0] @ np.arange(1, 8), seven)
    for wrong in (stored * 2, stored * 0.75, stored - 1):  # 2 and 4, of which 1 and 3 are missing; fractions; below 0
        files.write_nifti(path, wrong.astype(np.float32), affine)
        with pytest.raises(
            InputError, match="expected 0 to 1, or a map of the integers" if wrong.max() > 1 else "expected 0 to 1"
        ):
            helpers.read_labels(path, image)


def test_soft_labels_may_be_rounded_beyond_0_and_1_but_not_more(tmp_path, rng):
    affine, soft = np.diag([2.0, 2, 2, 1]), rng.random((6, 6, 6), np.float32)
    soft[0, 0, :2] = -0.003, 1.003
    image, path = helpers.Volume(soft, affine), tmp_path / "labels.nii.gz"
    for data in (soft, np.stack([soft, soft], axis=-1)):
        files.write_nifti(path, data, affine)
        labels, is_map = helpers.read_labels(path, image)
        assert not is_map
        np.testing.assert_array_equal(labels[..., 0], soft.clip(0, 1))
        for wrong in (data - 0.02, data + 0.02):
            files.write_nifti(path, wrong, affine)
            with pytest.raises(InputError, match="expected 0 to 1"):
                helpers.read_labels(path, image)


def test_a_header_that_itk_reads_otherwise_is_named(tmp_path, capsys):
    """SimpleITK agrees with nibabel about where the image lies unless there is a warning."""
    sform, qform = np.diag([2.0, 2, 2, 1]), np.diag([2.0, 2, 2, 1])
    qform[:3, 3] = [5, -4, 3]
    for codes, warning in {(1, 1): "two frames", (0, 1): "", (1, 0): "", (0, 0): "no frame"}.items():
        image = nib.Nifti1Image(np.ones((4, 5, 6), np.float32), None)
        image.set_sform(sform, codes[0])
        image.set_qform(qform, codes[1])
        path = tmp_path / "{}{}.nii".format(*codes)
        nib.save(image, path)
        files.warn_of_frame(path)
        out = capsys.readouterr().out
        assert out.startswith(f"warning: {path}: found {warning}") if warning else not out
        origin = np.array(sitk.ReadImage(str(path)).GetOrigin()) * [-1, -1, 1]
        assert warning or np.allclose(origin, files.read_nifti(path)[1][:3, 3])
    for angle, warning in {1e-4: "", 1e-3: "a sheared frame"}.items():
        sheared = sform + np.array([[0, 2 * angle, 0, 0], *[[0] * 4] * 3])
        image = nib.Nifti1Image(np.ones((4, 5, 6), np.float32), None)
        image.set_sform(sheared, 1)
        nib.save(image, path)
        files.warn_of_frame(path)
        out = capsys.readouterr().out
        assert f"found {warning}" in out if warning else not out
        with pytest.raises(RuntimeError) if warning else contextlib.nullcontext():
            sitk.ReadImage(str(path))
    image.set_sform(sform, 1)
    image.header.set_qform(sform, 1)
    image.header["quatern_b"] = image.header["quatern_c"] = 0.70711  # rounded: a little more than 1 together
    nib.save(image, path)
    files.warn.cache_clear()
    files.warn_of_frame(path)
    assert "two frames" in capsys.readouterr().out
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.01), -np.sin(0.01)], [np.sin(0.01), np.cos(0.01)]]
    image = nib.Nifti1Image(np.ones((400, 2, 2), np.uint8), None)
    image.set_sform(np.diag([0.4, 0.4, 0.4, 1]), 1)
    image.set_qform(turn @ np.diag([0.4, 0.4, 0.4, 1]), 1)  # 1.6 mm apart at the far end
    nib.save(image, path)
    files.warn.cache_clear()
    files.warn_of_frame(path)
    assert "two frames" in capsys.readouterr().out


def test_labels_must_lie_on_the_grid_of_their_image(tmp_path):
    """Also where two axes of one size are exchanged, which the corners 0 and (n, n, n) do not tell."""
    affine, label = np.diag([2.0, 2, 2, 1]), np.zeros((6, 6, 4))
    label[1:3, 3:5, 1:3] = 1
    volume = helpers.Volume(label.astype(np.float32), affine)
    path = tmp_path / "labels.nii.gz"
    files.write_nifti(path, label, affine)
    assert helpers.read_labels(path, volume)[0].sum() == 8
    shifted = affine.copy()
    shifted[1, 3] = 1
    for other in (affine[:, [1, 0, 2, 3]], shifted):
        files.write_nifti(path, label, other)
        with pytest.raises(InputError, match="expected the same grid"):
            helpers.read_labels(path, volume)


def test_an_image_that_hardly_covers_the_network_grid_is_named(rng, capsys):
    affine = np.diag([2.0, 2, 2, 1])
    whole, slab = (helpers.Volume(smooth_volume(rng, (30, 30, n)), affine) for n in (30, 6))
    slab.path, grid = "us", ("centre", (20, 20, 20), (20, 20, 20), 2.0)
    helpers.pair_to_network(whole, whole, *grid)
    assert not capsys.readouterr().out
    helpers.pair_to_network(whole, slab, *grid)
    assert capsys.readouterr().out.startswith("warning: us: covers 30 % of the network grid")


def test_nothing_half_written_replaces_a_file(tmp_path):
    path = tmp_path / "result.txt"
    path.write_text("whole")
    with pytest.raises(RuntimeError), files.atomic_write(path) as temporary:
        temporary.write_text("ha")
        raise RuntimeError
    assert path.read_text() == "whole" and [p.name for p in tmp_path.iterdir()] == ["result.txt"]
