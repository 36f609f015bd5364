"""Minibatches as a pure function of (seed, step): a resumed run and another backend see the same ones."""

from __future__ import annotations

import numpy as np
from unisono_spec.contract import InputError
from unisono_spec.contract.initial import generator


def starts(length: int, seed: int, step: int, batch_size: int, seq_len: int) -> np.ndarray:
    """Where the sequences of minibatch `step` start, [B] int64: uniform over a corpus of `length` ids."""
    if batch_size < 1 or seq_len < 1:
        raise InputError(f"batch_size, seq_len: {batch_size}, {seq_len}; use positive integers")
    if length < seq_len + 1:
        raise InputError(
            f"seq_len: {seq_len} tokens and their targets need {seq_len + 1} ids, this text has {length}; shorten seq_len or give more"
        )
    return generator(seed, f"batch.{step}").integers(0, length - seq_len, size=batch_size)


def batch(ids: np.ndarray, seed: int, step: int, batch_size: int, seq_len: int) -> np.ndarray:
    """Minibatch `step`: [B, T+1] int64 (inputs are [:, :-1], targets [:, 1:]); frames [N, F] give [B, T+1, F] float32."""
    at = starts(len(ids), seed, step, batch_size, seq_len)
    rows = ids[at[:, None] + np.arange(seq_len + 1)]
    return rows.astype(np.int64 if ids.dtype.kind in "iu" else np.float32)


def reset_mask(documents: np.ndarray, at: np.ndarray, seq_len: int) -> np.ndarray:
    """[B, T] bool for sequences that start at `at` [B]: true where a document starts. `documents`: sorted starts, as in a Corpus."""
    where = at[:, None] + np.arange(seq_len)
    nearest = np.searchsorted(documents, where)
    return (nearest < len(documents)) & (documents[np.minimum(nearest, len(documents) - 1)] == where)


def positions(length: int, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Positions of minibatch `step` for training on precomputed ξ, [N] int64: uniform over those with a target, 0 … length − 2."""
    return starts(length, seed, step, batch_size, 1)
