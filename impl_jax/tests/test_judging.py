"""judge_op with functions of arrays of JAX: gradients by jax.vjp."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from unisono_conformance import judge_op
from unisono_conformance.adapters import jax as adapter
from unisono_jax.ops import window
from unisono_jax.ops.elementwise import sigmoid


def pairs(x, decay, initial_state, reset=None, valid=None):
    """The decayed sum as one matrix of all pairs of tokens: few operations, since none is compiled here."""
    shape = x.shape[:2]
    reset = jnp.zeros(shape, bool) if reset is None else reset
    valid = jnp.ones(shape, bool) if valid is None else valid
    initial_state = jnp.where(reset[:, :1], 0, initial_state)
    u = jnp.where(valid[..., None], sigmoid(jnp.where(valid[..., None], x, 0)), 0)
    read, document = jnp.cumsum(valid, 1), jnp.cumsum(reset, 1)
    same = jnp.tril(document[:, :, None] == document[:, None, :])
    weight = jnp.where(same, (1 - decay) * decay ** jnp.where(same, read[:, :, None] - read[:, None, :], 0.0), 0)
    kept = jnp.where(document == 0, decay ** read.astype(x.dtype), 0)
    xi = weight @ u + kept[..., None] * initial_state[:, None]
    return xi, xi[:, -1]


def cut(x, decay, initial_state, reset=None, valid=None):
    """The same values, and no gradient of the state."""
    return pairs(x, decay, jax.lax.stop_gradient(initial_state), reset, valid)


def test_values_and_gradients():
    asked = {"op": "decayed_sum", "framework": "jax", "dtypes": ("float64",), "properties": ("P1", "P7")}
    verdict = judge_op(pairs, **asked)
    assert verdict.holds, verdict
    assert list(judge_op(cut, **asked).failed) == ["P7"]


def test_a_cotangent_is_widened_but_not_rounded(monkeypatch):
    """o may come wider than a rounded do; an o that is too narrow is told, and not met halfway."""
    x = np.ones((1, 2), np.float32)
    for dtype, cotangent in ((jnp.float32, jnp.bfloat16), (jnp.bfloat16, np.float32)):
        monkeypatch.setattr(adapter, "_function", lambda *_, dtype=dtype: lambda x, initial_state: (x.astype(dtype), initial_state))
        asked = ("decayed_sum", str(dtype), {"x": x, "initial_state": x}, {}, x.astype(cotangent), x, "cpu", "plain")
        if dtype == jnp.float32:
            assert adapter.make().op_vjp(*asked)[2]["x"].dtype == np.float32
        else:
            with pytest.raises(ValueError, match="dtype"):
                adapter.make().op_vjp(*asked)


def test_a_counter_in_the_state_has_no_gradient():
    verdict = judge_op(window.parallel, "window", framework="jax", dtypes=("float32",), properties=("P7",))
    assert verdict.holds, verdict
