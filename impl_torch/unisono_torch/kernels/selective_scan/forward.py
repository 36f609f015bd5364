"""The selective scan forward: h_t = exp(Δ_t A) ∘ h_{t−1} + Δ_t B_t u_t, y_t = (C_t h_t + D u_t) SiLU(z_t), states in registers.

A program sweeps a segment of the time; every TILE tokens it saves its states for the backward. Where there is more than one segment,
each has been swept from a state of 0 before (ENDS): states are linear, and over a segment they decay by exp(A Σ Δ).
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# ruff: noqa: RUF005, RUF059, B007 (its tuples grow by +, its loops have no underscore, its constants compare one way)

from __future__ import annotations

import triton
import triton.language as tl

from unisono_torch.kernels.selective_scan.functions import (
    COUNTS,
    LOG2E,
    alive,
    carried,
    columns,
    handed,
    place,
    placed,
    read_rows,
    read_states,
    sigmoid,
    softplus,
    starts,
    write_states,
)


@triton.jit
def _read(
    u, dt, B, C, z, valid, batch, top, T, where, token, DIM: tl.constexpr, N: tl.constexpr, U_ROW: tl.constexpr, DT_ROW: tl.constexpr,
    Z_ROW: tl.constexpr, HAS_Z: tl.constexpr, HAS_VALID: tl.constexpr, ENDS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """What a group reads."""
    row, _, live = alive(top, token, T, batch, valid, HAS_VALID)
    mask = live & (where < DIM)
    x = tl.load(u + row * U_ROW + where, mask=mask, other=0.0)
    delta = tl.load(dt + row * DT_ROW + where, mask=mask, other=0.0)
    gate = x
    if HAS_Z and not ENDS:
        gate = tl.load(z + row * Z_ROW + where, mask=mask, other=0.0)
    b = read_rows(B, batch, top, T, valid, N, ROWS, LANES, HAS_VALID, ACC)
    c = b
    if not ENDS:
        c = read_rows(C, batch, top, T, valid, N, ROWS, LANES, HAS_VALID, ACC)
    return x, delta, gate, b, c


@triton.jit(do_not_specialize=COUNTS)
def sweep(
    u, dt, A, B, C, D, z, initial, reset, valid, y, final, saved, ends, spans,
    T, segments, tiles, count, DIM: tl.constexpr, N: tl.constexpr, U_ROW: tl.constexpr, DT_ROW: tl.constexpr, Z_ROW: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr, SAVE: tl.constexpr, ENDS: tl.constexpr,
    ACC: tl.constexpr, RATE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y, the final state and, with SAVE, the state before each tile; with ENDS, only what a segment of `tiles` makes of 0.

    B and C [B, T, N]; saved [B, count, DIM, N]; ends [B, segments, DIM, N] and spans [B, segments, DIM].
    """
    batch, segment, block, first = place(DIM, segments, RATE, ROWS)
    where, token = columns(first, RATE, ROWS, LANES)
    inside = where < DIM
    a2 = ()
    for r in tl.static_range(RATE):
        a2 = a2 + (read_states(A, 0, first, DIM, N, RATE, ROWS, ACC)[r] * LOG2E,)
    if ENDS:
        h = ()
        for r in tl.static_range(RATE):
            h = h + (tl.zeros((ROWS, N), ACC),)
        span = tl.zeros((ROWS, LANES * RATE), ACC)
        cut = 0
    else:
        skip = tl.load(D + where, mask=inside, other=0.0).to(ACC)
        h = read_states(initial, batch * DIM * N, first, DIM, N, RATE, ROWS, ACC)
        for before in range(segment):
            h = carried(h, spans, batch * segments + before, ends, a2, first, DIM, N, RATE, ROWS, ACC)

    low = segment * tiles * TILE
    high = tl.minimum(low + tiles * TILE, T)
    ahead = _read(
        u, dt, B, C, z, valid, batch, low, T, where, token, DIM, N, U_ROW, DT_ROW, Z_ROW, HAS_Z, HAS_VALID, ENDS, ACC, ROWS, LANES
    )
    for top in range(low, high, LANES):
        x, delta, gate, b, c = ahead
        ahead = _read(
            u, dt, B, C, z, valid, batch, top + LANES, T, where, token, DIM, N, U_ROW, DT_ROW, Z_ROW, HAS_Z, HAS_VALID, ENDS, ACC, ROWS,
            LANES,
        )  # fmt: skip
        row, here, live = alive(top, token, T, batch, valid, HAS_VALID)
        start = starts(reset, batch, top, T, LANES, HAS_RESET)
        if SAVE:
            write_states(saved, (batch * count + top // TILE) * (DIM * N), h, first, top % TILE == 0, DIM, N, RATE, ROWS)
        x = x.to(ACC)
        delta = delta.to(ACC)
        if SOFTPLUS:
            delta = tl.where(live, softplus(delta, ACC), 0.0)
        deltas = handed(delta, LANES, RATE)
        gains = handed(delta * x, LANES, RATE)
        sums = ()
        for k in tl.static_range(LANES):
            after = ()
            for r in tl.static_range(RATE):
                held = tl.exp2(deltas[k * RATE + r] * a2[r]) * h[r]
                if HAS_RESET:
                    held = tl.where(start[k], 0.0, held)
                new = held + gains[k * RATE + r] * b[k]
                after = after + (new,)
                if not ENDS:
                    sums = sums + (tl.sum(new * c[k], 1)[:, None],)
            h = after
            if ENDS and HAS_RESET:
                cut += start[k].to(tl.int32)
        if ENDS:
            span += delta
        else:
            out = placed(sums, LANES, RATE) + skip * x
            if HAS_Z:
                gate = gate.to(ACC)
                out = out * gate * sigmoid(gate)
            tl.store(y + row * DIM + where, out.to(y.dtype.element_ty), mask=here & inside)
    if ENDS:
        at = batch * segments + segment
        write_states(ends, at * DIM * N, h, first, True, DIM, N, RATE, ROWS)
        for r in tl.static_range(RATE):
            channel = first + tl.arange(0, ROWS) * RATE + r
            whole = tl.sum(tl.where(tl.arange(0, LANES * RATE)[None, :] % RATE == r, span, 0.0), 1)
            tl.store(spans + at * DIM + channel, tl.where(cut > 0, float("inf"), whole), mask=channel < DIM)
    elif high == T:
        write_states(final, batch * DIM * N, h, first, True, DIM, N, RATE, ROWS)
