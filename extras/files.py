"""Files, read and written with care: what is damaged is named, what is there is never overwritten half-way.

World coordinates are NIfTI's: RAS, mm.
"""

import contextlib
import functools
import logging
import os
import re
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from tqdm import tqdm

from extras.errors import InputError, OutputError, expect, reading

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # bad headers are named by the checks below
LONGEST_NAME = 230  # bytes; file systems allow 255, and a name gets longer while a file is written

# -- Names and warnings --------------------------------------------------------------------------------------------


@functools.cache  # a file is read more than once
def warn(message):
    tqdm.write(f"warning: {message}")


def check_path(path):
    """Refuse a path that some library or file system cannot take: not in UTF-8, with a line break, a name too long."""
    for name in Path(path).absolute().parts:
        is_plain = not re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", name)
        expect(is_plain, ascii(str(path)), f"the name {name!a}", "one in UTF-8; rename it")
        size, claim = len(os.fsencode(name)), f"at most {LONGEST_NAME}; rename what it is made of"
        expect(size <= LONGEST_NAME, path, f"a name of {size} bytes, {name[:20]}...", claim)


# -- Read ----------------------------------------------------------------------------------------------------------


def read_nifti(path):
    """Voxels (float32; one volume is 3D) and the voxel-to-world matrix (4, 4) of a NIfTI file, checked."""
    with reading(path, "a NIfTI file that ends in .nii or .nii.gz, in small letters"):
        image = nib.load(path)
        expect(isinstance(image, nib.Nifti1Pair), path, type(image).__name__, "NIfTI")
        expect(image.header["xyzt_units"] % 8 not in (1, 3), path, "sizes in metres or micrometres", "mm")
        kind, stored = image.get_data_dtype(), Path(image.file_map["image"].filename)
        expect(kind.kind in "buif", path, f"voxels of type {kind}", "plain numbers")
        found, expected = stored.stat().st_size, np.prod(image.shape, dtype=float) * kind.itemsize
        claim = f"{expected:.0f} of voxels as its header says"
        expect(0 < expected <= found * 1032, path, f"{found} bytes", claim)  # deflate packs 1032 bytes into one at most
        data = np.asarray(image.dataobj, np.float32)
    affine = np.array(image.affine, float)
    spacing, matrix = np.linalg.norm(affine[:3, :3], axis=0), f"a header matrix {affine[:3].tolist()}"
    is_size = np.isfinite(affine).all() and ((spacing > 1e-3) & (spacing < 1e3)).all()
    expect(is_size, path, matrix, "voxels of 0.001 to 1000 mm")
    is_regular = abs(np.linalg.det(affine[:3, :3] / spacing)) >= 1e-3
    expect(is_regular, path, f"a singular one: {matrix}", "three directions")
    bad = np.sum(~np.isfinite(data))
    expect(bad == 0, path, f"{bad} NaN or infinite voxels", "none")
    return data[..., 0] if data.shape[3:] == (1,) else data, affine


def read_displacement(path):
    """Inverse of write_displacement: (X, Y, Z, 3) mm, RAS, and voxel-to-world matrix."""
    data, affine = read_nifti(path)
    expect(data.shape[3:] == (1, 3), path, f"shape {data.shape}", "a displacement field (X, Y, Z, 1, 3)")
    return data[:, :, :, 0, :] * np.array([-1, -1, 1], np.float32), affine


def affines_match(one, other, shape):
    """Whether two voxel-to-world matrices agree to 0.1 mm on where a grid's first voxel and its axes' ends lie."""
    ends = np.c_[np.vstack([np.zeros(3), np.diag(shape[:3])]), np.ones(4)]
    return np.allclose((one - other)[:3] @ ends.T, 0, atol=0.1)


def warn_of_frame(path):
    """Programs differ over where an image lies whose header does not say it, says it in two ways, or shears it."""
    header = nib.load(path).header
    try:
        qform = header.get_qform(coded=True)
    except ValueError:  # its quaternion has no unit length
        qform = np.full((4, 4), np.nan), 1
    forms = [form for form, code in (header.get_sform(coded=True), qform) if code]
    found = "" if forms else "no frame"
    if forms and not affines_match(forms[0], forms[-1], header.get_data_shape()):
        found = "two frames that differ"
    elif forms:
        axes = forms[0][:3, :3] / np.linalg.norm(forms[0][:3, :3], axis=0)
        found = "a sheared frame" if np.abs(axes.T @ axes - np.eye(3)).max() > 2e-4 else ""
    if found:
        warn(f"{path}: found {found} in its header (sform, qform), expected one; ITK may read another")


def warn_of_spacing(path):
    """A tool that changes the voxel size may change it in one of the two places of a header alone."""
    image = nib.load(path)
    used, sform = (np.round(nib.affines.voxel_sizes(matrix), 4) for matrix in (image.affine, image.header.get_sform()))
    pixdim = np.round(image.header["pixdim"][1:4], 4)
    if sform.any() and not np.allclose(sform, pixdim, rtol=0.01):
        found, here = f"voxels of {sform} mm by its sform, {pixdim} by its pixdim", f"{used} is used here"
        warn(f"{path}: found {found}, expected the same; {here}, ITK takes pixdim")


# -- Write ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path):
    """A temporary path beside `path`, renamed to it once the block has ended well."""
    path = Path(path)
    temporary = path.with_name(f".unfinished-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); expected room on a disk of yours") from None
    finally:
        temporary.unlink(missing_ok=True)


def ensure_writable_dir(path):
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
    with atomic_write(path) as temporary:
        nib.save(image, temporary)


def write_displacement(path, displacement, affine):
    """Displacement (X, Y, Z, 3) in mm RAS as the vector image that ITK, ANTs, SimpleITK and 3D Slicer read.

    That is NIfTI of shape (X, Y, Z, 1, 3), intent 1007 (vector), components in LPS.
    """
    lps = displacement * np.array([-1, -1, 1], np.float32)
    write_nifti(path, lps[:, :, :, None, :].astype(np.float32), affine, intent="vector")


def write_csv(path, table):
    """table: a pandas DataFrame, or a list of dictionaries with the same keys."""
    with atomic_write(path) as temporary:
        pd.DataFrame(table).to_csv(temporary, index=False)


def write_text(path, text):
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
