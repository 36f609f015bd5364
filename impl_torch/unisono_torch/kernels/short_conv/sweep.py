"""y_t = Σ_i w_i ∘ s_{t+i} + bias over TAPS inputs s: the state's TAPS − 1, then x; of those alone that have the owner of the last of them.
With SILU, SiLU(y_t).

A program owns ROWS tokens and COLUMNS channels of a sequence. Nothing is carried, so that each output is made by itself.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ("T", "programs")  # so that no length is compiled anew


@triton.jit
def _place(programs, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's sequence, its place among those of it, its rows and channels. A grid's first axis alone counts past 65,535."""
    blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    block, which = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    order = which % programs
    return (which // programs).to(tl.int64), order, order * ROWS + tl.arange(0, ROWS), block * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _seen(x, state, batch, e, c, T, X_ROW: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, ACC: tl.constexpr):
    """Inputs number e [ROWS] of [B, TAPS − 1 + T, D], [ROWS, COLUMNS]; 0 where there are none."""
    old = (e < TAPS - 1)[:, None]
    inside = (c < D)[None, :] & (e >= 0)[:, None] & (e < T + TAPS - 1)[:, None]
    at = (batch * T + e - (TAPS - 1))[:, None] * X_ROW + c[None, :]
    new = tl.load(x + at, mask=inside & (e >= TAPS - 1)[:, None], other=0.0).to(ACC)
    if TAPS > 1:
        at = (batch * (TAPS - 1) + e)[:, None] * D + c[None, :]
        new = tl.where(old, tl.load(state + at, mask=inside & old, other=0.0).to(ACC), new)
    return new


@triton.jit
def _owners(owner, batch, e, T, TAPS: tl.constexpr):
    return tl.load(owner + batch * (T + TAPS - 1) + e, mask=(e >= 0) & (e < T + TAPS - 1), other=-1)[:, None]


@triton.jit
def _outputs(
    x, weight, bias, state, owner, batch, t, c, T, X_ROW: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_OWNER: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y of tokens t [ROWS], without SiLU."""
    total = tl.zeros((ROWS, COLUMNS), ACC)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=c < D, other=0.0)[None, :]
    for i in tl.static_range(TAPS):
        s = _seen(x, state, batch, t + i, c, T, X_ROW, D, TAPS, ACC)
        if HAS_OWNER:
            s = tl.where(_owners(owner, batch, t + i, T, TAPS) == _owners(owner, batch, t + TAPS - 1, T, TAPS), s, 0.0)
        total += s * tl.load(weight + i * D + c, mask=c < D, other=0.0)[None, :]
    return total


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit(do_not_specialize=COUNTS)
def forward(
    x, weight, bias, state, owner, dy, y, T, programs, X_ROW: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_OWNER: tl.constexpr, SILU: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [B, T, D], weight [TAPS, D], state [B, TAPS − 1, D], owner [B, TAPS − 1 + T] → y [B, T, D]; with SLOPE dy times SiLU's slope."""
    batch, _, t, c = _place(programs, D, ROWS, COLUMNS)
    total = _outputs(x, weight, bias, state, owner, batch, t, c, T, X_ROW, D, TAPS, HAS_BIAS, HAS_OWNER, ACC, ROWS, COLUMNS)
    at = (batch * T + t)[:, None] * D + c[None, :]
    mask = (t < T)[:, None] & (c < D)[None, :]
    if SLOPE:
        sigma = _sigmoid(total)
        total = tl.load(dy + at, mask=mask, other=0.0).to(ACC) * sigma * (1 + total * (1 - sigma))
    elif SILU:
        total *= _sigmoid(total)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def backward(
    x, weight, state, owner, dy, dx, dstate, dweight, T, programs, X_ROW: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_OWNER: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dy [B, T, D] → dx, dstate, and of ROWS inputs each [B, ·, TAPS + 1, D] the gradients of the weight and, last, of the bias."""
    batch, order, e, c = _place(programs, D, ROWS, COLUMNS)
    inside = (c < D)[None, :] & (e < T + TAPS - 1)[:, None]
    s = _seen(x, state, batch, e, c, T, X_ROW, D, TAPS, ACC)
    total = tl.zeros((ROWS, COLUMNS), ACC)
    for i in tl.static_range(TAPS):
        t = e - i
        there = (t >= 0) & (t < T)
        d = tl.load(dy + (batch * T + t)[:, None] * D + c[None, :], mask=there[:, None] & (c < D)[None, :], other=0.0).to(ACC)
        at = (batch * programs + order) * (TAPS + 1)
        if HAS_BIAS and i == 0:
            tl.store(dweight + (at + TAPS) * D + c, tl.sum(d, 0), mask=c < D)
        read = s
        if HAS_OWNER:
            same = _owners(owner, batch, e, T, TAPS) == _owners(owner, batch, t + TAPS - 1, T, TAPS)
            d = tl.where(same, d, 0.0)
            read = tl.where(same, s, 0.0)  # a NaN that was not read must not spread
        total += d * tl.load(weight + i * D + c, mask=c < D, other=0.0)[None, :]
        part = tl.sum(tl.where(there[:, None], d * read, 0.0), 0)
        tl.store(dweight + (at + i) * D + c, part, mask=c < D)
    at = (batch * T + e - (TAPS - 1))[:, None] * D + c[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=inside & (e >= TAPS - 1)[:, None])
    if TAPS > 1:
        at = (batch * (TAPS - 1) + e)[:, None] * D + c[None, :]
        tl.store(dstate + at, total, mask=inside & (e < TAPS - 1)[:, None])
