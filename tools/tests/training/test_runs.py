"""Whole runs through the command: killed and resumed, diverged, continued, evaluated by other backends."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from unisono_conformance import judge, numerics
from unisono_spec.contract import InputError
from unisono_spec.contract.files import load_params
from unisono_tools import evaluation
from unisono_tools.config import Optimizer, TrainConfig, dump
from unisono_tools.train import checkpoint, progress, train
from unisono_tools.train.logs import read
from unisono_tools.train.loop import Diverged

STEPS = 30
# tests that run in the background hand on that they ignore the keyboard; a preexec_fn would fork a threaded JAX
COMMAND = """
import signal
from unisono_tools.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
raise SystemExit(main())
"""


def _start(config: Path, *argv: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NPROC": "1"}
    command = [sys.executable, "-c", COMMAND, "train", "--config", str(config), *argv]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _rows(run: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in ("time", "rate")} for row in read(run / "log.jsonl")]


def test_long_evaluations_say_how_far_they_are(backend, tiny, command, capsys, monkeypatch):
    """Lines of no terminal, of which one comes every ten seconds."""
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    monkeypatch.setattr(evaluation, "CHUNK", 16)
    plan = tiny(backend=backend)
    result = train(plan)
    lines = capsys.readouterr().err.splitlines()
    for step in (4, 8):
        told = [line for line in lines if line.startswith(f"step {step}/8  evaluating")]
        assert told == [f"step {step}/8  evaluating {share}%" for share in (0, 25, 50, 75)]
    code, _, said = command("eval", result.run, "--backend", backend, "--limit", 64)
    assert code == 0
    assert [line.split()[:2] for line in said.splitlines()] == [["evaluating", f"{share}%"] for share in (25, 50, 75)]
    assert all(line.endswith(" min left") for line in said.splitlines())


def test_on_a_terminal_an_evaluation_is_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    with progress.Evaluating(Console(file=file, force_terminal=True, width=80)) as told:
        told(0.5)
        assert told.bar is not None
        told.bar.refresh()
    assert "50%" in file.getvalue()
    file = io.StringIO()
    with progress.ProgressBar(0, 8, "tokens", Console(file=file, force_terminal=True, width=80)) as bar:
        bar.evaluating(0.25)
        assert bar.bar is not None
        bar.bar.refresh()
    assert "evaluating 25%" in file.getvalue()


def test_killed_at_random_moments_ends_with_the_same_bits(backend, tiny, tmp_path):
    config = tiny(
        overrides={"dropout": 0.25}, backend=backend, steps=STEPS, checkpoint_every=1, eval_every=7, threads=1, out=str(tmp_path / "whole")
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    whole = _start(path)
    killed, run = 0, tmp_path / "killed"
    moments = random.Random(0)
    while True:
        process = _start(path, "--out", str(run))
        if killed == 2:
            _, errors = process.communicate()
            assert process.returncode == 0, errors
            break
        # from the first checkpoint of this process on, at any moment
        begun = len(checkpoint.steps(run)), checkpoint.latest(run)
        while process.poll() is None and (len(checkpoint.steps(run)), checkpoint.latest(run)) == begun:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        killed += 1
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    assert list(checkpoint.steps(run)) == list(checkpoint.steps(tmp_path / "whole"))
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        for ours, theirs in zip(checkpoint.steps(run).values(), checkpoint.steps(tmp_path / "whole").values(), strict=True):
            assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert _rows(run) == _rows(tmp_path / "whole")
    assert [row["step"] for row in _rows(run) if "loss" in row] == list(range(1, STEPS + 1))


def test_a_run_stops_when_its_time_is_up_and_goes_on(backend, tiny):
    config = tiny(backend=backend, steps=4)
    stopped = train(config, seconds=0)
    assert stopped.steps == 1
    assert checkpoint.latest(stopped.run) == stopped.checkpoint
    assert train(config).steps == 4


@pytest.mark.parametrize(
    ("weight", "value", "said"), [("input.weight", 3e38, "loss: nan"), ("head.weight", 1e25, "gradient's norm: (inf|nan)")]
)
def test_divergence_stops_and_keeps_the_last_good_checkpoint(backend, weight, value, said, tiny, tmp_path):
    train(tiny(backend=backend, steps=4, optimizer=Optimizer(lr=1e-3)))
    good = checkpoint.latest(tmp_path / "run")
    assert good is not None
    # a checkpoint whose next loss or gradient overflows
    saved = checkpoint.load(good)
    saved.params[weight][::2] = value
    checkpoint.save(tmp_path / "run", saved)
    kept = (good / checkpoint.MODEL).read_bytes()
    why = rf"{said} at step 5; the last good checkpoint is .*step-00000004; its batch is .*; lower optimizer\.lr"
    with pytest.raises(Diverged, match=why):
        train(tiny(backend=backend, steps=8, optimizer=Optimizer(lr=1e-3)))
    assert checkpoint.latest(tmp_path / "run") == good
    assert (good / checkpoint.MODEL).read_bytes() == kept


def test_divergence_of_the_command(backend, tiny, refused, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump(tiny(backend=backend, optimizer=Optimizer(lr=1e30))))
    said = refused("train", "--config", path)
    assert "at step" in said
    assert "no checkpoint had been saved yet" in said or "step-" in said
    for step, folder in checkpoint.steps(tmp_path / "run").items():
        assert checkpoint.load(folder).step == step


def test_the_same_folder_with_another_config_is_refused(backend, tiny, refused, command, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump(tiny(backend=backend, steps=2)))
    assert command("train", "--config", path)[0] == 0
    assert "seq_len is 16 there and 8 here" in refused("train", "--config", path, "--seq_len", 8)
    assert "model.overrides.d_model" in refused("train", "--resume", tmp_path / "run", "--model.overrides.d_model", 12)
    code, out, _ = command("train", "--resume", tmp_path / "run", "--steps", 3)
    assert code == 0
    assert "step-00000003" in out
    about = json.loads((tmp_path / "run/checkpoints/step-00000003/trainer.json").read_text())
    assert about["step"] == 3
    assert about["tokenizer"] == "bytes"
    assert {"python", "numpy", "unisono"} <= set(about["versions"])


def test_a_full_disk_while_training(backend, tiny, tmp_path, monkeypatch):
    config = tiny(backend=backend)
    real = os.fsync

    def full(handle: int) -> None:
        if checkpoint.latest(tmp_path / "run"):
            raise OSError(28, os.strerror(28))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        train(config)
    monkeypatch.undo()
    assert list(checkpoint.steps(tmp_path / "run")) == [2]
    assert train(config).checkpoint.name == "step-00000008"


def test_a_trained_model_in_numpy(backend, tiny, command, tmp_path, close):
    config = tiny(backend=backend, steps=20, optimizer=Optimizer(lr=1e-2))
    result = train(config)
    assert result.best is not None
    rows = read(tmp_path / "run" / "log.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    shown = {}
    for name in (backend, "numpy"):
        code, out, _ = command("eval", tmp_path / "run", "--backend", name)
        assert code == 0
        assert out.splitlines()[0].endswith(f"backend {name}")
        shown[name] = float(out.split("bits per token")[1].split()[0])
    assert abs(shown[backend] - shown["numpy"]) <= numerics.printed(6) + numerics.formula("float32", 2**8) * shown["numpy"]
    texts = {command("generate", tmp_path / "run", "--backend", name, "--temperature", 0, "--max_new_tokens", 24)[1] for name in shown}
    assert len(texts) == 1


def test_starting_from_another_run(backend, tiny, tmp_path, refused):
    first = train(tiny(backend=backend, steps=2))
    config = tiny(backend=backend, steps=1, init_from=str(first.run), out=str(tmp_path / "second"), optimizer=Optimizer(lr=1e-12))
    second = train(config)
    before, after = (load_params(checkpoint.model_file(result.checkpoint))[1] for result in (first, second))
    judge.same(after, before, numerics.rounding("float32", 1))
    with pytest.raises(InputError, match=r"init_from: .* is of another model \(.*d_model"):
        train(tiny(backend=backend, overrides={"d_model": 12}, init_from=str(first.run), out=str(tmp_path / "third")))


def test_a_corpus_that_is_too_short(backend, tiny, tmp_path):
    with pytest.raises(InputError, match="seq_len: 100000"):
        train(tiny(backend=backend, seq_len=100_000))
    assert not (tmp_path / "run").exists()


def test_a_backend_that_is_not_there(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"'torch' is not installed here .*pip install 'unisono\[torch\]'"):
        train(TrainConfig(backend="torch"))
