"""Causal softmax attention with a cache of every key and value (Vaswani et al. 2017, eq 1).

Shapes: q, k [B, T, H, K], v [B, T, H, V] of any float dtype, reset and valid [B, T] bool or None. State: (keys [B, capacity, H, K],
values [B, capacity, H, V], count [B] int32): the tokens of the sequence by position, zeros from `count` on. Each form returns
(o [B, T, H, V], final state), floats as float32 or wider. o is 0 where a token is not valid, and NaN where a valid one is past the
capacity: it is not cached. (Models raise InputError instead where values are known, not traced.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from unisono_spec.contract.shapes import shaped

from unisono_jax.ops import position
from unisono_jax.ops.carry import chunk_length, chunks, joined
from unisono_jax.ops.elementwise import dot, masked, restarted, widened
from unisono_jax.ops.fold import fold
from unisono_jax.ops.packing import segments
from unisono_jax.registry import check_implementation

State = tuple[jax.Array, jax.Array, jax.Array]


@shaped
def step(
    q: jax.Array, k: jax.Array, v: jax.Array, state: State, reset: jax.Array | None = None, valid: jax.Array | None = None
) -> tuple[jax.Array, State]:
    """One token: q, k [B, H, K], v [B, H, V], reset and valid [B]."""
    q, k, v, keys, values = widened(*masked(valid, q, k, v), *state[:2])
    count = state[2]
    if reset is not None:
        (count,) = masked(~reset, count)
    slot = jnp.arange(keys.shape[1])
    keys, values = masked(slot < count[:, None], keys, values)  # an empty slot is no part of the state: it has no gradient either
    here = slot == count[:, None]  # [B, capacity]
    if valid is not None:
        here = here & valid[:, None]
    keys, values = (jnp.where(here[..., None, None], new[:, None], old) for new, old in ((k, keys), (v, values)))
    scores = dot("bhk,bchk->bhc", q, keys) / q.shape[-1] ** 0.5
    scores = jnp.where((slot <= count[:, None])[:, None], scores, -jnp.inf)  # what is not valid reads a slot too, for the sum's sake
    o = _finished(dot("bhc,bchv->bhv", jax.nn.softmax(scores), values), count, keys.shape[1], valid)
    return o, (keys, values, count + (1 if valid is None else valid.astype(jnp.int32)))


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
    """Masked attention for C queries at a time, recomputed for the gradient. The keys are the cache with the T tokens written
    into it; where a reset may write one slot twice, the cache with the tokens behind it."""
    check_implementation(implementation)
    batch, length = q.shape[:2]
    size = chunk_length(chunk_size, length)
    q, k, v, old_keys, old_values = widened(*masked(valid, q, k, v), *restarted(reset, initial_state)[:2])
    count, capacity = initial_state[2], old_keys.shape[1]
    old_keys, old_values = masked(jnp.arange(capacity) < count[:, None], old_keys, old_values)
    index, last = position.parallel(count, length, reset, valid)  # [B, T], [B]
    segment = segments(reset, batch, length)
    ends = segment == segment[:, -1:]
    held = ends if valid is None else ends & valid
    slot = jnp.where(held, index, capacity)  # where the sequence that goes on keeps each token; past the end: nowhere
    rows = jnp.arange(batch)[:, None]
    old_kept = masked(segment[:, -1] == 0, old_keys, old_values)
    final_keys, final_values = (old.at[rows, slot].set(new, mode="drop") for old, new in zip(old_kept, (k, v), strict=True))

    if reset is None:
        keys, values = final_keys, final_values

        def reads(at: jax.Array, now: jax.Array, number: jax.Array) -> jax.Array:
            return jnp.arange(capacity) <= at[..., None]

    else:
        keys, values = jnp.concatenate([old_keys, k], 1), jnp.concatenate([old_values, v], 1)  # [B, capacity+T, H, ·]

        def reads(at: jax.Array, now: jax.Array, number: jax.Array) -> jax.Array:
            cached = (jnp.arange(capacity) < count[:, None])[:, None] & (now == 0)[..., None]
            order = jnp.arange(length)
            new = (segment[:, None] == now[..., None]) & (order < number[:, None])
            if valid is not None:
                new = new & valid[:, None]
            return jnp.concatenate([cached, new | (order == number[:, None])], 2)  # what is not valid reads itself, for the sum's sake

    @jax.checkpoint
    def attend(chunk: tuple) -> jax.Array:
        q, *where = chunk
        scores = dot("bthk,bjhk->bhtj", q, keys) / q.shape[-1] ** 0.5
        weight = jax.nn.softmax(jnp.where(reads(*where)[:, None], scores, -jnp.inf))
        return dot("bhtj,bjhv->bthv", weight, values)

    by_chunk = [jnp.swapaxes(chunks(a, size), 0, 1) for a in (q, index, segment)]
    number = jnp.minimum(jnp.arange(len(by_chunk[0]) * size), length - 1).reshape(-1, size)
    o = joined(jnp.swapaxes(lax.map(attend, (*by_chunk, number)), 0, 1), length)
    return _finished(o, index, capacity, valid), (final_keys, final_values, last)


def _finished(o: jax.Array, index: jax.Array, capacity: int, valid: jax.Array | None) -> jax.Array:
    past = (index >= capacity)[..., None, None]
    return masked(valid, jnp.where(past, jnp.nan, o))[0]
