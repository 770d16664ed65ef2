"""The report of a run, in a real browser: it loads, shows the volumes, the slider moves them, nothing is fetched.

The last one needs Chromium and its driver (Debian: chromium and chromium-driver), and is skipped without.
"""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from extras import report
from helpers import Volume

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
AFFINE = np.diag([2.0, 2, 3, 1])


def ball(shape, centre, radius):
    distance = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - centre, axis=-1)
    return np.clip(radius + 0.5 - distance, 0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def volumes():
    """A ball that lies elsewhere before registration."""
    labels = {"fixed": ball((30, 26, 12), (15, 13, 6), 5), "before": ball((30, 26, 12), (20, 13, 6), 5)}
    labels["after"] = labels["fixed"]
    brightness = np.linspace(0, 0.5, 12, dtype=np.float32)
    return {name: Volume(label + brightness, AFFINE, labels=label[..., None]) for name, label in labels.items()}


def without_labels(volumes):
    return {name: Volume(volume.image, volume.affine) for name, volume in volumes.items()}


@pytest.fixture(scope="module")
def page(volumes, tmp_path_factory):
    folder, rows, parts = tmp_path_factory.mktemp("a <run>"), [], []
    ddf = np.zeros((20, 18, 12, 3), np.float32)
    for name in ("case0 & more", "case1 & more"):
        (folder / name).mkdir()
        row = {
            "case": name,
            "label": 0,
            "dice_before": 0.5,
            "dice_after": 0.9,
            "hd95_after_mm": 3.0,
            "folded_percent": 0,
        }
        rows.append(row)
        parts.append(report.report_pair(folder / name, [row], volumes, ddf, 3.0))
    report.write_report(folder, rows, parts)
    return folder / "report.html"


def slices_of(part, count):
    """The picture of a viewer, cut into its slices (count, height, 3, width, RGB)."""
    (encoded,) = re.findall(r'src="data:image;base64,([^"]+)"', part)
    tall = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))), float)
    assert f'max="{count - 1}"' in part and f"aspect-ratio: {tall.shape[1]} / {len(tall) // count};" in part
    return tall.reshape(count, len(tall) // count, 3, -1, 3)


def test_the_viewer_shows_each_slice_of_each_volume_with_its_outlines(volumes):
    slices = 12 * 3 // 2  # drawn as cubes of 2 mm
    for has_labels, shown_volumes in ((True, volumes), (False, without_labels(volumes))):
        pictures = slices_of(report.viewer(shown_volumes), slices)
        assert pictures.shape[1:4] == (26, 3, 30)
        middle, colours = pictures[slices // 2], [to_rgb(name) for name in (report.GREEN, report.ORANGE)]
        green, orange = (np.abs(middle - 255 * np.array(c)).max(axis=-1).min(axis=(0, 2)) < 40 for c in colours)
        assert list(green) == [has_labels, has_labels, False]  # hidden beneath a perfect result
        assert list(orange) == [False, has_labels, has_labels]
        background = pictures[:, 0, 0, 0, 0]
        assert (np.diff(background)[2:-2] > 0).all()  # from the lowest slice, which is darkest here, upwards
        rows, columns = np.nonzero(middle[:, 1, :, 0] > 200)
        assert has_labels or (abs(29 - columns.mean() - 20) < 1 and abs(25 - rows.mean() - 13) < 1)  # R left, A up


def test_volumes_thin_or_large_have_a_slider_too():
    for shape, spacing, shown in (((200, 200, 3), 1.0, 2), ((200, 150, 2), 0.5, 2), ((60, 50, 400), 0.6, 120)):
        image = ball(shape, np.array(shape) / 2, 20)
        label = (image > 0.5)[..., None].astype(np.float32)
        volume = Volume(image, np.diag([spacing] * 3 + [1]), labels=label)
        slices_of(report.viewer(dict.fromkeys(("fixed", "before", "after"), volume)), shown)


def test_a_picture_shows_folding_and_needs_no_labels(volumes, tmp_path):
    index = np.arange(12)[:, None, None]
    for name, factor in (("plain", 0), ("folded", -2)):  # which turns the middle inside out
        ddf = np.zeros((20, 18, 12, 3), np.float32)
        ddf[4:16, 4:14, 3:9, 0] = factor * (index - 5.5)
        report.plot_overview(tmp_path / f"{name}.png", "A$^B_to_$us", without_labels(volumes), ddf, 3.0)
    plain, folded = (np.asarray(Image.open(tmp_path / f"{n}.png").convert("L"), int) for n in ("plain", "folded"))
    where = np.argwhere(folded < plain - 150)
    assert len(where) > 100 and where[:, 1].min() > plain.shape[1] * 0.6  # black, in the last column


@pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium or no chromedriver")
def test_the_page_works_in_a_browser_and_fetches_nothing(page):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,1000",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        browser.get(page.as_uri())
        assert "a <run>" in browser.title and "gland Dice" in browser.find_element(By.TAG_NAME, "pre").text
        headings = [h.text.split(";")[0] for h in browser.find_elements(By.TAG_NAME, "h2")]
        assert headings == ["case0 & more", "case1 & more"]
        loaded = browser.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth > 0)")
        assert loaded == [True] * 5
        viewer = browser.find_elements(By.CSS_SELECTOR, "img[alt=slices]")[1]
        slider = browser.find_elements(By.CSS_SELECTOR, "input[type=range]")[1]
        assert viewer.size["width"] / viewer.size["height"] == pytest.approx(3 * 30 / 26, rel=0.01)  # in mm
        browser.execute_script("arguments[0].scrollIntoView({block: 'end'})", viewer)
        before = viewer.screenshot_as_png
        ActionChains(browser).move_to_element_with_offset(slider, -slider.size["width"] // 4, 0).click().perform()
        assert int(slider.get_attribute("value")) == pytest.approx(17 / 4, abs=1)
        assert viewer.screenshot_as_png != before

        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        assert asked and all(url.startswith(("file:", "data:", "blob:")) for url in asked), asked
        assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    finally:
        browser.quit()
