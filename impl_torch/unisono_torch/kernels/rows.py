"""What kernels ask of an array's place in memory."""

from __future__ import annotations

from torch import Tensor

# Of tokens that follow each other, at most: 64 of them, a block, are counted in 32 bits
APART = 1 << 25


def dense(a: Tensor) -> Tensor:
    """a [B, T, H, ·] where a head's channels lie side by side and its tokens less than APART from each other; else a copy."""
    return a if a.stride(-1) == 1 and a.stride(1) < APART else a.contiguous()
