"""InfinityFormer beside the court: hard decays, scales that differ, compression, memory of the backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from unisono_conformance import numerics
from unisono_jax.ops import multiscale
from unisono_spec.contract.infinityformer import InfinityFormerConfig

from .forms import B, T, create, marks, residual_floats, tokens

SMALL = InfinityFormerConfig(d_model=8, n_layers=1, n_heads=2, d_ffn=6, vocab_size=7)
DATA = SMALL.replace(decay="data", gate="vector", rope="numerator", n_scales=2, tie_head=False, head_bias=True)
COMPRESSED = SMALL.replace(compress_every=3, compress_rank=1)
STATE = {"S": (B, 3, 2, 3, 3), "z": (B, 3, 2, 3)}


def arrays(length: int = T) -> list[np.ndarray]:
    """q, k, v, q_norm, k_norm, log_decay, weight, S, z."""
    rng = np.random.default_rng(0)
    q, k, v, q_norm, k_norm = np.abs(rng.normal(size=(5, B, length, 2, 3)))
    weight = rng.normal(size=(B, length, 3, 1, 1))
    return [
        q,
        k,
        v,
        q_norm,
        k_norm,
        -np.abs(rng.normal(size=(B, length, 3))),
        weight,
        *(np.abs(rng.normal(size=s)) for s in STATE.values()),
    ]


def run(form: str, *given: Any) -> Any:
    *inputs, S, z, reset, valid = given
    return getattr(multiscale, form)(*inputs, (S, z), reset, valid, **({"chunk_size": 4} if form == "parallel" else {}))


def test_a_soft_decay_keeps_its_digits_behind_a_hard_one(close):
    """log λ = −1000 once in a chunk: a difference of float32 sums would leave e^(−0.1) only four digits after it."""
    given = arrays(64)
    given[5][:] = -0.1
    given[5][:, 9] = -1000.0
    reset = np.zeros((B, 64), bool)
    with jax.enable_x64(True):
        truth, _ = jax.jit(multiscale.recurrent)(*given[:7], (given[7], given[8]), reset)
    narrow = [a.astype(np.float32) for a in given]
    found, last = jax.jit(multiscale.parallel)(*narrow[:7], (narrow[7], narrow[8]), reset)
    # 64 terms of one sign, each the exponential of a sum of 64 roundings at random
    close(found, truth, numerics.formula("float32", 64))
    assert all(np.isfinite(a).all() for a in last)


def test_every_scale_has_a_gradient_of_its_own():
    reset, _ = marks()
    start = SMALL.params()["layers.0.mixer.decay.bias"].initial.values
    with jax.enable_x64(True):
        inputs = arrays()

        @jax.jit
        @jax.grad
        def gradient(a: jax.Array) -> jax.Array:
            log_decay = jnp.broadcast_to(jax.nn.log_sigmoid(a), (B, T, 3))
            return jnp.sum(jnp.sin(run("parallel", *inputs[:5], log_decay, *inputs[6:], reset, None)[0]))

        found = np.asarray(gradient(jnp.asarray(start)))
    assert (found != 0).all()
    assert len(np.unique(found)) == 3


def test_compression_is_the_best_approximation_and_its_projector_carries_no_gradient(close, rng):
    S, direction = rng.normal(size=(2, 4, 5, 5))
    with jax.enable_x64(True):
        low = multiscale.compressed(jnp.asarray(S), 2)
        U, s, V = np.linalg.svd(S)
        close(low, (U[..., :2] * s[..., None, :2]) @ V[..., :2, :])
        _, change = jax.jvp(partial(multiscale.compressed, rank=2), (S,), (direction,))
        close(change, U[..., :2] @ np.swapaxes(U[..., :2], -1, -2) @ direction)


def test_compression_acts_after_every_third_token_of_a_sequence():
    config = COMPRESSED
    with jax.enable_x64(True):
        model = create(config)
        _, state = model.compiled().forward(tokens(config, 6), form="recurrent")
        _, later = model.compiled().forward(tokens(config, 7), form="recurrent")
    assert (np.linalg.matrix_rank(state["layers.0.S"], tol=numerics.mistake()) == 1).all()
    assert (np.linalg.matrix_rank(later["layers.0.S"], tol=numerics.mistake()) > 1).all()


def test_memory_of_the_backward_is_linear_in_length():
    assert residual_floats(DATA, 4096) < 5 * residual_floats(DATA, 1024)
