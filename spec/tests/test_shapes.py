"""Arrays that do not fit each other, and arguments that say one thing for all tokens, in NumPy."""

from __future__ import annotations

import importlib

import misfits
import numpy as np
import pytest
from test_twins import OPS
from unisono_conformance import judge
from unisono_spec.contract.shapes import SHAPES
from unisono_spec.ops import multiscale

WITHOUT = {"position"}  # it has no arrays but a count and marks


def test_every_op_has_shapes():
    assert set(SHAPES) == set(OPS) - WITHOUT


@pytest.mark.parametrize("op", SHAPES)
def test_what_does_not_fit(op: str):
    assert misfits.check(importlib.import_module(f"unisono_spec.ops.{op}"), np.asarray) > 20


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("form", ["recurrent", "parallel"])
def test_one_for_all(form: str, axes: tuple[int, ...]):
    judge.same(*misfits.one_for_all(getattr(multiscale, form), np.asarray, *axes))
