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
# of the gated one: rows of a program, whose sums over them a bias's gradient is made of; columns of a block, and its warps
GATED_ROWS, GATED, GATED_WARPS = 32, 256, 1
ANYHOW = (torch.Tag.flexible_layout,)  # rows may lie apart: torch.compile pads those of products, and copied them for operators as they are


@triton.jit
def sigmoid(x):
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def _sigmoids(x):
    """σ(x) and σ(−x), each with its digits."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    inverse = 1 / (1 + e)
    return tl.where(x < 0, e, 1.0) * inverse, tl.where(x < 0, 1.0, e) * inverse


@triton.jit
def _share(x):
    """Φ(x) and e^{−x²/2}.

    Φ(x) = ½ erfc(−x/√2), since ½(1 + erf) has no digits where it is small; Triton has no erfc.
    erfc(z) = t p(t) e^{−z²}, t = 2 / (2 + z), for z ≥ 0: p of degree 8, with the least greatest relative error up to z = 10, where erfc
    leaves float32 (Lawson's algorithm; off by 0.7 roundings). erfc(−z) = 2 − erfc(z).
    """
    z = tl.abs(x) * 0.7071067811865476
    bell = tl.exp2(z * z * -LOG2E)
    t = 2 / (2 + z)
    p = t * -0.0590977468 + 0.284715757
    p = p * t - 0.487492211
    p = p * t + 0.27840257
    p = p * t - 0.0268574829
    p = p * t + 0.20278531
    p = p * t + 0.243078783
    p = p * t + 0.282378758
    p = p * t + 0.28208622
    tail = 0.5 * p * t * bell
    return tl.where(x > 0, 1 - tail, tail), bell


@triton.jit
def share(x):
    """Φ(x)."""
    return _share(x)[0]


@triton.jit
def _slope(a):
    below, bell = _share(a)
    return below + a * 0.3989422804014327 * bell


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
def _gate(x, offset, mask, F, HAS_BIAS: tl.constexpr):
    """a and b, float32."""
    a, b = tl.load(x, mask=mask, other=0.0).to(tl.float32), tl.load(x + F, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        a, b = a + offset[0], b + offset[1]
    return a, b


@triton.jit
def _offset(bias, column, F, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        of_a, of_b = tl.load(bias + column, mask=column < F, other=0.0), tl.load(bias + F + column, mask=column < F, other=0.0)
    else:
        of_a, of_b = tl.zeros(column.shape, tl.float32), tl.zeros(column.shape, tl.float32)
    return of_a.to(tl.float32), of_b.to(tl.float32)


@triton.jit
def _gated_forward(x, bias, y, rows, step, F, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = _offset(bias, column, F, HAS_BIAS)
    first = tl.program_id(0).to(tl.int64) * ROWS
    x += first * step + column
    y += first * F + column
    for _ in range(tl.minimum(rows - first, ROWS)):
        a, b = _gate(x, offset, column < F, F, HAS_BIAS)
        a *= sigmoid(b)
        tl.store(y, (a * share(a)).to(y.dtype.element_ty), mask=column < F)
        x, y = x + step, y + F


@triton.jit
def _gated_backward(
    dy, x, bias, dx, partial, rows, dstep, step, F, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """partial [programs, 2F]: sums of dx over a program's rows."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = _offset(bias, column, F, HAS_BIAS)
    first = tl.program_id(0).to(tl.int64) * ROWS
    dy += first * dstep + column
    x += first * step + column
    dx += first * 2 * F + column
    of_a, of_b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for _ in range(tl.minimum(rows - first, ROWS)):
        a, b = _gate(x, offset, column < F, F, HAS_BIAS)
        d = tl.load(dy, mask=column < F, other=0.0).to(tl.float32)
        gate, rest = _sigmoids(b)
        d *= _slope(a * gate) * gate
        e = d * a * rest
        tl.store(dx, d.to(dx.dtype.element_ty), mask=column < F)
        tl.store(dx + F, e.to(dx.dtype.element_ty), mask=column < F)
        of_a, of_b = of_a + d, of_b + e
        dy, x, dx = dy + dstep, x + step, dx + 2 * F
    if HAS_BIAS:
        partial += tl.program_id(0).to(tl.int64) * 2 * F + column
        tl.store(partial, of_a, mask=column < F)
        tl.store(partial + F, of_b, mask=column < F)


@torch.library.custom_op("unisono::gated_gelu", mutates_args=(), schema="(Tensor x, Tensor? bias=None) -> Tensor", tags=ANYHOW)
def gated(x, bias=None):
    """[a, b] [..., 2F], to which bias [2F] is added → GELU(a σ(b)) [..., F], float32 or narrower, in x's dtype. Opaque to torch.compile,
    which would make it twice, and would read the gradient of [a, b] again for that of the bias."""
    y, rows = gated_fake(x, bias), _rows(x)
    if y.numel():
        width = y.shape[-1]
        with torch.cuda.device_of(x):
            _gated_forward[_grid(rows, width)](
                rows, bias, y, len(rows), rows.stride(0), width, bias is not None, GATED_ROWS, GATED, num_warps=GATED_WARPS
            )
    return y


@gated.register_fake
def gated_fake(x, bias=None):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.custom_op(
    "unisono::gated_gelu_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor? bias) -> (Tensor, Tensor)",
    tags=ANYHOW,
)
def gated_backward(dy, x, bias):
    """dx, and bias's gradient, empty without it."""
    (dx, dbias), rows, upstream = gated_backward_fake(dy, x, bias), _rows(x), _rows(dy)
    if not dx.numel():
        return dx, dbias.zero_()
    grid, width = _grid(rows, dy.shape[-1]), dy.shape[-1]
    partial = None if bias is None else x.new_empty((grid[0], 2 * width), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _gated_backward[grid](
            upstream, rows, bias, dx, partial, len(rows), upstream.stride(0), rows.stride(0), width, bias is not None, GATED_ROWS, GATED,
            num_warps=GATED_WARPS,
        )  # fmt: skip
    return dx, dbias if partial is None else dbias.copy_(partial.sum(0))


@gated_backward.register_fake
def gated_backward_fake(dy, x, bias):
    return x.new_empty(x.shape), x.new_empty((0,)) if bias is None else bias.new_empty(bias.shape)


def _grid(rows: Tensor, width: int) -> tuple[int, int]:
    return -(-len(rows) // GATED_ROWS), -(-width // GATED)


def _rows(x: Tensor) -> Tensor:
    """[..., D] as rows that each lie in one piece."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, dy):
    x, bias = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        needed = (*ctx.needs_input_grad, False)[:2]  # a bias that is left at its default has no entry
        return again(_plain, (x, bias), needed, (dy,))
    dx, dbias = gated_backward(dy, x, bias)
    return dx, None if bias is None else dbias


def _plain(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same in plain operations, for second derivatives."""
    from unisono_torch.ops import elementwise

    a, b = (x if bias is None else x + bias.to(x.dtype)).chunk(2, -1)
    return elementwise.gelu(a * elementwise.sigmoid(b))


gated.register_autograd(_gradient, setup_context=_setup)
