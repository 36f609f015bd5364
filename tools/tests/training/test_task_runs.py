"""Runs that a task's own metric judges: learned, logged, kept by, stopped by, continued, evaluated."""

from __future__ import annotations

import dataclasses
import math
import shutil
from typing import Any

import numpy as np
import pytest
from unisono_conformance import numerics
from unisono_spec.contract import InputError, init_params
from unisono_spec.models import create
from unisono_tools.ahead import Ahead
from unisono_tools.backends import open_trainer
from unisono_tools.config import DataChoice, ModelChoice, Optimizer, dump
from unisono_tools.evaluation import nll
from unisono_tools.tasks import open_task
from unisono_tools.train import checkpoint, task_datamodule, train
from unisono_tools.train.checkpoint import Best
from unisono_tools.train.logs import read
from unisono_tools.train.task_datamodule import TaskDataModule

OPTIONS = {"vocabulary": 16, "train": ["16x2", "8x1"], "shares": [1, 1], "test": ["24x2"]}
ONE = {**OPTIONS, "train": ["16x2"], "shares": [1]}


@pytest.fixture
def task(tiny):
    def make(**changes):
        data = DataChoice(task="mqar", task_options=OPTIONS, eval_examples=32)
        model = ModelChoice("based-1m", {"d_model": 16, "n_layers": 2, "head_width": 8, "qk_width": 4, "vocab_size": 16,
                                         "attention": ["conv", "linear"]})  # fmt: skip
        return dataclasses.replace(tiny(), **{"data": data, "model": model, "batch_size": 8, **changes})

    return make


def test_the_loss_is_that_of_the_asked_places(backend, task):
    config = task(backend=backend, dtype="float64")
    model = config.validate()
    datamodule, trainer, params = TaskDataModule(config, model), open_trainer(config, model), init_params(model, 1, "float64")
    trainer.init(params)
    batch = datamodule.batch(0)
    assert batch.scored is not None
    logits, _ = create(model, params).forward(batch.inputs)
    nats = nll(model, logits[batch.scored], batch.targets[batch.scored])
    assert trainer.gradient(batch, 0)[0].loss == pytest.approx(nats.mean(), rel=numerics.mistake())
    # what is not asked has no say
    other = dataclasses.replace(batch, targets=np.where(batch.scored, batch.targets, 1))
    assert trainer.gradient(other, 0)[0] == trainer.gradient(batch, 0)[0]


def test_a_run_is_judged_by_accuracy(backend, task, command, tmp_path, monkeypatch):
    config = task(backend=backend, threads=1, steps=12, eval_every=3, checkpoint_every=3, optimizer=Optimizer(lr=1e-2))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, task_options=ONE))
    whole = train(config)
    rows = [row for row in read(whole.run / "log.jsonl") if "validation_accuracy" in row]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert whole.best is not None
    top = max(row["validation_accuracy"] for row in rows)
    assert whole.best.score == top
    lowest = min((row["validation_loss"], row["step"]) for row in rows if row["validation_accuracy"] == top)
    assert (whole.best.loss, whole.best.step) == lowest
    assert checkpoint.load(whole.checkpoint).best == whole.best
    # goes on from the middle with the same bits, its examples drawn by two processes
    half = tmp_path / "half"
    shutil.copytree(checkpoint.steps(whole.run)[9], half / "checkpoints" / "step-00000009")
    drawing = []
    monkeypatch.setattr(task_datamodule, "Ahead", lambda *given: drawing.append((found := Ahead(*given)).processes) or found)
    again = train(dataclasses.replace(config, out=str(half), data=dataclasses.replace(config.data, workers=2)))
    assert [process.poll() is None for process in drawing[0]] == [False, False]
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        assert (again.checkpoint / name).read_bytes() == (whole.checkpoint / name).read_bytes()
    # validation is the same in NumPy, and test has settings of its own
    shown = {}
    for split in ("validation", "test"):
        code, out, _ = command("eval", whole.run, "--backend", "numpy", "--split", split, "--limit", 32)
        assert code == 0
        shown[split] = out.splitlines()[1].split()[0], float(out.split("accuracy")[1].split(",")[0])
    assert shown["validation"] == ("16x2", round(rows[-1]["validation_accuracy"], 6))
    assert shown["test"][0] == "24x2"
    with pytest.raises(InputError, match="task_options"):
        train(dataclasses.replace(config, data=dataclasses.replace(config.data, task_options={**ONE, "power": 0.5})))


def test_several_settings_weigh_alike(task):
    from unisono_tools.backends.numpy import Reader

    config = task()
    model = config.validate()
    found = TaskDataModule(config, model).validate(Reader(model, init_params(model, 1)))
    rows = found.rows
    assert rows["validation_accuracy"] == (rows["validation_accuracy.16x2"] + rows["validation_accuracy.8x1"]) / 2 == found.score


def test_an_evaluation_of_several_settings_tells_the_share_of_all_that_is_done(task, monkeypatch):
    from unisono_tools.backends.numpy import Reader

    config, shares = task(), []
    model = config.validate()
    monkeypatch.setattr(task_datamodule, "MOST", 8 * 16 * 4 * model.d_model)  # 8 examples of 16 tokens, 16 of 8
    TaskDataModule(config, model).validate(Reader(model, init_params(model, 1)), shares.append)
    assert shares == [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 6 / 8]


def test_a_higher_score_is_better_and_of_equal_ones_a_lower_loss():
    assert Best(3, 1.0, 0.5).beats(None)
    assert Best(3, 1.0, 0.5).beats(Best(2, 0.5, 0.4))
    assert not Best(3, 0.5, 0.4).beats(Best(2, 1.0, 0.5))
    assert Best(3, 0.5, 0.5).beats(Best(2, 1.0, 0.5))
    assert not Best(3, 1.0).beats(Best(2, 1.0))
    assert Best(3, 0.9).beats(Best(2, 1.0))


def test_patience_goes_by_the_score(task, monkeypatch):
    scores = iter([0.5, 0.6, 0.6, 0.6, 0.9])
    monkeypatch.setattr("unisono_tools.train.task_datamodule.evaluate_task", lambda *_: _Fixed(next(scores)))
    config = task(steps=20, eval_every=2, patience=2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, task_options=ONE))
    result = train(config)
    assert (result.steps, result.of, result.best) == (8, 20, Best(4, 1.0, 0.6))
    assert result.why == train(config).why == "no better validation since step 4"


def test_a_run_ends_where_its_score_is_enough(task, monkeypatch):
    scores = iter([0.5, 0.95, 0.6])
    monkeypatch.setattr("unisono_tools.train.task_datamodule.evaluate_task", lambda *_: _Fixed(next(scores)))
    config = task(steps=20, eval_every=2, enough=0.9)
    result = train(dataclasses.replace(config, data=dataclasses.replace(config.data, task_options=ONE)))
    assert (result.steps, result.why, result.best) == (4, "0.9500 is enough", Best(4, 1.0, 0.95))


@dataclasses.dataclass
class _Fixed:
    score: float
    loss: float = 1.0


def test_what_a_task_does_not_go_with(task, refused, command, tmp_path):
    with pytest.raises(InputError, match=r"mqar has 16 ids, the model has a vocab_size of 8; set --model\.overrides\.vocab_size 16"):
        train(task(model=ModelChoice("cram-1m", {"vocab_size": 8})))
    with pytest.raises(InputError, match="drawn without end; give steps"):
        train(task(epochs=1))
    with pytest.raises(InputError, match="has examples of its own"):
        task(data=DataChoice(task="mqar", order="streamed")).validate()
    path = tmp_path / "config.yaml"
    path.write_text(dump(task()))
    code, out, _ = command("train", "--config", path, "--dry-run")
    assert code == 0
    assert "judged by accuracy: 16x2, 8x1" in out
    assert "did you mean 'mqar'" in refused("train", "--config", path, "--data.task", "mqarr")


# other tasks, small: what differs from their defaults, and a model that reads them
SMALL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "copying": ({"shortest": 1, "longest": 4, "test": [5]}, {}),
    "listops": ({"max_depth": 3, "max_args": 3, "min_length": 3, "max_length": 12}, {}),
    "phonebook": ({"train": [3], "test": [4]}, {}),
    "pathfinder": ({}, {}),
    "text": ({"bytes": 16}, {}),
    "image": ({"side": 4}, {}),
    "retrieval": ({"bytes": 16}, {"vocab_size": 257, "code_bits": 9}),
    "dna": ({"train": [16], "test": [16, 32]}, {"vocab_size": 5}),
    "video": ({"side": 4, "frames": 4}, {"codes": "frame", "frame_size": 16, "frame_head": "gaussian"}),
}


@pytest.mark.usefixtures("small_sets")
@pytest.mark.parametrize("name", SMALL)
def test_a_task_is_learned_from(backend, name, tiny, command):
    options, overrides = SMALL[name]
    data = DataChoice(task=name, task_options=options, eval_examples=8)
    config = tiny(backend=backend, overrides={"n_layers": 1, **overrides}, data=data, steps=2, eval_every=2, dtype="float64")
    result = train(config)
    assert result.best is not None
    code, out, _ = command("eval", result.run, "--backend", "numpy", "--limit", 8, "--dtype", "float64")
    assert code == 0
    metric = open_task(name).metric
    if metric is None:
        assert result.best.score is None
        assert f" {result.best.loss / math.log(2):.6f} bits a target" in out
    else:
        assert f"{metric} {result.best.score:.6f}, " in out
