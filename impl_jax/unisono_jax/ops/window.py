"""Sliding-window attention: causal softmax over the last w tokens of the sequence, the present one included, scaled by 1/√K.

Shapes: q, k [B, T, H, K], v [B, T, H, V] of any float dtype, reset and valid [B, T] bool or None. State: (keys [B, w, H, K],
values [B, w, H, V], count [B] int32): the last w keys and values, oldest first, so that the newest is always last and slots not yet
filled are zeros in front; and how many tokens the sequence has held. Each form returns (o [B, T, H, V], final state), floats as
float32 or wider. o is 0 where a token is not valid.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from unisono_spec.contract.shapes import shaped

from unisono_jax.ops.carry import chunk_length, chunks, joined
from unisono_jax.ops.elementwise import dot, masked, restarted, widened
from unisono_jax.ops.fold import fold
from unisono_jax.ops.packing import packing, segments, take
from unisono_jax.registry import check_implementation

State = tuple[jax.Array, jax.Array, jax.Array]


@shaped
def step(
    q: jax.Array, k: jax.Array, v: jax.Array, state: State, reset: jax.Array | None = None, valid: jax.Array | None = None
) -> tuple[jax.Array, State]:
    """One token: q, k [B, H, K], v [B, H, V], reset and valid [B]."""
    q, k, v, keys, values = widened(*masked(valid, q, k, v), *state[:2])
    count = state[2]
    w = keys.shape[1]
    if reset is not None:
        (count,) = masked(~reset, count)
    slots = jnp.arange(w)
    keys, values = masked(slots >= w - count[:, None], keys, values)  # an empty slot is no part of the state: it has no gradient either
    old = keys, values, count
    keys, values = (jnp.concatenate([a[:, 1:], new[:, None]], 1) for a, new in ((keys, k), (values, v)))
    count = count + 1
    filled = slots >= w - count[:, None]  # [B, w]
    scores = dot("bhk,bwhk->bhw", q, keys) / q.shape[-1] ** 0.5
    o = dot("bhw,bwhv->bhv", jax.nn.softmax(jnp.where(filled[:, None], scores, -jnp.inf)), values)
    if valid is None:
        return o, (keys, values, count)
    mask = valid[:, None, None, None]
    kept = jnp.where(mask, keys, old[0]), jnp.where(mask, values, old[1]), jnp.where(valid, count, old[2])
    return jnp.where(valid[:, None, None], o, 0), kept


@shaped
def recurrent(
    q: jax.Array, k: jax.Array, v: jax.Array, initial_state: State, reset: jax.Array | None = None, valid: jax.Array | None = None
) -> tuple[jax.Array, State]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    q, k, v, keys, values = widened(q, k, v, *initial_state[:2])
    return fold(step, (q, k, v), (keys, values, initial_state[2]), reset, valid)


@shaped
def parallel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    initial_state: State,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[jax.Array, State]:
    """A banded mask over the C valid tokens of a chunk and the w before them. Chunks are w tokens long at least: shorter ones
    would copy each key more often than twice."""
    check_implementation(implementation)
    batch, length = q.shape[:2]
    q, k, v, old_keys, old_values = widened(*masked(valid, q, k, v), *restarted(reset, initial_state)[:2])
    count, w = initial_state[2], old_keys.shape[1]
    size = chunk_length(max(chunk_size, w), length)
    tokens, segment = packing(valid, batch, length), segments(reset, batch, length)
    q, k, v, now = (tokens.pack(a) for a in (q, k, v, segment))
    slots = jnp.arange(w)
    held = jnp.where(slots >= w - count[:, None], 0, -1)  # the segment of each carried key; −1: an empty slot

    def band(old: jax.Array, new: jax.Array) -> jax.Array:
        """[B, w, …], [B, T, …] → the keys that a chunk may read [B, N, w+C, …]."""
        own = chunks(new, size)
        before = jnp.concatenate([old[:, None], own[:, :-1, size - w :]], 1) if own.shape[1] > 1 else old[:, None]
        return jnp.concatenate([before, own], 2)

    row, column = jnp.arange(size)[:, None], jnp.arange(w + size)
    reads = (column > row) & (column <= row + w) & (band(held, now)[:, :, None] == chunks(now, size)[..., None])  # [B, N, C, w+C]
    scores = dot("bnthk,bnjhk->bnhtj", chunks(q, size), band(old_keys, k)) / q.shape[-1] ** 0.5
    weight = jax.nn.softmax(jnp.where(reads[:, :, None], scores, -jnp.inf))  # a token reads itself, so no row is empty
    o = tokens.unpack(joined(dot("bnhtj,bnjhv->bnthv", weight, band(old_values, v)), length))

    newest = tokens.count[:, None] + slots  # [B, w] of the w+T
    kept = take(jnp.concatenate([held, now], 1), newest) == segment[:, -1:]
    keys, values = (
        masked(kept, take(jnp.concatenate([old, new], 1), newest))[0] for old, new in ((old_keys, k), (old_values, v))
    )  # fmt: skip
    ends = segment == segment[:, -1:]
    total = (ends if valid is None else ends & valid).sum(1, dtype=jnp.int32) + jnp.where(segment[:, -1] == 0, count, 0)
    return masked(valid, o)[0], (keys, values, total)
