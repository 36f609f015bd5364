"""What the kernels of multi-scale attention share: decays inside a segment, and loads of tokens and of columns.

Time is cut into segments of L tokens, before each of which the states of all scales are kept; a segment is one or two blocks of C.
A_t sums log₂ λ from the segment's first token to t, in float64, and is held as two float32 whose sum it is.
"""

# Triton's own language, which a checker of Python reads wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def narrow(x, DOT: tl.constexpr, TF32: tl.constexpr):
    """x rounded to what a product takes; to tf32 by hand, since the hardware truncates."""
    if TF32:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & -8192).to(tl.float32, bitcast=True)
    return x.to(DOT)


@triton.jit
def tokens(base, t0, rows, step, column, live, most: tl.constexpr, DOT: tl.constexpr):
    """[C, columns] of one head, 0 where a token is not read."""
    mask = live[:, None] & (column < most)[None, :]
    return tl.load(base + t0.to(tl.int64) * step + rows[:, None] * step + column[None, :], mask=mask, other=0).to(DOT)


@triton.jit
def state(base, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[rows, columns] of a state [ROWS, COLUMNS] that lies dense."""
    mask = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(base + row[:, None] * COLUMNS + column[None, :], mask=mask, other=0)


@triton.jit
def reads(t0, rows, T, valid, batch, HAS_VALID: tl.constexpr):
    """Which tokens there are, and which of them are read."""
    here = t0 + rows < T
    live = here
    if HAS_VALID:
        live = here & (tl.load(valid + batch * T + t0 + rows, mask=here, other=0) != 0)
    return here, live


@triton.jit
def rate_of(hi, lo, s, length, ALIKE: tl.constexpr):
    """log₂ λ of one scale, where decays are ALIKE for all tokens."""
    return tl.load(hi + s * length) + tl.load(lo + s * length) if ALIKE else 0.0


@triton.jit
def faded(table, at, rows, rate, count, ALIKE: tl.constexpr):
    """What `table` holds of tokens at + rows, which is λ^count where decays are ALIKE: computed sooner than loaded."""
    if ALIKE:
        return tl.exp2(rate * count.to(tl.float32))
    return tl.load(table + at + rows)


@triton.jit
def fading(hi, lo, at, rows, same, rate, BACK: tl.constexpr, ALIKE: tl.constexpr):
    """Of one scale inside a block: how much of a token's row another holds, [query, key], or BACK [key, query]. same: the pairs."""
    if ALIKE:
        x = rate * (rows[:, None] - rows[None, :]).to(tl.float32)
    else:
        high, low = tl.load(hi + at + rows), tl.load(lo + at + rows)
        x = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    if BACK:
        x = -x
    return tl.exp2(tl.where(same, x, -float("inf")))


@triton.jit
def column_of(tile, s, SCALES: tl.constexpr):
    """Column s of a tile [C, SCALES]."""
    return tl.sum(tl.where(tl.arange(0, SCALES)[None, :] == s, tile, 0.0), 1)


@triton.jit
def put(tile, s, x, SCALES: tl.constexpr):
    """The tile [C, SCALES] with x [C] added to its column s."""
    return tile + tl.where(tl.arange(0, SCALES)[None, :] == s, x[:, None], 0.0)


@triton.jit(do_not_specialize=["T", "segments", "d0", "d1", "d2"])
def prepare(
    log_decay, reset, valid, hi, lo, near, kept, ahead, whole, section, T, segments, d0, d1, d2,
    M: tl.constexpr, C: tl.constexpr, NB: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """From log λ [B or 1, T, M], by scale and token [B or 1, M, N·L]:

    hi, lo: A. near: what fades between a token and the middle of its segment. kept: what a token still holds of the state before the
    segment. ahead: what the state after it holds of a token. whole [B or 1, M, N]: what it holds of the state before. section [B, N·L]:
    how many resets there were in the segment up to a token.
    """
    L: tl.constexpr = C * NB
    index = tl.program_id(0)
    n, s, batch = index % segments, (index // segments) % M, (index // segments // M).to(tl.int64)
    rows = tl.arange(0, L)
    here, live = reads(n * L, rows, T, valid, batch, HAS_VALID)
    a = tl.load(log_decay + batch * d0 + (n * L + rows).to(tl.int64) * d1 + s * d2, mask=live, other=0).to(tl.float64)
    total = tl.cumsum(a * 1.4426950408889634, 0)
    high = total.to(tl.float32)
    end = tl.sum(tl.where(rows == L - 1, total, 0.0), 0)
    middle = tl.sum(tl.where(rows == C - 1, total, 0.0), 0)
    at = (batch * M + s) * (segments * L) + n * L + rows
    tl.store(hi + at, high)
    tl.store(lo + at, (total - high.to(tl.float64)).to(tl.float32))
    tl.store(near + at, tl.exp2(tl.where(rows < C, middle - total, total - middle).to(tl.float32)))
    holds, leaves = tl.exp2(high), tl.exp2((end - total).to(tl.float32))
    through = tl.exp2(end.to(tl.float32))
    if HAS_RESET:
        count = tl.cumsum(tl.load(reset + batch * T + n * L + rows, mask=here, other=0).to(tl.int32), 0)
        last = tl.max(count, 0)
        holds, leaves = tl.where(count == 0, holds, 0.0), tl.where(count == last, leaves, 0.0)
        through = tl.where(last == 0, through, 0.0)
        if s == 0:
            tl.store(section + batch * (segments * L) + n * L + rows, count)
    tl.store(kept + at, holds)
    tl.store(ahead + at, leaves)
    tl.store(whole + (batch * M + s) * segments + n, through)
