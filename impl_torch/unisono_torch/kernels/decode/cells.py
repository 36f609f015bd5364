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

from unisono_torch.kernels.decode.common import NORMS, launch, normed, ready
from unisono_torch.kernels.decode.project import NO_NORM, projected
from unisono_torch.kernels.decode.tiles import Next
from unisono_torch.kernels.mom_gru.operator import advance


@triton.jit
def settled(
    h, residual, out, gain, shift, following, B, D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """h [2, B, D]: the first becomes the second, which is what out [B, D] holds, on residual; following [B, D]: its norm."""
    d = tl.arange(0, BLOCK)
    i = tl.program_id(0) * D + d
    TYPE: tl.constexpr = out.dtype.element_ty
    ready(EARLY)
    y = tl.load(h + B * D + i, mask=d < D, other=0.0)
    tl.store(h + i, y, mask=d < D)
    y = y.to(TYPE).to(tl.float32)
    if HAS_RESIDUAL:
        y = (y + tl.load(residual + i, mask=d < D, other=0.0).to(tl.float32)).to(TYPE).to(tl.float32)
    tl.store(out + i, y.to(TYPE), mask=d < D)
    if NORM > 0:
        tl.store(following + i, normed(y, d, D, gain, shift, NORM, EPS, TYPE).to(TYPE), mask=d < D)


def cell_step(
    x: Tensor, h: Tensor, M: Tensor, sizes: Any, weights: Any, residual: Tensor | None, dtype: torch.dtype, joined: str,
    following: Next | None,
) -> Tensor:  # fmt: skip
    """x [B, ·], h [2, B, D], of which the first advances, as does M → h' [B, D] in `dtype`, on residual. sizes, weights: the loop's.
    joined, following: as `projected` takes them."""
    advance(h, M, projected(x, weights[0], weights[1], joined=joined), sizes, weights)
    _, batch, d = h.shape
    out = h.new_empty((batch, d), dtype=dtype)
    kind, gain, shift, eps = NO_NORM if following is None else following.norm
    if following is not None:
        following.rows = torch.empty_like(out)
    settled[(batch,)](
        h, residual, out, gain, shift, None if following is None else following.rows, batch, D=d, HAS_RESIDUAL=residual is not None,
        NORM=NORMS[kind], EPS=eps, BLOCK=triton.next_power_of_2(d), num_warps=4, **launch(h.device),
    )  # fmt: skip
    return out
