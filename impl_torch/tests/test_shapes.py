"""Arrays that do not fit each other, and arguments that say one thing for all tokens, in PyTorch."""

from __future__ import annotations

import importlib

import misfits
import pytest
import torch
from unisono_conformance import judge
from unisono_spec.contract.shapes import SHAPES
from unisono_torch.ops import decayed_sum, multiscale


@pytest.mark.parametrize("op", SHAPES)
def test_what_does_not_fit(op: str):
    assert misfits.check(importlib.import_module(f"unisono_torch.ops.{op}"), torch.from_numpy) > 20


@pytest.mark.parametrize("op", SHAPES)
def test_of_nothing_but_sequences_may_there_be_none(op: str):
    misfits.check_none(importlib.import_module(f"unisono_torch.ops.{op}"), torch.from_numpy)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("form", ["recurrent", "parallel"])
def test_one_for_all(form: str, axes: tuple[int, ...]):
    judge.same(*misfits.one_for_all(getattr(multiscale, form), torch.from_numpy, *axes))


@pytest.mark.parametrize("decay", [1, 0.75])
def test_a_decay_may_be_traced(decay: float):
    """Of a whole number, too, PyTorch's compiler cannot ask whether it has a shape."""
    x, state = torch.ones(1, 3, 2), torch.zeros(1, 2)
    torch.compiler.reset()
    run = torch.compile(lambda decay: decayed_sum.recurrent(x, decay, state)[0], backend="eager", fullgraph=True, dynamic=True)
    judge.same(run(decay), decayed_sum.recurrent(x, decay, state)[0])
