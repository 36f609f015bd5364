"""Tails of elementary functions keep their digits: each value, slope and curvature is held to itself, not to the largest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unisono_conformance import judge, numerics, tails
from unisono_jax.ops import elementwise
from unisono_jax.ops.features import elu1

NAMES = [name for name in tails.FUNCTIONS if name == "elu1" or hasattr(elementwise, name)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_tails(name: str, compiled: bool) -> None:
    """XLA's tanh has rounded to −1 where GELU is −2.3e-7; jax's y(1−y) and 1−y² have no digits where y is near 1."""
    x = np.concatenate([tails.points(name, "float32"), tails.limits("float32")])
    f = elu1 if name == "elu1" else getattr(elementwise, name)
    slope = jax.grad(f)
    for order, g in enumerate((f, jax.vmap(slope), jax.vmap(jax.grad(slope)))):
        tails.hold(name, np.asarray((jax.jit(g) if compiled else g)(jnp.asarray(x))), x, "float32", order)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_tails_in_16_bits(name: str, dtype: str) -> None:
    x = tails.points(name, dtype)
    f = elu1 if name == "elu1" else getattr(elementwise, name)
    tails.hold(name, np.asarray(jax.jit(f)(jnp.asarray(x))), x, dtype)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("scale", "usual"), [(2.0**90, 2.0**20), (2.0**60, 2.0**20)])
def test_a_norm_of_large_rows_is_that_of_small_ones(scale: float, usual: float, compiled: bool) -> None:
    """Powers of two scale a row, its norm's slope and nothing else, though the squares of the large one are beyond float32."""
    row, upstream = jnp.arange(64) % 7 - 2.5, jnp.linspace(1, 2, 64)

    def found(x: jax.Array) -> tuple[jax.Array, ...]:
        y, back = jax.vjp(elementwise.layer_norm, x, jnp.linspace(0.5, 1.5, 64), jnp.linspace(-1, 1, 64))
        return y, *back(upstream)

    y, slope, *others = (jax.jit(found) if compiled else found)(row * scale)
    expected, its, *those = (jax.jit(found) if compiled else found)(row * usual)
    judge.same((y, slope * (scale / usual), *others), (expected, its, *those), numerics.rounding("float32", 8))


def test_one_row_takes_weights_as_they_lie() -> None:
    """Decoding reads each weight once: a transposed copy made on every call took eight times as long on a CPU."""
    x, weight = jnp.ones((1, 256)), jnp.ones((512, 256))
    program = jax.jit(elementwise.linear).lower(x, weight).compile().as_text()
    assert program is not None
    assert " dot(" in program
    assert " transpose(" not in program
