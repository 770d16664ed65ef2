"""README and code hold each other to the truth: headings, links, function names, settings and commands."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import benchmark
import numpy as np
import pytest

import results
from config import Config, parse

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SOURCES = [path for folder in (".", "data", "media") for path in sorted((ROOT / folder).glob("*.py"))]
RESULTS = ["example_summary.txt", "mrus_summary.txt", "mrus_centroids_summary.txt"]
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def test_headings_that_the_code_names_exist():
    headings = set(re.findall(r"^#+ (.*)$", README, re.MULTILINE))
    named = {name for path in SOURCES for name in re.findall(r'README, "([^"]+)"', path.read_text())}
    named |= {name for path in SOURCES for name in re.findall(r'README, "[^"]+" and "([^"]+)"', path.read_text())}
    assert named and named <= headings, named - headings


def test_links_pictures_and_anchors_exist():
    for page in (ROOT / "README.md", ROOT / "media" / "experiments.md"):
        links = re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text())
        local = [(page.parent / target if target else page, anchor) for target, anchor in links if "://" not in target]
        assert local
        for file, anchor in local:
            assert file.exists(), file
            if anchor:
                titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in anchors, (file, anchor)


def test_code_excerpts_stand_in_the_source():
    """All but those that import something, which test_scripts.py runs."""
    excerpts = [e for e in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if not e.startswith("import")]
    assert len(excerpts) >= 3
    for excerpt in excerpts:
        assert any(excerpt in path.read_text() for path in SOURCES), excerpt


def test_figures_of_the_results_tables_stand_in_files_that_commands_wrote():
    written = " ".join((ROOT / "media" / name).read_text() for name in RESULTS)
    numbers = set(re.findall(r"[\d.]+", written))
    rows = [
        line for line in README.splitlines() if re.match(r"\| (gland|landmark|RMS|the first one|public clin)", line)
    ]
    assert len(rows) >= 5
    for row in rows:
        figures = re.findall(r"(?<![\w.])\d+\.\d+(?!\w)", row)
        assert figures and set(figures) <= numbers, (row, set(figures) - numbers)


def test_the_table_of_folds_says_what_their_files_hold():
    form = r"\[\d\]\(media/mrus_fold_(\d)\.csv\) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \(([\d.]+)\)"
    rows = re.findall(form, README)
    assert len(rows) == 5
    for fold, *told in rows:
        found = results.values(results.read(ROOT / "media" / f"mrus_fold_{fold}.csv"))
        (start, tre), (_, dice), (_, hd95) = (found[n] for n in ("landmark TRE, mm", "gland Dice", "gland HD95, mm"))
        figures = np.nanmedian(start), np.median(dice), np.median(hd95), np.median(tre), np.mean(tre)
        assert told == [f"{figure:.2f}" for figure in figures], fold


def test_functions_and_settings_that_the_readme_names_exist():
    code = "\n".join(path.read_text() for path in SOURCES)
    functions = re.findall(r"`(\w+)\(\)`", README)
    assert functions and all(f"def {name}(" in code for name in functions), functions
    for flag in re.findall(r"--(\w+_\w+)", README):
        assert flag in {field.name for field in dataclasses.fields(Config)}, flag


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    """Every script exists and takes the flags that the README gives it."""
    for part in command.split("&&"):
        words = shlex.split(part)
        scripts = [word for word in words if word.endswith(".py")]
        assert all((ROOT / script).exists() for script in scripts), part
        if scripts and scripts[0] in ("train.py", "inference.py"):
            parse(words[words.index(scripts[0]) + 1 :])


def test_the_figures_of_the_benchmark_are_what_it_wrote():
    result = json.loads((ROOT / "media" / "benchmark.json").read_text())
    text = " ".join(README.split())
    for line in benchmark.markdown(result["rows"]):
        assert " ".join(line.split()) in text, line
    warp, gradient = (next(row for row in result["rows"] if row["part"] == f"warp, {n}") for n in ("value", "gradient"))
    for figure in ("scipy", "sitk"):
        assert f"{warp[figure] / warp['ours']:.1f} times" in text, figure
    assert f"{gradient['torch'] / gradient['ours']:.2f} times" in text
    assert f"({result['large convolution, FLOP/s'] / 1e9:.0f} GFLOP/s)" in text
    shares = [f"{100 * share:.0f}" for share in result["share of limit"].values()]
    assert "{} % of the step's time at 8 channels, {} % at 16 and {} % at 32".format(*shares) in text
    assert "of the network's, {}, {} and {} %".format(*shares[3:]) in text


def test_continuous_integration_runs_the_command_of_the_readme():
    tests = [command for command in COMMANDS if "pytest" in command]
    assert len(tests) == 1 and tests[0].startswith("python3 "), "as .ci/run looks for it"
