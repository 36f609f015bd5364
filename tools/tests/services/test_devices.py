"""The command starts the processes that --devices asks for; a run goes on with another number of them; the loop's benchmark."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from unisono_spec.contract import InputError
from unisono_tools.bench import loop as benchmark
from unisono_tools.bench import scaling
from unisono_tools.bench.loop import main
from unisono_tools.config import TrainConfig, dump
from unisono_tools.train import checkpoint, train
from unisono_tools.train.logs import read
from unisono_tools.train.loop import Run

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def _command(config: TrainConfig, path, *more: str) -> list[str]:
    path.write_text(dump(config))
    return [sys.executable, "-m", "unisono_tools.cli", "train", "--config", str(path), *more]


def test_a_run_goes_on_with_another_number_of_processes(tiny, tmp_path, close):
    """Shards of two write what one reads, and the other way round; each part keeps its dropout."""
    config = tiny("cram-1m", {"dropout": 0.25}, backend="torch", dtype="float64", threads=1, steps=4, ema=0.9, keep=9)
    whole = train(dataclasses.replace(config, accumulation=2, steps=8, out=str(tmp_path / "whole")))
    more = dataclasses.replace(config, devices=2, parallel="fsdp", out=str(tmp_path / "run"), steps=8)
    # the same schedule, stopped half-way by a signal that torchrun hands on
    process = subprocess.Popen(_command(dataclasses.replace(more, steps=8, max_minutes=1e-9), tmp_path / "a.yaml"), env=ENVIRONMENT)
    assert process.wait(timeout=300) == 0
    stopped = checkpoint.newest(tmp_path / "run")
    assert stopped is not None
    assert stopped[1].step == 1
    ended = train(dataclasses.replace(more, devices=1, parallel="ddp", accumulation=2))
    for name in ("params", "optimizer", "average"):
        ours, theirs = (getattr(checkpoint.load(result.checkpoint), name) for result in (ended, whole))
        close(*(np.concatenate([arrays[n].ravel() for n in sorted(arrays)]) for arrays in (ours, theirs)), "float64", name)


def test_a_signal_reaches_all_and_exits_as_shells_expect(tiny, tmp_path):
    config = tiny(backend="torch", devices=2, steps=100_000, eval_every=100_000, checkpoint_every=5, threads=1)
    process = subprocess.Popen(_command(config, tmp_path / "a.yaml"), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and checkpoint.latest(tmp_path / "run") is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "which is saved; `unisono train --resume" in " ".join(said.split())
    found = checkpoint.newest(tmp_path / "run")
    assert found is not None
    assert max(row["step"] for row in read(tmp_path / "run/log.jsonl")) <= found[1].step


def test_more_devices_than_there_are(tiny):
    with pytest.raises(InputError, match=r"devices: 2 with 1 process\(es\); start as many, as in `torchrun --nproc-per-node 2"):
        train(tiny(backend="torch", devices=2))
    with pytest.raises(InputError, match=r"devices: 64, there are \d+ here; .*xla_force_host_platform_device_count=64"):
        train(tiny(backend="jax", devices=64, batch_size=64))
    with pytest.raises(InputError, match=r"context: 2 does not divide 1 device\(s\); give a multiple of 2 in devices"):
        train(tiny(backend="jax", context=2))
    with pytest.raises(InputError, match=r"context: 2, and this model's state grows with what it reads"):
        train(tiny("transformer-1m", {"head_width": 4}, backend="jax", context=2))


def test_the_benchmark_of_the_loop(tmp_path):
    words = [
        "--device",
        "cpu",
        "--model",
        "cram-demo",
        "--batch_size",
        "2",
        "--seq_len",
        "16",
        "--steps",
        "10",
        "--with",
        "dtype=float16,ema=0.9",
    ]
    assert main([*words, "--output", str(tmp_path / "loop")]) == 0
    (run,) = json.loads((tmp_path / "loop.json").read_text())
    assert run["run"]["command"] == f"python -m unisono_tools.bench.loop {' '.join(words)}"
    assert [row["with"] for row in run["rows"]] == ["", "dtype=float16,ema=0.9"]
    assert all(row["loop"] > 0 and row["bare"] > 0 and row["memory"].endswith("iB") for row in run["rows"])


def test_rounds_of_the_benchmark_of_the_loop(tmp_path, monkeypatch):
    """Bare steps and loops in turn, and their medians; in float16 the bare step scales its loss as well."""
    bare, loop = iter([100.0, 300.0, 200.0]), iter([90.0, 80.0, 260.0, 270.0, 190.0, 180.0])
    monkeypatch.setattr(benchmark, "bare_rate", lambda config: next(bare))
    monkeypatch.setattr(benchmark, "pace", lambda config: (next(loop), 1.0))
    words = ["--device", "cpu", "--steps", "10", "--together", "--rounds", "3", "--with", "ema=0.9"]
    assert main([*words, "--output", str(tmp_path / "loop")]) == 0
    (run,) = json.loads((tmp_path / "loop.json").read_text())
    assert [(row["with"], row["bare"], row["loop"], row["rounds"]) for row in run["rows"]] == [("", 200, 190, 3), ("ema=0.9", 200, 180, 3)]
    with pytest.raises(SystemExit):
        main([*words, "--rounds", "0"])


def test_the_benchmark_of_scaling(tmp_path, monkeypatch):
    """Two devices beside one that reads as much as each; it neither evaluates nor saves."""
    monkeypatch.setattr(Run, "_save", None)
    monkeypatch.setattr(Run, "_evaluate", None)
    words = ["--device", "cpu", "--model", "cram-demo", "--batch_size", "4", "--seq_len", "16", "--steps", "10"]
    assert scaling.main([*words, "--output", str(tmp_path / "scaling")]) == 0
    (run,) = json.loads((tmp_path / "scaling.json").read_text())
    assert [(row["devices"], row["batch_size"]) for row in run["rows"]] == [(1, 4), (1, 2)]
    one, half = run["rows"]
    two = {**one, "devices": 2, "with": "parallel=fsdp", "tokens_per_s": 1.5 * half["tokens_per_s"]}
    compiled = {**two, "with": "parallel=fsdp,compile=true"}
    scaling.write([{**run, "rows": [two, compiled]}, run], tmp_path / "scaling")
    first, second, *_ = (line for line in (tmp_path / "scaling.md").read_text().splitlines() if line.startswith("| 1 |"))
    assert first.endswith(f"| 2 | parallel=fsdp | 2 × 16 | {two['tokens_per_s']:,.0f} | 150% of call 2 |")
    assert second.endswith("|  |")  # no device alone was compiled
    assert [scaling.alone(text) for text in ("parallel=ddp", "context=2,compile=true,accumulation=4")] == ["", "compile=true"]
