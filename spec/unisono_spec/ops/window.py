"""Sliding-window attention: causal softmax over the last w tokens of the sequence, the present one included, scaled by 1/√K.

Shapes: q, k [B, T, H, K], v [B, T, H, V], reset and valid [B, T] bool or None. State: (keys [B, w, H, K], values [B, w, H, V],
count [B] int32): the last w keys and values, oldest first, so that the newest is always last and slots not yet filled are
zeros in front; and how many tokens the sequence has held. Each form returns (o [B, T, H, V], final state). o is 0 where a
token is not valid.
"""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.shapes import shaped
from unisono_spec.ops.fold import fold

State = tuple[np.ndarray, np.ndarray, np.ndarray]


def step(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, state: State, reset: np.ndarray | None = None, valid: np.ndarray | None = None
) -> tuple[np.ndarray, State]:
    """One token: q, k [B, H, K], v [B, H, V], reset and valid [B]."""
    keys, values, count = state
    w = keys.shape[1]
    if reset is not None:
        count = np.where(reset, 0, count).astype(np.int32)
    held = (np.arange(w) >= w - count[:, None])[..., None, None]  # an empty slot is no part of the state: it has no gradient either
    keys, values = np.where(held, keys, 0), np.where(held, values, 0)
    if valid is not None:
        q, k, v = (np.where(valid[:, None, None], a, 0) for a in (q, k, v))
    old = keys, values, count
    keys, values = np.concatenate([keys[:, 1:], k[:, None]], 1), np.concatenate([values[:, 1:], v[:, None]], 1)
    count = count + np.int32(1)
    filled = np.arange(w) >= w - count[:, None]  # [B, w]
    scores = np.einsum("bhk,bwhk->bhw", q, keys) / q.shape[-1] ** 0.5
    scores = np.where(filled[:, None], scores, -np.inf)
    weight = np.exp(scores - np.real(scores).max(-1, keepdims=True))
    o = np.einsum("bhw,bwhv->bhv", weight / weight.sum(-1, keepdims=True), values)
    if valid is None:
        return o, (keys, values, count)
    new, mask = (keys, values, count), valid[:, None, None, None]
    kept = np.where(mask, new[0], old[0]), np.where(mask, new[1], old[1]), np.where(valid, new[2], old[2])
    return np.where(valid[:, None, None], o, 0), kept


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
    """A banded mask over the w carried tokens and the C of a chunk. The band counts valid tokens: others take no room."""
    batch, length = q.shape[:2]
    reset = np.zeros((batch, length), bool) if reset is None else reset
    valid = np.ones((batch, length), bool) if valid is None else valid
    q, k, v = (np.where(valid[..., None, None], a, 0) for a in (q, k, v))
    *carried, count = initial_state
    keys, values = (np.where(reset[:, 0, None, None, None], 0, a) for a in carried)
    w, out = keys.shape[1], []
    slots = np.broadcast_to(np.arange(1 - w, 1), (batch, w))  # the order of carried tokens; the newest is 0
    for start in range(0, length, chunk_size):
        part = slice(start, start + chunk_size)
        read = valid[:, part]
        order = np.concatenate([slots, np.cumsum(read, 1)], 1)  # [B, w+C]
        segment = np.concatenate([np.zeros((batch, w), int), np.cumsum(reset[:, part], 1)], 1)
        present = np.concatenate([slots + count[:, None] > 0, read], 1)
        keys, values = np.concatenate([keys, k[:, part]], 1), np.concatenate([values, v[:, part]], 1)

        gap = order[:, w:, None] - order[:, None, :]  # [B, C, w+C], query by key
        reads = present[:, None] & (segment[:, w:, None] == segment[:, None]) & (gap >= 0) & (gap < w) & read[..., None]
        scores = np.einsum("bthk,bjhk->bthj", q[:, part], keys) / q.shape[-1] ** 0.5
        shift = np.where(reads[:, :, None], np.real(scores), -np.inf).max(-1, keepdims=True)
        weight = np.where(reads[:, :, None], np.exp(np.where(reads[:, :, None], scores - shift, 0)), 0)
        total = weight.sum(-1, keepdims=True) + ~read[..., None, None]  # nothing is read there
        out.append(np.einsum("bthj,bjhv->bthv", weight / total, values))

        last = present & (segment == segment[:, -1:])
        wanted = order[:, -1:] + np.arange(1 - w, 1)  # [B, w]
        chosen = (last[:, None] & (order[:, None] == wanted[..., None])).astype(np.real(v).dtype)  # [B, w, w+C]
        keys, values = np.einsum("bwj,bjhk->bwhk", chosen, keys), np.einsum("bwj,bjhv->bwhv", chosen, values)
        held = (read & last[:, w:]).sum(1)
        count = (held + np.where(segment[:, -1] == 0, count, 0)).astype(np.int32)
    return np.concatenate(out, 1), (keys, values, count)
