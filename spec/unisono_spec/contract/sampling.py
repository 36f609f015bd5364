"""Choosing the next token, once for every room: float64 softmax, inverse CDF, Philox(seed, row, position).

One seed gives one text on every backend, except where two backends' logits straddle a near-tie; those are counted.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from unisono_spec.contract.errors import InputError

# Logits closer than this share of their spread may swap order between float32 backends.
NEAR_TIE = 1e-5


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature: {self.temperature!r}; use 0 for greedy or a positive number")
        if self.top_k < 0:
            raise InputError(f"top_k: {self.top_k!r}; use 0 for all or a positive integer")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {self.top_p!r}; use a number in (0, 1]")


GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Generated:
    """tokens `[B, n]` int64; near_ties `[B, n]` bool: choices that another backend's rounding could turn."""

    tokens: np.ndarray
    near_ties: np.ndarray


def choose(logits: np.ndarray, sampling: Sampling, position: int) -> tuple[np.ndarray, np.ndarray]:
    """The next id of each row, and whether it was a near-tie.

    logits `[B, V]`; position: how many tokens were generated before this one. Raises InputError on a NaN.
    """
    z = np.asarray(logits).astype(np.float64)
    if np.isnan(z).any():
        raise InputError(f"logits: NaN at generated position {position}; the weights or the state are damaged")
    margin = NEAR_TIE * np.ptp(z, axis=-1)
    if sampling.temperature == 0:
        ids = z.argmax(-1)  # the lowest id on ties
        top2 = np.partition(z, -2, axis=-1)[:, -2:] if z.shape[-1] > 1 else np.stack([z[:, 0] - np.inf, z[:, 0]], -1)
        return ids, top2[:, 1] - top2[:, 0] <= margin
    ids, ties = np.empty(len(z), np.int64), np.empty(len(z), bool)
    for row in range(len(z)):
        ids[row], ties[row] = _draw(z[row] / sampling.temperature, sampling, row, position)
    return ids, ties


def _draw(z: np.ndarray, sampling: Sampling, row: int, position: int) -> tuple[int, bool]:
    order = np.argsort(-z, kind="stable")  # best first, the lowest id on ties
    p = np.exp(z[order] - z[order[0]])
    p /= p.sum()
    if sampling.top_k:
        p[sampling.top_k :] = 0
    if sampling.top_p < 1:
        p[np.cumsum(p) - p >= sampling.top_p * p.sum()] = 0
    cdf = np.cumsum(p)
    key = np.array([sampling.seed, (row << 32) | position], dtype=np.uint64)
    u = np.random.Generator(np.random.Philox(key=key)).random() * cdf[-1]
    rank = int(np.searchsorted(cdf, u, side="right"))
    tie = bool(np.abs(cdf - u).min() <= NEAR_TIE)
    return int(order[min(rank, np.count_nonzero(p) - 1)]), tie
