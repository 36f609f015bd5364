"""The benchmark of linear and multi-scale attention runs without a GPU, and what it times is right."""

from __future__ import annotations

import json

from unisono_conformance import numerics
from unisono_tools.bench.attention import SUITES, main


def test_a_run_on_a_cpu(tmp_path, capsys):
    assert main(["--repeats", "1", "--output", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert [len(case["rows"]) for case in result["cases"]] == [2, 1, 2]
    for case in result["cases"]:
        for row in case["rows"]:
            assert row["forward_ms"] > 0
            assert row["error_o"] < numerics.formula("float32", case["length"])
            assert row["error_gradient"] < numerics.formula("float32", case["length"], gradient=True)
    text = (tmp_path / "run.md").read_text(encoding="utf-8")
    assert text.count("| plain |") == text.count("| unisono | ") == 2
    assert "| shape | floor | unisono |\n" in text
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert "plain" in capsys.readouterr().out


def test_floors_count_each_byte_once():
    elements = 8 * 4096 * 16 * 64
    assert SUITES["attention"][0].floor_bytes() == (8 * elements, 14 * elements)
