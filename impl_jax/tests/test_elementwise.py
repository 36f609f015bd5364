"""Tails of elementary functions keep their digits: each value and slope is held to itself, not to the largest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unisono_conformance import judge, numerics
from unisono_jax.ops.elementwise import gelu_tanh, sigmoid

X = np.concatenate([-np.geomspace(0.1, 30, 25)[::-1], np.geomspace(0.1, 30, 25)]).astype(np.float32)


def logistic(x):
    """σ and σ' in float64, from e^−|x|, which loses nothing."""
    e = np.exp(-np.abs(x))
    return np.where(x > 0, 1, e) / (1 + e), e / (1 + e) ** 2


@pytest.mark.parametrize("compiled", [False, True])
def test_slope_of_sigmoid(compiled):
    slope = jax.vmap(jax.grad(sigmoid))
    found = np.asarray((jax.jit(slope) if compiled else slope)(X), np.float64)
    _, wanted = logistic(X.astype(np.float64))
    # e^−x errs by an elementary function's few units; a sum, a quotient and a product follow
    judge.within(found, wanted, numerics.formula("float32", 1, gradient=True) * wanted)


def gelu(x):
    """z with GELU(x) = x σ(z); GELU, its terms; GELU', its terms; in float64."""
    c = np.sqrt(8 / np.pi)
    z = c * (x + 0.044715 * x**3)
    value, slope = logistic(z)
    inner = c * (1 + 3 * 0.044715 * x**2) * slope
    return z, x * value, np.abs(x) * value, value + x * inner, value + np.abs(x) * inner


@pytest.mark.parametrize("compiled", [False, True])
def test_tails_of_gelu(compiled):
    """Where ½(1 + tanh) has rounded to 0: GELU(−5) is −2.3e-7. Roundings of the argument z cost |z| times as much of σ(z)."""
    x = X[(X > -6) & (X < 6)]
    z, value, terms, slope, slope_terms = gelu(x.astype(np.float64))
    condition = numerics.formula("float32", 1) * (1 + np.abs(z))
    f, g = gelu_tanh, jax.vmap(jax.grad(gelu_tanh))
    f, g = (jax.jit(f), jax.jit(g)) if compiled else (f, g)
    judge.within(np.asarray(f(jnp.asarray(x)), np.float64), value, condition * terms)
    judge.within(np.asarray(g(jnp.asarray(x)), np.float64), slope, numerics.GRADIENT * condition * slope_terms)
