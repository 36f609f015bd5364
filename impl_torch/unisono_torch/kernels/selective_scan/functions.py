"""What the kernels of the selective scan share: how a program's threads hold channels, states and tokens, and σ and softplus.

A program owns RATE · ROWS channels with all their N states (padded with zeros to a power of two, four or more), as RATE tiles [ROWS, N]:
tile r holds the channels m·RATE + r. A thread holds up to four neighbouring states of a channel, LANES threads of a warp one channel. Time
goes in groups of LANES tokens: what there is a token and channel is a tile [ROWS, LANES·RATE], as it lies in memory, a token a lane, so
that no softplus is computed twice, and lanes hand their token round in turn. Loads of a group are issued while the one before it is
computed: a chain of steps has nothing else to hide their latency behind.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# ruff: noqa: RUF005, SIM108, SIM300 (its tuples grow by +, its loops have no underscore, its constants compare one way)

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ("T", "segments", "tiles", "count", "batches")  # so that no length is compiled anew
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def place(DIM: tl.constexpr, segments, RATE: tl.constexpr, ROWS: tl.constexpr):
    """This program's batch row, segment, number of its block of channels, and first channel."""
    program = tl.program_id(0)
    blocks: tl.constexpr = (DIM + RATE * ROWS - 1) // (RATE * ROWS)
    block = program % blocks
    segment = (program // blocks) % segments
    batch = (program // (blocks * segments)).to(tl.int64)
    return batch, segment, block, block * (RATE * ROWS)


@triton.jit
def columns(first, RATE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """The channel of each element of a tile [ROWS, LANES·RATE], and the token of each column in its group."""
    column = tl.arange(0, LANES * RATE)[None, :]
    # the detour hides from the compiler that rows are neighbours in memory: it would give them to neighbouring threads
    row = (tl.arange(0, ROWS)[:, None] * 2 + 1) // 2
    return first + row * RATE + column % RATE, column // RATE


@triton.jit
def read_states(p, at, first, DIM: tl.constexpr, N: tl.constexpr, RATE: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    """RATE tiles [ROWS, N] of [DIM, N] at p + at; 0 where there is no channel."""
    n = tl.arange(0, N)[None, :]
    out = ()
    for r in tl.static_range(RATE):
        channel = first + tl.arange(0, ROWS)[:, None] * RATE + r
        out = out + (tl.load(p + at + channel * N + n, mask=(channel < DIM) & (n < N), other=0.0).to(ACC),)
    return out


@triton.jit
def write_states(p, at, h, first, on, DIM: tl.constexpr, N: tl.constexpr, RATE: tl.constexpr, ROWS: tl.constexpr):
    n = tl.arange(0, N)[None, :]
    for r in tl.static_range(RATE):
        channel = first + tl.arange(0, ROWS)[:, None] * RATE + r
        tl.store(p + at + channel * N + n, h[r], mask=(channel < DIM) & (n < N) & on)


@triton.jit
def carried(h, spans, at, ends, a2, first, DIM: tl.constexpr, N: tl.constexpr, RATE: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    """States h past a segment, number `at` of them all: they decay by exp(A Σ Δ), and what the segment makes of 0 comes to them."""
    made = read_states(ends, at * DIM * N, first, DIM, N, RATE, ROWS, ACC)
    out = ()
    for r in tl.static_range(RATE):
        channel = first + tl.arange(0, ROWS)[:, None] * RATE + r
        span = tl.load(spans + at * DIM + channel, mask=channel < DIM, other=0.0)
        cut = span == float("inf")
        out = out + (tl.where(cut, 0.0, tl.exp2(tl.where(cut, 0.0, span) * a2[r]) * h[r]) + made[r],)
    return out


@triton.jit
def alive(top, token, T, batch, valid, HAS_VALID: tl.constexpr):
    """Of each token of a group: its row [1, LANES·RATE], whether there is such a token, and whether it is valid."""
    here = top + token < T
    row = batch * T + top + token
    live = here
    if HAS_VALID:
        live = here & (tl.load(valid + row, mask=here, other=0) != 0)
    return row, here, live


@triton.jit
def read_rows(
    p, batch, top, T, valid, N: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, HAS_VALID: tl.constexpr, ACC: tl.constexpr
):
    """LANES rows of [B, T, N], each as [ROWS, N], for every thread its own; that of the last token where there is no such token."""
    every = tl.arange(0, N)[None, :] + tl.zeros((ROWS, 1), tl.int32)
    out = ()
    for k in tl.static_range(LANES):
        at = batch * T + tl.minimum(top + k, T - 1)
        if HAS_VALID:
            out = out + (tl.load(p + at * N + every, mask=tl.load(valid + at) != 0, other=0.0).to(ACC),)
        else:
            out = out + (tl.load(p + at * N + every).to(ACC),)
    return out


@triton.jit
def starts(reset, batch, top, T, LANES: tl.constexpr, HAS_RESET: tl.constexpr):
    """Whether each of LANES tokens resets, as scalars."""
    out = ()
    for k in tl.static_range(LANES):
        if HAS_RESET:
            out = out + (tl.load(reset + batch * T + top + k, mask=top + k < T, other=0) != 0,)
        else:
            out = out + (False,)
    return out


@triton.jit
def handed(x, LANES: tl.constexpr, RATE: tl.constexpr):
    """Each column of x [ROWS, LANES·RATE] as [ROWS, 1]."""
    column = tl.arange(0, LANES * RATE)[None, :]
    out = ()
    for c in tl.static_range(LANES * RATE):
        out = out + (tl.sum(tl.where(column == c, x, 0.0), 1)[:, None],)
    return out


@triton.jit
def placed(columns, LANES: tl.constexpr, RATE: tl.constexpr):
    """Columns [ROWS, 1] side by side: `handed` undone."""
    column = tl.arange(0, LANES * RATE)[None, :]
    out = tl.where(column == 0, columns[0], 0.0)
    for c in tl.static_range(1, LANES * RATE):
        out = tl.where(column == c, columns[c], out)
    return out


@triton.jit
def softplus(x, ACC: tl.constexpr):
    """log(1 + e^x) = max(x, 0) + log1p(e), e = e^−|x|, with log1p(e) = 2 artanh(s), s = e / (2 + e) ≤ ⅓: no digits are lost where e is
    small. The series ends below a rounding: s²ⁿ ≤ 9⁻ⁿ."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (2 + e)
    q = s * s
    TERMS: tl.constexpr = 17 if ACC == tl.float64 else 8
    series = tl.zeros_like(q)
    for n in tl.static_range(TERMS):
        series = series * q + tl.full((), 1.0 / (2 * (TERMS - 1 - n) + 1), ACC)
    return tl.maximum(x, 0.0) + 2 * s * series


@triton.jit
def sigmoid(x):
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x < 0, e, 1.0) / (1 + e)
