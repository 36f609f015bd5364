"""One token of MARU's cell: products of x, the loop's kernel, and what follows it."""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unisono_torch.kernels.decode.common import launch, ready
from unisono_torch.kernels.decode.project import projected
from unisono_torch.kernels.mom_gru.operator import advance

BLOCK = 256


@triton.jit
def settled(h, residual, out, SIZE, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """h [2, SIZE]: the first becomes the second, which is what out [SIZE] holds, on residual."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    TYPE: tl.constexpr = out.dtype.element_ty
    ready(EARLY)
    y = tl.load(h + SIZE + i, mask=i < SIZE, other=0.0)
    tl.store(h + i, y, mask=i < SIZE)
    y = y.to(TYPE)
    if HAS_RESIDUAL:
        y = (y.to(tl.float32) + tl.load(residual + i, mask=i < SIZE, other=0.0).to(tl.float32)).to(TYPE)
    tl.store(out + i, y, mask=i < SIZE)


def cell_step(x: Tensor, h: Tensor, M: Tensor, sizes: Any, weights: Any, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [B, ·], h [2, B, D], of which the first advances, as does M → h' [B, D] in `dtype`, on residual. sizes, weights: the loop's."""
    advance(h, M, projected(x, weights[0], weights[1]), sizes, weights)
    out = h.new_empty(h.shape[1:], dtype=dtype)
    size = out.numel()
    settled[(triton.cdiv(size, BLOCK),)](
        h, residual, out, size, HAS_RESIDUAL=residual is not None, BLOCK=BLOCK, num_warps=4, **launch(h.device)
    )
    return out
