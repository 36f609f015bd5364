"""S4D beside the court: the exact hold, the kernel's digits in float32, memory of the backward."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unisono_conformance import numerics
from unisono_jax import registry
from unisono_jax.ops import diagonal_ssm
from unisono_spec.contract.s4d import S4DConfig

from .forms import B, T, residual_floats

SMALL = S4DConfig(d_model=6, n_layers=1, vocab_size=7, d_state=4, ffn_mult=2)


def arrays(length: int = T) -> list[np.ndarray]:
    """u, dt, A, C, D, state, the dynamics as a model starts with them."""
    rng = np.random.default_rng(0)
    a = np.broadcast_to(np.stack([np.full(4, -0.5), np.pi * np.arange(4)], -1), (3, 4, 2))
    return [
        rng.normal(size=(B, length, 3)),
        np.geomspace(1e-3, 1e-1, 3),
        a,
        *rng.normal(size=(1, 3, 4, 2)),
        np.ones(3),
        rng.normal(size=(B, 3, 4, 2)),
    ]


def test_the_hold_is_exact_where_a_step_is_short(close):
    """(e^z − 1) / A for z from 1e-9 up, where e^z − 1 has lost its digits."""
    dt, pairs = np.array([1e-9, 1e-3, 0.1]), np.array([[-0.5, 0], [-0.5, 31 * np.pi]])
    a = pairs[:, 0] + 1j * pairs[:, 1]
    z = dt[:, None] * a
    series = sum(z**n / math.factorial(n + 1) for n in range(12))
    truth = np.where(np.abs(z) < 0.1, dt[:, None] * series, np.expm1(z) / a)
    with jax.enable_x64(True):
        *_, gain = diagonal_ssm.discretised(jnp.asarray(dt), jnp.broadcast_to(pairs, (3, 2, 2)))
    found = np.asarray(gain[..., 0]) + 1j * np.asarray(gain[..., 1])
    close(np.abs(found / truth - 1), np.zeros((3, 2)))


def test_a_mode_that_keeps_all_is_held_in_float32(close):
    """(e^{ΔA} − 1) / A is Δ where |A|² is no float32."""
    dt, A = jnp.array([1e-3, 0.1]), jnp.full((2, 3, 2), jnp.array([-1e-25, 0.0]))
    gain, push = jax.vjp(lambda A: diagonal_ssm.discretised(dt, A)[2], A)
    close(np.asarray(gain), np.stack([dt[:, None] * np.ones((2, 3)), np.zeros((2, 3))], -1), numerics.rounding("float32", 2))
    (slope,) = push(jnp.ones_like(gain))
    close(np.asarray(slope), np.broadcast_to(np.square(dt)[:, None, None] / 2, A.shape), numerics.rounding("float32", 2))


@pytest.mark.parametrize("implementation", ["plain", "pallas"])
def test_turns_keep_their_digits_in_float32(close, implementation, monkeypatch):
    """Both forms read the same rounded dynamics; fast turns go round hundreds of radians in a chunk."""
    given = arrays(256)
    given[2] = np.broadcast_to(np.stack([np.full(4, -0.5), np.pi * np.array([0, 10, 20, 31])], -1), (3, 4, 2))
    narrow = [x.astype(np.float32) for x in given]
    with jax.enable_x64(True):
        truth, _ = jax.jit(diagonal_ssm.recurrent)(*(x.astype(np.float64) for x in narrow))
    monkeypatch.setenv(registry.INTERPRET, "1")
    found, _ = jax.jit(lambda *given: diagonal_ssm.parallel(*given, implementation=implementation))(*narrow)
    # the angle of a step is rounded once, and counts 256 times at the far end
    close(found, truth, numerics.rounding("float32", 2 * 256))


def test_memory_of_the_backward_is_linear_in_length():
    assert residual_floats(SMALL, 4096) < 5 * residual_floats(SMALL, 1024)


def test_states_between_chunks_as_sums_of_sums(close, rng):
    """What a GPU takes, where chunks are no power of the radix; the truth is the loop over chunks."""
    size, turn = rng.uniform(0.8, 1, (3, 4)), rng.uniform(0, 7, (3, 4))
    factor = np.stack([size * np.cos(turn), size * np.sin(turn)], -1)
    own, first = rng.normal(size=(3, 4, 2, B, 83)), rng.normal(size=(B, 3, 4, 2))
    with jax.enable_x64(True):
        found = jax.jit(diagonal_ssm._summed)(factor, own, first)
        close(found, jax.jit(diagonal_ssm._carried)(factor, own, first))


def test_chunks_as_a_gpu_takes_them(close, monkeypatch):
    """Longer ones than asked for, the last one not whole, sums between them."""
    given = arrays(300)
    with jax.enable_x64(True):
        truth = jax.jit(diagonal_ssm.recurrent)(*given)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        # a function of its own, whose trace no other test takes
        jax.tree.map(close, jax.jit(lambda *given: diagonal_ssm.parallel(*given))(*given), truth)
