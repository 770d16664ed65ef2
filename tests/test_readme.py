"""README and code hold each other to the truth: headings, links, function names, settings and commands."""

import dataclasses
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest

import config
from config import InferenceConfig, TrainConfig
from extras import report

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = "\n".join(page.read_text() for page in PAGES)
SOURCES = [path for folder in (".", "extras", "data", "media") for path in sorted((ROOT / folder).glob("*.py"))]
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def test_headings_that_the_code_names_exist():
    headings = set(re.findall(r"^#+ (.*)$", README, re.MULTILINE))
    named = {name for path in SOURCES for name in re.findall(r'(?:README|docs/\w+.md), "([^"]+)"', path.read_text())}
    named |= {name for path in SOURCES for name in re.findall(r'README, "[^"]+" and "([^"]+)"', path.read_text())}
    assert named and named <= headings, named - headings


def test_links_pictures_and_anchors_exist():
    for page in PAGES:
        links = re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text())
        local = [(page.parent / target if target else page, anchor) for target, anchor in links if "://" not in target]
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


def test_figures_of_the_results_table_stand_in_the_file_that_the_command_wrote():
    numbers = set(re.findall(r"[\d.]+", (ROOT / "media" / "example_summary.txt").read_text()))
    rows = [line for line in README.splitlines() if line.startswith("| the first one above")]
    figures = re.findall(r"(?<![\w.])\d+\.\d+(?!\w)", " | ".join(rows[0].split("|")[4:]))
    assert len(rows) == 1 and len(figures) == 8 and set(figures) <= numbers, set(figures) - numbers


def test_the_table_of_the_ablation_is_the_one_that_the_command_wrote():
    table = pd.read_csv(ROOT / "media" / "ablation.csv")
    columns = ["true error in the gland, mm", "gland Dice", "landmark TRE, mm"]
    for row in table.to_dict("records"):
        cells = [row["network taught with"], *(f"{row[name]:.2f}" for name in columns)]
        assert f"| {' | '.join(cells)} |" in README, cells


def test_the_table_of_real_patients_is_the_one_that_the_command_wrote():
    """Each median [quartiles] worst of the gathered folds stands in docs/real_patients.md, two medians in README."""
    table = report.read_metrics(ROOT / "media" / "mrus_cross_validation.csv")
    cells = re.findall(r"[\d.]+ \[[\d.]+ [\d.]+\] [\d.]+", report.summarise(table))
    page = (ROOT / "docs" / "real_patients.md").read_text()
    assert len(cells) == 8 and all(cell in page for cell in cells), [cell for cell in cells if cell not in page]
    dice, _, tre, _ = (f"{values['after'].median():.2f}" for values in report.measured(table).values())
    assert f"{table['case'].nunique()} pairs: {dice} and {tre} mm" in PAGES[0].read_text()


def test_functions_and_settings_that_the_readme_names_exist():
    code = "\n".join(path.read_text() for path in SOURCES)
    functions = re.findall(r"`(\w+)\(\)`", README)
    assert functions and all(f"def {name}(" in code for name in functions), functions
    for flag in re.findall(r"--(\w+_\w+)", README):
        fields = (*dataclasses.fields(TrainConfig), *dataclasses.fields(InferenceConfig))
        assert flag in {field.name for field in fields}, flag


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, monkeypatch):
    """Every script exists and takes the flags that the README gives it."""
    for part in command.split("&&"):
        words = shlex.split(part)
        scripts = [word for word in words if word.endswith(".py")]
        assert all((ROOT / script).exists() for script in scripts), part
        kind = {"train.py": TrainConfig, "inference.py": InferenceConfig}.get(scripts[0] if scripts else None)
        if kind:
            monkeypatch.setattr("sys.argv", words[words.index(scripts[0]) :])
            config.parse_config(kind)


def test_continuous_integration_runs_the_command_of_the_readme():
    tests = [command for command in COMMANDS if "pytest" in command]
    assert len(tests) == 1 and tests[0].startswith("python3 "), "as .ci/run looks for it"
