"""Arrays that do not fit each other, and arguments that say one thing for all tokens, in JAX."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import misfits
import numpy as np
import pytest
from unisono_conformance import judge
from unisono_jax.ops import multiscale
from unisono_spec.contract.shapes import SHAPES


@pytest.mark.parametrize("op", SHAPES)
def test_what_does_not_fit(op: str):
    assert misfits.check(importlib.import_module(f"unisono_jax.ops.{op}"), np.asarray, steps=True) > 20


@pytest.mark.parametrize("op", SHAPES)
def test_of_nothing_but_sequences_may_there_be_none(op: str):
    misfits.check_none(importlib.import_module(f"unisono_jax.ops.{op}"), np.asarray)


@pytest.mark.parametrize("form", ["recurrent", "parallel"])
def test_one_for_all(form: str):
    judge.same(*misfits.one_for_all(jax.jit(getattr(multiscale, form)), jnp.asarray, 0, 1))
