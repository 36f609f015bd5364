"""How the sweeps are cut: by the way, the kind of product and the wider of K and V, as timed on an H100 (docs/results/kernel-notes.md).

Nothing here depends on lengths, so that a new length compiles nothing, and nothing is timed where a model runs.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cut:
    """chunk: tokens C whose products are masked. block: columns a program. warps, stages: of a program, and of its loads. split: wide
    features in two halves. Of taylor2 alone: registers a thread at most; every: tokens between the states kept, a power of two."""

    chunk: int
    block: int
    warps: int
    stages: int
    split: bool = False
    registers: int | None = None
    every: int = 256


@dataclasses.dataclass(frozen=True)
class HopperCut:
    """As Cut, of hopper.py and hopper_forward.py. programs: at most, where time is cut. early, packed: as there. crowded: stages where
    heads alone are more programs than that, so that two have room on a multiprocessor."""

    chunk: int
    block: int
    warps: int
    stages: int
    programs: int
    early: bool = False
    packed: bool = False
    crowded: int | None = None


# by (way, kind of product, the wider of K and V rounded up to a power of two)
TABLE: dict[tuple[str, str, int], Cut] = {
    # Triton 3.6 miscompiles blocks of 32 columns with 4 warps and 64 tokens for an H100: wrong numbers and illegal accesses, against
    # float64 in several sizes. Narrow heads therefore take 2 warps.
    **{(way, "bfloat16", width): Cut(64, width, 2, 2) for way in ("forward", "backward") for width in (16, 32)},
    ("forward", "bfloat16", 64): Cut(64, 64, 4, 3),
    ("backward", "bfloat16", 64): Cut(64, 64, 4, 3),
    ("forward", "bfloat16", 128): Cut(64, 64, 4, 2, split=True),
    ("backward", "bfloat16", 128): Cut(64, 64, 4, 2),
    ("forward", "bfloat16", 256): Cut(64, 64, 8, 2),
    ("backward", "bfloat16", 256): Cut(32, 32, 8, 2),
    # products of float32 numbers: float16 in tf32, float32 itself without matrix units
    **{(way, "float32", width): Cut(32, min(width, 32), 4, 1) for way in ("forward", "backward") for width in (16, 32, 64, 128)},
    **{(way, "float32", 256): Cut(16, 16, 4, 1) for way in ("forward", "backward")},
}
# taylor2, by (what is made: o, q's or k's and v's gradient, kind of product): of the chunks, and of the sweeps before, which alone say
# `every`. K up to 16, V up to 64 a block. Triton 3.6 miscompiles chunks' kernels of bfloat16 with 8 warps (gradients of k wrong) and with
# loads in stages (illegal accesses), against float64 on an H200.
CHUNKS: dict[tuple[str, str], Cut] = {
    **{(mode, "bfloat16"): Cut(64, 64, 4, 1, registers=168) for mode in "oqk"},
    **{(mode, "float32"): Cut(16, 16, 4, 1) for mode in "oqk"},
}
SWEEPS: dict[tuple[str, str], Cut] = {
    **{(mode, "bfloat16"): Cut(64, 64, 4, 1, registers=168, every=128) for mode in "oqk"},
    **{(mode, "float32"): Cut(16, 16, 4, 1) for mode in "oqk"},
}
# of hopper.py, by what served_as says: a program a multiprocessor forward
HOPPER: dict[tuple[str, int], HopperCut] = {
    ("forward", 64): HopperCut(64, 64, 4, 4, 132, crowded=3),
    ("forward", 128): HopperCut(64, 128, 8, 3, 132, early=True, packed=True),
    ("forward", 256): HopperCut(64, 64, 8, 2, 132, packed=True),
    ("backward", 64): HopperCut(64, 64, 4, 3, 264),
    ("backward", 128): HopperCut(64, 128, 8, 2, 264),
    ("backward", 256): HopperCut(64, 64, 8, 2, 264),
}
# so wide a head must be for it, and a multiple of what is copied at once: 16 bytes
LEAST, COPIED = 32, 8
# Heads of other widths from NARROWEST on are copied into such ones (padded.py), so many at a time that copies are at most COPIES of the
# bytes of inputs and outputs, up to a width of 128 and beyond; those of fewer numbers in q and v than LARGE at once.
NARROWEST, COPIES, LARGE = 16, (0.2, 0.46), 1 << 21
INTERPRETED = Cut(16, 16, 1, 1, every=32)
WIDTH = 16  # of heads, for which taylor2's kernels have room
# Up to so wide a value, do·o is made where it is used, twice; of wider ones once, before, since registers are what is scarce.
NARROW = 64
# Time is cut into segments where heads alone are fewer programs than a GPU runs at once (two a multiprocessor of an H100), each of
# SHORTEST tokens or more; of LONG, where heads leave less than half of it idle: a segment costs reading k and v again.
PROGRAMS, FEW = 264, 96
# What segments leave takes at most OWN of the bytes of inputs and outputs, and taylor2's states KEPT, or there are fewer of them.
SHORTEST, LONG, OWN, KEPT = 512, 2048, 0.2, 0.305


def width_of(K: int, V: int) -> int:
    return max(16, 1 << (max(K, V) - 1).bit_length())


def features(width: int) -> int:
    """How many taylor2 has of heads so wide: kernels' own, which say each pair once, up to WIDTH."""
    return (WIDTH // 2 + 1) * WIDTH + WIDTH + 1 if width <= WIDTH else 1 + width + width**2


def served_as(way: str, K: int, V: int) -> tuple[str, int]:
    """An entry of HOPPER: the narrower of K and V, each rounded up to 64, 128 or 256; or 256, where keys, or on the way back values, are so
    wide."""
    BK, BV = (max(64, width_of(n, n)) for n in (K, V))
    return way, 256 if (BK if way == "forward" else max(BK, BV)) > 128 else min(BK, BV)
