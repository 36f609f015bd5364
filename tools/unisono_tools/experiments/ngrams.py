"""What a model must beat: Witten–Bell byte n-grams and xz, in bits per byte of held-out text."""

from __future__ import annotations

import lzma

import numpy as np
from unisono_spec.contract import InputError

MAX_ORDER = 7  # a context and its next byte fit in 64 bits


def witten_bell(train: np.ndarray, held_out: np.ndarray, orders: int = 5) -> list[float]:
    """Bits per byte of `held_out` under interpolated byte n-grams counted in `train`, for contexts of 0 … `orders` bytes.

    P_k(c | h) = (N(hc) + T(h) P_{k−1}(c | h′)) / (N(h) + T(h)), where T(h) is the number of different bytes seen after h and h′ is h
    without its oldest byte; P_{−1} = 1/256 (Witten & Bell 1991, method C, interpolated as by Chen & Goodman 1999, section 2.6).
    Both texts: [N] bytes. The first byte of `held_out` is context only, as it is for the models.
    """
    if not 0 <= orders <= MAX_ORDER:
        raise InputError(f"orders: {orders}; use 0 to {MAX_ORDER}")
    if len(train) <= orders or len(held_out) < 2:
        raise InputError(f"n-grams: {len(train)} and {len(held_out)} bytes are too few; give longer texts")
    p = np.full(len(held_out) - 1, 1 / 256)
    bits = []
    for order in range(orders + 1):
        skipped = max(order - 1, 0)  # the first targets have shorter contexts, and keep their P of that order
        p[skipped:] = _interpolate(_grams(train, order + 1), _grams(held_out, order + 1)[0 if order else 1 :], p[skipped:])
        bits.append(float(-np.log2(p).mean()))
    return bits


def xz(held_out: np.ndarray, primed_with: np.ndarray | None = None) -> float:
    """Bits per byte of `held_out` after xz -9e, alone; or what it adds to `primed_with`, compressed before it in one stream."""
    text = held_out.tobytes()
    size = _xz_size(text) if primed_with is None else _xz_size(primed_with.tobytes() + text) - _xz_size(primed_with.tobytes())
    return 8 * size / len(held_out)


def _grams(text: np.ndarray, n: int) -> np.ndarray:
    """Every n consecutive bytes as one integer, [N − n + 1] uint64: the context, and the next byte in the lowest 8 bits."""
    out = np.zeros(len(text) - n + 1, np.uint64)
    for i in range(n):
        out = out << np.uint64(8) | text[i : len(text) - n + 1 + i]
    return out


def _interpolate(seen: np.ndarray, asked: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """P_k of the grams `asked` [M], from the grams `seen` and P_{k−1} [M]."""
    grams, counts = np.unique(seen, return_counts=True)
    contexts, first, types = np.unique(grams >> np.uint64(8), return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, first)  # N(h)
    pair = np.minimum(np.searchsorted(grams, asked), len(grams) - 1)
    n_pair = np.where(grams[pair] == asked, counts[pair], 0)
    context = np.minimum(np.searchsorted(contexts, asked >> np.uint64(8)), len(contexts) - 1)
    known = contexts[context] == asked >> np.uint64(8)
    t = types[context]
    return np.where(known, (n_pair + t * shorter) / (totals[context] + t), shorter)


def _xz_size(text: bytes) -> int:
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
