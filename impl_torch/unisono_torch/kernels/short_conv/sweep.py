"""y_t = Σ_i w_i ∘ s_{t+i} + bias over TAPS inputs s: the state's TAPS − 1, then x; of those alone that have the owner of the last of them.
With SILU, SiLU(y_t).

A program owns ROWS tokens and COLUMNS channels of a sequence. Nothing is carried, so that each output is made by itself.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# ruff: noqa: RUF005, SIM108 (its tuples grow by +, its constants compare one way)

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
        total += s * tl.load(weight + c * TAPS + i, mask=c < D, other=0.0)[None, :]
    return total


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit(do_not_specialize=COUNTS)
def forward(
    x, weight, bias, state, owner, y, T, programs, X_ROW: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_OWNER: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [B, T, D], weight [D, TAPS], state [B, TAPS − 1, D], owner [B, TAPS − 1 + T] → y [B, T, D]."""
    batch, _, t, c = _place(programs, D, ROWS, COLUMNS)
    total = _outputs(x, weight, bias, state, owner, batch, t, c, T, X_ROW, D, TAPS, HAS_BIAS, HAS_OWNER, ACC, ROWS, COLUMNS)
    at = (batch * T + t)[:, None] * D + c[None, :]
    mask = (t < T)[:, None] & (c < D)[None, :]
    if SILU:
        total *= _sigmoid(total)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _one(x, state, batch, e, c, T, X_ROW: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, ACC: tl.constexpr):
    """Input number e of [B, TAPS − 1 + T, D], [COLUMNS]; 0 where there is none."""
    inside = (c < D) & (e < T + TAPS - 1)
    s = tl.load(x + (batch * T + e - (TAPS - 1)) * X_ROW + c, mask=inside & (e >= TAPS - 1), other=0.0).to(ACC)
    if TAPS > 1:
        s += tl.load(state + (batch * (TAPS - 1) + e) * D + c, mask=inside & (e >= 0) & (e < TAPS - 1), other=0.0).to(ACC)
    return s


@triton.jit
def _given(
    x, state, owner, dy, batch, t, c, T, X_ROW: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, HAS_OWNER: tl.constexpr,
    ACC: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Of EACH tokens from t on: the newest input, its owner, and dy."""
    inputs = ()
    owners = ()
    upstream = ()
    for k in tl.static_range(EACH):
        inputs = inputs + (_one(x, state, batch, t + k + TAPS - 1, c, T, X_ROW, D, TAPS, ACC),)
        there = (t + k >= 0) & (t + k < T)
        upstream = upstream + (tl.load(dy + (batch * T + t + k) * D + c, mask=(c < D) & there, other=0.0).to(ACC),)
        if HAS_OWNER:
            owners = owners + (_owner(owner, batch, t + k + TAPS - 1, T, TAPS),)
        else:
            owners = owners + (0,)
    return inputs, owners, upstream


@triton.jit
def _owner(owner, batch, e, T, TAPS: tl.constexpr):
    return tl.load(owner + batch * (T + TAPS - 1) + e, mask=(e >= 0) & (e < T + TAPS - 1), other=-1)


@triton.jit(do_not_specialize=COUNTS)
def backward(
    x, weight, bias, state, owner, dy, dx, dstate, dweight, T, programs, X_ROW: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_OWNER: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """dy [B, T, D] → dx, dstate, and of ROWS inputs each [B, ·, TAPS + 1, D] the gradients of the weight and, last, of the bias.

    A program walks along time, so that each input and dy is read once: it holds the last TAPS inputs, and of their outputs the gradients
    before SiLU.
    """
    blocks: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    block, which = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    order, batch = which % programs, (which // programs).to(tl.int64)
    c = block * COLUMNS + tl.arange(0, COLUMNS)
    first = order * ROWS
    taps = ()
    seen = ()
    owners = ()
    slopes = ()
    sums = ()
    offset = tl.zeros((COLUMNS,), ACC)
    if HAS_BIAS:
        offset = tl.load(bias + c, mask=c < D, other=0.0).to(ACC)
    for i in tl.static_range(TAPS):
        taps = taps + (tl.load(weight + c * TAPS + i, mask=c < D, other=0.0).to(ACC),)
        sums = sums + (tl.zeros((COLUMNS,), ACC),)
    for i in tl.static_range(TAPS - 1):  # of the outputs before, number first − TAPS + 1 and after
        seen = seen + (_one(x, state, batch, first - (TAPS - 1) + i, c, T, X_ROW, D, TAPS, ACC),)
        slopes = slopes + (tl.zeros((COLUMNS,), ACC),)
        if HAS_OWNER:
            owners = owners + (_owner(owner, batch, first - (TAPS - 1) + i, T, TAPS),)
        else:
            owners = owners + (0,)
    total = tl.zeros((COLUMNS,), ACC)

    low = first - (TAPS - 1)
    ahead = _given(x, state, owner, dy, batch, low, c, T, X_ROW, D, TAPS, HAS_OWNER, ACC, EACH)
    for top in range(low, first + ROWS, EACH):
        inputs, labels, upstream = ahead
        ahead = _given(x, state, owner, dy, batch, top + EACH, c, T, X_ROW, D, TAPS, HAS_OWNER, ACC, EACH)
        for k in tl.static_range(EACH):
            t = top + k
            seen = seen + (inputs[k],)
            owners = owners + (labels[k],)
            d = upstream[k]
            if SILU:
                y = offset
                for i in tl.static_range(TAPS):
                    s = seen[i]
                    if HAS_OWNER:
                        s = tl.where(owners[i] == owners[TAPS - 1], s, 0.0)
                    y += s * taps[i]
                sigma = _sigmoid(y)
                d = d * sigma * (1 + y * (1 - sigma))
            d = tl.where((t >= 0) & (t < T), d, 0.0)
            slopes = slopes + (d,)
            own = (t >= first) & (t < first + ROWS)
            mine = tl.where(own, d, 0.0)
            total += mine
            added = ()
            for i in tl.static_range(TAPS):
                read = seen[i]
                if HAS_OWNER:
                    read = tl.where(owners[i] == owners[TAPS - 1], read, 0.0)  # a NaN that was not read must not spread
                added = added + (sums[i] + tl.where(own & (t < T), mine * read, 0.0),)
            sums = added
            # input number t, the oldest of output t's, has now been read by all that read it
            reached = tl.zeros((COLUMNS,), ACC)
            for i in tl.static_range(TAPS):
                part = slopes[TAPS - 1 - i]
                if HAS_OWNER:
                    part = tl.where(_owner(owner, batch, t, T, TAPS) == _owner(owner, batch, t - i + TAPS - 1, T, TAPS), part, 0.0)
                reached += part * taps[i]
            inside = (c < D) & own & (t < T + TAPS - 1)
            at = (batch * T + t - (TAPS - 1)) * D + c
            tl.store(dx + at, reached.to(dx.dtype.element_ty), mask=inside & (t >= TAPS - 1))
            if TAPS > 1:
                tl.store(dstate + (batch * (TAPS - 1) + t) * D + c, reached, mask=inside & (t < TAPS - 1))
            seen = seen[1:]
            owners = owners[1:]
            slopes = slopes[1:]
    at = (batch * programs + order) * (TAPS + 1)
    for i in tl.static_range(TAPS):
        tl.store(dweight + (at + i) * D + c, sums[i], mask=c < D)
    if HAS_BIAS:
        tl.store(dweight + (at + TAPS) * D + c, total, mask=c < D)
