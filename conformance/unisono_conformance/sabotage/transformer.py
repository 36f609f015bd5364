"""Mistakes in the Transformer's cache."""

from __future__ import annotations

import numpy as np
from unisono_spec.layers import lat as layer
from unisono_spec.ops import softmax_attention

from unisono_conformance.sabotage import Sabotage
from unisono_conformance.sabotage.lat import halved, restarting, unscaled

SOFTMAX = softmax_attention.parallel


def _padding_keeps_its_slot(q, k, v, initial_state, reset, valid, chunk_size):
    """Without resets: each token is cached where it stands in the call, not where it stands in its sequence."""
    o, (keys, values, count) = SOFTMAX(q, k, v, initial_state, reset, valid, chunk_size)
    if valid is None or (reset is not None and reset.any()):
        return o, (keys, values, count)
    slot = np.arange(keys.shape[1])
    held = (slot < initial_state[2][:, None])[..., None, None]
    keys, values = (np.where(held, a, 0) for a in (keys, values))
    for b, t in zip(*np.nonzero(valid), strict=True):
        keys[b, initial_state[2][b] + t], values[b, initial_state[2][b] + t] = k[b, t], v[b, t]
    return o, (keys, values, count)


def _cache_dropped(q, k, v, initial_state, reset, valid, chunk_size):
    keys, values, count = initial_state
    o, _ = SOFTMAX(q, k, v, (keys, values, np.zeros_like(count)), reset, valid, chunk_size)
    return o, SOFTMAX(q, k, v, initial_state, reset, valid, chunk_size)[1]


def _empty_slots_differentiated(q, k, v, initial_state, reset, valid, chunk_size):
    o, (keys, values, count) = SOFTMAX(q, k, v, initial_state, reset, valid, chunk_size)
    empty = (np.arange(keys.shape[1]) >= count[:, None])[..., None, None]
    return o, (np.where(empty, initial_state[0], keys), np.where(empty, initial_state[1], values), count)


def _future_shown(q, k, v, *rest):
    """Each query reads what the last one may: the mask is not causal."""
    o, last = SOFTMAX(q, k, v, *rest)
    moved = [SOFTMAX(np.concatenate([q[:, :-1], q[:, t : t + 1]], 1), k, v, *rest)[0][:, -1] for t in range(q.shape[1])]
    return np.stack(moved, 1).astype(o.dtype), last


def softmax(instead) -> tuple:
    return ((softmax_attention, "parallel", instead),)


SABOTAGES = (
    Sabotage("cached at the wrong slot beside padding", "P15v", softmax(_padding_keeps_its_slot)),
    Sabotage("cache not read after hand-over", "P3", softmax(_cache_dropped)),
    Sabotage("gradient of empty slots", "P7", softmax(_empty_slots_differentiated)),
    Sabotage("mask that shows the future to the cache", "P5", softmax(_future_shown)),
    Sabotage("scores without 1/√K", "P1", softmax(unscaled(SOFTMAX))),
    Sabotage("half of RoPE's base", "P1", ((layer, "rotate", halved),)),
    Sabotage("rotation restarts at zero after hand-over", "P3", ((layer, "rotate", restarting),)),
)
