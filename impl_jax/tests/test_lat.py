"""LAT, Based and the Transformer baseline: forms, gradients, marks, dtypes, capacity, rotary positions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from unisono_jax import InputError
from unisono_jax.ops import linear_attention, position, rotary, short_conv, softmax_attention, window
from unisono_jax.ops.features import elu1
from unisono_spec.contract.lat import LATConfig
from unisono_spec.contract.transformer import TransformerConfig

from .forms import B, T, check_dtypes, check_forms, check_poison, create, residual_floats, tokens

SMALL = LATConfig(d_model=8, n_layers=1, vocab_size=7, head_width=4, qk_width=6, ffn_mult=2)
BASED = {"norm": "rms", "ffn": "swiglu", "bias": False, "tie_head": True, "head_bias": False}
VARIANTS: dict[str, Any] = {
    "learned": SMALL.replace(n_layers=2, attention=("linear", "window"), feature_map="learned", positions="rope", window=5),
    "based": SMALL.replace(
        n_layers=2, attention=("conv", "linear"), feature_map="taylor2", qk_width=3, **BASED
    ),
    "transformer": TransformerConfig(d_model=8, n_layers=1, vocab_size=7, head_width=4, ffn_mult=2),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_forms_steps_and_gradients_agree_across_a_handed_over_state(close, name):
    check_forms(VARIANTS[name], close, gradients=name == "based")


def case(name: str) -> tuple[Any, list[np.ndarray], int]:
    """run(form, *given, reset, valid), given, and how many of those are sequences."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, B, T, 2, 3))
    how = {"recurrent": {}, "parallel": {"chunk_size": 4}}
    if name == "linear_attention":
        given = [np.abs(q), np.abs(k), v, rng.normal(size=(B, 2, 3, 3)), np.abs(rng.normal(size=(B, 2, 3)))]
        return lambda form, q, k, v, S, z, *m: getattr(linear_attention, form)(q, k, v, (S, z), *m, **how[form]), given, 3
    if name == "short_conv":
        given = [q[:, :, 0], rng.normal(size=(3, 1, 4)), rng.normal(size=3), rng.normal(size=(B, 3, 3))]
        return lambda form, x, *rest: getattr(short_conv, form)(x, *rest, **how[form]), given, 1
    count, slots = np.array([1, 3], np.int32), np.arange(3)
    op, held = (window, slots >= 3 - count[:, None]) if name == "window" else (softmax_attention, slots < count[:, None])
    old = rng.normal(size=(2, B, 3, 2, 3)) * held[..., None, None]
    if name == "softmax":
        old = np.pad(old, ((0, 0), (0, 0), (0, T), (0, 0), (0, 0)))

    def run(form, q, k, v, reset, valid):
        o, (*kept, held) = getattr(op, form)(q, k, v, (*old, count), reset, valid, **how[form])
        return o, (*kept, held)

    return run, [q, k, v], 3


@pytest.mark.parametrize("name", ["linear_attention", "short_conv", "window", "softmax"])
def test_what_is_not_valid_reaches_neither_outputs_nor_gradients(close, name):
    run, given, sequences = case(name)
    check_poison(run, given, sequences, close)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", VARIANTS)
def test_dtypes(name, dtype):
    check_dtypes(VARIANTS[name], dtype)


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
        for dtype in (jnp.float32, jnp.float64):
            # four turns of one rounding each, three products of two each; tables and this angle err by 2³¹ · 2⁻⁵³ at most
            bound = 16 * jnp.finfo(dtype).eps + 2.0**-20
            cos, sin = rotary.turn(jnp.asarray(where), 8, dtype=dtype)
            assert np.abs(np.asarray(cos) - np.cos(angle)).max() < bound
            assert np.abs(np.asarray(sin) - np.sin(angle)).max() < bound


def test_values_of_one_come_back_as_one(close):
    run, (q, k, v, S, z), _ = case("linear_attention")
    with jax.enable_x64(True):
        o, (_, z) = run("parallel", q, k, np.ones_like(v), 0 * S, 0 * z, None, None)
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
    config = VARIANTS["transformer"]
    model, given = create(config, "float32"), tokens(config, 6)
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
    config = VARIANTS["transformer"]
    model = create(config, "float32")
    assert model.generate(tokens(config, 3), 4).tokens.shape == (B, 4)
