"""Minibatches as a pure function of (seed, step): a resumed run and another backend see the same ones."""

from __future__ import annotations

import functools

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


def shuffled_starts(length: int, seed: int, step: int, batch_size: int, seq_len: int) -> np.ndarray:
    """Where the sequences of minibatch `step` start, [B] int64, where each epoch reads a text's windows once, in an order of its own."""
    windows = (length - 1) // seq_len
    starts(length, seed, step, batch_size, seq_len)  # the same demands
    numbers = step * batch_size + np.arange(batch_size)
    epochs = numbers // windows
    orders = {epoch: _epoch(seed, int(epoch), windows, length - 1 - windows * seq_len) for epoch in np.unique(epochs)}
    return np.array([orders[e][1][n % windows] * seq_len + orders[e][0] for e, n in zip(epochs, numbers, strict=True)], np.int64)


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, windows: int, spare: int) -> tuple[int, np.ndarray]:
    """Where the first window of an epoch starts, and the order of its windows."""
    random = generator(seed, f"epoch.{epoch}")
    return int(random.integers(0, spare + 1)), random.permutation(windows)


def batch(ids: np.ndarray, seed: int, step: int, batch_size: int, seq_len: int) -> np.ndarray:
    """Minibatch `step`: [B, T+1] int64 (inputs are [:, :-1], targets [:, 1:]); frames [N, F] give [B, T+1, F] float32."""
    return rows_at(ids, starts(len(ids), seed, step, batch_size, seq_len), seq_len)


def rows_at(ids: np.ndarray, at: np.ndarray, seq_len: int) -> np.ndarray:
    """The sequences that start at `at` [B], with one id more."""
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
