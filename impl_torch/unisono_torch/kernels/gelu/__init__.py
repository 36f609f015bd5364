"""GELU, and GELU of what a gate lets through, on a GPU in one pass each way, with the digits of their tails; by plain operations they take
six passes and more."""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from unisono_torch.ops.transforms import again

LOG2E = tl.constexpr(1.4426950408889634)
C, D = tl.constexpr(1.5957691216057308), tl.constexpr(0.07135481627260025)  # 2u = x (C + D x²)
FAR = tl.constexpr(100.0)  # as in ops/elementwise.py
BLOCK = 1024


@triton.jit
def sigmoid(x):
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def share(x):
    """Φ(x) = ½ erfc(−x/√2), since ½(1 + erf) has no digits where it is small; Triton has no erfc.

    erfc(z) = t p(t) e^{−z²}, t = 2 / (2 + z), for z ≥ 0: p of degree 8, with the least greatest relative error up to z = 10, where erfc
    leaves float32 (Lawson's algorithm; off by 0.7 roundings). erfc(−z) = 2 − erfc(z).
    """
    z = tl.abs(x) * 0.7071067811865476
    t = 2 / (2 + z)
    p = t * -0.0590977468 + 0.284715757
    p = p * t - 0.487492211
    p = p * t + 0.27840257
    p = p * t - 0.0268574829
    p = p * t + 0.20278531
    p = p * t + 0.243078783
    p = p * t + 0.282378758
    p = p * t + 0.28208622
    tail = 0.5 * p * t * tl.exp2(z * z * -LOG2E)
    return tl.where(x > 0, 1 - tail, tail)


@triton.jit
def _slope(a):
    return share(a) + a * 0.3989422804014327 * tl.exp2(a * a * (-0.5 * LOG2E))


@triton.jit
def _forward(x, y, N, TANH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + at, mask=at < N, other=0.0).to(tl.float32)
    b = a * sigmoid(a * (C + D * a * a)) if TANH else a * share(a)
    tl.store(y + at, b.to(y.dtype.element_ty), mask=at < N)


@triton.jit
def _backward(dy, x, dx, N, TANH: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + at, mask=at < N, other=0.0).to(tl.float32)
    d = tl.load(dy + at, mask=at < N, other=0.0).to(tl.float32)
    if TANH:
        a = tl.clamp(a, -FAR, FAR, propagate_nan=tl.PropagateNan.ALL)
        z = a * (C + D * a * a)
        slope = sigmoid(z) * (1 + a * (C + 3 * D * a * a) * sigmoid(-z))
    else:
        slope = _slope(a)
    tl.store(dx + at, (d * slope).to(dx.dtype.element_ty), mask=at < N)


def forward(x: Tensor, tanh: bool) -> Tensor:
    """x [...] → [...], float32 or narrower, in its dtype."""
    x = x.contiguous()
    y, grid = torch.empty_like(x), (triton.cdiv(x.numel(), BLOCK),)
    if x.numel():
        with torch.cuda.device_of(x):
            _forward[grid](x, y, x.numel(), tanh, BLOCK)
    return y


def backward(dy: Tensor, x: Tensor, tanh: bool) -> Tensor:
    """dy and x [...] → dx [...], in x's dtype."""
    dy, x = dy.contiguous(), x.contiguous()
    dx, grid = torch.empty_like(x), (triton.cdiv(x.numel(), BLOCK),)
    if x.numel():
        with torch.cuda.device_of(x):
            _backward[grid](dy, x, dx, x.numel(), tanh, BLOCK)
    return dx


@triton.jit
def _gated_forward(x, y, step, F, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + row * step + column, mask=column < F, other=0.0).to(tl.float32)
    b = tl.load(x + row * step + F + column, mask=column < F, other=0.0).to(tl.float32)
    a *= sigmoid(b)
    tl.store(y + row * F + column, (a * share(a)).to(y.dtype.element_ty), mask=column < F)


@triton.jit
def _gated_backward(dy, x, dx, dstep, step, F, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + row * step + column, mask=column < F, other=0.0).to(tl.float32)
    b = tl.load(x + row * step + F + column, mask=column < F, other=0.0).to(tl.float32)
    d = tl.load(dy + row * dstep + column, mask=column < F, other=0.0).to(tl.float32)
    gate = sigmoid(b)
    d *= _slope(a * gate) * gate
    tl.store(dx + row * 2 * F + column, d.to(dx.dtype.element_ty), mask=column < F)
    tl.store(dx + row * 2 * F + F + column, (d * a * sigmoid(-b)).to(dx.dtype.element_ty), mask=column < F)


@torch.library.custom_op("unisono::gated_gelu", mutates_args=(), schema="(Tensor x) -> Tensor")
def gated(x):
    """[a, b] [..., 2F] → GELU(a σ(b)) [..., F], float32 or narrower, in its dtype. Opaque to torch.compile, which would make it twice."""
    y, rows = gated_fake(x), _rows(x)
    if y.numel():
        width = y.shape[-1]
        with torch.cuda.device_of(x):
            _gated_forward[(len(rows), triton.cdiv(width, BLOCK))](rows, y, rows.stride(0), width, BLOCK)
    return y


@gated.register_fake
def gated_fake(x):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op("unisono::gated_gelu_backward", mutates_args=(), schema="(Tensor dy, Tensor x) -> Tensor")
def gated_backward(dy, x):
    dx, rows, upstream = gated_backward_fake(dy, x), _rows(x), _rows(dy)
    if dx.numel():
        grid = len(rows), triton.cdiv(dy.shape[-1], BLOCK)
        with torch.cuda.device_of(x):
            _gated_backward[grid](upstream, rows, dx, upstream.stride(0), rows.stride(0), dy.shape[-1], BLOCK)
    return dx


@gated_backward.register_fake
def gated_backward_fake(dy, x):
    return x.new_empty(x.shape)


def _rows(x: Tensor) -> Tensor:
    """[..., D] as rows that each lie in one piece."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, dy):
    (x,) = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return again(_plain, (x,), ctx.needs_input_grad, (dy,))
    return gated_backward(dy, x)


def _plain(x: Tensor) -> Tensor:
    """The same in plain operations, for second derivatives."""
    from unisono_torch.ops import elementwise

    a, b = x.chunk(2, -1)
    return elementwise.gelu(a * elementwise.sigmoid(b))


gated.register_autograd(_gradient, setup_context=_setup)
