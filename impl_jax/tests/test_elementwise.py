"""Tails of elementary functions keep their digits: each value and slope is held to itself, not to the largest."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from unisono_conformance import numerics
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
    assert (np.abs(found - wanted) <= numerics.formula("float32", 1, gradient=True) * wanted).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_tails_of_gelu(compiled):
    """Where ½(1 + tanh) has rounded to 0: GELU(−5) is −2.3e-7. Roundings of the argument z cost |z| times as much of σ(z)."""
    x = X[(X > -6) & (X < 6)]
    wide = x.astype(np.float64)
    c = np.sqrt(8 / np.pi)
    z = c * (wide + 0.044715 * wide**3)
    value, slope = logistic(z)
    found = np.asarray((jax.jit(gelu_tanh) if compiled else gelu_tanh)(x), np.float64)
    assert (np.abs(found - wide * value) <= numerics.formula("float32", 1) * (1 + np.abs(z)) * np.abs(wide) * value).all()
    wanted, terms = (value + part * c * (1 + 3 * 0.044715 * wide**2) * slope for part in (wide, np.abs(wide)))
    g = jax.vmap(jax.grad(gelu_tanh))
    found = np.asarray((jax.jit(g) if compiled else g)(x), np.float64)
    assert (np.abs(found - wanted) <= numerics.formula("float32", 1, gradient=True) * (1 + np.abs(z)) * terms).all()
