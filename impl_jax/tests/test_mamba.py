"""Mamba beside the court: near-1 decays over a long sequence, memory of the backward."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from unisono_conformance import judge, numerics
from unisono_jax.ops import selective_scan
from unisono_spec.contract.mamba import MambaConfig

from .forms import B, residual_floats

SMALL = MambaConfig(d_model=6, n_layers=1, vocab_size=7, d_state=3, conv_width=3)


def test_slow_decays_stay_within_the_random_walk_of_float32_roundings(rng):
    length = 20_000
    dt, a = np.full((1, length, 1), 0.01), np.array([[-1.0, -1e-3]])  # decays e^(−0.01), e^(−0.00001)
    u, (b, c) = np.abs(rng.normal(size=(1, length, 1))), np.abs(rng.normal(size=(2, 1, length, 2)))
    d, h = np.ones(1), np.zeros((1, 1, 2))
    with jax.enable_x64(True):
        truth = np.asarray(jax.jit(selective_scan.recurrent)(u, dt, a, b, c, d, h)[0])
    found, _ = jax.jit(selective_scan.parallel)(*(x.astype(np.float32) for x in (u, dt, a, b, c, d, h)))
    assert found.dtype == np.float32
    # every term has one sign; a decay below 1 is rounded by u / 2, alike at every token
    judge.within(found, truth, (numerics.formula("float32", length) + numerics.rounding("float32", length) / 2) * truth)


def test_rows_of_tokens_as_a_gpu_takes_them(close, rng, monkeypatch):
    """Values and gradients beside those of a token after the other, of chunks that are no squares, the last one not whole."""
    dt, b, c = rng.uniform(0.1, 1, (B, 17, 3)), *rng.normal(size=(2, B, 17, 2))
    given: Any = rng.normal(size=(B, 17, 3)), dt, -rng.uniform(0.1, 2, (3, 2)), b, c, rng.normal(size=3), rng.normal(size=(B, 3, 2))
    marks: Any = rng.random((B, 17)) < 0.2, rng.random((B, 17)) < 0.7

    def slopes():
        def loss(given):
            y, h = selective_scan.parallel(*given, *marks, chunk_size=7, implementation="plain")
            return jnp.sin(y).sum() + jnp.cos(h).sum(), (y, h)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(given)

    with jax.enable_x64(True):
        truth = slopes()
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        jax.tree.map(close, slopes(), truth)
        u, dt, A, b, c, D, h = given
        y, _ = selective_scan.parallel(u[:0], dt[:0], A, b[:0], c[:0], D, h[:0], chunk_size=7)
        assert y.shape == (0, 17, 3)


def test_the_backward_keeps_no_state_of_each_token():
    few, many = (residual_floats(SMALL.replace(d_state=n), 512) for n in (2, 130))
    inner, size = SMALL.expand * SMALL.d_model, 64
    # 128 more states: B and C of each token, a state of each chunk, and A, in both the parameters and their derivatives
    assert many - few < 128 * (B * 512 * 2 * 4 + (B * 512 // size + 8) * inner * 2 + inner * 16)
    assert many - few < 128 * B * 512 * inner
