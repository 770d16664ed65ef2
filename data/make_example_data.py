"""Make the tutorial's example data: synthetic prostate MR and transrectal ultrasound of the same patients.

    python data/make_example_data.py

writes data/example/{train,valid,test}, each a data set as README, "Your own data" describes it, with one folder more:
true_displacement/, the deformation that made the pair, in mm on a coarser grid over the fixed image (ITK convention).

A patient is a handful of implicit surfaces in a frame whose origin is the MR volume's centre (mm; right, anterior,
superior). The ultrasound shows, at x, the tissue that the MR shows at x + u(x). Surfaces and u are formulas, so images,
labels and truth are exact on every grid and nothing is resampled. The same seed gives the same files.
"""

import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from extras.errors import run
from extras.files import write_displacement, write_nifti
from helpers import FOLDERS
from utils import jacobian_determinant, voxel_to_world

PATIENTS = {"train": 160, "valid": 8, "test": 12}
MR_SHAPE, MR_SPACING, MR_ORIENTATION = (96, 96, 32), (1.05, 1.05, 3.0), "LPS"
US_SHAPE, US_SPACING, US_ORIENTATION = (80, 88, 48), (0.9, 0.9, 1.35), "PIR"
TRUTH_SPACING = 3  # the true displacement is smooth: every third voxel of the ultrasound is enough
SMALLEST_JACOBIAN = 0.3  # of the deformation: it squeezes tissue to no less than this share of its volume


def ball(p, centre, radii):
    """Distance from a centre in units of the radii: 1 on the ellipsoid's surface. p: (..., 3) mm."""
    radii = np.broadcast_to(radii, 3)
    return np.sqrt(sum(((p[..., k] - float(centre[k])) / float(radii[k])) ** 2 for k in range(3)))


def step(distance, width):
    """1 where distance < 0, 0 beyond, with a smooth edge of the given width."""
    return 1 / (1 + np.exp(np.clip(4 * distance / width, -50, 50)))


# -- The patient ---------------------------------------------------------------------------------------------------


def random_patient(rng):
    """Sizes and places of one patient's anatomy, in mm."""
    radii = rng.uniform([18, 13, 15], [24, 18, 20])
    patient = {
        "gland": rng.uniform(-3, 3, 3),
        "radii": radii,
        "taper": rng.uniform(0.15, 0.35),  # the apex is narrower than the base
        "lobes": rng.normal(0, 0.03, (3, 2)),  # irregular outline
        "transition": (rng.uniform([-1, 1, 1], [1, 3, 5]), radii * rng.uniform(0.6, 0.78, 3)),
        "bladder": np.array([rng.normal(0, 3), rng.uniform(2, 10), radii[2] + rng.uniform(16, 20)]),
        "rectum": np.array([rng.normal(0, 3), -radii[1] - rng.uniform(8, 12)]),
        "nodules": rng.uniform(-0.6, 0.6, (8, 3)) * radii,
        "nodule_size": rng.uniform(3, 6, 8),
        "nodule_tone": rng.choice([-1, 1], 8) * rng.uniform(0.5, 1, 8),
    }
    # Landmarks: visible in both images, in ways that differ. All lie inside the gland, well apart from each other.
    places, count = [], rng.integers(4, 7)
    while len(places) < count:
        places = []
        for place in rng.uniform(-0.7, 0.7, (200, 3)) * radii:
            is_inside = np.linalg.norm(place / radii) < 0.75
            if is_inside and len(places) < count and all(np.linalg.norm(place - other) > 11 for other in places):
                places.append(place)
    kinds = rng.permutation(["cyst", "calcification", "lesion"] * 2)[:count]
    patient["landmarks"] = list(zip(kinds, places, rng.uniform(3.5, 5, count), strict=True))
    return patient


def tissues(p, patient):
    """Signed or scaled distances of every structure at points p (..., 3) mm in the MR frame."""
    q = p - patient["gland"].astype(p.dtype)
    x, y, z = np.moveaxis(q / patient["radii"].astype(p.dtype), -1, 0)
    angle = np.arctan2(y, x)
    outline = sum(a * np.cos(k * angle) + b * np.sin(k * angle) for k, (a, b) in enumerate(patient["lobes"], start=2))
    width = 1 - patient["taper"] / (1 + np.exp(5 * z + 1))
    groove = 0.12 * np.exp(-((x / 0.3) ** 2)) * (y < 0)  # the back is flat, with a groove in the middle
    gland = np.sqrt(((x / width) ** 2 + (y * (1 + groove)) ** 2) / (1 + outline) ** 2 + z**2)
    centre, radii = patient["transition"]
    nodules = sum(
        tone * np.exp(-0.5 * ball(q, place, size) ** 2)
        for place, size, tone in zip(patient["nodules"], patient["nodule_size"], patient["nodule_tone"], strict=True)
    )
    urethra = np.hypot(q[..., 0], q[..., 1] - 2 - 0.01 * q[..., 2] ** 2)
    return {
        "gland": gland,
        "transition": ball(q, centre, radii),
        "nodules": nodules,
        "urethra": np.where(np.abs(z) < 1.1, urethra, 99),
        "bladder": ball(q, patient["bladder"], [26, 20, 17]),
        "rectum": np.hypot(q[..., 0] - patient["rectum"][0], q[..., 1] - patient["rectum"][1]),
        "muscle": ball(q * [1, 1, 0], [0, 0, 0], [37, 60, 1]),  # obturator internus: beyond this, at the sides
        "levator": np.abs(ball(q, [0, -4, -10], [29, 24, 34]) - 1),
        "pubis": ball(q, [0, patient["radii"][1] + 22, -8], [24, 11, 15]),
        "landmarks": [(kind, ball(q, place, size)) for kind, place, size in patient["landmarks"]],
    }


def label_maps(t):
    """Label 0 the gland, 1 its transition zone, then the landmarks: (..., L) uint8. t: what `tissues` returned."""
    distances = [t["gland"], t["transition"], *(distance for _, distance in t["landmarks"])]
    return np.stack([distance < 1 for distance in distances], axis=-1).astype(np.uint8)


# -- The deformation -----------------------------------------------------------------------------------------------


def displacement(x, centre, shift, linear, bumps):
    """u(x) in mm at points x (..., 3) mm: `shift` at the centre, a linear part about it, and Gaussian bumps."""
    x = x - centre.astype(x.dtype)
    result = x @ linear.T.astype(x.dtype) + shift.astype(x.dtype)
    for place, size, bump in bumps:
        weight = np.exp(-0.5 * ball(x, place, size) ** 2) - np.exp(-0.5 * ball(np.zeros(3), place, size) ** 2)
        result += weight[..., None].astype(x.dtype) * np.asarray(bump, x.dtype)
    return result


def random_deformation(rng, patient):
    """u(x) of a patient: a shift, small turns, stretches along the axes, wide smooth bumps and the probe's push."""
    every_4_mm = np.moveaxis(np.mgrid[-36:37:4, -40:41:4, -32:33:4], 0, -1).astype(float)
    while True:
        shift = rng.normal(size=3)
        shift *= rng.uniform(6, 12) / np.linalg.norm(shift)
        rx, ry, rz = np.radians(rng.uniform(-4, 4, 3))
        linear = np.array([[0, -rz, ry], [rz, 0, -rx], [-ry, rx, 0]]) + np.diag(rng.uniform(-0.22, 0.22, 3))
        places, sizes = rng.uniform(-1, 1, (5, 3)) * patient["radii"], rng.uniform(13, 17, 5)
        bumps = list(zip(places, sizes, rng.uniform(-6, 6, (5, 3)), strict=True))
        # The probe moves the tissue before it forward, so the ultrasound shows at x what lay further back.
        bumps.append(([0, -patient["radii"][1] - 6, 0], 16, [0, -rng.uniform(7, 11), 0]))
        u = partial(displacement, centre=patient["gland"] - shift, shift=shift, linear=linear, bumps=bumps)
        if jacobian_determinant(u(every_4_mm) / 4).min() > SMALLEST_JACOBIAN:
            return u


def tissue_to_ultrasound(place, u):
    """Where the ultrasound shows the tissue that the MR shows at `place`: solves x + u(x) = place."""
    x = np.array(place, float)
    for _ in range(30):
        x = place - u(x)
    return x


# -- The images ----------------------------------------------------------------------------------------------------


def mr_image(p, t, rng):
    """T2-weighted MR of tissues t at points p: bright fluid and peripheral zone, dark muscle, bias, Rician noise."""
    image = 0.60 + 0.08 * np.sin(p[..., 0] / 5 + 1) * np.sin(p[..., 1] / 6) * np.sin(p[..., 2] / 7)  # fat
    for distance, width, tone in [
        (1 - t["muscle"], 0.1, 0.16),
        (t["levator"] - 0.07, 0.06, 0.18),
        (t["pubis"] - 1.1, 0.1, 0.08),
        (t["pubis"] - 0.95, 0.1, 0.42),
        (t["bladder"] - 1.08, 0.06, 0.22),
        (t["bladder"] - 1, 0.06, 1.0),
        (t["rectum"] - 11, 2, 0.3),
        (t["rectum"] - 8, 2, 0.06),
        (t["gland"] - 1.06, 0.05, 0.2),  # the capsule, thin and dark
        (t["gland"] - 0.98, 0.05, 0.78),  # peripheral zone
        (t["transition"] - 1.05, 0.1, 0.25),
        (t["transition"] - 0.95, 0.1, 0.45 + 0.25 * t["nodules"]),
        (t["urethra"] - 3, 1.5, 0.85),
    ]:
        image += step(distance, width) * (tone - image)
    for kind, distance in t["landmarks"]:
        tone = {"cyst": 1.05, "calcification": 0.04, "lesion": 0.22}[kind]
        image += step(distance - 1, 0.3) * (tone - image)
    slope, bend = rng.normal(0, 0.003, 3).astype(p.dtype), rng.normal(0, 5e-5, 3).astype(p.dtype)
    image *= np.exp(p @ slope + (p**2) @ bend)
    noise = rng.normal(0, 0.03, (2, *image.shape))
    return np.hypot(image + noise[0], noise[1])


def us_image(x, t, patient, u, rng):
    """Transrectal ultrasound of tissues t seen at points x: fan, speckle, attenuation, bright interfaces, shadows."""
    gland = tissue_to_ultrasound(patient["gland"], u)
    probe = gland + [0, -patient["radii"][1] - 14, 0]
    depth = np.hypot(x[..., 0] - probe[0], x[..., 1] - probe[1]) - 10  # mm in front of a probe of 10 mm radius
    angle = np.arctan2(x[..., 0] - probe[0], x[..., 1] - probe[1])
    echo = np.full(depth.shape, 0.42)
    for distance, width, tone in [
        (1 - t["muscle"], 0.1, 0.25),
        (t["pubis"] - 1.1, 0.1, 0.95),
        (t["pubis"] - 0.9, 0.1, 0.05),
        (t["bladder"] - 1.06, 0.06, 0.7),
        (t["bladder"] - 1, 0.06, 0.03),
        (t["gland"] - 1.07, 0.06, 0.85),  # the capsule and the fat around it, bright
        (t["gland"] - 0.98, 0.05, 0.48),
        (t["transition"] - 1.06, 0.08, 0.75),
        (t["transition"] - 0.95, 0.1, 0.27 + 0.06 * t["nodules"]),
        (t["urethra"] - 3, 1.5, 0.12),
    ]:
        echo += step(distance, width) * (tone - echo)
    shadow = np.ones(depth.shape)
    for (kind, distance), (_, place, size) in zip(t["landmarks"], patient["landmarks"], strict=True):
        tone = {"cyst": 0.03, "calcification": 1.4, "lesion": 0.8}[kind]
        echo += step(distance - 1, 0.3) * (tone - echo)
        if kind == "calcification":
            seen = tissue_to_ultrasound(place + patient["gland"], u)
            far, aside = np.hypot(*(seen - probe)[:2]), np.arctan2(*(seen - probe)[:2])
            behind = step(far + size - 10 - depth, 2) * step(np.abs(x[..., 2] - seen[2]) - size, 1.5)
            shadow *= 1 - 0.6 * behind * step(np.abs(angle - aside) - size / far, 0.04)
    echo += 0.5 * np.exp(-0.5 * (depth / 1.5) ** 2)  # rectal wall
    grain = [ndimage.gaussian_filter(rng.normal(size=depth.shape), [0.9, 0.6, 0.5]) for _ in range(2)]
    speckle = np.hypot(*grain) / np.mean(np.hypot(*grain))
    image = echo * shadow * np.exp(-depth / 70) * (0.5 + 0.5 * speckle)
    fan = (depth > 0) & (depth < 68) & (np.abs(angle) < np.radians(70))
    return np.where(fan, image, 0)


# -- Files ---------------------------------------------------------------------------------------------------------


def random_frame(rng):
    """A scanner's own world: (4, 4) rotation of up to 10 degrees about each axis and a shift of up to 100 mm."""
    turn = Rotation.from_euler("xyz", rng.uniform(-10, 10, 3), degrees=True).as_matrix()
    return nib.affines.from_matvec(turn, rng.uniform(-100, 100, 3))


def centred_affine(shape, spacing):
    return nib.affines.from_matvec(np.diag(spacing), -np.array(spacing) * (np.array(shape) - 1) / 2)


def to_orientation(data, affine, orientation):
    """Store an RAS volume with other axis order and directions, e.g. "LPS"; the world stays the same."""
    ras, target = (nib.orientations.axcodes2ornt(codes) for codes in ("RAS", orientation))
    change = nib.orientations.ornt_transform(ras, target)
    stored = nib.orientations.apply_orientation(data, change)
    return stored, affine @ nib.orientations.inv_ornt_aff(change, data.shape[:3])


def write_pair(folder, case, seed):
    rng = np.random.default_rng(seed)
    mr_grid, us_grid = centred_affine(MR_SHAPE, MR_SPACING), centred_affine(US_SHAPE, US_SPACING)
    p, x = voxel_to_world(MR_SHAPE, mr_grid), voxel_to_world(US_SHAPE, us_grid)
    patient = random_patient(rng)
    u = random_deformation(rng, patient)
    mr_frame, us_frame = random_frame(rng), random_frame(rng)
    mr_tissues, us_tissues = tissues(p, patient), tissues(x + u(x), patient)
    mr, us = mr_image(p, mr_tissues, rng), us_image(x, us_tissues, patient, u, rng)
    volumes = {
        "moving_images": (mr * 400).clip(0, 32767).astype(np.int16),
        "fixed_images": (us * 160).clip(0, 255).astype(np.uint8),
        "moving_labels": label_maps(mr_tissues),
        "fixed_labels": label_maps(us_tissues),
    }
    for name, data in volumes.items():
        moving = name.startswith("moving")
        affine = mr_frame @ mr_grid if moving else us_frame @ us_grid
        stored, affine = to_orientation(data, affine, MR_ORIENTATION if moving else US_ORIENTATION)
        write_nifti(folder / name / f"{case}.nii.gz", stored, affine)
    x = x[1::TRUTH_SPACING, 1::TRUTH_SPACING, 1::TRUTH_SPACING]
    us_grid = us_grid @ nib.affines.from_matvec(TRUTH_SPACING * np.eye(3), [1, 1, 1])
    in_world = (x + u(x)) @ mr_frame[:3, :3].T + mr_frame[:3, 3] - (x @ us_frame[:3, :3].T + us_frame[:3, 3])
    stored, affine = to_orientation(in_world, us_frame @ us_grid, US_ORIENTATION)
    write_displacement(folder / "true_displacement" / f"{case}.nii.gz", stored, affine)


def main(folder=Path(__file__).parent / "example", seed=2019, patients=PATIENTS):
    """Write the whole data set aside, then rename it: an interrupted run leaves nothing that looks complete."""
    aside = Path(f"{folder}.unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    jobs = []
    for split, count in patients.items():
        for name in (*FOLDERS, "true_displacement"):
            (aside / split / name).mkdir(parents=True)
        jobs += [(aside / split, f"{split}{n:02d}", [seed, len(jobs) + n]) for n in range(count)]
    with ProcessPoolExecutor() as pool:
        made = pool.map(write_pair, *zip(*jobs, strict=True))
        list(tqdm(made, "making example data", len(jobs), unit="pair", disable=None))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


if __name__ == "__main__":
    run(main)
