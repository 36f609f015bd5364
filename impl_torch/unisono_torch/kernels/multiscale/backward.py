"""Gradients of multi-scale attention, of a block of tokens at a time.

With P = q·k, R = do·v and δ^s_t = do_t·N^s_t / D^s_t, which is also c's gradient, and λ^s_tj what a token t holds of j:

    dq_t = Σ_s c^s_t/D^s_t Σ_j λ^s_tj (R_tj − δ^s_t) k_j,   dk_j = Σ_s Σ_t c^s_t/D^s_t λ^s_tj (R_tj − δ^s_t) q_t,
    dv_j = Σ_s Σ_t c^s_t/D^s_t λ^s_tj P_tj do_t,

where δ's share belongs to q' and k'. The gradient of log λ_t is the sum of c/D λ_tj (R P − δ P') over all pairs that have t between them,
i ≥ t > j: those inside a block by sums over both its axes, so that nothing cancels; others by row, and by column. Where decays are ALIKE
for all tokens and only the sum over tokens is asked for, a token's entry is what the pairs that end with it add to that sum.
"""

# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from unisono_torch.kernels.multiscale.functions import column_of, faded, fading, narrow, put, rate_of, reads, state, tokens

_UNSPECIALISED = [
    "T", "H", "batches", "segments", "q0", "q1", "q2", "k0", "k1", "k2", "v0", "v1", "v2", "d0", "d1", "d2", "a0", "a1", "a2",
    "b0", "b1", "b2", "g0", "g1", "g2", "g3", "p0",
]  # fmt: skip


@triton.jit(do_not_specialize=_UNSPECIALISED)
def of_queries(
    q, k, v, do, q_norm, k_norm, gain, valid, section, hi, lo, near, kept, S, z, denominator, dq, dq_norm, delta, shares, lost, back,
    back_z, fades, tail,
    T, H, batches, segments, q0, q1, q2, k0, k1, k2, v0, v1, v2, d0, d1, d2, a0, a1, a2, b0, b1, b2, g0, g1, g2, g3, p0,
    UNIT: tl.constexpr, SAME: tl.constexpr, FADES: tl.constexpr, ALIKE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr,
    M: tl.constexpr, SCALES: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    C: tl.constexpr, NB: tl.constexpr, DOT: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """dq, dq_norm; δ; for keys, shares = c/D and lost = shares·δ; what weighs queries in states.py, back = c/D·kept and back_z = −back·δ
    [B, H, M, N·L].

    Where FADES: log λ's gradient by what these queries read [B, H, M, N·L], and tail, by what they read of the state before [B, H, M, 2N].
    """
    L: tl.constexpr = C * NB
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    blocks: tl.constexpr = (K + BN - 1) // BN
    index = tl.program_id(0)
    part, n = index % NB, (index // NB) % segments
    block, which = (index // NB // segments) % blocks, index // NB // segments // blocks
    head, batch = (which % H).to(tl.int64), (which // H).to(tl.int64)
    rows, feature, value, column = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV), block * BN + tl.arange(0, BN)
    q += (batch * q0 + head * q2) * UNIT
    k += (batch * k0 + head * k2) * UNIT
    v += (batch * v0 + head * v2) * UNIT
    do += (batch * d0 + head * d2) * UNIT
    if not SAME:
        q_norm += (batch * a0 + head * a2) * UNIT
        k_norm += (batch * b0 + head * b2) * UNIT
    t0, length = n * L + part * C, (segments * L).to(tl.int64)
    here, live = reads(t0, rows, T, valid, batch, HAS_VALID)
    u0 = tl.maximum(t0 - C, 0)
    _, alive = reads(u0, rows, T, valid, batch, HAS_VALID)
    sections = rows
    same = rows[:, None] >= rows[None, :]
    if HAS_RESET:
        sections = tl.load(section + batch * length + t0 + rows)
        same = same & (sections[:, None] == sections[None, :])
        linked = sections[:, None] == tl.load(section + batch * length + u0 + rows)[None, :]
    at = batch * p0 + t0
    mine = (batch * H + head) * M
    scale, token = tl.arange(0, SCALES), (t0 + rows).to(tl.int64)
    D = tl.load(denominator + (mine + scale[None, :]) * T + token[:, None], mask=here[:, None] & (scale < M)[None, :], other=1.0)
    c = tl.load(
        gain + batch * g0 + head * g3 + token[:, None] * g1 + scale[None, :] * g2, mask=live[:, None] & (scale < M)[None, :], other=0
    ).to(tl.float32)
    share = c / D

    # do·N, its part from the state apart: Σ_k q_k (S do)_k
    a = tokens(q, t0, rows, q1 * UNIT, feature, live, K, DOT)
    g = tokens(do, t0, rows, d1 * UNIT, value, live, V, DOT)
    PR = tl.dot(a, tl.trans(tokens(k, t0, rows, k1 * UNIT, feature, live, K, DOT)), input_precision=PRECISION)
    PR *= tl.dot(g, tl.trans(tokens(v, t0, rows, v1 * UNIT, value, live, V, DOT)), input_precision=PRECISION)
    met = tl.zeros((C, SCALES), tl.float32)
    for s in range(M):
        rate = rate_of(hi, lo, s, length, ALIKE)
        met = put(met, s, tl.sum(fading(hi, lo, at + s * length, rows, same, rate, False, ALIKE) * PR, 1), SCALES)
    if part == 1:
        far = tl.dot(a, tl.trans(tokens(k, u0, rows, k1 * UNIT, feature, alive, K, DOT)), input_precision=PRECISION)
        far *= tl.dot(g, tl.trans(tokens(v, u0, rows, v1 * UNIT, value, alive, V, DOT)), input_precision=PRECISION)
        if HAS_RESET:
            far = tl.where(linked, far, 0.0)
        for s in range(M):
            rate = rate_of(hi, lo, s, length, ALIKE)
            other = faded(near, at + s * length - C, rows, rate, C - 1 - rows, ALIKE)
            met = put(met, s, faded(near, at + s * length, rows, rate, rows + 1, ALIKE) * tl.sum(far * other[None, :], 1), SCALES)
    acc = tl.zeros((C, BN), tl.float32)
    old = tl.zeros((C, SCALES), tl.float32)
    for s in range(M):
        holds = faded(kept, at + s * length, rows, rate_of(hi, lo, s, length, ALIKE), part * C + rows + 1, ALIKE)
        for part_k in tl.static_range(blocks):
            row = part_k * BN + tl.arange(0, BN)
            reached = tl.dot(g, tl.trans(state(S + ((mine + s) * segments + n) * (K * V), row, value, K, V)), input_precision=PRECISION)
            mine_q = tokens(q, t0, rows, q1 * UNIT, row, live, K, tl.float32)
            old = put(old, s, holds * tl.sum(mine_q * reached, 1), SCALES)
            if part_k == block:
                acc += (column_of(share, s, SCALES) * holds)[:, None] * reached
    D_s = (met + old) / D  # δ
    acc_norm = tl.zeros((C, BN), tl.float32)
    for s in range(M):
        line = tl.load(z + ((mine + s) * segments + n) * K + column, mask=column < K, other=0)
        holds = faded(kept, at + s * length, rows, rate_of(hi, lo, s, length, ALIKE), part * C + rows + 1, ALIKE)
        weighed = column_of(share, s, SCALES) * holds
        d = column_of(D_s, s, SCALES)
        if block == 0:
            tl.store(delta + (mine + s) * length + token, d)
            tl.store(shares + (mine + s) * length + token, column_of(share, s, SCALES))
            tl.store(lost + (mine + s) * length + token, column_of(share, s, SCALES) * d)
            tl.store(back + (mine + s) * length + token, weighed)
            tl.store(back_z + (mine + s) * length + token, -weighed * d)
        acc_norm -= (weighed * d)[:, None] * line[None, :]

    # the segment's own pairs; products are made anew rather than kept, since registers are what is scarce
    weight, less = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for s in range(M):
        rate = rate_of(hi, lo, s, length, ALIKE)
        fade = column_of(share, s, SCALES)[:, None] * fading(hi, lo, at + s * length, rows, same, rate, False, ALIKE)
        weight += fade
        less += fade * column_of(D_s, s, SCALES)[:, None]
    R = tl.dot(g, tl.trans(tokens(v, t0, rows, v1 * UNIT, value, live, V, DOT)), input_precision=PRECISION)
    b = tokens(k, t0, rows, k1 * UNIT, column, live, K, DOT)
    if SAME:
        acc = tl.dot(narrow(weight * R - less, DOT, TF32), b, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(narrow(weight * R, DOT, TF32), b, acc, input_precision=PRECISION)
        b = tokens(k_norm, t0, rows, b1 * UNIT, column, live, K, DOT)
        acc_norm = tl.dot(narrow(-less, DOT, TF32), b, acc_norm, input_precision=PRECISION)
    if FADES:
        inner = tl.zeros((C, SCALES), tl.float32)
        before = tl.where(rows[:, None] < rows[None, :], 1.0, 0.0).to(DOT)
        norms = tl.dot(a, tl.trans(tokens(k, t0, rows, k1 * UNIT, feature, live, K, DOT)), input_precision=PRECISION)
        PR = norms * R
        a_norm = a
        if not SAME:
            a_norm = tokens(q_norm, t0, rows, a1 * UNIT, feature, live, K, DOT)
            norms = tl.dot(a_norm, tl.trans(tokens(k_norm, t0, rows, b1 * UNIT, feature, live, K, DOT)), input_precision=PRECISION)
        if block == 0:
            for s in range(M):
                rate = rate_of(hi, lo, s, length, ALIKE)
                fade = column_of(share, s, SCALES)[:, None] * fading(hi, lo, at + s * length, rows, same, rate, False, ALIKE)
                pairs = tl.where(rows[:, None] > rows[None, :], fade * (PR - column_of(D_s, s, SCALES)[:, None] * norms), 0.0)
                if ALIKE:  # each of the t − j tokens between a pair gets the same
                    inner = put(inner, s, tl.sum((rows[:, None] - rows[None, :]).to(tl.float32) * pairs, 1), SCALES)
                else:
                    past = tl.dot(narrow(pairs, DOT, TF32), before, input_precision=PRECISION)  # Σ_{j<t}
                    inner = put(inner, s, tl.sum(tl.where(rows[:, None] >= rows[None, :], past, 0.0), 0), SCALES)
    if FADES:
        row = tl.zeros((C, SCALES), tl.float32)
        for s in range(M):
            line = tl.load(z + ((mine + s) * segments + n) * K + feature, mask=feature < K, other=0)
            holds = faded(kept, at + s * length, rows, rate_of(hi, lo, s, length, ALIKE), part * C + rows + 1, ALIKE)
            norm = tl.sum(a_norm.to(tl.float32) * line[None, :], 1) * holds
            row = put(row, s, column_of(share * old, s, SCALES) - column_of(share * D_s, s, SCALES) * norm, SCALES)
        if block == 0:
            tl.store(tail + (mine + scale) * (segments * NB) + n * NB + part, tl.sum(row, 0), mask=scale < M)
    if part == 1:
        weight, less = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
        for s in range(M):
            rate = rate_of(hi, lo, s, length, ALIKE)
            mine_s = column_of(share, s, SCALES) * faded(near, at + s * length, rows, rate, rows + 1, ALIKE)
            fade = mine_s[:, None] * faded(near, at + s * length - C, rows, rate, C - 1 - rows, ALIKE)[None, :]
            weight += fade
            less += fade * column_of(D_s, s, SCALES)[:, None]
        R = tl.dot(g, tl.trans(tokens(v, u0, rows, v1 * UNIT, value, alive, V, DOT)), input_precision=PRECISION)
        if HAS_RESET:
            weight, less = tl.where(linked, weight, 0.0), tl.where(linked, less, 0.0)
        b = tokens(k, u0, rows, k1 * UNIT, column, alive, K, DOT)
        if SAME:
            acc = tl.dot(narrow(weight * R - less, DOT, TF32), b, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(narrow(weight * R, DOT, TF32), b, acc, input_precision=PRECISION)
            b = tokens(k_norm, u0, rows, b1 * UNIT, column, alive, K, DOT)
            acc_norm = tl.dot(narrow(-less, DOT, TF32), b, acc_norm, input_precision=PRECISION)
        if FADES:
            norms = tl.dot(a, tl.trans(tokens(k, u0, rows, k1 * UNIT, feature, alive, K, DOT)), input_precision=PRECISION)
            PR = norms * R
            if not SAME:
                norms = tl.dot(a_norm, tl.trans(tokens(k_norm, u0, rows, b1 * UNIT, feature, alive, K, DOT)), input_precision=PRECISION)
            if HAS_RESET:
                PR, norms = tl.where(linked, PR, 0.0), tl.where(linked, norms, 0.0)
            for s in range(M):
                rate = rate_of(hi, lo, s, length, ALIKE)
                mine_s = column_of(share, s, SCALES) * faded(near, at + s * length, rows, rate, rows + 1, ALIKE)
                other = faded(near, at + s * length - C, rows, rate, C - 1 - rows, ALIKE)[None, :]
                row = put(row, s, mine_s * tl.sum((PR - column_of(D_s, s, SCALES)[:, None] * norms) * other, 1), SCALES)
    if FADES:  # noqa: SIM102  (one is known to the compiler)
        if block == 0:
            if ALIKE:
                inner += (rows + 1).to(tl.float32)[:, None] * row
            else:
                for s in range(M):
                    later = tl.where(rows[:, None] <= rows[None, :], column_of(row, s, SCALES)[None, :], 0.0)
                    inner = put(inner, s, tl.sum(later, 1), SCALES)  # Σ_{i≥t}
            tl.store(fades + (mine + scale[None, :]) * length + token[:, None], inner, mask=(scale < M)[None, :])
    out = (batch * T + t0) * (H * K) + head * K + rows[:, None] * (H * K) + column[None, :]
    mask = here[:, None] & (column < K)[None, :]
    if SAME:
        acc += acc_norm
    else:
        tl.store(dq_norm + out, acc_norm.to(dq_norm.dtype.element_ty), mask=mask)
    tl.store(dq + out, acc.to(dq.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_UNSPECIALISED)
def of_keys(
    q, k, v, do, q_norm, k_norm, gain, valid, section, hi, lo, near, ahead, dS, dz, dk, dk_norm, dv, shares, lost, fades, head_sum,
    T, H, batches, segments, q0, q1, q2, k0, k1, k2, v0, v1, v2, d0, d1, d2, a0, a1, a2, b0, b1, b2, g0, g1, g2, g3, p0,
    UNIT: tl.constexpr, SAME: tl.constexpr, FADES: tl.constexpr, ALIKE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr,
    M: tl.constexpr, SCALES: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    C: tl.constexpr, NB: tl.constexpr, DOT: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """dk, dk_norm and dv. dS, dz: the gradients of the states after each segment.

    Where FADES: log λ's gradient by what becomes of these keys [blocks, B, H, M, N·L], and of the state after [blocks, B, H, M, 2N].
    """
    L: tl.constexpr = C * NB
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    WIDER: tl.constexpr = K if K > V else V
    blocks: tl.constexpr = (WIDER + BN - 1) // BN
    index = tl.program_id(0)
    part, n = index % NB, (index // NB) % segments
    block, which = (index // NB // segments) % blocks, index // NB // segments // blocks
    head, batch = (which % H).to(tl.int64), (which // H).to(tl.int64)
    rows, feature, value, column = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV), block * BN + tl.arange(0, BN)
    q += (batch * q0 + head * q2) * UNIT
    k += (batch * k0 + head * k2) * UNIT
    v += (batch * v0 + head * v2) * UNIT
    do += (batch * d0 + head * d2) * UNIT
    if not SAME:
        q_norm += (batch * a0 + head * a2) * UNIT
        k_norm += (batch * b0 + head * b2) * UNIT
    t0, length = n * L + part * C, (segments * L).to(tl.int64)
    here, live = reads(t0, rows, T, valid, batch, HAS_VALID)
    sections = rows
    if HAS_RESET:
        sections = tl.load(section + batch * length + t0 + rows)
    at = batch * p0 + t0
    mine = (batch * H + head) * M
    token = (t0 + rows).to(tl.int64)
    a = tokens(k, t0, rows, k1 * UNIT, feature, live, K, DOT)
    g = tokens(v, t0, rows, v1 * UNIT, value, live, V, DOT)
    acc, acc_norm, acc_v = tl.zeros((C, BN), tl.float32), tl.zeros((C, BN), tl.float32), tl.zeros((C, BN), tl.float32)
    row = tl.zeros((C, SCALES), tl.float32)
    for j in tl.static_range(NB):
        w0 = t0 + j * C
        if part + j < NB:
            _, alive = reads(w0, rows, T, valid, batch, HAS_VALID)
            linked = rows[:, None] <= rows[None, :]  # [key, query]
            if j == 1:
                linked = (rows[:, None] >= 0) & alive[None, :]
            if HAS_RESET:
                linked = linked & (sections[:, None] == tl.load(section + batch * length + w0 + rows)[None, :])
            weight, less = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
            for s in range(M):
                c = tl.load(shares + (mine + s) * length + w0 + rows)
                d = tl.load(lost + (mine + s) * length + w0 + rows)
                rate = rate_of(hi, lo, s, length, ALIKE)
                if j == 0:
                    fade = fading(hi, lo, at + s * length, rows, linked, rate, True, ALIKE)
                else:
                    other = faded(near, at + s * length + C, rows, rate, rows + 1, ALIKE)
                    fade = faded(near, at + s * length, rows, rate, C - 1 - rows, ALIKE)[:, None] * other[None, :]
                weight += fade * c[None, :]
                less += fade * d[None, :]
            if HAS_RESET and j == 1:
                weight, less = tl.where(linked, weight, 0.0), tl.where(linked, less, 0.0)
            b = tokens(q, w0, rows, q1 * UNIT, column, alive, K, DOT)
            R = tl.dot(g, tl.trans(tokens(do, w0, rows, d1 * UNIT, value, alive, V, DOT)), input_precision=PRECISION)
            if SAME:
                acc = tl.dot(narrow(weight * R - less, DOT, TF32), b, acc, input_precision=PRECISION)
            else:
                acc = tl.dot(narrow(weight * R, DOT, TF32), b, acc, input_precision=PRECISION)
                b = tokens(q_norm, w0, rows, a1 * UNIT, column, alive, K, DOT)
                acc_norm = tl.dot(narrow(-less, DOT, TF32), b, acc_norm, input_precision=PRECISION)
            P = tl.dot(a, tl.trans(tokens(q, w0, rows, q1 * UNIT, feature, alive, K, DOT)), input_precision=PRECISION)
            b = tokens(do, w0, rows, d1 * UNIT, column, alive, V, DOT)
            acc_v = tl.dot(narrow(weight * P, DOT, TF32), b, acc_v, input_precision=PRECISION)
            if FADES and j == 1:
                norms = P
                if not SAME:
                    a_norm = tokens(k_norm, t0, rows, b1 * UNIT, feature, live, K, DOT)
                    b = tokens(q_norm, w0, rows, a1 * UNIT, feature, alive, K, DOT)
                    norms = tl.dot(a_norm, tl.trans(b), input_precision=PRECISION)
                P *= R
                if HAS_RESET:
                    P, norms = tl.where(linked, P, 0.0), tl.where(linked, norms, 0.0)
                for s in range(M):
                    c = tl.load(shares + (mine + s) * length + w0 + rows)
                    d = tl.load(lost + (mine + s) * length + w0 + rows)
                    rate = rate_of(hi, lo, s, length, ALIKE)
                    other = faded(near, at + s * length + C, rows, rate, rows + 1, ALIKE)
                    fade = faded(near, at + s * length, rows, rate, C - 1 - rows, ALIKE)
                    row = put(row, s, fade * tl.sum((c[None, :] * P - d[None, :] * norms) * other[None, :], 1), SCALES)
    if FADES:
        mine_k = tokens(k, t0, rows, k1 * UNIT, column, live, K, tl.float32)
        mine_n = mine_k
        if not SAME:
            mine_n = tokens(k_norm, t0, rows, b1 * UNIT, column, live, K, tl.float32)
        if block > 0:
            row = tl.zeros((C, SCALES), tl.float32)  # the first block's program has added it
    sent = tl.zeros((C, SCALES), tl.float32)
    for s in range(M):
        after = dS + ((mine + s) * segments + n) * (K * V)
        last = tl.minimum(T - n * L, L) - 1 - part * C
        leaves = faded(ahead, at + s * length, rows, rate_of(hi, lo, s, length, ALIKE), tl.maximum(last - rows, 0), ALIKE)
        line = tl.load(dz + ((mine + s) * segments + n) * K + column, mask=column < K, other=0)
        reached = tl.dot(g, tl.trans(state(after, column, value, K, V)), input_precision=PRECISION)
        acc += leaves[:, None] * reached
        acc_norm += leaves[:, None] * line[None, :]
        if FADES:
            sent = put(sent, s, leaves * (tl.sum(mine_k * reached, 1) + tl.sum(mine_n * line[None, :], 1)), SCALES)
        acc_v += leaves[:, None] * tl.dot(a, state(after, feature, column, K, V), input_precision=PRECISION)
    if FADES:
        scale = tl.arange(0, SCALES)
        which = block * batches * H * M + mine + scale
        row += sent
        if ALIKE:
            after_it = (tl.minimum(T - t0, C) - 1 - rows).to(tl.float32)[:, None] * row
            tl.store(fades + which[None, :] * length + token[:, None], after_it, mask=(scale < M)[None, :])
        else:
            for s in range(M):
                earlier = tl.sum(tl.where(rows[:, None] > rows[None, :], column_of(row, s, SCALES)[None, :], 0.0), 1)  # Σ_{j<t}
                tl.store(fades + (block * batches * H * M + mine + s) * length + token, earlier)
        tl.store(head_sum + which * (segments * NB) + n * NB + part, tl.sum(sent, 0), mask=scale < M)
    out = (batch * T + t0) * H + head
    mask = here[:, None] & (column < K)[None, :]
    place = out * K + rows[:, None] * (H * K) + column[None, :]
    # what is not read meets normalisers all the same
    acc, acc_norm = tl.where(live[:, None], acc, 0.0), tl.where(live[:, None], acc_norm, 0.0)
    if SAME:
        acc += acc_norm
    else:
        tl.store(dk_norm + place, acc_norm.to(dk_norm.dtype.element_ty), mask=mask)
    tl.store(dk + place, acc.to(dk.dtype.element_ty), mask=mask)
    place = out * V + rows[:, None] * (H * V) + column[None, :]
    tl.store(dv + place, acc_v.to(dv.dtype.element_ty), mask=here[:, None] & (column < V)[None, :])
