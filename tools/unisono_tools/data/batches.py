"""Minibatches as a pure function of (seed, step): a resumed run and another backend see the same ones."""

from __future__ import annotations

import functools

import numpy as np
from unisono_spec.contract import InputError
from unisono_spec.contract.initial import generator


def starts(length: int, seed: int, step: int, batch_size: int, seq_len: int, corpus: int = 0) -> np.ndarray:
    """Where the sequences of minibatch `step` start, [B] int64: uniform over a corpus of `length` ids, the corpus'th of several."""
    if batch_size < 1 or seq_len < 1:
        raise InputError(f"batch_size, seq_len: {batch_size}, {seq_len}; use positive integers")
    if length < seq_len + 1:
        raise InputError(
            f"seq_len: {seq_len} tokens and their targets need {seq_len + 1} ids, this text has {length}; shorten seq_len or give more"
        )
    return drawn(seed, step, corpus).integers(0, length - seq_len, size=batch_size)


def drawn(seed: int, step: int, corpus: int = 0) -> np.random.Generator:
    """What decides places in one of several corpora at a step."""
    return generator(seed, f"batch.{step}.{corpus}" if corpus else f"batch.{step}")


def shuffled_starts(length: int, seed: int, step: int, batch_size: int, seq_len: int) -> np.ndarray:
    """Where the sequences of minibatch `step` start, [B] int64, where each epoch reads a text's windows once, in an order of its own."""
    starts(length, seed, step, batch_size, seq_len)  # the same demands
    windows = (length - 1) // seq_len
    shift, place = in_epochs(windows, seed, step * batch_size + np.arange(batch_size), length - 1 - windows * seq_len)
    return place * seq_len + shift


def in_epochs(windows: int, seed: int, numbers: np.ndarray, spare: int = 0, together: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Of the sequences with these numbers [n]: how far their epoch is shifted, 0 … spare, and which window each is; both [n] int64.

    together: so many windows stay side by side, and their groups are shuffled."""
    epochs, places = np.divmod(numbers, windows)
    orders = {int(epoch): _epoch(seed, int(epoch), windows, spare, together) for epoch in np.unique(epochs)}
    found = [(orders[int(e)][0], orders[int(e)][1][p]) for e, p in zip(epochs, places, strict=True)]
    shift, place = np.array(found, np.int64).reshape(-1, 2).T
    return shift, place


@functools.lru_cache(maxsize=8)
def _epoch(seed: int, epoch: int, windows: int, spare: int, together: int) -> tuple[int, np.ndarray]:
    """Where the first window of an epoch starts, and the order of its windows."""
    random = generator(seed, f"epoch.{epoch}")
    shift, groups = int(random.integers(0, spare + 1)), random.permutation(-(-windows // together))
    order = (groups[:, None] * together + np.arange(together)).ravel()
    return shift, order[order < windows]


def batch(ids: np.ndarray, seed: int, step: int, batch_size: int, seq_len: int) -> np.ndarray:
    """Minibatch `step`: [B, T+1] int64 (inputs are [:, :-1], targets [:, 1:]); frames [N, F] give [B, T+1, F] float32."""
    return rows_at(ids, starts(len(ids), seed, step, batch_size, seq_len), seq_len)


def rows_at(ids: np.ndarray, at: np.ndarray, seq_len: int) -> np.ndarray:
    """The sequences that start at `at` [B], with one id more."""
    rows = ids[at[:, None] + np.arange(seq_len + 1)]
    return rows.astype(np.int64 if ids.dtype.kind in "iu" else np.float32)


def beginnings(ids: np.ndarray, at: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents that start at `at` [B] and have `lengths` [B] ids: the first seq_len + 1 of each, zeros behind shorter ones, and which
    of the first seq_len have a target, [B, T] bool."""
    within = np.arange(seq_len + 1) < lengths[:, None]
    out = np.zeros((len(at), seq_len + 1, *ids.shape[1:]), np.int64 if ids.dtype.kind in "iu" else np.float32)
    for row, start, length in zip(out, at, np.minimum(lengths, seq_len + 1), strict=True):
        row[:length] = ids[start : start + length]
    return out, within[:, 1:]


def reset_mask(documents: np.ndarray, at: np.ndarray, seq_len: int) -> np.ndarray:
    """[B, T] bool for sequences that start at `at` [B]: true where a document starts. `documents`: sorted starts, as in a Corpus."""
    where = at[:, None] + np.arange(seq_len)
    nearest = np.searchsorted(documents, where)
    return (nearest < len(documents)) & (documents[np.minimum(nearest, len(documents) - 1)] == where)


def positions(length: int, seed: int, step: int, batch_size: int) -> np.ndarray:
    """Positions of minibatch `step` for training on precomputed ξ, [N] int64: uniform over those with a target, 0 … length − 2."""
    return starts(length, seed, step, batch_size, 1)
