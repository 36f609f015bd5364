"""Several processes that train one model: the losses of one, the files of one, and a run that changes its number of processes."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from unisono_tools.config import Schedule, TrainConfig, dump
from unisono_tools.train import checkpoint, train
from unisono_tools.train.logs import read

MODELS = {
    "cram-1m": {"dropout": 0.25},
    "maru-1m": {"n_layers": 1, "head_hidden": 8, "n_banks": 2, "n_slots": 3, "d_memory": 4, "router": "gumbel", "dropout": 0.25},
}


def _start(config: TrainConfig, path: Path, processes: int, before: str = "exec ") -> subprocess.Popen:
    """before: what bash reads before the command."""
    path.write_text(dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "unisono_tools.cli"]
    line = before + shlex.join([*command, "train", "--config", str(path)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(["bash", "-c", line], env=environment, stderr=subprocess.PIPE, text=True)


def _losses(run: Path) -> np.ndarray:
    return np.array([row[name] for row in read(run / "log.jsonl") for name in ("loss", "gradient_norm", "validation_loss") if name in row])


@pytest.mark.parametrize("model", MODELS)
def test_two_processes_are_one_with_two_parts(model, tiny, tmp_path):
    config = tiny(model, MODELS[model], backend="torch", dtype="float64", threads=1, out=str(tmp_path / "two"))
    process = _start(config, tmp_path / "two.yaml", 2)
    _, said = process.communicate()
    assert process.returncode == 0, said
    one = train(dataclasses.replace(config, accumulation=2, out=str(tmp_path / "one")))
    # two summands: their sum has no order
    assert np.array_equal(_losses(tmp_path / "two"), _losses(one.run))
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        assert (checkpoint.steps(tmp_path / "two")[8] / name).read_bytes() == (one.checkpoint / name).read_bytes()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_killed_process_ends_all_and_others_continue(parallel, tiny, tmp_path, close):
    """The one that is left says so at once; one process, or two again, go on to the weights of a run that nothing befell."""
    run = tmp_path / "run"
    config = tiny(
        backend="torch", dtype="float64", threads=1, steps=100_000, eval_every=100_000, checkpoint_every=1, keep=1000, out=str(run),
        parallel=parallel, schedule=Schedule(kind="constant", warmup_steps=3),
    )  # fmt: skip
    process = _start(config, tmp_path / "config.yaml", 2)
    while process.poll() is None and checkpoint.latest(run) is None:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    start = time.monotonic()
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.monotonic() - start < 60
    assert "unisono train: error: process 0: another process has ended" in said, said
    assert "the same command continues from the last checkpoint" in said
    found = checkpoint.newest(run)
    assert found is not None
    steps = found[1].step + 2
    again = dataclasses.replace(config, steps=steps, out=str(tmp_path / "again"))
    shutil.copytree(run, again.out)
    # what the kill left half-written, had it come then; the first checkpoint has none before it
    newest = checkpoint.steps(tmp_path / "again")[found[1].step] / checkpoint.OPTIMIZER
    damaged = found[1].step > 1
    if damaged:
        newest.write_bytes(newest.read_bytes()[:-7])
    two = _start(again, tmp_path / "again.yaml", 2)
    _, said = two.communicate(timeout=240)
    assert two.returncode == 0, said
    assert (said.count("going back to") == 1) == damaged, said
    alone = dataclasses.replace(config, steps=steps, parallel="ddp", accumulation=2)
    ends = [checkpoint.load(train(one).checkpoint) for one in (alone, dataclasses.replace(alone, out=str(tmp_path / "whole")))]
    ends.append(checkpoint.load(checkpoint.steps(tmp_path / "again")[steps]))
    for name in ("params", "optimizer"):
        one, whole, pair = (np.concatenate([getattr(end, name)[n].ravel() for n in sorted(getattr(end, name))]) for end in ends)
        close(one, whole, "float64", name)
        close(pair, whole, "float64", name)


def test_a_disk_that_is_full(tiny, tmp_path):
    """The one that writes says so, the other one that it is alone; the same command goes on once there is room."""
    config = tiny(backend="torch", overrides={"d_model": 64}, threads=1, steps=2)
    process = _start(config, tmp_path / "config.yaml", 2, "ulimit -f 64; exec ")
    _, said = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "File too large" in said
    assert "Traceback" not in said.split("torch/distributed")[0], said
    assert checkpoint.latest(tmp_path / "run") is None
    process = _start(config, tmp_path / "config.yaml", 2)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert list(checkpoint.steps(tmp_path / "run")) == [2]


def test_a_run_that_ended_leaves_at_once(tiny, command, monkeypatch, tmp_path):
    """The interpreter's own end now and then aborted one of several, or waited for ever, and torchrun called the run failed."""
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("unisono_tools.backends.torch.ranks.Ranks.replicate", lambda _, objective, fixed: objective)
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    (tmp_path / "config.yaml").write_text(dump(tiny(backend="torch", threads=1)))
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    assert command("train", "--config", tmp_path / "config.yaml")[0] == 0
    assert left == [0]
    distributed.destroy_process_group()


def test_a_batch_that_does_not_divide(tiny, tmp_path):
    process = _start(tiny(backend="torch", batch_size=3), tmp_path / "config.yaml", 2)
    _, said = process.communicate()
    assert process.returncode != 0
    assert "batch_size: 3 does not divide into 2 processes times accumulation 1; use a multiple of 2" in said
