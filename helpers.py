"""Files <-> arrays: find pairs, read and check, resample to the network grid, write volumes.

Shapes: B batch; X, Y, Z fixed grid; MX, MY, MZ moving grid; L labels. World coordinates are NIfTI's: RAS, mm.
"""

import contextlib
import csv
import io
import json
import logging
import os
import shutil
import signal
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from tqdm import tqdm

from config import InputError

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # bad headers are named by the checks below
SUFFIXES = (".nii", ".nii.gz")
VOLUMES = (*SUFFIXES, ".nrrd", ".nhdr", ".mha", ".mhd", ".img", ".mgz", ".dcm")  # of which only SUFFIXES are read
FOLDERS = ("moving_images", "fixed_images", "moving_labels", "fixed_labels")

# -- Find ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    case: str
    patient: str
    moving_image: Path
    fixed_image: Path
    moving_labels: Path | None = None
    fixed_labels: Path | None = None
    true_displacement: Path | None = None  # example data only


def case_name(path):
    name = Path(path).name.removesuffix(".gz").removesuffix(".nii")
    if not name.isprintable():
        raise InputError(f"{path}: found a name that cannot be printed, expected one in UTF-8; rename the file")
    return name


def find_pairs(folder, labels="required"):
    """The pairs of a data set: one NIfTI file per case in each of its four folders, under the same name.

    labels="optional" takes a data set without its two label folders too. Without patients.csv each case is its own
    patient.
    """
    folder = Path(folder)
    names = FOLDERS
    if labels == "optional" and not any((folder / name).exists() for name in FOLDERS[2:]):
        names = FOLDERS[:2]
    files = {}
    for name in names:
        if not (folder / name).is_dir():
            raise InputError(f"{folder / name}: no such folder; expected {', '.join(names)} in {folder}")
        paths = sorted(p for p in (folder / name).iterdir() if p.name[0] != "." and p.name.lower().endswith(VOLUMES))
        for path in paths:
            if not path.name.endswith(SUFFIXES):
                raise InputError(f"{path}: found a volume of this kind, expected .nii or .nii.gz; convert or rename it")
        files[name] = {case_name(p): p for p in paths}
        if len(files[name]) < len(paths):
            raise InputError(f"{folder / name}: a case is there both as .nii and as .nii.gz; expected one of them")
    cases = sorted(set().union(*files.values()))
    if not cases:
        raise InputError(f"{folder}: found no .nii or .nii.gz file; expected one per case in {', '.join(names)}")
    missing = [f"{folder / n / c}.nii.gz" for c in cases for n in names if c not in files[n]]
    if missing:
        raise InputError("\n".join(f"{path}: missing; expected in all of {', '.join(names)}" for path in missing))
    table = folder / "patients.csv"
    patients = read_patients(table) if table.exists() else {case: case for case in cases}
    unknown = [case for case in cases if not patients.get(case)]
    if unknown:
        raise InputError(f"{table}: found no patient for case {unknown[0]}; expected a line for every case")
    truth = {case_name(p): p for p in folder.glob("true_displacement/*.nii.gz")}
    paths = {c: {name.replace("images", "image"): files[name][c] for name in names} for c in cases}
    return [Pair(c, patients[c], **paths[c], true_displacement=truth.get(c)) for c in cases]


def read_patients(path):
    """{case: patient}, from the columns case and patient."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = {tuple((row[name] or "").strip() for name in ("case", "patient")) for row in csv.DictReader(file)}
        if len(dict(lines)) < len(lines):
            raise ValueError("a case of two patients")
        return dict(lines)
    except (OSError, KeyError, csv.Error, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error!r}); expected a CSV file with columns case,patient") from None


def find_test_pairs(folds, fold, train_dir, test_dir):
    """The pairs to register: those of test_dir or, without one, those of the fold that training held out."""
    if test_dir:
        return find_pairs(test_dir, labels="optional")
    if folds:
        return split_fold(find_pairs(train_dir), folds, fold)[1]
    raise InputError("--test_dir: found none; expected a folder of pairs, or --moving FILE --fixed FILE")


def split_fold(pairs, folds, fold):
    """Deal the patients into `folds` groups; return (pairs of the others, pairs of group `fold`)."""
    patients = sorted({pair.patient for pair in pairs})
    if len(patients) < folds:
        raise InputError(f"--folds: found {len(patients)} patients, expected at least {folds}")
    order = np.random.default_rng(0).permutation(len(patients))
    held_out = {patients[index] for index in order[fold::folds]}
    return [p for p in pairs if p.patient not in held_out], [p for p in pairs if p.patient in held_out]


def check_patients(path, trained=None, held_out=()):
    """The training that wrote `path` must have been of just the pairs `trained`, and of no patient of `held_out`.

    Neither holds any more where cases came or went, for then the patients are dealt into other folds.
    """
    known = read_patients(path)
    if trained is not None and (other := known.items() ^ {pair.case: pair.patient for pair in trained}.items()):
        case, patient = min(other)
        raise InputError(f"{path}: case {case} of patient {patient} came or went since; expected the same data set")
    for pair in held_out:
        if pair.patient in known.values():
            raise InputError(f"{path}: found patient {pair.patient}, expected none held out; has the data set changed?")


# -- Read and check ------------------------------------------------------------------------------------------------


def read_nifti(path):
    """Voxels (float32; one volume is 3D) and the voxel-to-world matrix (4, 4) of a NIfTI file, checked."""
    try:
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Pair):
            raise InputError(f"{path}: found {type(image).__name__}, expected NIfTI")
        if image.header["xyzt_units"] % 8 in (1, 3):
            raise InputError(f"{path}: found sizes in metres or micrometres, expected mm")
        if image.get_data_dtype().kind not in "buif":
            raise InputError(f"{path}: found voxels of type {image.get_data_dtype()}, expected plain numbers")
        stored = Path(image.file_map["image"].filename)
        packing = {".nii": 1, ".gz": 1032}.get(stored.suffix, np.inf)  # deflate packs 1032 bytes into one at most
        found, expected = stored.stat().st_size, np.prod(image.shape, dtype=float) * image.get_data_dtype().itemsize
        if not 0 < expected <= found * packing:
            raise InputError(f"{path}: found {found} bytes, expected {expected:.0f} of voxels as its header says")
        data = np.asarray(image.dataobj, np.float32)
    except InputError:
        raise
    except Exception as error:  # nibabel and zlib have many of their own
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); expected a NIfTI file") from None
    affine = np.array(image.affine, float)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and ((spacing > 1e-3) & (spacing < 1e3)).all()):
        raise InputError(f"{path}: found a header matrix {affine[:3].tolist()}, expected voxels of 0.001 to 1000 mm")
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise InputError(f"{path}: found a singular header matrix {affine[:3].tolist()}, expected three directions")
    if not np.isfinite(data).all():
        raise InputError(f"{path}: found {np.sum(~np.isfinite(data))} NaN or infinite voxels, expected none")
    return data[..., 0] if data.shape[3:] == (1,) else data, affine


def same_place(one, other, shape):
    """Whether two voxel-to-world matrices agree to 0.1 mm on where a grid's first voxel and its axes' ends lie."""
    ends = np.c_[np.vstack([np.zeros(3), np.diag(shape[:3])]), np.ones(4)]
    return np.allclose((one - other)[:3] @ ends.T, 0, atol=0.1)


def warn_of_frame(path):
    """Programs differ over where an image lies whose header does not say it, says it in two ways, or shears it."""
    header = nib.load(path).header
    try:
        qform = header.get_qform(coded=True)
    except ValueError:  # its quaternion is none
        qform = np.full((4, 4), np.nan), 1
    forms = [form for form, code in (header.get_sform(coded=True), qform) if code]
    if not forms:
        found = "no frame"
    elif not same_place(forms[0], forms[-1], header.get_data_shape()):
        found = "two frames that differ"
    else:
        axes = forms[0][:3, :3] / np.linalg.norm(forms[0][:3, :3], axis=0)
        found = "a sheared frame" if np.abs(axes.T @ axes - np.eye(3)).max() > 2e-4 else ""
    if found:
        tqdm.write(f"warning: {path}: found {found} in its header (sform, qform), expected one; ITK may read another")


def read_image(path):
    """A 3D image: voxels (any shape) and voxel-to-world matrix."""
    data, affine = read_nifti(path)
    if data.ndim != 3 or min(data.shape) < 2:
        raise InputError(f"{path}: found shape {data.shape}, expected 3 dimensions of 2 voxels and more")
    if data.min() == data.max():
        raise InputError(f"{path}: found the value {data.min():g} in every voxel, expected an image")
    return data, affine


def read_labels(path, image_path, volume):
    """Labels (image's shape, L) in [0, 1] that lie on the grid of their image, in `volume`; and if they were a map.

    A 4D file has one label in each volume; a 3D file is one label or, as segmentation tools write it, a map of
    integers where 1 is label 0, 2 is label 1 and so on.
    """
    data, affine = read_nifti(path)
    if data.ndim not in (3, 4):
        raise InputError(f"{path}: found shape {data.shape}, expected 3 dimensions, or 4 with one label in each volume")
    if data.shape[:3] != volume.image.shape:
        raise InputError(f"{path}: found shape {data.shape[:3]}, expected {volume.image.shape} as in {image_path}")
    if not same_place(affine, volume.affine, data.shape):
        raise InputError(f"{path}: header matrix differs from that of {image_path}, expected the same grid")
    is_map = data.ndim == 3 and data.max() > 1.01
    if is_map:
        whole = np.rint(data)  # with a scale factor in the header 1 may be stored as 0.988
        data = whole if np.abs(data - whole).max() < 0.1 else data
        values = np.unique(data)
        if values.size > 256 or not np.isin(values, range(values.size)).all():
            found = f"{values.size} values, {values[0]:g} to {values[-1]:g}"
            raise InputError(
                f"{path}: found {found}, expected 0 to 1, or a map of the integers 0, 1, 2, ..., all there"
            )
        data = (data[..., None] == values[values > 0]).astype(np.float32)
    data = data[..., None] if data.ndim == 3 else data
    if data.min() < -0.01 or data.max() > 1.01:
        raise InputError(f"{path}: found values {data.min():g} to {data.max():g}, expected 0 to 1")
    data = np.clip(data, 0, 1)  # filters and scale factors leave 1.0001
    empty = np.flatnonzero(data.max(axis=(0, 1, 2)) < 0.5)
    if empty.size:
        raise InputError(f"{path}: label {empty[0]} is empty, expected at least one voxel of 0.5 or more")
    full = np.flatnonzero(data.min(axis=(0, 1, 2)) >= 0.5)
    if full.size:
        raise InputError(f"{path}: label {full[0]} fills the image, expected at least one voxel below 0.5")
    return data, is_map


@dataclass
class Volume:
    """One side of a pair: image (any shape), voxel-to-world matrix (4, 4), labels (image's shape, L) or None."""

    image: np.ndarray
    affine: np.ndarray
    labels: np.ndarray | None = None
    is_map: bool = False  # the labels were stored as one volume of integers


def read_pair(pair):
    """Read and check every file of a pair: moving Volume, fixed Volume, as stored."""
    moving, fixed = Volume(*read_image(pair.moving_image)), Volume(*read_image(pair.fixed_image))
    if pair.moving_labels:
        moving.labels, moving.is_map = read_labels(pair.moving_labels, pair.moving_image, moving)
        fixed.labels, fixed.is_map = read_labels(pair.fixed_labels, pair.fixed_image, fixed)
        found, expected = moving.labels.shape[-1], fixed.labels.shape[-1]
        if found != expected:
            message = f"{pair.moving_labels}: found {found} labels, expected {expected} as in {pair.fixed_labels}"
            raise InputError(message)
    return moving, fixed


def check_pairs(pairs):
    """Read every file of the pairs; all that cannot be used is named together."""
    problems = []
    for pair in tqdm(pairs, "checking", unit="pair", disable=None):
        try:
            read_pair(pair)
            if pair.true_displacement:
                read_displacement(pair.true_displacement)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))


# -- Network grid --------------------------------------------------------------------------------------------------


def network_grid(affine, shape, grid_shape, voxel_size):
    """Voxel-to-world matrix (4, 4) of the network grid on a volume.

    The grid's axes are the volume's own, in the order and direction nearest to RAS+, its voxels are cubes of
    `voxel_size` mm, and its centre is the volume's.
    """
    direction = np.zeros((3, 3))
    for column, (axis, sign) in zip(affine[:3, :3].T, nib.io_orientation(affine), strict=True):
        direction[:, int(axis)] = sign * column / np.linalg.norm(column)
    u, _, vt = np.linalg.svd(direction)  # the nearest rotation, should the header be sheared
    centre = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    axes = u @ vt * voxel_size
    return nib.affines.from_matvec(axes, centre - axes @ ((np.array(grid_shape) - 1) / 2))


def resample_to_grid(data, affine, grid, grid_shape):
    """A volume (any shape) on the network grid, trilinear; 0 outside.

    Where the grid is coarser than the volume, a Gaussian filter comes first, so that nothing falls between two
    samples (width: Cardoso et al. 2015, doi 10.1007/978-3-319-24571-3_81, which matches the voxels' extents).
    """
    to_volume = np.linalg.inv(affine) @ grid
    if data.shape == tuple(grid_shape) and np.allclose(to_volume, np.eye(4), atol=1e-4):
        return data
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    ratio = np.linalg.norm(grid[:3, 0]) / spacing
    sigma = np.sqrt(np.maximum(ratio**2 - 1, 0)) / (2 * np.sqrt(2 * np.log(2)))
    smooth = ndimage.gaussian_filter(data, sigma, mode="nearest") if sigma.any() else data
    return ndimage.affine_transform(
        smooth, to_volume[:3, :3], to_volume[:3, 3], tuple(grid_shape), order=1, mode="grid-constant"
    )


def to_unit_range(image):
    """Intensities to 0..1 between the 0.5th and 99.5th percentile."""
    low, high = np.percentile(image, [0.5, 99.5]).astype(np.float32)
    if low == high:
        low, high = image.min(), image.max()
    return np.clip((image - low) / (high - low), 0, 1)


def to_network(volume, grid, grid_shape):
    """A Volume on a network grid: image (X, Y, Z, 1) in 0..1, the grid's matrix, labels (X, Y, Z, L) or None."""

    def resampled(data):
        return resample_to_grid(data, volume.affine, grid, grid_shape)

    labels = volume.labels
    if labels is not None:
        labels = np.stack([resampled(label) for label in np.moveaxis(labels, -1, 0)], axis=-1)
    return Volume(resampled(to_unit_range(volume.image))[..., None], grid, labels)


def pair_to_network(pair, moving, fixed, start, moving_shape, fixed_shape, voxel_size):
    """Both Volumes of a pair on the network's grids, which a DDF of zero lays over each other; see to_network.

    start: "centre" lays the moving grid about the moving image's own centre and axes, "header" about those of the
    fixed image, in the world frame that the two headers share. A warning names an image that covers less than half of
    its grid.
    """
    about = moving if start == "centre" else fixed
    moving_grid = network_grid(about.affine, about.image.shape, moving_shape, voxel_size)
    fixed_grid = network_grid(fixed.affine, fixed.image.shape, fixed_shape, voxel_size)
    for path, volume, grid, shape in (
        (pair.moving_image, moving, moving_grid, moving_shape),
        (pair.fixed_image, fixed, fixed_grid, fixed_shape),
    ):
        seen = in_view(voxel_to_world(shape, np.linalg.inv(volume.affine) @ grid), volume.image.shape).mean()
        if seen < 0.5:
            tqdm.write(f"warning: {path}: covers {100 * seen:.0f} % of the network grid, expected most; see its header")
    return to_network(moving, moving_grid, moving_shape), to_network(fixed, fixed_grid, fixed_shape)


def in_view(points, shape):
    """Which points (..., 3), in voxels, lie in a volume: up to half a voxel beyond its outer centres, as ITK has it."""
    return ((points >= -0.5) & (points <= np.array(shape) - 0.5)).all(axis=-1)


# -- Batches -------------------------------------------------------------------------------------------------------


class PreparedPairs:
    """Every pair of a data set, checked and resampled once, then kept as one small file each in a scratch folder.

    The operating system's file cache holds what fits in memory; the rest streams from disk. So a thousand pairs train
    in the memory of a few. The folder is made where TMPDIR says. Images are kept as float16, labels as uint8 (255 = 1).
    """

    def __init__(self, pairs, start, moving_shape, fixed_shape, voxel_size):
        self.pairs = pairs
        self.scratch = tempfile.TemporaryDirectory(prefix="prepared-pairs-")  # removed with this object
        self.label_counts, problems = [], []
        for number, pair in enumerate(tqdm(pairs, "reading", unit="pair", disable=None)):
            try:
                moving, fixed = read_pair(pair)
            except InputError as error:
                problems.append(str(error))
                continue
            moving, fixed = pair_to_network(pair, moving, fixed, start, moving_shape, fixed_shape, voxel_size)
            self.label_counts.append(fixed.labels.shape[-1])
            arrays = {
                "moving_image": moving.image.astype(np.float16),
                "fixed_image": fixed.image.astype(np.float16),
                "moving_labels": np.round(moving.labels * 255).astype(np.uint8),
                "fixed_labels": np.round(fixed.labels * 255).astype(np.uint8),
            }
            for side, path in (("moving", pair.moving_labels), ("fixed", pair.fixed_labels)):
                visible = arrays[f"{side}_visible"] = arrays[f"{side}_labels"].any(axis=(0, 1, 2))
                for k in np.flatnonzero(~visible):
                    tqdm.write(f"warning: {path}: label {k} lies outside the network grid and teaches nothing")
            packed = io.BytesIO()  # NumPy's own writing to a file does not say that a disk is full
            np.savez(packed, **arrays)
            with written_aside(self._file(number)) as aside:
                aside.write_bytes(packed.getbuffer())
        if problems:
            raise InputError("\n".join(problems))

    def _file(self, number):
        return os.path.join(self.scratch.name, f"{number}.npz")

    def __getitem__(self, number):
        path = self._file(number)
        try:
            with np.load(path) as arrays:
                return dict(arrays)
        except OSError as error:  # some systems tidy up where temporary files lie
            fix = "expected it to stay; name another folder in TMPDIR, then --resume"
            raise InputError(f"{path}: cannot be read ({error.strerror}); {fix}") from None


def draw_pairs(prepared, numbers, step, batch_size, labels_per_pair, cross_patient, seed):
    """What batch number `step` is made of: (moving number, fixed number, labels that count) of each of its pairs.

    A pure function of its arguments, so a run can be repeated and continued. Two-stage sampling (Hu et al. 2018):
    first the pairs, then labels of each. A share of the pairs takes its moving volume from another patient; those
    have only the gland, label 0, in common (after arXiv 2102.04938).
    """
    rng = np.random.default_rng([seed, step])
    drawn = []
    for number in rng.choice(numbers, size=batch_size):
        others = [k for k in numbers if prepared.pairs[k].patient != prepared.pairs[number].patient]
        chosen = np.arange(prepared.label_counts[number])
        if others and rng.random() < cross_patient:
            drawn.append((rng.choice(others), number, chosen[:1]))
        else:
            drawn.append((number, number, rng.permutation(chosen)[:labels_per_pair] if labels_per_pair else chosen))
    return drawn


def read_batch(prepared, drawn):
    """The arrays of what `draw_pairs` gave: images (B, ..., 1), labels (B, ..., L), mask (B, L) of those that count."""
    batch = []
    for moving, fixed, chosen in drawn:
        arrays = prepared[fixed]
        if moving != fixed:
            arrays |= {name: array for name, array in prepared[moving].items() if name.startswith("moving")}
        batch.append(choose_labels(arrays, chosen, max(prepared.label_counts)))
    return {name: np.stack([arrays[name] for arrays in batch]) for name in batch[0]}


def whole_pair(prepared, number):
    """One pair with all of its labels, as a batch of one."""
    return read_batch(prepared, [(number, number, np.arange(prepared.label_counts[number]))])


def choose_labels(arrays, chosen, size):
    """A pair's images and labels, filled up with empty labels to `size`; mask (size,) of those chosen and in view."""
    result = {name: arrays[name].astype(np.float32) for name in ("moving_image", "fixed_image")}
    mask = np.isin(np.arange(size), chosen)
    for side in ("moving", "fixed"):
        labels = arrays[f"{side}_labels"]
        count = labels.shape[-1]
        padded = result[f"{side}_labels"] = np.zeros((*labels.shape[:3], size), np.float32)
        np.multiply(labels, np.float32(1 / 255), out=padded[..., :count])
        mask[:count] &= arrays[f"{side}_visible"]
    return {**result, "mask": mask.astype(np.float32)}


# -- Full resolution -----------------------------------------------------------------------------------------------


def displacement_on(shape, affine, ddf, fixed_grid, moving_grid, offset):
    """The network's DDF as displacement y - x in mm (RAS) at every voxel of a grid.

    shape, affine: that grid, mostly the fixed image's own; ddf: (X, Y, Z, 3) voxels; fixed_grid, moving_grid: (4, 4)
    voxel to world; offset: (3,). A fixed point x lies at j = inv(fixed_grid) x and goes to
    y = moving_grid (j + offset + ddf(j)). Beyond the network grid the DDF keeps its border value.
    """
    to_grid = np.linalg.inv(fixed_grid) @ affine
    # At voxel i of the image, y - x = moving_grid (to_grid i + offset) - affine i, which is affine in i, + the DDF's.
    rest = moving_grid @ nib.affines.from_matvec(np.eye(3), offset) @ to_grid - affine
    result = interpolate(ddf @ moving_grid[:3, :3].T.astype(np.float32), to_grid, shape)
    result += voxel_to_world(shape, rest)
    return result


def interpolate(field, to_field, shape):
    """A field (X, Y, Z, C) at voxel to_field @ i for every voxel i of a grid: linear, its border value outside.

    As long as the two grids' axes are parallel, in whatever order, that is one small matrix product along each.
    """
    matrix, origin = to_field[:3, :3], to_field[:3, 3]
    along = np.argmax(np.abs(matrix), axis=1)  # the grid's axis that is each axis of the field
    oblique = matrix - np.eye(3)[along] * matrix
    if np.abs(oblique).max() * max(shape) > 1e-3 or len(set(along)) < 3:
        channels = np.moveaxis(field, -1, 0)
        values = [ndimage.affine_transform(c, matrix, origin, shape, order=1, mode="nearest") for c in channels]
        return np.stack(values, axis=-1)
    weights = []
    for axis, size in enumerate(field.shape[:3]):
        place = np.clip(matrix[axis, along[axis]] * np.arange(shape[along[axis]]) + origin[axis], 0, size - 1)
        weights.append(np.maximum(1 - np.abs(place[:, None] - np.arange(size)), 0).astype(np.float32))
    grid_axes = ["uvw"[axis] for axis in along]
    return np.einsum("xyzc,{}x,{}y,{}z->uvwc".format(*grid_axes), field, *weights, optimize=True)


def voxel_to_world(shape, affine):
    """Affine map of every voxel index of a grid: (X, Y, Z, 3) float32."""
    affine = np.asarray(affine, np.float32)
    index = np.ogrid[: shape[0], : shape[1], : shape[2]]
    return sum((index[k].astype(np.float32)[..., None] * affine[:3, k] for k in range(3)), affine[:3, 3])


def warp_to_fixed(data, affine, displacement, fixed_affine, order=1):
    """Resample a volume once, at x + displacement(x) for every voxel x of the fixed image.

    data: (any shape) or labels (any shape, L), on the grid of matrix `affine`; displacement: (X, Y, Z, 3) mm, RAS.
    order: 1 trilinear, 0 nearest voxel. 0 where it is not `in_view`. Returns (X, Y, Z) or (X, Y, Z, L).
    """
    inverse = np.linalg.inv(affine)
    start = voxel_to_world(displacement.shape[:3], inverse @ fixed_affine)  # where a displacement of zero leads to
    to_voxels = inverse[:3, :3].T.astype(np.float32)
    channels = np.moveaxis(data, -1, 0) if data.ndim == 4 else [data]

    def warp_plane(k):
        points = start[k] + displacement[k] @ to_voxels
        inside, points = in_view(points, data.shape[:3]), np.ascontiguousarray(np.moveaxis(points, -1, 0))
        return [np.where(inside, ndimage.map_coordinates(c, points, order=order, mode="nearest"), 0) for c in channels]

    with ThreadPoolExecutor() as threads:
        warped = np.array(list(threads.map(warp_plane, range(len(displacement)))))
    return np.moveaxis(warped, 1, -1) if data.ndim == 4 else warped[:, 0]


# -- Write ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_aside(path):
    """A temporary path beside `path`, renamed to it once the block has ended well."""
    path = Path(path)
    aside = path.with_name(f".unfinished-{path.name}")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); expected room on a disk of yours") from None
    finally:
        aside.unlink(missing_ok=True)


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written to ({error.strerror}); expected a folder of yours") from None
    return Path(path)


def write_nifti(path, data, affine, intent="none"):
    image = nib.Nifti1Image(data, affine)
    image.header.set_intent(intent)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    with written_aside(path) as aside:
        nib.save(image, aside)


def write_displacement(path, displacement, affine):
    """Displacement (X, Y, Z, 3) in mm RAS as the vector image that ITK, ANTs, SimpleITK and 3D Slicer read.

    That is NIfTI of shape (X, Y, Z, 1, 3), intent 1007 (vector), components in LPS.
    """
    lps = displacement * np.array([-1, -1, 1], np.float32)
    write_nifti(path, lps[:, :, :, None, :].astype(np.float32), affine, intent="vector")


def read_displacement(path):
    """Inverse of write_displacement: (X, Y, Z, 3) mm, RAS, and voxel-to-world matrix."""
    data, affine = read_nifti(path)
    if data.shape[3:] != (1, 3):
        raise InputError(f"{path}: found shape {data.shape}, expected a displacement field (X, Y, Z, 1, 3)")
    return data[:, :, :, 0, :] * np.array([-1, -1, 1], np.float32), affine


def write_csv(path, rows):
    with written_aside(path) as aside, open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def save_weights(network, path):
    needed, free = 8 * network.count_params(), shutil.disk_usage(path.parent).free
    if free < needed:  # HDF5 takes the whole process with it when a disk is full
        raise InputError(f"{path}: found {free} bytes free, expected {needed}; make room on that disk")
    with written_aside(path) as aside:
        network.save_weights(aside)


def save_checkpoint(path, variables, progress):
    """All variables as arrays, and what else a training knows as JSON, in one file. Nothing in it is ever executed."""
    with written_aside(path) as aside, open(aside, "wb") as file:
        np.savez(file, *[variable.numpy() for variable in variables], progress=json.dumps(progress))


def load_checkpoint(path, variables):
    """Inverse of save_checkpoint: sets the variables, returns the progress."""
    try:
        with np.load(path) as arrays:
            for number, variable in enumerate(variables):
                variable.assign(arrays[f"arr_{number}"])
            return json.loads(str(arrays["progress"]))
    except Exception as error:  # zipfile, NumPy and TensorFlow have many of their own
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be read ({reason}); expected the checkpoint of this training") from None


@contextlib.contextmanager
def signals_noted():
    """Within the block Ctrl-C and SIGTERM end nothing; they are noted in the list that this gives."""
    noted = []
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.signal(number, lambda number, frame: noted.append(number)) for number in numbers]
    try:
        yield noted
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def load_weights(network, path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # Keras only warns of layers that it leaves as they were
            network.load_weights(path)
    except FileNotFoundError:
        raise InputError(f"{path}: missing; expected weights that train.py wrote") from None
    except (OSError, ValueError, KeyError, UserWarning) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: found weights that do not fit ({reason}); expected those of this network") from None
