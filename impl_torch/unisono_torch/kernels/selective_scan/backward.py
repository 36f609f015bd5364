"""The selective scan's gradient. With G_t = ∂L/∂h_t = C_t dy_t + a_{t+1} G_{t+1} and a_t = exp(Δ_t A):

dC_t = Σ_d dy_t h_t, dB_t = Σ_d G_t Δ_t u_t, d(Δ u)_t = G_t·B_t, and what a_t receives, W_t = a_t G_t ∘ h_{t−1}, gives dΔ_t = W_t·A and
dA = Σ_t Δ_t W_t.

Tiles are taken from the last to the first. From the state saved before a tile, the state before each group of LANES tokens goes to a
scratch; each group is then computed once more with its states and decays in registers, and swept back. Sums over channels are over those
of one program: the programs' sums are added up afterwards, in a fixed order.

Where there is more than one segment, each has been swept from G = 0 before (`ends`): G is linear too.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# ruff: noqa: RUF005, RUF059 (its tuples grow by +, its loops have no underscore, its constants compare one way)

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
    u, dt, B, C, z, valid, dy, batch, top, T, where, token, DIM: tl.constexpr, N: tl.constexpr, U_ROW: tl.constexpr, DT_ROW: tl.constexpr,
    Z_ROW: tl.constexpr, HAS_Z: tl.constexpr, HAS_VALID: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What a group reads: of INPUTS u and B, of OUTPUTS z, dy and C."""
    row, _, live = alive(top, token, T, batch, valid, HAS_VALID)
    mask = live & (where < DIM)
    delta = tl.load(dt + row * DT_ROW + where, mask=mask, other=0.0)
    x = delta
    gate = delta
    d = delta
    if INPUTS:
        x = tl.load(u + row * U_ROW + where, mask=mask, other=0.0)
        b = read_rows(B, batch, top, T, valid, N, ROWS, LANES, HAS_VALID, ACC)
        c = b
    if OUTPUTS:
        d = tl.load(dy + row * DIM + where, mask=mask, other=0.0)
        if HAS_Z:
            gate = tl.load(z + row * Z_ROW + where, mask=mask, other=0.0)
        c = read_rows(C, batch, top, T, valid, N, ROWS, LANES, HAS_VALID, ACC)
        if not INPUTS:
            b = c
    return x, delta, gate, d, b, c


@triton.jit(do_not_specialize=COUNTS)
def ends(
    u, dt, A, B, C, z, reset, valid, dy, ends, spans, T, segments, tiles, DIM: tl.constexpr, N: tl.constexpr,
    U_ROW: tl.constexpr, DT_ROW: tl.constexpr, Z_ROW: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr,
    ACC: tl.constexpr, RATE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What reaches the state before each segment from the outputs in it [B, segments, DIM, N], and Σ Δ of a segment."""
    batch, segment, block, first = place(DIM, segments, RATE, ROWS)
    where, token = columns(first, RATE, ROWS, LANES)
    a2 = ()
    G = ()
    for r in tl.static_range(RATE):
        a2 = a2 + (read_states(A, 0, first, DIM, N, RATE, ROWS, ACC)[r] * LOG2E,)
        G = G + (tl.zeros((ROWS, N), ACC),)
    span = tl.zeros((ROWS, LANES * RATE), ACC)
    cut = 0
    low = segment * tiles * TILE
    groups = tl.cdiv(tl.minimum(low + tiles * TILE, T) - low, LANES)
    for done in range(groups):
        top = low + (groups - 1 - done) * LANES
        x, delta, gate, d, b, c = _read(
            u, dt, B, C, z, valid, dy, batch, top, T, where, token, DIM, N, U_ROW, DT_ROW, Z_ROW, HAS_Z, HAS_VALID, False, True, ACC, ROWS,
            LANES,
        )  # fmt: skip
        row, here, live = alive(top, token, T, batch, valid, HAS_VALID)
        start = starts(reset, batch, top, T, LANES, HAS_RESET)
        delta = delta.to(ACC)
        if SOFTPLUS:
            delta = tl.where(live, softplus(delta, ACC), 0.0)
        span += delta
        d = d.to(ACC)
        if HAS_Z:
            gate = gate.to(ACC)
            d = d * gate * sigmoid(gate)
        deltas = handed(delta, LANES, RATE)
        ds = handed(d, LANES, RATE)
        for k in tl.static_range(LANES - 1, -1, -1):
            before = ()
            for r in tl.static_range(RATE):
                held = tl.exp2(deltas[k * RATE + r] * a2[r]) * (G[r] + ds[k * RATE + r] * c[k])
                if HAS_RESET:
                    held = tl.where(start[k], 0.0, held)
                before = before + (held,)
            G = before
            if HAS_RESET:
                cut += start[k].to(tl.int32)
    at = batch * segments + segment
    write_states(ends, at * DIM * N, G, first, True, DIM, N, RATE, ROWS)
    for r in tl.static_range(RATE):
        channel = first + tl.arange(0, ROWS) * RATE + r
        whole = tl.sum(tl.where(tl.arange(0, LANES * RATE)[None, :] % RATE == r, span, 0.0), 1)
        tl.store(spans + at * DIM + channel, tl.where(cut > 0, float("inf"), whole), mask=channel < DIM)


@triton.jit(do_not_specialize=COUNTS)
def sweep(
    u, dt, A, B, C, D, z, reset, valid, saved, dy, dfinal, du, ddt, dA, dB, dC, dD, dz, dinitial, scratch, ends, spans,
    T, segments, tiles, count, batches, DIM: tl.constexpr, N: tl.constexpr, U_ROW: tl.constexpr, DT_ROW: tl.constexpr, Z_ROW: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr,
    ACC: tl.constexpr, RATE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """All gradients; of A and D a batch row and segment, of B and C a block of channels [blocks, B, T, N]."""
    batch, segment, block, first = place(DIM, segments, RATE, ROWS)
    where, token = columns(first, RATE, ROWS, LANES)
    inside = where < DIM
    skip = tl.load(D + where, mask=inside, other=0.0).to(ACC)
    every = tl.arange(0, N)[None, :] + tl.zeros((ROWS, 1), tl.int32)
    top_row = tl.arange(0, ROWS)[:, None] == 0
    own = tl.program_id(0).to(tl.int64) * (TILE // LANES) * (RATE * ROWS * N)
    a2 = ()
    to_A = ()
    for r in tl.static_range(RATE):
        a2 = a2 + (read_states(A, 0, first, DIM, N, RATE, ROWS, ACC)[r] * LOG2E,)
        to_A = to_A + (tl.zeros((ROWS, N), ACC),)
    to_D = tl.zeros((ROWS, LANES * RATE), ACC)
    G = read_states(dfinal, batch * DIM * N, first, DIM, N, RATE, ROWS, ACC)
    for after in range(segments - 1 - segment):
        G = carried(G, spans, batch * segments + segments - 1 - after, ends, a2, first, DIM, N, RATE, ROWS, ACC)

    stop = tl.minimum(segment * tiles + tiles, count)
    for done in range(stop - segment * tiles):
        tile = stop - 1 - done
        low = tile * TILE
        groups = tl.cdiv(tl.minimum(TILE, T - low), LANES)
        h = read_states(saved, (batch * count + tile) * (DIM * N), first, DIM, N, RATE, ROWS, ACC)
        tl.debug_barrier()
        write_states(scratch, own, h, 0, True, RATE * ROWS, N, RATE, ROWS)
        ahead = _read(
            u, dt, B, C, z, valid, dy, batch, low, T, where, token, DIM, N, U_ROW, DT_ROW, Z_ROW, HAS_Z, HAS_VALID, True, False, ACC, ROWS,
            LANES,
        )  # fmt: skip
        for group in range(1, groups):
            top = low + (group - 1) * LANES
            x, delta, gate, d, b, c = ahead
            ahead = _read(
                u, dt, B, C, z, valid, dy, batch, top + LANES, T, where, token, DIM, N, U_ROW, DT_ROW, Z_ROW, HAS_Z, HAS_VALID, True, False,
                ACC, ROWS, LANES,
            )  # fmt: skip
            row, here, live = alive(top, token, T, batch, valid, HAS_VALID)
            start = starts(reset, batch, top, T, LANES, HAS_RESET)
            delta = delta.to(ACC)
            if SOFTPLUS:
                delta = tl.where(live, softplus(delta, ACC), 0.0)
            deltas = handed(delta, LANES, RATE)
            gains = handed(delta * x.to(ACC), LANES, RATE)
            for k in tl.static_range(LANES):
                now = ()
                for r in tl.static_range(RATE):
                    held = tl.exp2(deltas[k * RATE + r] * a2[r]) * h[r]
                    if HAS_RESET:
                        held = tl.where(start[k], 0.0, held)
                    now = now + (held + gains[k * RATE + r] * b[k],)
                h = now
            write_states(scratch, own + group * (RATE * ROWS * N), h, 0, True, RATE * ROWS, N, RATE, ROWS)
        tl.debug_barrier()

        ahead = _read(
            u, dt, B, C, z, valid, dy, batch, low + (groups - 1) * LANES, T, where, token, DIM, N, U_ROW, DT_ROW, Z_ROW, HAS_Z, HAS_VALID,
            True, True, ACC, ROWS, LANES,
        )  # fmt: skip
        for undone in range(groups):
            group = groups - 1 - undone
            top = low + group * LANES
            x, raw, gate, d, b, c = ahead
            ahead = _read(
                u, dt, B, C, z, valid, dy, batch, tl.maximum(top - LANES, 0), T, where, token, DIM, N, U_ROW, DT_ROW, Z_ROW, HAS_Z,
                HAS_VALID, True, True, ACC, ROWS, LANES,
            )  # fmt: skip
            row, here, live = alive(top, token, T, batch, valid, HAS_VALID)
            start = starts(reset, batch, top, T, LANES, HAS_RESET)
            states = read_states(scratch, own + group * (RATE * ROWS * N), 0, RATE * ROWS, N, RATE, ROWS, ACC)
            x = x.to(ACC)
            raw = raw.to(ACC)
            d = d.to(ACC)
            delta = raw
            if SOFTPLUS:
                delta = tl.where(live, softplus(raw, ACC), 0.0)
            if HAS_Z:
                gate = gate.to(ACC)
                sigma = sigmoid(gate)
                dout = d
                d = d * gate * sigma
            deltas = handed(delta, LANES, RATE)
            gains = handed(delta * x, LANES, RATE)
            ds = handed(d, LANES, RATE)
            decays = ()
            for k in tl.static_range(LANES):
                for r in tl.static_range(RATE):
                    a = tl.exp2(deltas[k * RATE + r] * a2[r])
                    held = a * states[k * RATE + r]
                    if HAS_RESET:
                        a = tl.where(start[k], 0.0, a)
                        held = tl.where(start[k], 0.0, held)
                    decays = decays + (a,)
                    states = states + (held + gains[k * RATE + r] * b[k],)

            outs = ()
            to_gains = ()
            to_deltas = ()
            for k in tl.static_range(LANES - 1, -1, -1):
                before = ()
                total_A = ()
                out_k = ()
                gain_k = ()
                delta_k = ()
                for r in tl.static_range(RATE):
                    full = G[r] + ds[k * RATE + r] * c[k]
                    from_C = ds[k * RATE + r] * states[(k + 1) * RATE + r]
                    from_B = gains[k * RATE + r] * full
                    if r == 0:
                        sum_B = from_B
                        sum_C = from_C
                    else:
                        sum_B += from_B
                        sum_C += from_C
                    if HAS_Z:
                        out_k = out_k + (tl.sum(states[(k + 1) * RATE + r] * c[k], 1)[:, None],)
                    gain_k = gain_k + (tl.sum(full * b[k], 1)[:, None],)
                    back = decays[k * RATE + r] * full
                    W = back * states[k * RATE + r]
                    if HAS_RESET:
                        back = tl.where(start[k], 0.0, back)
                        W = tl.where(start[k], 0.0, W)
                    before = before + (back,)
                    total_A = total_A + (to_A[r] + deltas[k * RATE + r] * W,)
                    delta_k = delta_k + (tl.sum(W * a2[r], 1)[:, None],)
                G = before
                to_A = total_A
                outs = out_k + outs
                to_gains = gain_k + to_gains
                to_deltas = delta_k + to_deltas
                at = ((block.to(tl.int64) * batches + batch) * T + top + k) * N + every
                writes = top_row & (top + k < T)
                tl.store(dB + at, tl.sum(sum_B, 0)[None, :] + tl.zeros((ROWS, N), ACC), mask=writes)
                tl.store(dC + at, tl.sum(sum_C, 0)[None, :] + tl.zeros((ROWS, N), ACC), mask=writes)
            to_D += d * x
            to_gain = placed(to_gains, LANES, RATE)
            mask = here & inside
            at = row * DIM + where
            tl.store(du + at, tl.where(live, to_gain * delta + skip * d, 0.0).to(du.dtype.element_ty), mask=mask)
            to_delta = placed(to_deltas, LANES, RATE) * (1 / LOG2E) + to_gain * x
            if SOFTPLUS:
                to_delta *= sigmoid(raw)
            tl.store(ddt + at, tl.where(live, to_delta, 0.0).to(ddt.dtype.element_ty), mask=mask)
            if HAS_Z:
                to_z = dout * (placed(outs, LANES, RATE) + skip * x) * sigma * (1 + gate * (1 - sigma))
                tl.store(dz + at, tl.where(live, to_z, 0.0).to(dz.dtype.element_ty), mask=mask)

    write_states(dA, (batch * segments + segment) * DIM * N, to_A, first, True, DIM, N, RATE, ROWS)
    for r in tl.static_range(RATE):
        channel = first + tl.arange(0, ROWS) * RATE + r
        whole = tl.sum(tl.where(tl.arange(0, LANES * RATE)[None, :] % RATE == r, to_D, 0.0), 1)
        tl.store(dD + (batch * segments + segment) * DIM + channel, whole, mask=channel < DIM)
    if segment == 0:
        write_states(dinitial, batch * DIM * N, G, first, True, DIM, N, RATE, ROWS)
