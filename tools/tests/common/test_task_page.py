"""The page of tasks: drawn from its numbers, and a picture of each kind of example."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from unisono_tools.experiments import redraw, task_page


@pytest.mark.usefixtures("small_sets")
def test_the_page_says_what_was_measured(tmp_path, monkeypatch):
    lines = {
        "copying": ("copying", {"shortest": 1, "longest": 4, "test": [4]}, 64),
        "image": ("image", {"side": 4}, 0),
        "dna": ("dna", {"train": [16], "test": [16, 32]}, 0),
        "video": ("video", {"side": 4, "frames": 2}, 0),
    }
    monkeypatch.setattr(task_page, "LINES", lines)
    monkeypatch.setattr(task_page, "PICTURES", {name: (task, options) for name, (task, options, _) in lines.items()})
    task_page.main(["--output", str(tmp_path / "tasks"), "--pictures", "dna", "image"])
    content = json.loads((tmp_path / "tasks.json").read_text())
    page = (tmp_path / "tasks.md").read_text()
    assert list(content["tasks"]) == list(lines)
    for found in content["tasks"].values():
        for scores in found["baselines"].values():
            assert all(f"{what} {score:.4f}" in page for what, score in scores.items())
    assert "| `image` | 54, 6, 20 | images | 16 | accuracy |" in page
    assert "| `dna` | ∞, " in page
    assert page == task_page.markdown(content)
    assert "tasks" in redraw.TABLES
    for name in ("dna", "image"):
        with Image.open(tmp_path / f"task-{name}.png") as picture:
            assert picture.width > 2 * picture.height
    # one line measured anew keeps the others
    task_page.main(["--output", str(tmp_path / "tasks"), "--only", "copying", "--pictures"])
    assert json.loads((tmp_path / "tasks.json").read_text())["tasks"] == content["tasks"]
