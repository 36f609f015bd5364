"""The benchmark of Based's and LAT's other operators runs without a GPU, and what it times is right."""

from __future__ import annotations

import json

from unisono_conformance import numerics
from unisono_tools.bench.based import CHECKED, main


def test_a_run_on_a_cpu(tmp_path, capsys):
    command = ["--device", "cpu", "--repeats", "1", "--only", "RoPE, then", "--output", str(tmp_path / "run")]
    assert main(command) == 0
    (case,) = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["cases"]
    assert [row["contestant"] for row in case["rows"]] == ["unisono", "plain"]
    for row in case["rows"]:
        assert row["forward_ms"] > 0
        assert row["error"] < numerics.formula("bfloat16", CHECKED[1], 1, gradient=True)
    assert (tmp_path / "run.md").read_text(encoding="utf-8").count("| plain |") == 1
    assert "plain" in capsys.readouterr().out
