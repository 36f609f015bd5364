"""The tables that are made from reports."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from unisono_spec.contract.errors import InputError

FILE = importlib.util.spec_from_file_location("status", Path(__file__).parents[2] / ".ci/status.py")
assert FILE is not None
assert FILE.loader is not None
status: Any = importlib.util.module_from_spec(FILE)
FILE.loader.exec_module(status)
LINE = {"property": "P1", "title": "equals the spec", "arch": "cram", "outcome": "passed", "examples": 3, "worst": 0.25}


def _reports(folder: Path, **changes) -> Path:
    for room in status.ROOMS:
        lines = [LINE, {**LINE, "property": "P10"}, {**LINE, "outcome": "failed" if room == "jax" else "passed"}]
        (folder / f"{room}.json").write_text(json.dumps({"profile": "ci", "unmet": [], "lines": lines, **changes}))
    return folder


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = _reports(tmp_path)
    for name in ("readme", "page"):
        (tmp_path / name).write_text(f"before\n{status.BEGIN}\nold\n{status.END}\nafter\n")
    words = ["status", str(reports), "--readme", str(tmp_path / "readme"), "--page", str(tmp_path / "page")]
    monkeypatch.setattr("sys.argv", words)
    assert status.main() == 0
    readme, page = ((tmp_path / name).read_text() for name in ("readme", "page"))
    assert readme.startswith("before\n")
    assert readme.endswith("\nafter\n")
    assert "old" not in readme
    assert "| `cram` | 9 examples, 25% | 1 of 3 fail | 9 examples, 25% |" in readme
    assert "| P1 | equals the spec | N P T O | · |" in page
    assert page.index("| P1 |") < page.index("| P10 |")
    (tmp_path / "page").write_text("no markers")
    assert status.main() == 2


@pytest.mark.parametrize("changes", [{"profile": "dev"}, {"unmet": ["model lat"]}, {"lines": [LINE, {**LINE, "outcome": "died"}]}])
def test_half_a_judgement_is_refused(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(InputError, match="not the whole judgement"):
        status.read(_reports(tmp_path, **changes))
    with pytest.raises(InputError, match="no such report"):
        status.read(tmp_path / "nowhere")
