"""One token of CRAM's adaptive sum: the score s_φ and ξ ← ξ + s σ(x), in place, in one launch."""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unisono_torch.kernels.decode.common import NORMS, last, launch, loaded, normed, ready
from unisono_torch.kernels.decode.tiles import Next
from unisono_torch.kernels.gelu import sigmoid

Layer = tuple[Tensor, Tensor]  # weight [out, in] and bias


@triton.jit
def _gelu_tanh(x):
    return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def scored(
    x, qx, position, W0, b0, W1, b1, W2, b2, h, xi, out, counters, gain, shift, following, D: tl.constexpr, DIGITS: tl.constexpr,
    KEY_SCALE: tl.constexpr, EXCLUSIVE: tl.constexpr, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr, BI: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """xi [B, D] += s σ(x), s = W2·h + b2; out [B, D]: xi, or as it was before. h [B, D]: s_φ's second hidden layer, float32, of the
    position's binary digits and k = x·qx / KEY_SCALE, x and qx [B, D].

    PROGRAMS for each sequence make rows of h; the last of them to come makes xi, and the norm of out in following [B, D], if there is NORM.
    """
    row = tl.program_id(1)
    I: tl.constexpr = DIGITS + 1
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BI)
    j = tl.arange(0, BI)
    d = tl.arange(0, BD)
    w1 = tl.load(W1 + n[:, None] * I + i[None, :], mask=(n < D)[:, None] & (i < I)[None, :], other=0.0).to(tl.float32)
    w0 = tl.load(W0 + i[:, None] * I + j[None, :], mask=(i < I)[:, None] & (j < I)[None, :], other=0.0).to(tl.float32)
    ready(EARLY)
    given = tl.load(x + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    key = tl.sum(given * tl.load(qx + row * D + d, mask=d < D, other=0.0).to(tl.float32), 0) / KEY_SCALE
    place = tl.load(position + row)
    digit = (place >> tl.maximum(DIGITS - 1 - j, 0)) & 1
    asked = tl.where(j < DIGITS, digit.to(tl.float32), tl.where(j == DIGITS, key, 0.0))
    first = _gelu_tanh(tl.sum(w0 * asked[None, :], 1) + tl.load(b0 + i, mask=i < I, other=0.0).to(tl.float32))
    second = _gelu_tanh(tl.sum(w1 * first[None, :], 1) + tl.load(b1 + n, mask=n < D, other=0.0).to(tl.float32))
    tl.store(h + row * D + n, second, mask=n < D)
    if last(counters + row, PROGRAMS):
        tl.debug_barrier()
        w = tl.load(W2 + d, mask=d < D, other=0.0).to(tl.float32)
        s = tl.sum(w * tl.load(h + row * D + d, mask=d < D, other=0.0), 0) + tl.load(b2).to(tl.float32)
        old = tl.load(xi + row * D + d, mask=d < D, other=0.0)
        new = old + s * sigmoid(given)
        loaded()
        tl.store(xi + row * D + d, new, mask=d < D)
        found = old if EXCLUSIVE else new
        tl.store(out + row * D + d, found, mask=d < D)
        if NORM > 0:
            TYPE: tl.constexpr = following.dtype.element_ty
            rows = normed(tl.where(d < D, found, 0.0), d, D, gain, shift, NORM, EPS, TYPE)
            tl.store(following + row * D + d, rows.to(TYPE), mask=d < D)


def sum_step(
    x: Tensor, qx: Tensor, position: Tensor, layers: tuple[Layer, Layer, Layer], key_scale: float, xi: Tensor, exclusive: bool,
    turns: Tensor, following: Next | None,
) -> Tensor:  # fmt: skip
    """x and qx = Q x [B, D], position [B] int32, the score's three layers, xi [B, D] float32, which is advanced → ξ [B, D].

    turns [B] int32: zeros, before and after. following: a norm of the result.
    """
    (batch, d), ((w0, b0), (w1, b1), (w2, b2)) = x.shape, layers
    h, out = (x.new_empty((batch, d), dtype=torch.float32) for _ in range(2))
    rows, (kind, gain, shift, eps) = 16, ("none", None, None, 0.0) if following is None else following.norm
    if following is not None:
        following.rows = torch.empty_like(x)
    programs = triton.cdiv(d, rows)
    scored[(programs, batch)](
        x, qx, position, w0, b0, w1, b1, w2, b2, h, xi, out, turns, gain, shift, None if following is None else following.rows, D=d,
        DIGITS=len(b0) - 1, KEY_SCALE=key_scale, EXCLUSIVE=exclusive,
        PROGRAMS=programs, ROWS=rows, BD=triton.next_power_of_2(d), BI=triton.next_power_of_2(len(b0)), NORM=NORMS[kind],
        EPS=eps, num_warps=4, **launch(x.device),
    )  # fmt: skip
    return out
