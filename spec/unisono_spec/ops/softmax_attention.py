"""Causal softmax attention with a cache of every key and value (Vaswani et al. 2017, eq 1).

Shapes: q, k [B, T, H, K], v [B, T, H, V], reset and valid [B, T] bool or None. State: (keys [B, capacity, H, K],
values [B, capacity, H, V], count [B] int32): the tokens of the sequence by position, zeros from `count` on. Each form returns
(o [B, T, H, V], final state). o is 0 where a token is not valid. A sequence longer than the capacity is an InputError.
"""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.errors import InputError
from unisono_spec.contract.shapes import shaped
from unisono_spec.ops.fold import fold

State = tuple[np.ndarray, np.ndarray, np.ndarray]


def step(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, state: State, reset: np.ndarray | None = None, valid: np.ndarray | None = None
) -> tuple[np.ndarray, State]:
    """One token: q, k [B, H, K], v [B, H, V], reset and valid [B]."""
    keys, values, count = state
    if reset is not None:
        count = np.where(reset, 0, count).astype(np.int32)
    read = np.ones(len(q), bool) if valid is None else valid
    slot = np.arange(keys.shape[1])
    held = (slot < count[:, None])[..., None, None]  # an empty slot is no part of the state: it has no gradient either
    keys, values = np.where(held, keys, 0), np.where(held, values, 0)
    _check_capacity(count[read], keys.shape[1])
    here = ((slot == count[:, None]) & read[:, None])[..., None, None]
    keys, values = np.where(here, k[:, None], keys), np.where(here, v[:, None], values)
    count = count + read.astype(np.int32)
    scores = np.einsum("bhk,bchk->bhc", np.where(read[:, None, None], q, 0), keys) / q.shape[-1] ** 0.5
    # the first slot is read even where the sequence is still empty, to have something to divide by
    seen = (slot < np.maximum(count, 1)[:, None])[:, None]
    scores = np.where(seen, scores, -np.inf)
    weight = np.exp(scores - np.real(scores).max(-1, keepdims=True))
    o = np.einsum("bhc,bchv->bhv", weight / weight.sum(-1, keepdims=True), values)
    return np.where(read[:, None, None], o, 0), (keys, values, count)


@shaped
def recurrent(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, initial_state: State, reset: np.ndarray | None = None, valid: np.ndarray | None = None
) -> tuple[np.ndarray, State]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    return fold(step, (q, k, v), initial_state, reset, valid)


@shaped
def parallel(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    initial_state: State,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    chunk_size: int = 64,
) -> tuple[np.ndarray, State]:
    """One masked attention over the cache and all T tokens, for C queries at a time."""
    batch, length = q.shape[:2]
    reset = np.zeros((batch, length), bool) if reset is None else reset
    valid = np.ones((batch, length), bool) if valid is None else valid
    q, k, v = (np.where(valid[..., None, None], a, 0) for a in (q, k, v))
    capacity, count = initial_state[0].shape[1], initial_state[2]
    segment = np.cumsum(reset, 1)  # [B, T]
    same = segment[:, :, None] == segment[:, None, :]
    before = np.tril(same & valid[:, None, :], -1).sum(-1)  # [B, T], valid tokens before t in its segment
    index = before + np.where(segment == 0, count[:, None], 0)
    _check_capacity(index[valid], capacity)

    slots = np.broadcast_to(np.arange(capacity), (batch, capacity))
    old = (np.where(reset[:, 0, None, None, None], 0, a) for a in initial_state[:2])
    keys, values = (np.concatenate(both, 1) for both in zip(old, (k, v), strict=True))  # [B, capacity+T, H, ·]
    where = np.concatenate([slots, index], 1)
    present = np.concatenate([slots < count[:, None], valid], 1)
    belongs = np.concatenate([np.zeros((batch, capacity), int), segment], 1)
    out = []
    for start in range(0, length, chunk_size):
        part = slice(start, start + chunk_size)
        reads = present[:, None] & (belongs[:, None] == segment[:, part, None]) & (where[:, None] <= index[:, part, None])
        reads = (reads & valid[:, part, None])[:, :, None]  # [B, C, 1, capacity+T]
        scores = np.einsum("bthk,bjhk->bthj", q[:, part], keys) / q.shape[-1] ** 0.5
        shift = np.where(reads, np.real(scores), -np.inf).max(-1, keepdims=True)
        weight = np.where(reads, np.exp(np.where(reads, scores - shift, 0)), 0)
        total = weight.sum(-1, keepdims=True) + ~valid[:, part, None, None]  # nothing is read there
        out.append(np.einsum("bthj,bjhv->bthv", weight / total, values))

    last = present & (belongs == segment[:, -1:])
    chosen = (last[:, None] & (where[:, None] == slots[..., None])).astype(np.real(v).dtype)  # [B, capacity, capacity+T]
    final = np.einsum("bcj,bjhk->bchk", chosen, keys), np.einsum("bcj,bjhv->bchv", chosen, values)
    return np.concatenate(out, 1), (*final, (index[:, -1] + valid[:, -1]).astype(np.int32))


def _check_capacity(index: np.ndarray, capacity: int) -> None:
    if index.size and index.max() >= capacity:
        raise InputError(f"capacity: token {index.max() + 1} of a sequence, the cache holds {capacity}; give init_state a larger capacity")
