"""How attention over a window is cut, by dtype and the wider of K and V. Nothing here depends on lengths."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Cut:
    """queries, keys: tokens of a block. warps: of a program. stages: of loads."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Cuts:
    forward: Cut
    of_queries: Cut
    of_keys: Cut


NARROW = {
    64: Cuts(Cut(64, 64, 4, 2), Cut(64, 64, 4, 2), Cut(64, 64, 4, 2)),
    128: Cuts(Cut(64, 64, 4, 2), Cut(64, 64, 4, 2), Cut(64, 64, 8, 1)),
}
FLOAT32 = {
    64: Cuts(Cut(32, 32, 4, 1), Cut(32, 32, 4, 1), Cut(32, 32, 4, 1)),
    128: Cuts(Cut(32, 32, 4, 1), Cut(32, 32, 4, 1), Cut(32, 32, 4, 1)),
}
INTERPRETED = Cuts(*[Cut(16, 16, 1, 1)] * 3)


def cut(dtype: torch.dtype, width: int, interpreted: bool) -> Cuts:
    if interpreted:
        return INTERPRETED
    return (FLOAT32 if dtype == torch.float32 else NARROW)[64 if width <= 64 else 128]
