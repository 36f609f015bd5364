"""Choosing the next token, once for every room: float64 softmax, inverse CDF, Philox(seed, row, number generated so far).

One seed gives one text on every backend, except where two backends' logits straddle a near-tie; those are counted.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np

from unisono_spec.contract.errors import InputError, shown

# Logits closer than this share of their spread may swap order between float32 backends. A state's sum of T tokens, each of whose partial
# sums is rounded, errs by 2^-24 sqrt(T / 3) of itself, as a random walk does: of 2^17 tokens by 1.25e-5, in each of two logits of two.
NEAR_TIE = 5e-5
FEW = 8  # random numbers that NumPy draws sooner one by one


@dataclasses.dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary; 0 ≤ seed < 2⁶⁴.

    repetition_penalty θ: logits of ids that the text holds already are divided by θ where they are positive and multiplied by it
    elsewhere, before all else (Keskar et al. 2019, CTRL, section 4.1, as transformers computes it); 1 changes nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, kind in (("temperature", float), ("top_k", int), ("top_p", float), ("seed", int), ("repetition_penalty", float)):
            object.__setattr__(self, name, _number(name, getattr(self, name), kind))
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature: {shown(self.temperature)}; use 0 for greedy or a positive number")
        if self.top_k < 0:
            raise InputError(f"top_k: {shown(self.top_k)}; use 0 for all or a positive integer")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: {shown(self.top_p)}; use a number in (0, 1]")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise InputError(f"repetition_penalty: {shown(self.repetition_penalty)}; use 1 for none or a positive number, say 1.2")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed: {shown(self.seed)}; use an integer from 0 to 2**64 - 1")


def _number(name: str, value: Any, kind: Callable[[Any], int | float]) -> int | float:
    """`value` as Python's, whichever library it comes from."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral if kind is int else numbers.Real):
        wanted = "an integer" if kind is int else "a number"
        raise InputError(f"{name}: {shown(value)} has type {type(value).__name__}; give {wanted}")
    try:
        return kind(value)
    except OverflowError:
        return math.inf


GREEDY = Sampling()


def choose(logits: np.ndarray, sampling: Sampling, n_generated: int, seen: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The next id of each row, and whether it was a near-tie.

    logits `[B, V]`: +inf is better than any number, and several share; −inf is never chosen. n_generated: how many ids were
    generated before this one. seen `[B, V]` bool: ids that each text holds, which a repetition penalty asks for. Raises InputError on
    a NaN, and on a row of −inf alone.
    """
    z = np.asarray(logits).astype(np.float64)
    if z.ndim != 2 or not z.shape[-1]:
        raise InputError(f"logits: shape {z.shape}; give [B, V]")
    if np.isnan(z).any():
        raise InputError(trouble(1, n_generated))
    best = z.max(-1, keepdims=True)
    if (best == -np.inf).any():
        raise InputError(trouble(2, n_generated))
    z = np.where(best == np.inf, np.where(z == np.inf, 0, -np.inf), z)
    if sampling.repetition_penalty != 1 and seen is not None:
        with np.errstate(over="ignore", under="ignore"):
            moved = np.where(z > 0, z / sampling.repetition_penalty, z * sampling.repetition_penalty)
        # a penalty never forbids: what was finite stays so
        most = np.finfo(np.float64).max
        z = np.where(seen & np.isfinite(z), np.clip(moved, -most, most), z)
    if sampling.temperature == 0:
        return z.argmax(-1), _close(z)  # the lowest id on ties
    ids, ties = np.empty(len(z), np.int64), np.empty(len(z), bool)
    for row in range(len(z)):
        ids[row], ties[row] = _draw(z[row], sampling, row, n_generated)
    return ids, ties


def trouble(kind: int, n_generated: int) -> str:
    """What is wrong with logits: 1, a NaN; 2, a row of −inf alone."""
    if kind == 1:
        return f"logits: NaN at generated token {n_generated}; the weights or the state are damaged"
    return f"logits: a row of -inf alone at generated token {n_generated}; leave at least one id that can be chosen"


def uniform(seed: int, rows: int, n_generated: int, count: int) -> np.ndarray:
    """[count, rows]: the number in [0, 1) that row r's id number n_generated + i is drawn with, many at once (Salmon et al. 2011).

    Philox4x64-10 under the key (seed, row · 2³² + number), at the counter that NumPy's begins with.
    """
    if rows * count <= FEW:
        return np.array([[_uniform(seed, row, n_generated + i) for row in range(rows)] for i in range(count)]).reshape(count, rows)
    number = np.arange(n_generated, n_generated + count, dtype=np.uint64)[:, None]
    key = [np.uint64(seed), (np.arange(rows, dtype=np.uint64) << np.uint64(32)) | number]
    a, b, c, d = (np.full((count, rows), value, np.uint64) for value in (1, 0, 0, 0))
    with np.errstate(over="ignore"):
        for _ in range(10):
            (high_a, low_a), (high_c, low_c) = _product(a, 0xD2E7470EE14C6C93), _product(c, 0xCA5A826395121157)
            a, b, c, d = high_c ^ b ^ key[0], low_c, high_a ^ d ^ key[1], low_a
            key = [key[0] + np.uint64(0x9E3779B97F4A7C15), key[1] + np.uint64(0xBB67AE8584CAA73B)]
    return (a >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _uniform(seed: int, row: int, number: int) -> float:
    return np.random.Generator(np.random.Philox(key=np.array([seed, (row << 32) | number], dtype=np.uint64))).random()


def _product(a: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """The high and the low 64 bits of a product."""
    half, low = np.uint64(32), np.uint64(2**32 - 1)
    a1, a0, b1, b0 = a >> half, a & low, np.uint64(factor >> 32), np.uint64(factor & (2**32 - 1))
    middle = a1 * b0 + (a0 * b0 >> half)
    other = a0 * b1 + (middle & low)
    return a1 * b1 + (middle >> half) + (other >> half), a * np.uint64(factor)


def _close(z: np.ndarray) -> np.ndarray:
    """Whether the two best of each row are near, beside the spread of what can be chosen at all."""
    half = z / 2  # so that no difference overflows
    first, second = np.partition(half, -2, axis=-1)[:, :-3:-1].T if z.shape[-1] > 1 else (half[:, 0], np.full(len(z), -np.inf))
    return first - second <= NEAR_TIE * (first - half.min(-1, initial=np.inf, where=half > -np.inf))


def _draw(z: np.ndarray, sampling: Sampling, row: int, n_generated: int) -> tuple[int, bool]:
    with np.errstate(over="ignore", under="ignore"):  # to −inf or 0: what is so far from the best has no probability
        scaled = z / sampling.temperature
        if not math.isfinite(scaled.max()):  # a temperature near 0
            scaled = (z - z.max()) / sampling.temperature
        order = np.argsort(-scaled, kind="stable")  # best first, the lowest id on ties
        p = np.exp(scaled[order] - scaled[order[0]])
        p /= p.sum()
    if sampling.top_k:
        p[sampling.top_k :] = 0
    few = many = p
    if sampling.top_p < 1:
        before, enough = np.cumsum(p) - p, sampling.top_p * p.sum()
        before[0] = -np.inf  # the best stays
        few, p, many = (np.where(before >= enough + by, 0, p) for by in (-NEAR_TIE, 0, NEAR_TIE))
    cdf = np.cumsum(p)
    u = _uniform(sampling.seed, row, n_generated)
    rank = int(min(np.searchsorted(cdf, u * cdf[-1], side="right"), np.count_nonzero(p) - 1))
    return int(order[rank]), _turns(z[order], rank, u, few, many)


def _turns(z: np.ndarray, rank: int, u: float, few: np.ndarray, many: np.ndarray) -> bool:
    """Whether rounding could turn a draw: u falls near an edge of the CDF, wherever rounding lets top_p cut (few and many are kept at
    least and at most), or one beside the chosen rank of the sorted logits z could change places with it."""
    edges = np.cumsum(many)[: np.count_nonzero(many) - 1]
    half = z / 2  # so that no difference overflows
    margin = NEAR_TIE * (half[0] - half.min(initial=np.inf, where=half > -np.inf))
    near = (edges >= u * few.sum() - NEAR_TIE) & (edges <= u * many.sum() + NEAR_TIE)
    return bool(near.any() or (-np.diff(half[max(rank - 1, 0) : rank + 2]) <= margin).any())
