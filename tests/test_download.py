"""The download of the public pairs, from a small archive that a local web server gives out."""

import functools
import http.server
import shutil
import threading

import numpy as np
import pytest
from conftest import ROOT, import_file
from test_helpers import smooth_volume

import helpers
from extras import files
from extras.errors import InputError

download_mrus = import_file(ROOT / "data" / "download_mrus.py")


@pytest.fixture
def data(tmp_path, rng):
    """A data set of four cases as the archive holds it; a and c are of one patient, as are b and d."""
    mr = [smooth_volume(rng, (12, 12, 12)) for _ in range(2)]
    volumes = {"a": mr[0], "b": mr[1], "c": 3 * mr[0] + rng.normal(0, 0.1, (12, 12, 12)), "d": mr[1]}
    folder = tmp_path / "served" / "example-data-mrus"
    for name in helpers.FOLDERS:
        (folder / name).mkdir(parents=True)
        for case, volume in volumes.items():
            image = volume > np.median(volume) if "labels" in name else volume
            files.write_nifti(folder / name / f"{case}.nii.gz", image.astype(np.float32), np.eye(4))
    return folder


@pytest.fixture
def fetch(data, tmp_path):
    """Pack what lies in `data`, and run the download from a web server of this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=data.parent)
    handler.func.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(name="mrus.zip"):
        shutil.make_archive(data.parent / "mrus", "zip", data.parent, data.name)
        url = f"http://localhost:{server.server_port}/{name}"
        download_mrus.main(url, tmp_path / "mrus", cases=4)

    yield run
    server.shutdown()


def test_pairs_arrive_whole_and_grouped_by_patient(fetch, tmp_path, capsys):
    fetch()
    patients = {"a": "patient00", "b": "patient01", "c": "patient00", "d": "patient01"}
    assert {pair.case: pair.patient for pair in helpers.find_pairs(tmp_path / "mrus")} == patients
    assert "4 pairs of 2 patients" in (out := capsys.readouterr().out) and "no licence" in out
    assert {path.name for path in tmp_path.iterdir()} == {"served", "mrus"}
    with pytest.raises(InputError, match="mrus: found a folder of this name, expected none"):
        fetch()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda data: (data / "fixed_labels" / "b.nii.gz").unlink(), "fixed_labels/b.nii.gz: missing"),
        (lambda data: [(data / name / "d.nii.gz").unlink() for name in helpers.FOLDERS], "found 3 cases, expected 4"),
        (lambda data: (data / "moving_images" / "a.nii.gz").write_bytes(b"cut"), "a.nii.gz: cannot be read"),
        (lambda data: shutil.rmtree(data / "moving_images"), "found 0 folders moving_images"),
    ],
)
def test_what_is_not_whole_leaves_nothing(spoil, message, data, fetch, tmp_path):
    spoil(data)
    with pytest.raises(InputError, match=message):
        fetch()
    assert {path.name for path in tmp_path.iterdir()} == {"served"}


def test_without_a_connection_it_says_so_in_one_line(fetch, tmp_path):
    with pytest.raises(InputError, match=r"nothing\.zip: cannot be read \(.*404.*expected a connection") as caught:
        fetch("nothing.zip")
    assert "\n" not in str(caught.value) and {path.name for path in tmp_path.iterdir()} == {"served"}
