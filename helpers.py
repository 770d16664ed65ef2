"""Files to arrays: find pairs, read and check volumes, resample to the network grid, draw batches.

Shapes: B batch; X, Y, Z fixed grid; MX, MY, MZ moving grid; L labels. World coordinates are NIfTI's: RAS, mm.
"""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage
from tqdm import tqdm

from extras.errors import InputError, expect, reading
from extras.files import affines_match, check_path, read_displacement, read_nifti, warn, warn_of_spacing
from utils import in_view, voxel_to_world

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
    """The name without its ending, in Unicode's composed form: systems write accents in two ways."""
    check_path(path)
    return unicodedata.normalize("NFC", re.sub(r"\.nii(\.gz)?$", "", Path(path).name, flags=re.IGNORECASE))


def find_files(folder):
    """{case: path} of the volumes in a folder."""
    paths = sorted(path for path in folder.iterdir() if path.name[0] != "." and path.name.lower().endswith(VOLUMES))
    files = {}
    for path in paths:
        expect(path.name.lower().endswith(SUFFIXES), path, "a volume of this kind", ".nii or .nii.gz; convert it")
        other = files.setdefault(case_name(path), path)
        expect(other == path, path, f"the same case as in {other.name!a}", "one file for each case")
    return files


def find_pairs(folder, labels="required"):
    """The pairs of a data set: one NIfTI file per case in each of its four folders, under the same name.

    labels="optional" takes a data set without label folders, too. Without patients.csv each case is its own patient.
    """
    folder, names = Path(folder), FOLDERS
    if labels == "optional" and not any((folder / name).exists() for name in FOLDERS[2:]):
        names = FOLDERS[:2]
    for name in names:
        expect((folder / name).is_dir(), folder / name, "no such folder", f"{', '.join(names)} in {folder}")
    files = {name: find_files(folder / name) for name in names}
    cases = sorted(set().union(*files.values()))
    expect(cases, folder, "no .nii or .nii.gz file", f"one per case in {', '.join(names)}")
    missing = "\n".join(f"{folder / n / c}.nii.gz: missing" for c in cases for n in names if c not in files[n])
    if missing:
        raise InputError(f"{missing}; expected in all of {', '.join(names)}")
    table = folder / "patients.csv"
    patients = read_patients(table) if table.exists() else dict(zip(cases, cases, strict=True))
    for case in cases:
        expect(patients.get(case), table, f"no patient for case {case}", "a line for every case")
    truth = {case_name(path): path for path in folder.glob("true_displacement/*.nii.gz")}  # example data only
    paths = {c: {name.replace("images", "image"): files[name][c] for name in names} for c in cases}
    return [Pair(c, patients[c], **paths[c], true_displacement=truth.get(c)) for c in cases]


def read_patients(path):
    """{case: patient}, from the columns case and patient."""
    with reading(path, "a CSV file with columns case,patient"):
        table = pd.read_csv(path, dtype=str, encoding="utf-8-sig", keep_default_na=False, index_col=False)
        table = table[["case", "patient"]].apply(lambda column: column.str.strip().str.normalize("NFC"))
        lines = table.drop_duplicates()
    expect(lines["case"].is_unique, path, "a case of two patients", "one patient for each case")
    return dict(lines.itertuples(index=False))


# -- Read and check ------------------------------------------------------------------------------------------------


@dataclass
class Volume:
    """One side of a pair: an image and its labels, on one grid."""

    image: np.ndarray  # (any shape)
    affine: np.ndarray  # (4, 4) voxel to world
    path: Path | None = None
    labels: np.ndarray | None = None  # (image's shape, L), 0 to 1
    is_map: bool = False  # the labels were stored as one volume of integers
    truth: tuple | None = None  # example data: the true displacement (X, Y, Z, 3) in mm, RAS, and its matrix (4, 4)


def read_image(path):
    """A Volume of a 3D image, without labels."""
    data, affine = read_nifti(path)
    expect(data.ndim == 3 and min(data.shape) >= 2, path, f"shape {data.shape}", "3 dimensions of 2 voxels and more")
    expect(data.min() < data.max(), path, f"the value {data.min():g} in every voxel", "an image")
    warn_of_spacing(path)
    return Volume(data, affine, path)


def read_labels(path, image):
    """Labels (image's shape, L) in [0, 1] that lie on the grid of the Volume `image`; and if they were stored as a map.

    A 4D file has one label in each volume; a 3D file is one label or, as segmentation tools write it, a map of
    integers where 1 is label 0, 2 is label 1 and so on.
    """
    data, affine = read_nifti(path)
    shape, same = image.image.shape, f"as in {image.path}"
    expect(data.ndim in (3, 4), path, f"shape {data.shape}", "3 dimensions, or 4 with one label in each volume")
    expect(data.shape[:3] == shape, path, f"shape {data.shape[:3]}", f"{shape} {same}")
    expect(affines_match(affine, image.affine, shape), path, "another header matrix", f"the same grid {same}")
    is_map = data.ndim == 3 and data.max() > 1.01
    if is_map:
        whole = np.rint(data)  # with a scale factor in the header 1 may be stored as 0.988
        data = whole if np.abs(data - whole).max() < 0.1 else data
        values = np.unique(data)
        found = f"{values.size} values, {values[0]:g} to {values[-1]:g}"
        is_complete = values.size <= 256 and np.isin(values, range(values.size)).all()
        expect(is_complete, path, found, "0 to 1, or a map of the integers 0, 1, 2, ..., all there")
        data = (data[..., None] == values[values > 0]).astype(np.float32)
    data = data[..., None] if data.ndim == 3 else data
    expect(data.min() >= -0.01 and data.max() <= 1.01, path, f"values {data.min():g} to {data.max():g}", "0 to 1")
    data = np.clip(data, 0, 1)  # filters and scale factors leave 1.0001
    for k, label in enumerate(np.moveaxis(data, -1, 0)):
        expect(label.max() >= 0.5, path, f"that label {k} is empty", "at least one voxel of 0.5 or more")
        expect(label.min() < 0.5, path, f"that label {k} fills the image", "at least one voxel below 0.5")
    return data, is_map


def read_pair(pair):
    """Read and check every file of a pair: moving Volume, fixed Volume, as stored."""
    moving, fixed = read_image(pair.moving_image), read_image(pair.fixed_image)
    if pair.moving_labels:
        moving.labels, moving.is_map = read_labels(pair.moving_labels, moving)
        fixed.labels, fixed.is_map = read_labels(pair.fixed_labels, fixed)
        found, expected = moving.labels.shape[-1], fixed.labels.shape[-1]
        expect(found == expected, pair.moving_labels, f"{found} labels", f"{expected} as in {pair.fixed_labels}")
    if pair.true_displacement:
        fixed.truth = read_displacement(pair.true_displacement)
    return moving, fixed


def read_pairs(pairs, activity):
    """Each pair with its two Volumes, one after the other. All that cannot be used is named together, at the end."""
    problems = []
    for pair in tqdm(pairs, activity, unit="pair", disable=None):
        try:
            volumes = read_pair(pair)
        except InputError as error:
            problems.append(str(error))
        else:
            yield pair, *volumes
    if problems:
        raise InputError("\n".join(problems))


# -- Network grid --------------------------------------------------------------------------------------------------


def network_grid(affine, shape, grid_shape, voxel_size):
    """Voxel-to-world matrix (4, 4) of the network grid on a volume.

    Its axes are the volume's own, in the order and direction nearest to RAS+. Its centre is the volume's.
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


def covered(volume, grid, grid_shape):
    """Which voxels of a Volume lie on a network grid."""
    return in_view(voxel_to_world(volume.image.shape, np.linalg.inv(grid) @ volume.affine), grid_shape)


def to_unit_range(volume, seen):
    """The image of a Volume as intensities 0..1, from the 0.5th to the 99.5th percentile of the voxels `seen`.

    A value that more than 5 % of them share at either end of the range is left out: scanner padding, the black around
    an ultrasound fan, a burnt-in frame. Where it lies far from all others, as padding does, a warning names it.
    """
    values = volume.image[seen] if seen.any() else volume.image.ravel()
    count, shared = values.size, {}
    for end in (np.min, np.min, np.max, np.max):  # twice each: padding may lie beyond a background
        value = end(values)
        others = values[values != value]
        share = (values.size - others.size) / count
        if share > 0.05 and others.size and np.ptp(others) > 0:
            values, shared[value] = others, share
    low, high = np.percentile(values, [0.5, 99.5]).astype(np.float32)
    low, high = (low, high) if low < high else (values.min(), values.max())
    for value, share in shared.items():
        if value and max(low - value, value - high) > 0.5 * (high - low):  # 0 is the black around any image
            warn(f"{volume.path}: {100 * share:.0f} % of its voxels are {value:g}, taken as padding")
    return np.clip((volume.image - low) / max(high - low, 1e-6), 0, 1)


def to_network(volume, grid, grid_shape):
    """A Volume on a network grid of matrix `grid`: image (X, Y, Z, 1) in 0..1, labels (X, Y, Z, L) or None.

    A warning names an image that covers less than half of the grid.
    """
    seen = in_view(voxel_to_world(grid_shape, np.linalg.inv(volume.affine) @ grid), volume.image.shape).mean()
    if seen < 0.5:
        warn(f"{volume.path}: covers {100 * seen:.0f} % of the network grid, expected most of it")
    image = to_unit_range(volume, covered(volume, grid, grid_shape))
    labels = [] if volume.labels is None else np.moveaxis(volume.labels, -1, 0)
    image, *labels = (resample_to_grid(data, volume.affine, grid, grid_shape) for data in (image, *labels))
    return Volume(image[..., None], grid, volume.path, np.stack(labels, axis=-1) if labels else None)


def pair_to_network(moving, fixed, initial_alignment, moving_shape, fixed_shape, voxel_size):
    """Both Volumes of a pair on the network's grids, which a DDF of zero lays over each other; see to_network.

    initial_alignment: "centre" lays the moving grid about the moving image's own centre and axes, "header" about those
    of the fixed image, in the world frame that the two headers share.
    """
    about = moving if initial_alignment == "centre" else fixed
    moving_grid = network_grid(about.affine, about.image.shape, moving_shape, voxel_size)
    fixed_grid = network_grid(fixed.affine, fixed.image.shape, fixed_shape, voxel_size)
    return to_network(moving, moving_grid, moving_shape), to_network(fixed, fixed_grid, fixed_shape)


# -- Batches -------------------------------------------------------------------------------------------------------


class PreparedPairs:
    """Every pair of a data set: read, checked and resampled to the network grid once, then kept in memory."""

    def __init__(self, pairs, *grid):
        """grid: the last arguments of `pair_to_network`."""
        self.pairs, self.label_counts, self.arrays = pairs, [], []
        for _, *volumes in read_pairs(pairs, "reading"):
            arrays, on_grids = {}, pair_to_network(*volumes, *grid)
            for side, original, volume in zip(("moving", "fixed"), volumes, on_grids, strict=True):
                labels = np.round(volume.labels * 255).astype(np.uint8)
                arrays |= {f"{side}_image": volume.image.astype(np.float16), f"{side}_labels": labels}
                for k in np.flatnonzero(~labels.any(axis=(0, 1, 2))):
                    seen = covered(original, volume.affine, labels.shape[:3])[original.labels[..., k] >= 0.5]
                    where = "is too small for" if seen.any() else "lies outside"
                    warn(f"labels of {volume.path}: label {k} {where} the network grid and teaches nothing")
            self.label_counts.append(labels.shape[-1])
            self.arrays.append(arrays)

    def __getitem__(self, index):
        """A dictionary of moving_image, fixed_image (float16), moving_labels and fixed_labels (uint8, 255 = 1)."""
        return self.arrays[index]


def draw_pairs(rng, prepared, indices, batch_size, labels_per_pair, inter_subject_fraction):
    """What a batch is made of: (moving index, fixed index, the labels that count) of each of its pairs.

    Two-stage sampling (Hu et al. 2018): first the pairs, then labels of each. In inter-subject pairs the moving volume
    is another patient's; they share only label 0, the gland (Bashkanov et al. 2021, arXiv 2102.04938).
    """
    drawn = []
    for index in rng.choice(indices, size=batch_size):
        others = [k for k in indices if prepared.pairs[k].patient != prepared.pairs[index].patient]
        labels = np.arange(prepared.label_counts[index])
        if others and rng.random() < inter_subject_fraction:
            drawn.append((rng.choice(others), index, labels[:1]))
        else:
            drawn.append((index, index, rng.permutation(labels)[:labels_per_pair] if labels_per_pair else labels))
    return drawn


def read_batch(prepared, drawn):
    """The arrays of what `draw_pairs` gave: images (B, ..., 1), labels (B, ..., L), mask (B, L) of those that count.

    L is the largest number of labels in the data set. A pair with fewer is filled up with empty ones.
    """
    pairs = [read_drawn(prepared, *entry) for entry in drawn]
    return {name: np.stack([pair[name] for pair in pairs]) for name in pairs[0]}


def read_drawn(prepared, moving, fixed, chosen):
    """One pair of a batch: of the chosen labels those count that lie on both network grids."""
    size, pair = max(prepared.label_counts), {}
    mask = np.isin(np.arange(size), chosen)
    for side, index in (("moving", moving), ("fixed", fixed)):
        arrays, count = prepared[index], prepared.label_counts[index]
        stored = arrays[f"{side}_labels"]
        mask[:count] &= stored.any(axis=(0, 1, 2))
        labels = np.zeros((*stored.shape[:3], size), np.float32)
        np.multiply(stored, np.float32(1 / 255), out=labels[..., :count])
        pair |= {f"{side}_image": arrays[f"{side}_image"].astype(np.float32), f"{side}_labels": labels}
    return pair | {"mask": mask.astype(np.float32)}


def whole_pair(prepared, index):
    """One pair with all of its labels, as a batch of one."""
    return read_batch(prepared, [(index, index, np.arange(prepared.label_counts[index]))])
