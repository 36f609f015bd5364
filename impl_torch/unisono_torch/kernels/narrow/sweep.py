"""y = x Wᵀ + b [M, N] of x [M, K] in bfloat16 with few columns K, held padded to KP; dx = dy W; and dW = dyᵀ x with db = Σ dy beside it.

A float32 is three bfloat16, which tensor cores take as they lie, turned or not, and sum in float32: no digit is lost but in dx, which is
rounded to bfloat16 in the end. What is wide, y and dy, passes once through each kernel.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ("M", "splits")  # so that no length is compiled anew


@triton.jit
def _columns(p, row, there, STEP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """Rows `row` of [·, K] as [rows, KP]."""
    k = tl.arange(0, KP)[None, :]
    return tl.load(p + row.to(tl.int64)[:, None] * STEP + k, mask=there[:, None] & (k < K), other=0.0)


@triton.jit
def _parts(a, DOT: tl.constexpr):
    """A float32 as bfloat16 numbers that add up to it, held as products take them."""
    first = a.to(tl.bfloat16).to(tl.float32)
    second = (a - first).to(tl.bfloat16).to(tl.float32)
    return first.to(DOT), second.to(DOT), (a - first - second).to(tl.bfloat16).to(DOT)


@triton.jit
def _beside(total, small):
    """A sum with that of smaller parts: of an infinite factor the parts are NaN, and its first says all."""
    return total + tl.where(small - small == 0, small, 0.0)


@triton.jit(do_not_specialize=COUNTS)
def forward(
    x, weight, bias, y, M, X_ROW: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    m = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    a = _columns(x, m, m < M, X_ROW, K, KP).to(DOT)
    high, middle, low = _parts(_columns(weight, n, n < N, K, K, KP), DOT)
    total = tl.dot(a, tl.trans(low))
    total = tl.dot(a, tl.trans(middle), total)
    total = tl.where(total - total == 0, total, 0.0)  # see _beside
    total = tl.dot(a, tl.trans(high), total)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y + at, total, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def inputs(
    dy, weight, dx, M, N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total, small = tl.zeros((ROWS, KP), tl.float32), tl.zeros((ROWS, KP), tl.float32)
    for first in range(0, N, COLUMNS):
        n = first + tl.arange(0, COLUMNS)
        d = tl.load(dy + m.to(tl.int64)[:, None] * N + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
        high, middle, _ = _parts(_columns(weight, n, n < N, K, K, KP), DOT)
        d_high, d_middle, _ = _parts(d, DOT)
        small = tl.dot(d_high, middle, small)
        small = tl.dot(d_middle, high, small)
        total = tl.dot(d_high, high, total)
    k = tl.arange(0, KP)[None, :]
    tl.store(dx + m.to(tl.int64)[:, None] * K + k, _beside(total, small).to(dx.dtype.element_ty), mask=(m < M)[:, None] & (k < K))


@triton.jit(do_not_specialize=COUNTS)
def weights(
    dy, x, sums, M, splits, X_ROW: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of every `splits`-th block of rows each, [splits, N · K + N]: dweight and dbias, end to end."""
    blocks: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    split = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    total, small = tl.zeros((COLUMNS, KP), tl.float32), tl.zeros((COLUMNS, KP), tl.float32)
    whole = tl.zeros((COLUMNS,), tl.float32)
    for first in range(split * ROWS, M, splits * ROWS):
        m = first + tl.arange(0, ROWS)
        d = tl.load(dy + m.to(tl.int64)[:, None] * N + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
        a = _columns(x, m, m < M, X_ROW, K, KP).to(DOT)
        high, middle, low = _parts(d, DOT)
        small = tl.dot(tl.trans(low), a, small)
        small = tl.dot(tl.trans(middle), a, small)
        total = tl.dot(tl.trans(high), a, total)
        whole += tl.sum(d, 0)
    k = tl.arange(0, KP)[None, :]
    sums += split * (N * K + N)
    tl.store(sums + n[:, None] * K + k, _beside(total, small), mask=(n < N)[:, None] & (k < K))
    tl.store(sums + N * K + n, whole, mask=n < N)
