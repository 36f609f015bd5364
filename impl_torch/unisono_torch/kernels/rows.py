"""What kernels ask of an array's place in memory, and some rows or heads of one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of tokens that follow each other, at most: 64 of them, a block, are counted in 32 bits
APART = 1 << 25
ALL = slice(None)


def dense(a: Tensor) -> Tensor:
    """a [B, T, H, ·] where a head's channels lie side by side and its tokens less than APART from each other; else a copy."""
    return a if a.stride(-1) == 1 and a.stride(1) < APART else a.contiguous()


class Part(NamedTuple):
    """rows: of the batch."""

    rows: slice
    heads: slice

    def of(self, a: Tensor | None, rows: int | None = 0, heads: int | None = None) -> Any:
        """Its view of an array, whose axes of rows and heads are given; an axis of one is shared."""
        if a is None:
            return None
        for axis, which in ((rows, self.rows), (heads, self.heads)):
            if axis is not None and a.shape[axis] != 1:
                a = a[(ALL,) * axis + (which,)]
        return a

    def moved(self, a: Tensor | None) -> Any:
        """Its view of an array [B, T, H, ·], where a copy of 16 bytes can begin: else another kernel would be compiled for it."""
        view = self.of(a, 0, 2)
        return view if view is None or view.data_ptr() % 16 == 0 else view.clone(memory_format=torch.contiguous_format)


def division(batch: int, heads: int, wanted: float) -> list[Part]:
    """Parts of all rows and heads, each at most one in `wanted` of them, or one head."""
    if not batch * heads:
        return [Part(ALL, ALL)]
    rows, each = max(1, int(batch / wanted)), max(1, int(heads * min(1, batch / wanted)))
    return [
        Part(slice(b, min(b + rows, batch)), slice(h, min(h + each, heads))) for b in range(0, batch, rows) for h in range(0, heads, each)
    ]
