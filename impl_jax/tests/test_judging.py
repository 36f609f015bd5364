"""judge_op with functions of arrays of JAX: gradients by jax.vjp."""

from __future__ import annotations

import jax
from unisono_conformance import judge_op
from unisono_jax.ops import decayed_sum


def cut(x, decay, initial_state, reset=None, valid=None, chunk_size=64):
    """The same values, and no gradient of the state."""
    return decayed_sum.parallel(x, decay, jax.lax.stop_gradient(initial_state), reset, valid, chunk_size)


def test_values_and_gradients():
    asked = {"op": "decayed_sum", "framework": "jax", "dtypes": ("float64", "bfloat16"), "properties": ("P1", "P7", "P9")}
    verdict = judge_op(decayed_sum.parallel, **asked)
    assert verdict.holds, verdict
    assert list(judge_op(cut, **asked).failed) == ["P7"]
