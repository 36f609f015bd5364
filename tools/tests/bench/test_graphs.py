"""Steps as CUDA graphs, with what a recording does on a GPU played on a CPU: its tensors have one place each, written by every replay."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils import _pytree as trees
from unisono_spec.contract import InputError, init_params
from unisono_spec.contract.files import load_params
from unisono_tools.backends.base import Batch
from unisono_tools.backends.torch import Trainer, graphs
from unisono_tools.backends.torch.reader import Reader
from unisono_tools.config import TrainConfig
from unisono_tools.train import train

SMALL = {"n_layers": 1, "head_hidden": 8, "n_banks": 2, "n_slots": 3, "d_memory": 4, "router": "gumbel", "dropout": 0.1}
REFUSED = "operation not permitted when stream is capturing"


class Recorded:
    def __init__(self, work: Any) -> None:
        self.work, self.found = work, work()

    def replay(self) -> None:
        for own, new in zip(trees.tree_leaves(self.found), trees.tree_leaves(self.work()), strict=True):
            if own is not None:
                own.copy_(new)


@pytest.fixture
def recorded(monkeypatch) -> list[Any]:
    """What was recorded; a trainer on a CPU takes it for a GPU."""
    found: list[Any] = []

    def captured(work: Any, pool: Any) -> tuple[Any, Any]:
        found.append(Recorded(work))
        return found[-1], found[-1].found

    monkeypatch.setattr("unisono_tools.backends.torch.trainer.unfit", lambda *_: None)
    monkeypatch.setattr(graphs, "captured", captured)
    return found


def _trainers(plan: TrainConfig, how: Any = "auto") -> Any:
    """Without graphs and with them."""
    made = [Trainer(dataclasses.replace(plan, cuda_graphs=graphed), plan.validate()) for graphed in (False, how)]
    for trainer in made:
        trainer.init(init_params(trainer.config, 0, plan.param_dtype))
    return made


def _batch(plan: TrainConfig, step: int = 0) -> Batch:
    rows = np.random.default_rng(step).integers(0, 256, (plan.batch_size, plan.seq_len + 1))
    return Batch(rows[:, :-1], rows[:, 1:])


def _alike(trainers: Any, batch: Batch, step: int) -> None:
    results = [trainer.grad_step(batch, step, 1e-2).read() for trainer in trainers]
    assert results[0] == results[1]
    (plain, held), (same, kept) = ((t.params(), t.optimizer_state()) for t in trainers)
    assert all(np.array_equal(plain[name], same[name]) for name in plain)
    assert all(np.array_equal(held[name], kept[name]) for name in held)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_replayed_steps_have_the_same_bits(recorded, tiny, monkeypatch, accumulation):
    """A state and groups come and go; noise and masks are new each step."""
    monkeypatch.setattr(graphs, "KINDS", 3)
    plan = tiny("maru-1m", SMALL, batch_size=4, accumulation=accumulation)
    trainers = _trainers(plan)
    scored = np.random.default_rng(0).random((9, plan.batch_size, plan.seq_len)) < np.linspace(0.3, 0.9, 9)[:, None, None]
    groups = np.array([[True], [False], [True], [False]])
    for step, kind in enumerate(("", "carried", "carried", "groups", "", "groups", "carried", "carried", "")):
        batch = dataclasses.replace(_batch(plan, step), carried=kind == "carried", groups=groups if kind == "groups" else None)
        _alike(trainers, dataclasses.replace(batch, scored=scored[step] if kind else None), step)
        assert len(recorded) == (min(step + 1, 3) if accumulation == 2 else max(0, min(step - 3, 3)))  # what came twice
    assert not trainers[1].notes


def test_what_only_a_later_microbatch_has_is_kept():
    seldom, made = graphs.Graphed(lambda _: None, []), torch.ones(3)
    assert seldom._added([None], True) == [None]
    (kept,) = seldom._added([made], False)
    assert kept is not None
    assert kept.data_ptr() != made.data_ptr(), "the next replay writes there"


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("failure", "why"),
    [
        (RuntimeError(f"CUDA error: {REFUSED}\nand more"), f"CUDA error: {REFUSED}"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), graphs.SCARCE),
        (None, graphs.SCARCE),
        ("later", graphs.SCARCE),
    ],
)
def test_what_cannot_be_recorded_goes_without_and_says_so_once(recorded, tiny, monkeypatch, failure, why, accumulation):
    """Also in the middle of an accumulated step. None: a graph leaves too little memory; later: a batch of another kind finds too little
    beside it."""
    plan = tiny("lat-1m", {"head_width": 4, "qk_width": 4}, batch_size=4, accumulation=accumulation)
    played: Any = vars(graphs)["captured"]
    asked: list[Any] = []

    def captured(work: Any, pool: Any) -> Any:
        asked.append(played(work, pool))
        if isinstance(failure, Exception):
            raise failure
        return asked[-1]

    monkeypatch.setattr(graphs, "captured", captured)
    if failure is None:
        monkeypatch.setattr(graphs.Graphed, "_scarce", lambda self: True)
    trainers = _trainers(plan)
    if failure == "later":
        backward = graphs.Graphed._backward

        def short(self: Any, arguments: Any, weight: Any) -> Any:
            if self.graphs and arguments["groups"] is not None:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return backward(self, arguments, weight)

        monkeypatch.setattr(graphs.Graphed, "_backward", short)
    for step in range(5):
        groups = np.ones((plan.batch_size, 1), bool) if failure == "later" and step == 2 else None
        _alike(trainers, dataclasses.replace(_batch(plan, step), groups=groups), step)
    assert trainers[1].notes == [f"cuda_graphs: auto, and from here on without: {why}"]
    assert not trainers[1].graphs.graphs
    assert len(asked) == 1
    if isinstance(failure, Exception):
        must = _trainers(plan, True)[1]
        with pytest.raises(InputError, match=r"cuda_graphs: true, and a step of this model cannot be recorded .*; leave it out"):
            [must.grad_step(_batch(plan, step), step, 1e-2) for step in range(2)]


def test_a_run_evaluates_between_graphs_and_says_where_it_goes_without(recorded, tiny, monkeypatch, tmp_path):
    """An evaluation that needs a graph's memory gets it, and the graph is recorded anew; the run ends as one without graphs does."""
    read, failed = Reader._read, []

    def hungry(self: Reader, *args: Any) -> Any:
        held: Any = getattr(self.spare, "__self__", None)
        if held is not None and held.graphs and len(failed) < 2:
            failed.append(len(recorded))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(self, *args)

    monkeypatch.setattr(Reader, "_read", hungry)
    ends = []
    for how in (False, "auto"):
        said = io.StringIO()
        plan = dataclasses.replace(tiny(), cuda_graphs=how, out=str(tmp_path / str(how)))
        ends.append(load_params(train(plan, console=Console(file=said, width=200)).checkpoint / "model.safetensors")[1])
        assert "cuda_graphs" not in said.getvalue()
    assert all(np.array_equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert failed == [1, 2]
    monkeypatch.setattr(graphs.Graphed, "_scarce", lambda self: True)
    train(dataclasses.replace(tiny(), out=str(tmp_path / "scarce")), console=Console(file=said, width=200))
    assert said.getvalue().count(f"cuda_graphs: auto, and from here on without: {graphs.SCARCE}") == 1


@pytest.mark.parametrize(
    ("device", "processes", "why"),
    [
        ("cpu", 1, "on cpu"),
        ("cuda:0", 2, "with 2 processes"),
        ("cuda:1", 1, "on cuda:1, which is not this process's current GPU"),
        ("cuda:0", 1, None),
        ("cuda", 1, None),
    ],
)
def test_where_steps_can_be_recorded(monkeypatch, device, processes, why):
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    assert graphs.unfit(torch.device(device), processes) == why
