"""The benchmark runs without a GPU, and what it times is right."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import subprocess
from pathlib import Path

import pytest
import torch
import torch._inductor
from unisono_conformance import numerics
from unisono_spec.contract import preset
from unisono_tools import bench, experiments
from unisono_tools.backends.torch.compiling import compile_step
from unisono_tools.bench import linear, report
from unisono_tools.bench.__main__ import main
from unisono_tools.bench.cases import SUITES, Case


def test_a_run_on_a_cpu(tmp_path, capsys):
    assert main(["--only", "B2", "--peers", "eager", "--repeats", "1", "--output", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert [case["op"] for case in result["cases"]] == ["decayed_sum", "weighted_sum"]
    for case in result["cases"]:
        assert {row["contestant"] for row in case["rows"]} >= {"torch eager"}
        for row in case["rows"]:
            assert row["forward_ms"] > 0
            assert row["backward_ms"] > 0
            # of the largest value: ξ is float32; ∂x is rounded to bfloat16 once
            assert row["error_xi"] < numerics.formula("float32", case["length"])
            assert row["error_dx"] < numerics.formula("bfloat16", case["length"], 1, gradient=True)
    assert (tmp_path / "run.md").read_text(encoding="utf-8").count("| torch eager |") == 2
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert "Floor: forward" in capsys.readouterr().out


def test_an_unknown_case_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "no such"])
    assert "there are: decayed_sum" in capsys.readouterr().err


GIVEN = {"stability": ["RUN"], "tune": ["linear_attention"], "clip": ["RUN"], "scales": ["RUN"]}
APART = ("jax", "__main__")  # test_jax.py's, and every suite's
WRITE = [
    path
    for folder in (bench, experiments)
    for path in sorted(Path(folder.__path__[0]).glob("*.py"))
    if path.stem not in APART and '"--output"' in path.read_text("utf-8")
]


@pytest.mark.parametrize("path", WRITE, ids=lambda path: path.stem)
def test_where_nothing_can_be_written_nothing_is_done(path, tmp_path, capsys):
    (tmp_path / "file").touch()
    module = importlib.import_module(f"unisono_tools.{path.parent.name}.{path.stem}")
    with pytest.raises(SystemExit, match="2"):
        module.main([*GIVEN.get(path.stem, []), "--output", str(tmp_path / "file" / "page")])
    assert "cannot be written, for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"), [("", "names no file"), ("a\0b", "names no file"), ("page", "stands there"), ("x" * 300, "cannot be")]
)
def test_names_that_no_page_can_have(name, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").mkdir()
    with pytest.raises(SystemExit, match="2"):
        report.ready(argparse.ArgumentParser(), Path(name))
    assert said in capsys.readouterr().err


def test_floors_count_each_byte_once():
    elements = 8 * 16384 * 1024
    fixed, adaptive = SUITES["cram"][:2]
    assert fixed.floor_bytes() == (4 * elements, 6 * elements)
    assert adaptive.floor_bytes() == (4 * elements + 4 * 8 * 16384, 6 * elements + 8 * 8 * 16384)
    assert Case("decayed_sum", 1, 2, 3, "float32", "float32").floor_bytes() == (48, 72)


def test_a_contestant_that_failed_has_no_figures():
    row = {"contestant": "x", "error_xi": float("nan"), "error_dx": float("nan"), "peak_bytes": None, "note": "failed: why"}
    case = {"name": "c", "floor_ms": [1.0, 1.0], "rows": [{**row, "forward_ms": float("nan"), "backward_ms": float("nan")}]}
    text = report.markdown({"run": {}, "ceilings": {"copy_bytes_per_s": 1e9, "matmul_flop_per_s": 1e12}, "cases": [case]})
    assert "| x | – | – | – | – | – | – | – | – | – |" in text
    assert "x: failed: why." in text


def test_marks_say_what_was_met():
    rows = [("ms", 0.44, 0.65, 0.45), ("ms", 0.5, 0.65, 0.45), ("ms", 0.7, 0.65, 0.45), ("times", 5.0, 5, None), ("times", 4.9, 5, None)]
    said = [line.split(" | ")[-1] for line in report.marks(rows)[2:]]
    assert said == ["must and aim |", "must |", "no |", "must |", "no |"]


def test_small_kernels_share_launches_where_that_was_measured(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: given.append(how))
    for name, device in (("mamba-1m", "cuda"), ("mamba-1m", "cpu"), ("maru-1m", "cuda")):
        compile_step(print, preset(name), torch.device(device))
    assert given == [{"dynamic": False, "options": {"combo_kernels": True}}, {"dynamic": False}, {"dynamic": False}]
    assert "combo_kernels" in torch._inductor.list_options()


def test_models_beside_each_other_stay_on_cores_of_their_own(tmp_path, monkeypatch, capsys):
    asked = []

    def point(command, **how):
        name, length = command[-2], int(command[-1])
        asked.append((name, length, int(command[command.index("--core") + 1])))
        said = linear.Point(name, length, length / 1e3, length / 5e2, length, length / 2e3, 0.0 if name == "s4d" else length)
        return subprocess.CompletedProcess(command, 0, json.dumps(dataclasses.asdict(said)), "")

    monkeypatch.setattr(linear, "cores", lambda: [3, 5])
    monkeypatch.setattr(subprocess, "run", point)
    monkeypatch.setattr(linear, "plot", lambda path, points: None)
    given = ["--params", "1M", "--models", "maru", "s4d", "lat", "--longest", "4096", "--output", str(tmp_path / "page")]
    assert linear.main([*given, "--beside", "2"]) == 0
    assert {core for _, _, core in asked} <= {3, 5}
    for name in ("maru", "s4d", "lat"):
        assert [length for each, length, _ in asked if each == name] == [1024, 2048, 4096]
        assert len({core for each, _, core in asked if each == name}) == 1
    kept = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))
    assert [(p["model"], p["length"]) for p in kept["points"]] == [(m, n) for m in ("maru", "s4d", "lat") for n in (1024, 2048, 4096)]
    assert "--beside 2" in kept["run"]["command"]
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| s4d | 1.00 (1.00–1.00) | – |" in page
    assert "| lat | 1.00 (1.00–1.00) | 1.00 (1.00–1.00) |" in page
    with pytest.raises(SystemExit):
        linear.main([*given, "--beside", "3"])
    assert "--beside 3: use 1 to 2" in capsys.readouterr().err


def test_a_peak_is_forgotten_and_told_anew():
    linear.forget_peak()
    held = bytearray(64 << 20)
    held[::4096] = b"1" * (len(held) // 4096)
    most = linear.peak_mebibytes()
    del held
    assert linear.forget_peak() < most - 32
    assert linear.peak_mebibytes() < most - 32
