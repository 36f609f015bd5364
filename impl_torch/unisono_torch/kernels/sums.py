"""Sums that programs leave row by row, added in one launch: always in the same order, where a library's reduction has one a tensor."""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unisono_torch.kernels.registry import interpreted

ROWS, COLUMNS = 16, 128  # read at once


@triton.jit(do_not_specialize=("rows",))
def add(
    parts, first, second, rows, STEP: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, TURN: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Columns of [rows, STEP], WIDTH of them, added: SPLIT to `first`, as [SPLIT / TURN, TURN] turned, the others to `second`."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), parts.dtype.element_ty)
    for low in range(0, rows, ROWS):
        r = low + tl.arange(0, ROWS)
        at = r.to(tl.int64)[:, None] * STEP + c[None, :]
        total += tl.sum(tl.load(parts + at, mask=(r < rows)[:, None] & (c < WIDTH)[None, :], other=0.0), 0)
    tl.store(first + c % TURN * (SPLIT // TURN) + c // TURN, total, mask=c < SPLIT)
    tl.store(second + c - SPLIT, total, mask=(c >= SPLIT) & (c < WIDTH))


def added(parts: Tensor, first: Tensor, second: Tensor, turn: int) -> None:
    """parts [rows, columns] → `first` and `second`, end to end, which have as many entries as there are columns, or fewer."""
    kernel: Any = add
    split, wide = first.numel(), 32 if interpreted() else COLUMNS
    width = split + second.numel()
    with torch.cuda.device_of(parts):
        kernel[(-(-width // wide),)](parts, first, second, len(parts), parts.shape[1], width, split, turn, ROWS, wide, num_warps=4)
