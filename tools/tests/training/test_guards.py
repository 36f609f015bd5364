"""What keeps a run whole: signals, a lock on its folder, a fingerprint of its corpus, checkpoints that fall back."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from unisono_spec.contract import InputError
from unisono_spec.contract.files import load_arrays
from unisono_tools import evaluation, signals
from unisono_tools.backends import open_trainer
from unisono_tools.config import DataChoice, Optimizer, dump
from unisono_tools.train import checkpoint, loop, train
from unisono_tools.train import loader as loading
from unisono_tools.train.logs import read
from unisono_tools.train.loop import Diverged


@pytest.fixture
def signalled(monkeypatch) -> Iterator[Callable[[signal.Signals, int], None]]:
    """Have this process get a signal while it draws the batch of a step."""
    before = {}

    def at(sent: signal.Signals, step: int) -> None:
        # a job in the background has the keyboard's signal ignored
        before[sent] = signal.signal(sent, signal.default_int_handler)
        left = [sent]

        def loader(*args):
            batches = loading.loader(*args)

            def drawn(now: int):
                if now == step and left:
                    os.kill(os.getpid(), left.pop())
                return batches(now)

            return drawn

        monkeypatch.setattr("unisono_tools.train.datamodule.loader", loader)

    yield at
    for sent, handler in before.items():
        signal.signal(sent, handler)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_and_says_how_to_continue(backend, sent, tiny, tmp_path, command, signalled):
    path, run = tmp_path / "config.yaml", tmp_path / "a run"
    config = tiny(backend=backend, steps=6, eval_every=100, checkpoint_every=100, out=str(run))
    path.write_text(dump(config))
    signalled(sent, 2)
    code, _, errors = command("train", "--config", path)
    assert code == 128 + sent
    assert list(checkpoint.steps(run)) == [3]
    assert f"{sent.name}: stopped at step 3, which is saved; `unisono train --resume '{run}'` continues" in " ".join(errors.split())
    assert [row["step"] for row in read(run / "log.jsonl")] == [1, 2, 3]
    if sent is signal.SIGTERM:
        # what was interrupted ends with the bits of what was not
        assert command("train", "--resume", run)[0] == 0
        whole = train(dataclasses.replace(config, out=str(tmp_path / "whole")))
        for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
            assert (checkpoint.steps(run)[6] / name).read_bytes() == (whole.checkpoint / name).read_bytes()


def test_a_press_that_python_drops_ends_the_run(backend, tiny, command, tmp_path, monkeypatch):
    """As it does where the garbage collector is at work, before the run has begun."""
    monkeypatch.setattr(signals, "_pressed", [])
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:

        def lost(train, config):
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            return open_trainer(train, config)

        monkeypatch.setattr(loop, "open_trainer", lost)
        (tmp_path / "config.yaml").write_text(dump(tiny(backend=backend)))
        assert command("train", "--config", tmp_path / "config.yaml")[0] == 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, handler)
    assert list(checkpoint.steps(tmp_path / "run")) == [1]


def test_a_signal_to_another_process_ends_this_one_alike(backend, tiny, monkeypatch):
    """torchrun would wait for minutes on a machine whose process ended well."""
    monkeypatch.setattr(importlib.import_module(f"unisono_tools.backends.{backend}").Trainer, "any", lambda *_: True)
    result = train(tiny(backend=backend))
    assert (result.steps, result.signal) == (1, signal.SIGTERM)


def test_a_signal_while_evaluating_leaves_the_evaluation_out(tiny, tmp_path, monkeypatch):
    def evaluate(*args, progress, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        progress(0.0)
        raise AssertionError("not reached")

    monkeypatch.setattr("unisono_tools.train.datamodule.evaluate", evaluate)
    result = train(tiny(eval_every=3))
    assert (result.steps, result.signal, result.best) == (3, signal.SIGTERM, None)
    assert list(checkpoint.steps(tmp_path / "run")) == [2, 3]


def test_an_evaluation_that_a_signal_left_out_is_made_up(tiny, tmp_path, monkeypatch):
    """The log, the best and the weights are those of a run without a signal, at an evaluation in the middle and at the last."""
    whole = train(tiny(out=str(tmp_path / "whole")))
    plain, left = evaluation.evaluate, {4, 8}

    def evaluate(*args, **kwargs):
        step = max(checkpoint.steps(run), default=0) + 2
        if step in left:
            left.remove(step)
            os.kill(os.getpid(), signal.SIGTERM)
            kwargs["progress"](0.0)
        return plain(*args, **kwargs)

    monkeypatch.setattr("unisono_tools.train.datamodule.evaluate", evaluate)
    run = tmp_path / "run"
    first = train(tiny())
    assert (first.steps, first.signal, first.best) == (4, signal.SIGTERM, None)
    assert checkpoint.load(first.checkpoint).unjudged
    second = train(tiny())
    assert second.steps == 8
    assert second.best is not None
    assert second.best.step == 4
    assert checkpoint.load(second.checkpoint).unjudged
    third = train(tiny())
    assert third.best == whole.best
    ours, theirs = (checkpoint.load(result.checkpoint) for result in (third, whole))
    assert not ours.unjudged
    assert ours.best == theirs.best
    shown = [[{k: v for k, v in row.items() if k not in ("time", "rate")} for row in read(r / "log.jsonl")] for r in (run, whole.run)]
    assert shown[0] == shown[1]
    assert train(tiny()).best == whole.best  # and no more


def test_one_process_in_a_folder(tiny, tmp_path, refused):
    path, run = tmp_path / "config.yaml", tmp_path / "run"
    path.write_text(dump(tiny()))
    holder = (
        "import sys, pathlib; from unisono_tools.train.guard import alone_in\n"
        "with alone_in(pathlib.Path(sys.argv[1])): print(1, flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", holder, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    said = refused("train", "--config", path, "--seed", 1)
    assert f"in use by process {process.pid} on " in said
    assert "choose another --out" in said
    process.kill()
    process.communicate()
    # a killed process lets go
    assert train(tiny(steps=1)).steps == 1


def test_another_text_is_not_the_same_run(backend, tiny, tmp_path, refused, command):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("what was learned from " * 40)
    config = dataclasses.replace(tiny(backend=backend, steps=2), data=DataChoice(corpus=str(corpus)))
    train(config)
    corpus.write_text("what was learned From " * 40)
    said = refused("train", "--resume", tmp_path / "run", "--steps", 3)
    digest = json.loads((tmp_path / "run/checkpoints/step-00000002/trainer.json").read_text())["corpus"]
    assert str(corpus) in said
    assert f"step-00000002 learned from {digest[:12]}" in said
    corpus.write_text("what was learned from " * 40)
    assert train(dataclasses.replace(config, steps=3)).steps == 3
    # the same text elsewhere is the same; another one is named
    moved = corpus.rename(tmp_path / "moved.txt")
    assert command("train", "--resume", tmp_path / "run", "--steps", 4, "--data.corpus", moved)[0] == 0
    corpus.write_text("what was learned From " * 40)
    said = refused("train", "--resume", tmp_path / "run", "--steps", 5, "--data.corpus", corpus)
    assert f"data.corpus is '{moved}' there and '{corpus}' here" in said


def test_a_damaged_checkpoint_falls_back_aloud(backend, tiny, tmp_path, capsys):
    config = tiny(backend=backend, steps=8, threads=1, keep=4)
    whole = train(config)
    wanted = (whole.checkpoint / checkpoint.MODEL).read_bytes()
    broken = whole.checkpoint / checkpoint.OPTIMIZER
    broken.write_bytes(broken.read_bytes()[:-9])
    again = train(config)
    said = " ".join(capsys.readouterr().err.split())
    assert "step-00000008/optimizer.safetensors" in said
    assert "going back to" in said
    assert "step-00000006" in said
    assert (again.checkpoint / checkpoint.MODEL).read_bytes() == wanted


@pytest.mark.parametrize(("content", "split"), [("four score and sev", 1), ("x" * 300, 15)])
def test_a_validation_split_that_says_nothing(backend, content, split, tiny, tmp_path, refused):
    corpus = tmp_path / "short.txt"
    corpus.write_text(content)
    config = dataclasses.replace(tiny(backend=backend, seq_len=4), data=DataChoice(corpus=str(corpus)))
    with pytest.raises(InputError, match=rf"short\.txt: its validation split has {split} tokens?, too few .*data\.validation"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_short_corpus_to_validate_on_is_the_one_that_is_named(tiny, tmp_path, text):
    (tmp_path / "short.txt").write_text("ab")
    config = dataclasses.replace(tiny(), data=DataChoice(corpus=str(text), validation=str(tmp_path / "short.txt")))
    with pytest.raises(InputError, match=r"^data\.validation: .*short\.txt has 2 tokens, too few"):
        train(config)


@pytest.mark.parametrize("device", ["tpu", "abacus"])
def test_a_device_that_is_not_here(backend, device, tiny, tmp_path):
    with pytest.raises(InputError, match=f"device: '{device}'"):
        train(tiny(backend=backend, device=device))
    assert not checkpoint.steps(tmp_path / "run")


def test_more_steps_are_another_schedule(backend, tiny, tmp_path, capsys):
    train(tiny(backend=backend, steps=4))
    capsys.readouterr()
    train(tiny(backend=backend, steps=8))
    said = " ".join(capsys.readouterr().err.split())
    assert "planned for 4 steps, now for 8: the learning rate jumps from 0.0002 to" in said


def test_weights_that_are_not_finite_are_not_saved(backend, tiny, tmp_path, monkeypatch):
    def opened(*args):
        trainer = open_trainer(*args)
        params = trainer.params
        trainer.params = lambda: {name: np.where(name == "head.weight", np.nan, p) for name, p in params().items()}
        return trainer

    monkeypatch.setattr("unisono_tools.train.loop.open_trainer", opened)
    with pytest.raises(Diverged, match=r"head\.weight: not finite after step 2; no checkpoint had been saved yet"):
        train(tiny(backend=backend))
    assert not checkpoint.steps(tmp_path / "run")


def test_the_batch_of_a_failed_step_is_kept(backend, tiny, tmp_path):
    first = train(tiny(backend=backend, steps=2))
    saved = checkpoint.load(first.checkpoint)
    saved.params["input.weight"][:] = 3e38
    checkpoint.save(first.run, saved)
    with pytest.raises(Diverged, match=r"at step 3; the last good .*its batch is .*failed-step-00000003\.safetensors"):
        train(tiny(backend=backend, steps=4))
    config, arrays = load_arrays(tmp_path / "run" / "failed-step-00000003.safetensors", "batch")
    assert config == saved.config
    assert arrays["inputs"].shape == arrays["targets"].shape == (4, 16)
    assert np.array_equal(arrays["inputs"][:, 1:], arrays["targets"][:, :-1])


def test_no_patience(backend, tiny, capsys):
    # a learning rate that moves nothing: no evaluation after the first is lower
    config = tiny(backend=backend, steps=50, eval_every=2, patience=3, optimizer=Optimizer(lr=1e-30, weight_decay=0.0))
    result = train(config)
    assert result.best is not None
    assert (result.steps, result.best.step) == (8, 2)
    assert "no better validation since step 2" in capsys.readouterr().err
    assert 8 in checkpoint.steps(result.run)
    # the same command again, as of a job that is queued anew, trains no further
    assert train(config).steps == 8
    assert "no better validation since step 2; raise --patience" in " ".join(capsys.readouterr().err.split())
    assert train(dataclasses.replace(config, patience=4)).steps == 10


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device"), OSError(5, "Input/output error")]
)
@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_whose_reader_is_gone_goes_on(error, terminal, tiny, tmp_path, monkeypatch):
    """As where `| head` has read enough, the disk of a redirected log is full, or the connection to a terminal is lost."""

    class Gone(io.StringIO):
        def isatty(self) -> bool:
            return terminal

        def write(self, _: str) -> int:
            raise error

    monkeypatch.setattr(sys, "stderr", Gone())
    assert train(tiny()).steps == 8
    assert [row["step"] for row in read(tmp_path / "run" / "log.jsonl") if "loss" in row] == list(range(1, 9))


def test_a_limit_of_time(backend, tiny, capsys):
    result = train(tiny(backend=backend, steps=50, max_minutes=1e-9))
    assert result.steps == 1
    assert "out of time: stopped at step 1, which is saved" in capsys.readouterr().err
    assert train(tiny(backend=backend, steps=3)).steps == 3


def test_a_number_of_a_process_that_is_alone_is_none(backend, tiny, monkeypatch):
    # some schedulers set it for every job
    monkeypatch.setenv("RANK", "3")
    assert checkpoint.latest(train(tiny(backend=backend, steps=1)).run) is not None
