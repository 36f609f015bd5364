"""The committed figures and tables show the committed numbers, and are made again from them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image
from unisono_tools.experiments import redraw

RESULTS = Path(__file__).parents[3] / "docs/results"
REMEDY = "python -m unisono_tools.experiments.redraw docs/results"


def test_they_show_their_numbers(tmp_path):
    """Figures drawn today have the size of the committed ones: layouts, too, are the present ones."""
    for path in redraw.main(RESULTS, tmp_path):
        kept = RESULTS / path.name
        if path.suffix == ".md":
            assert path.read_text("utf-8") == kept.read_text("utf-8"), REMEDY
            continue
        numbers = hashlib.sha256((RESULTS / f"{path.stem}.json").read_bytes()).hexdigest()
        assert redraw.shown(path) == redraw.shown(kept) == numbers, REMEDY
        with Image.open(path) as made, Image.open(kept) as before:
            assert made.size == before.size, REMEDY


def test_every_committed_figure_of_numbers_is_one():
    pictures = {path.stem for path in RESULTS.glob("*.png") if path.with_suffix(".json").exists()}
    assert pictures == set(redraw.FIGURES)
