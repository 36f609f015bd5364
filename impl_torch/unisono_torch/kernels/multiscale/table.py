"""How multi-scale attention is cut: by the kind of product and the wider of K and V.

Nothing here depends on lengths, so that a new length compiles nothing, and nothing is timed where a model runs.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cut:
    """chunk: tokens C whose products are masked; blocks: of C, in a segment whose states are kept. columns: of a program. warps: of a
    program, for reading and for states. stages: of loads of states. registers: at most, of a thread that reads forward."""

    chunk: int
    blocks: int
    columns: int
    warps: int
    state_warps: int
    stages: int
    registers: int | None = None


@dataclasses.dataclass(frozen=True)
class HopperCut:
    """stages: of loads. registers: at most, of a thread."""

    stages: int
    registers: int | None


@dataclasses.dataclass(frozen=True)
class SweepCut:
    """chunk: tokens C whose products are masked, 16 for each warp of a program. stages: of loads."""

    chunk: int
    stages: int

    @property
    def warps(self) -> int:
        return self.chunk // 16


# by (kind of product, the wider of K and V rounded up to a power of two)
TABLE: dict[tuple[str, int], Cut] = {
    # Triton 3.6 miscompiles narrower blocks with 4 warps and 64 tokens for an H100: illegal accesses in the court, at 16 columns; and
    # with 8 warps and 64 columns. Narrow heads are therefore padded to 64.
    **{("bfloat16", width): Cut(64, 2, 64, 4, 4, 2) for width in (16, 32, 64)},
    ("bfloat16", 128): Cut(64, 2, 64, 4, 4, 2),
    # products of float32 numbers: float16 in tf32, float32 itself without matrix units
    **{("float32", width): Cut(32, 2, min(width, 32), 4, 4, 1) for width in (16, 32, 64, 128)},
}
# one scale alone needs fewer registers forward, so that three programs fit where two did
ONE: dict[tuple[str, int], Cut] = {
    key: dataclasses.replace(cut, registers=168) if key[0] == "bfloat16" and key[1] <= 64 else cut for key, cut in TABLE.items()
}
HOPPER = HopperCut(2, 128)  # states by hopper.py
HOPPER_SWEEPS = {"forward": SweepCut(64, 3), "of_queries": SweepCut(64, 3), "of_keys": SweepCut(64, 3)}  # hopper_sweep.py
TURNED = ("none", "elu1", "relu")  # φ whose slope is known from it, so that hopper_segments.py turns gradients back
INTERPRETED = Cut(16, 2, 16, 1, 1, 1)
# Of the bytes of inputs and outputs, what the states of all heads at once may take, with what else a token has for its scales; what those
# of a part of the heads may take, if not; how many parts there are at most; and numbers in q and v below which nobody minds.
WHOLE, EACH, PARTS, LARGE = 0.66, 0.52, 8, 1 << 21
# Time is cut into pieces of segments where heads and scales leave a GPU half idle: a piece costs reading keys and values again.
# What pieces leave takes at most OWN of the bytes of inputs and outputs.
FEW, PROGRAMS, SHORTEST, OWN = 96, 528, 4, 0.12


def width_of(K: int, V: int) -> int:
    return max(16, 1 << (max(K, V) - 1).bit_length())
