"""Arrays that do not fit each other, and arguments that say one thing for all tokens, in NumPy."""

from __future__ import annotations

import importlib

import misfits
import numpy as np
import pytest
from test_twins import OPS
from unisono_conformance import judge
from unisono_spec.contract import InputError
from unisono_spec.contract.shapes import SHAPES
from unisono_spec.ops import linear_attention, multiscale

WITHOUT = {"position"}  # it has no arrays but a count and marks


def test_every_op_has_shapes():
    assert set(SHAPES) == set(OPS) - WITHOUT


@pytest.mark.parametrize("op", SHAPES)
def test_what_does_not_fit(op: str):
    assert misfits.check(importlib.import_module(f"unisono_spec.ops.{op}"), np.asarray) > 20


@pytest.mark.parametrize("op", SHAPES)
def test_of_nothing_but_sequences_may_there_be_none(op: str):
    misfits.check_none(importlib.import_module(f"unisono_spec.ops.{op}"), np.asarray)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("form", ["recurrent", "parallel"])
def test_one_for_all(form: str, axes: tuple[int, ...]):
    judge.same(*misfits.one_for_all(getattr(multiscale, form), np.asarray, *axes))


@pytest.mark.parametrize(
    ("state", "found"), [(np.zeros((2, 1, 3, 3)), "of type ndarray"), (3, "of type int"), ((np.zeros((2, 1, 3, 3)),), "1 arrays")]
)
def test_a_state_of_two_arrays(state, found: str):
    x = np.ones((2, 4, 1, 3))
    with pytest.raises(InputError, match=f"initial_state: {found}, expected 2 arrays"):
        linear_attention.parallel(x, x, x, state)
