"""The committed figures and tables show the committed numbers, and are made again from them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from unisono_tools.experiments import figures, redraw

RESULTS = Path(__file__).parents[3] / "docs/results"
REMEDY = "python -m unisono_tools.experiments.redraw docs/results"


def test_they_show_their_numbers(tmp_path):
    """All that have numbers. Figures drawn today have the size of the committed ones: layouts, too, are the present ones."""
    written = redraw.main(RESULTS, tmp_path)
    assert {path.stem for path in RESULTS.glob("*.png") if path.with_suffix(".json").exists()} <= {path.stem for path in written}
    for path in written:
        kept = RESULTS / path.name
        if path.suffix == ".md":
            assert path.read_text("utf-8") == kept.read_text("utf-8"), REMEDY
            continue
        numbers = hashlib.sha256((RESULTS / f"{path.stem}.json").read_bytes()).hexdigest()
        assert figures.marked(path) == figures.marked(kept) == numbers, REMEDY
        with Image.open(path) as made, Image.open(kept) as before:
            assert made.size == before.size, REMEDY


def test_all_that_are_drawn_have_numbers():
    assert {name for name in (*redraw.FIGURES, *redraw.TABLES) if not (RESULTS / f"{name}.json").exists()} == set()


def test_they_say_where_they_come_from():
    """The command, the date, the device and versions; of what was trained the commit and the seeds, too."""
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text("utf-8"))
        for part in content if isinstance(content, list) else [content]:
            made = part["about" if "table" in part else "run"]
            assert {name for name in ("command", "date", "device", "versions") if not made.get(name)} == set(), path.name
            if "curves" in part:
                assert made["commit"], path.name
                assert {curve.get("seeds", 1) for curve in part["curves"]} == {len(made["seeds"])}, path.name
            for row in part["rows"] if "table" in part else ():
                assert made["commit"], path.name
                assert {run["seed"] for run in row["runs"]} <= set(row["seeds"]), (path.name, row["row"])


@pytest.mark.parametrize("module", ["experiments.redraw", "bench.stability"])
def test_a_folder_without_results_is_one_line(module: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", f"unisono_tools.{module}", str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert str(tmp_path) in done.stderr
