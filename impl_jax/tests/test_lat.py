"""LAT and the Transformer beside the court: rotary positions, capacity, memory of the backward, bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unisono_conformance import numerics
from unisono_jax import InputError
from unisono_jax.ops import linear_attention, position, rotary
from unisono_jax.ops.features import elu1
from unisono_spec.contract.lat import LATConfig
from unisono_spec.contract.transformer import TransformerConfig

from .forms import B, T, create, residual_floats, tokens

SMALL = LATConfig(d_model=8, n_layers=1, vocab_size=7, head_width=4, qk_width=6, ffn_mult=2)
TRANSFORMER = TransformerConfig(d_model=8, n_layers=1, vocab_size=7, head_width=4, ffn_mult=2)


def test_elu1_is_not_zero_where_the_naive_form_is():
    x = jnp.array([-20.0, -8.0, 3.0], jnp.bfloat16)
    np.testing.assert_array_equal(elu1(x), jnp.concatenate([jnp.exp(x[:2]), x[2:] + 1]))
    assert (elu1(x) > 0).all()
    assert np.isfinite(jax.grad(lambda x: elu1(x).sum())(jnp.array([1e4, -1e4]))).all()


def test_turns_are_right_at_every_int32():
    where = np.array([0, 1, 255, 256, 200_000, 1_000_000, 2**31 - 1], np.int32)
    # 80-bit or wider where the machine has it; float64 alone is right to 2³¹ · 2⁻⁵³
    angle = where[:, None].astype(np.longdouble) * 10000.0 ** (-np.arange(4) / 4)
    with jax.enable_x64(True):
        for dtype in ("float32", "float64"):
            # four turns of one rounding each, three products of two each; tables and this angle err by 2³¹ · 2⁻⁵³ at most
            bound = numerics.rounding(dtype, 2**5) + numerics.rounding("float64", 2**33)
            cos, sin = rotary.cos_sin(jnp.asarray(where), 8, dtype=jnp.dtype(dtype))
            assert np.abs(np.asarray(cos) - np.cos(angle)).max() < bound
            assert np.abs(np.asarray(sin) - np.sin(angle)).max() < bound


def test_values_of_one_come_back_as_one(close):
    q, k = np.abs(np.random.default_rng(0).normal(size=(2, B, T, 2, 3)))
    with jax.enable_x64(True):
        o, (_, z) = linear_attention.parallel(q, k, np.ones_like(k), (jnp.zeros((B, 2, 3, 3)), jnp.zeros((B, 2, 3))), chunk_size=4)
        read = (q[:, -1] * z).sum(-1, keepdims=True)
        close(o[:, -1], jnp.broadcast_to(read / (read + linear_attention.EPS), o[:, -1].shape))


def test_memory_of_the_backward_is_linear_in_length():
    config = SMALL.replace(n_layers=4, attention=("linear", "window", "conv", "linear"), window=5)
    assert residual_floats(config, 4096) < 5 * residual_floats(config, 1024)  # 16 times, were there a T×T array


def test_furthest_position(rng):
    start, reset, valid = rng.integers(0, 9, B).astype(np.int32), rng.random((B, T)) < 0.2, rng.random((B, T)) < 0.7
    for marks in ((reset, valid), (reset, None), (None, valid), (None, None)):
        where, _ = position.parallel(jnp.asarray(start), T, *(None if m is None else jnp.asarray(m) for m in marks))
        read = np.ones((B, T), bool) if marks[1] is None else valid
        assert position.furthest(start, T, *marks) == np.asarray(where)[read].max() + 1


def test_bad_input_is_named_with_a_remedy():
    model, given = create(TRANSFORMER, "float32"), tokens(TRANSFORMER, 6)
    with pytest.raises(InputError, match="capacity: softmax attention caches every token"):
        model.init_state(B)
    with pytest.raises(InputError, match="capacity: token 6 of a sequence, the cache holds 5; give init_state a larger"):
        model.compiled().forward(given, model.init_state(B, 5))
    y, state = jax.jit(lambda t: model.forward(t, model.init_state(B, 5)))(given)  # values that no check can see
    assert np.isnan(y[:, 5]).all()
    assert np.isfinite(y[:, :5]).all()
    with pytest.raises(InputError, match="capacity: token 7"):
        model.step(given[:, 0], state)
    learned = create(SMALL.replace(positions="learned", max_positions=5, n_layers=0), "float32")
    with pytest.raises(InputError, match="max_positions: token 6 of a sequence, 5 positions were learned; use positions='rope'"):
        learned.forward(given)
    assert np.isnan(jax.jit(lambda t: learned.forward(t)[0])(given)[:, 5]).all()
    with pytest.raises(InputError, match="noise: this config has no noisy router"):
        learned.forward(given[:, :5], noise=[])


def test_generate_makes_room_for_what_it_writes():
    model = create(TRANSFORMER, "float32")
    assert model.generate(tokens(TRANSFORMER, 3), 4).tokens.shape == (B, 4)
