"""Causal depthwise convolution over the last w tokens: y_t = Σ_d weight[:, w−1−d] ∘ x_{t−d} + bias. Before the first token stand zeros.

Shapes: x [B, T, D] of any float dtype, weight [D, 1, w] (the last tap is the present token's), bias [D] or None, state
[B, w−1, D]: the last w−1 inputs, oldest first; reset and valid [B, T] bool or None. Each form returns (y [B, T, D], final state),
float32 or wider. y is 0 where a token is not valid.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from unisono_spec.contract.shapes import shaped

from unisono_jax.ops.carry import chunk_length
from unisono_jax.ops.elementwise import masked, restarted, wide, widened
from unisono_jax.ops.fold import fold
from unisono_jax.ops.packing import packing, segments, take
from unisono_jax.registry import check_implementation


@shaped
def step(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    state: jax.Array,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token: x [B, D], reset and valid [B]."""
    x, state = widened(*masked(valid, x), state)
    if reset is not None:
        (state,) = masked(~reset, state)
    seen = jnp.concatenate([state, x[:, None]], 1)  # [B, w, D]
    (read,) = masked(valid, seen)
    y = (read * weight[:, 0].T.astype(x.dtype)).sum(1)
    y = y if bias is None else y + bias.astype(x.dtype)
    if valid is None:
        return y, seen[:, 1:]
    return jnp.where(valid[:, None], y, 0), jnp.where(valid[:, None, None], seen[:, 1:], state)


@shaped
def recurrent(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    initial_state: jax.Array,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    state = initial_state.astype(wide(x, initial_state))
    return fold(lambda x_t, *rest: step(x_t, weight, bias, *rest), (x,), state, reset, valid)


@shaped
def parallel(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    initial_state: jax.Array,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """A sum of w shifted copies of the valid tokens. `chunk_size` changes nothing."""
    check_implementation(implementation)
    batch, length, _ = x.shape
    chunk_length(chunk_size, length)
    x, state = widened(*masked(valid, x), restarted(reset, initial_state))
    taps, carried = weight[:, 0].T.astype(x.dtype), state.shape[1]  # [w, D]
    tokens, segment = packing(valid, batch, length), segments(reset, batch, length)
    now = tokens.pack(segment)
    if valid is not None:  # places behind the last valid token read nothing: a NaN among the last inputs must not meet their gradient of 0
        now = jnp.where(jnp.arange(length) < tokens.count[:, None], now, -1)
    seen = jnp.concatenate([state, tokens.pack(x)], 1)  # [B, w−1+T, D]
    owner = jnp.concatenate([jnp.zeros((batch, carried), jnp.int32), now], 1)
    y = jnp.zeros((), x.dtype) if bias is None else bias.astype(x.dtype)
    for i, tap in enumerate(taps):
        shifted = seen[:, i : i + length]
        if (reset is not None or valid is not None) and i < carried:
            (shifted,) = masked(owner[:, i : i + length] == now, shifted)
        y = y + shifted * tap
    newest = tokens.count[:, None] + jnp.arange(carried)  # [B, w−1]
    final = seen[:, length:] if valid is None else take(seen, newest)
    if reset is not None:
        (final,) = masked((owner[:, length:] if valid is None else take(owner, newest)) == segment[:, -1:], final)
    return masked(valid, tokens.unpack(y))[0], final
