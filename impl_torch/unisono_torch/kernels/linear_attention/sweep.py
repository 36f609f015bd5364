"""Normalised linear attention and its gradients as sweeps over time, with the state in registers.

    o_t = N_t / D_t,  N_t = φ(q_t)ᵀ S_t,  D_t = φ(q_t)·z_t + ε,  S_t = S_{t−1} + φ(k_t) v_tᵀ,  z_t = z_{t−1} + φ(k_t)

With δ_t = do_t·o_t, the gradients are sums of the same shape, the last two from the last token to the first:

    dφ(q_t) = Σ_{j≤t} (v_j·do_t − δ_t) φ(k_j) / D_t
    dφ(k_j) = Σ_{t≥j} (v_j·do_t − δ_t) φ(q_t) / D_t + dS v_j + dz
    dv_j    = Σ_{t≥j} (φ(k_j)·φ(q_t)) do_t / D_t + dSᵀ φ(k_j)

So there is one sweep, out_i = Σ_j (a_i·b_j + e_i f_j) w_j: inside a chunk of C tokens by masked products, of what was before the chunk
through the state Σ_j b_j w_jᵀ [M, N] and the row Σ_j f_j w_j [N]. A program owns BLOCK columns of one head of one sequence. Where heads
are few, time is cut into segments: a launch without outputs leaves what each adds, and each program adds up those before its own.
What comes out has the same bits whoever runs first.

Rounded to the dtype before a product: φ, φ/D, masked scores, and the carried state. Sums, states and D are float32. float16 takes
products in tf32, which has its digits and float32's range: sums of products leave float16.

taylor2 has sweeps of its own (taylor.py).
"""

# Triton's own language, which a checker of Python reads wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _phi(x, tau, MAP: tl.constexpr):
    """φ(x) in float32. A GPU's greater of two numbers is the one that is no NaN: hence `where`."""
    if MAP == "relu":
        return tl.where(x < 0, 0.0, x)
    if MAP == "learned":
        x = x * tau
    if MAP == "elu1" or MAP == "learned":
        return tl.maximum(x + 1, tl.exp2(tl.where(x > 0, 0.0, x) * 1.4426950408889634))  # e^x ≥ x + 1
    return x


@triton.jit
def _features(base, t0, rows, step, feature, live, scale, MAP: tl.constexpr, K: tl.constexpr):
    """φ of tokens' heads [C, features] in float32, 0 where nothing is read."""
    read = live[:, None] & (feature < K)[None, :]
    return tl.where(read, _phi(_load_wide(base, t0, rows, step, feature, read), scale, MAP), 0.0)


@triton.jit
def _slope(g, x, tau, MAP: tl.constexpr):
    """g times the derivative of φ by its argument, which is τx for "learned"."""
    if MAP == "relu":
        return tl.where(x > 0, g, 0.0)
    if MAP == "learned":
        x = x * tau
    if MAP == "elu1" or MAP == "learned":
        return g * tl.exp2(tl.minimum(x, 0.0) * 1.4426950408889634)
    return g


@triton.jit
def _narrow(x, DOT: tl.constexpr, TF32: tl.constexpr):
    """x rounded to what a product takes; to tf32 by hand, since the hardware truncates."""
    if TF32:
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & -8192).to(tl.float32, bitcast=True)
    return x.to(DOT)


@triton.jit
def _load(base, t0, rows, step, channel, mask):
    """[C, channels] of a head whose tokens lie `step` apart."""
    return tl.load(base + t0.to(tl.int64) * step + rows[:, None] * step + channel[None, :], mask=mask, other=0)


@triton.jit
def _load_wide(base, t0, rows, step, channel, mask):
    return _load(base, t0, rows, step, channel, mask).to(tl.float32)


@triton.jit
def _rows(MODE: tl.constexpr, q, k, D, t0, rows, qt, kt, feature, live, H, scale, MAP: tl.constexpr, K: tl.constexpr,
          DOT: tl.constexpr, TF32: tl.constexpr):  # fmt: skip
    """a and b, where they are features."""
    phi_q = _features(q, t0, rows, qt, feature, live, scale, MAP, K)
    phi_k = _features(k, t0, rows, kt, feature, live, scale, MAP, K)
    if MODE == "o":
        return _narrow(phi_q, DOT, TF32), _narrow(phi_k, DOT, TF32)
    share = 1 / tl.load(D + rows * H, mask=live, other=1.0)[:, None]
    return _narrow(phi_k, DOT, TF32), _narrow(phi_q * share, DOT, TF32)


@triton.jit(do_not_specialize=["T", "H", "count", "d0", "d1", "d2"])
def products(o, do, delta, T, H, count, d0, d1, d2, UNIT: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr):
    """δ = do·o of each token and head, [B, T, H]; count: how many there are."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head, token = row % H, row // H
    channel = tl.arange(0, BV)
    mask = (row < count)[:, None] & (channel < V)[None, :]
    a = tl.load(o + row[:, None] * V + channel[None, :], mask=mask, other=0).to(tl.float32)
    at = ((token // T) * d0 + (token % T) * d1 + head * d2) * UNIT
    b = tl.load(do + at[:, None] + channel[None, :], mask=mask, other=0).to(tl.float32)
    tl.store(delta + row, tl.sum(a * b, 1), mask=row < count)


@triton.jit
def _sweep(
    MODE: tl.constexpr, WRITES: tl.constexpr, q, k, v, o_dot, do, denominator, tau, reset, valid, S, z, out, S_out, z_out, tau_out,
    own, own_z, cuts, qt, kt, vt, dt, batch, head, first, order, segments, length, strip, strips, T, H,
    K: tl.constexpr, V: tl.constexpr, MAP: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr,
    DOT: tl.constexpr, TF32: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ROOM: tl.constexpr,
    LINE: tl.constexpr, SPLIT: tl.constexpr, GIVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sweep MODE: "o", or the gradient of "q", "k" or "v". WRITES: the outputs, or without it what a segment adds to the state.

    SPLIT: of wide features, the second half of a, b and the state by itself, since a whole does not fit the registers. o_dot: δ where
    GIVEN, else o.
    """
    BACK: tl.constexpr = MODE == "k" or MODE == "v"
    PHI_ROWS: tl.constexpr = MODE == "o" or MODE == "v"  # a and b are features, w values; or the other way round
    M: tl.constexpr = K if PHI_ROWS else V
    N: tl.constexpr = V if PHI_ROWS else K
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    EPS: tl.constexpr = 1e-6
    HALVED: tl.constexpr = SPLIT and PHI_ROWS
    BH: tl.constexpr = BM // 2 if HALVED else BM
    rows, feature, column = tl.arange(0, C), tl.arange(0, BH), first + tl.arange(0, BN)
    inside, within = (feature < M)[None, :], (column < N)[None, :]
    ahead = rows[:, None] <= rows[None, :] if BACK else rows[:, None] >= rows[None, :]
    which = batch * H + head  # of the heads
    scale = tl.load(tau).to(tl.float32) if MAP == "learned" else 1.0

    # The state lies so that what is as it was loaded, w of features or b of values, is what its update transposes: that is free.
    if PHI_ROWS:
        state, line = tl.zeros((BN, BH), tl.float32), tl.zeros((BH if MODE == "o" else BN,), tl.float32)
        at, held = feature[None, :] * V + column[:, None], inside & (column < N)[:, None]
        tile = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BH)[None, :]
    else:
        state, line = tl.zeros((BM, BN), tl.float32), tl.zeros((BN,), tl.float32)
        at, held = feature[:, None] + column[None, :] * V, (feature < M)[:, None] & within
        tile = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    spot, live_spot = (feature, feature < K) if MODE == "o" else (column, column < K)
    if HALVED:
        more = BH + tl.arange(0, BH)
        at2, held2 = more[None, :] * V + column[:, None], (more < M)[None, :] & (column < N)[:, None]
        state2, line2 = tl.zeros((BN, BH), tl.float32), tl.zeros((BH,), tl.float32)
    if WRITES:
        state = tl.load(S + which * (K * V) + at, mask=held, other=0).to(tl.float32)
        if MODE != "v":
            line = tl.load(z + which * K + spot, mask=live_spot, other=0).to(tl.float32)
        if HALVED:
            state2 = tl.load(S + which * (K * V) + at2, mask=held2, other=0).to(tl.float32)
            if MODE == "o":
                line2 = tl.load(z + which * K + more, mask=more < K, other=0).to(tl.float32)
        for j in range(order):
            before = strip + j * strips
            if HAS_RESET:
                cut = tl.load(cuts + before) != 0
                state, line = tl.where(cut, 0.0, state), tl.where(cut, 0.0, line)
                if HALVED:
                    state2, line2 = tl.where(cut, 0.0, state2), tl.where(cut, 0.0, line2)
            if HALVED:
                state2 += tl.load(own + before * ROOM + tile + BH)
                if MODE == "o":
                    line2 += tl.load(own_z + before * LINE + more)
            state += tl.load(own + before * ROOM + tile)
            line += tl.load(own_z + before * LINE + tl.arange(0, line.shape[0]))
    cut_any = tl.full((), 0, tl.int32)
    part = tl.zeros((BN,), tl.float32)
    low = (segments - 1 - order if BACK else order) * length
    chunks = tl.cdiv(tl.minimum(length, T - low), C)
    for i in tl.range(0, chunks, num_stages=STAGES):
        t0 = low + (chunks - 1 - i if BACK else i) * C
        here = t0 + rows < T
        live, token = here, batch * T + t0
        if HAS_VALID:
            live = here & (tl.load(valid + token + rows, mask=here, other=0) != 0)
        read, owned = live[:, None] & inside, live[:, None] & within
        D_at = denominator + token * H + head
        if PHI_ROWS:
            a, b = _rows(MODE, q, k, D_at, t0, rows, qt, kt, feature, live, H, scale, MAP, K, DOT, TF32)
            if HALVED:
                if WRITES:
                    scores = tl.dot(a, tl.trans(b), input_precision=PRECISION)
                a2, b2 = _rows(MODE, q, k, D_at, t0, rows, qt, kt, more, live, H, scale, MAP, K, DOT, TF32)
        else:
            b_do, b_v = _load(do, t0, rows, dt, feature, read), _load(v, t0, rows, vt, feature, read).to(DOT)
            if GIVEN:
                delta = tl.load(o_dot + (token + rows) * H + head, mask=live, other=0.0)
            else:
                delta = tl.sum(b_do.to(tl.float32) * _load_wide(o_dot, t0, rows, H * V, feature, read), 1)
            b_do = b_do.to(DOT)
            share = 1 / tl.load(D_at + rows * H, mask=live, other=1.0)[:, None]
        if MODE == "o":
            w = _load(v, t0, rows, vt, column, owned).to(DOT)
        elif MODE == "q":
            a, b, w = b_do, b_v, _narrow(_features(k, t0, rows, kt, column, live, scale, MAP, K), DOT, TF32)
        elif MODE == "k":
            a, b, w = b_v, b_do, _narrow(_features(q, t0, rows, qt, column, live, scale, MAP, K) * share, DOT, TF32)
        else:
            w = _load(do, t0, rows, dt, column, owned).to(DOT)
        if HAS_RESET:
            segment = tl.cumsum(tl.load(reset + token + rows, mask=here, other=0).to(tl.int32), 0)
            last = tl.max(segment, 0)
            reads, leaves = (segment == last, segment == 0) if BACK else (segment == 0, segment == last)
            keeps = last == 0
            cut_any = tl.maximum(cut_any, last)
        if WRITES:
            if HALVED:
                scores = tl.dot(a2, tl.trans(b2), scores, input_precision=PRECISION)
            else:
                scores = tl.dot(a, tl.trans(b), input_precision=PRECISION)
            if MODE == "q":
                scores -= delta[:, None]
            elif MODE == "k":
                scores -= delta[None, :]
            mask = ahead
            if HAS_RESET:
                mask = mask & (segment[:, None] == segment[None, :])
            scores = tl.where(mask, scores, 0.0)
            carried = _narrow(state, DOT, TF32)
            acc = tl.dot(a, tl.trans(carried) if PHI_ROWS else carried, input_precision=PRECISION)
            if HALVED:
                acc = tl.dot(a2, tl.trans(_narrow(state2, DOT, TF32)), acc, input_precision=PRECISION)
            if MODE == "q":
                acc -= delta[:, None] * line[None, :]
            elif MODE == "k":
                acc += line[None, :]
            if HAS_RESET:
                acc = tl.where(reads[:, None], acc, 0.0)
            acc = tl.dot(_narrow(scores, DOT, TF32), w, acc, input_precision=PRECISION)
            if MODE == "o":
                past = tl.sum(a.to(tl.float32) * line[None, :], 1)
                if HALVED:
                    past += tl.sum(a2.to(tl.float32) * line2[None, :], 1)
                if HAS_RESET:
                    past = tl.where(reads, past, 0.0)
                D = tl.sum(scores, 1) + past + EPS
                acc = acc * (1 / D)[:, None]
                if first == 0:
                    tl.store(denominator + (token + rows) * H + head, D, mask=here)
            elif MODE == "q":
                acc = acc * share
            elif MODE == "k":
                acc = tl.where(owned, acc, 0.0)
            if not PHI_ROWS:
                x = _load_wide(q, t0, rows, qt, column, owned) if MODE == "q" else _load_wide(k, t0, rows, kt, column, owned)
                acc = _slope(acc, x, scale, MAP)
                if MAP == "learned":
                    part += tl.sum(acc * x, 0)
                    acc = acc * scale
            N_out = out + token.to(tl.int64) * (H * N) + head * N + rows[:, None] * (H * N) + column[None, :]
            tl.store(N_out, acc.to(out.dtype.element_ty), mask=here[:, None] & within)
        into = w
        if HAS_RESET:
            state, line = tl.where(keeps, state, 0.0), tl.where(keeps, line, 0.0)
            if PHI_ROWS:
                b = tl.where(leaves[:, None], b, 0.0).to(DOT)
                if HALVED:
                    state2, line2 = tl.where(keeps, state2, 0.0), tl.where(keeps, line2, 0.0)
                    b2 = tl.where(leaves[:, None], b2, 0.0).to(DOT)
            else:
                into = tl.where(leaves[:, None], w, 0.0).to(DOT)
        if PHI_ROWS:
            state = tl.dot(tl.trans(w), b, state, input_precision=PRECISION)
            if HALVED:
                state2 = tl.dot(tl.trans(w), b2, state2, input_precision=PRECISION)
        else:
            state = tl.dot(tl.trans(b), into, state, input_precision=PRECISION)
        if MODE == "o":
            line += tl.sum(b.to(tl.float32), 0)
            if HALVED:
                line2 += tl.sum(b2.to(tl.float32), 0)
        elif MODE == "q":
            line += tl.sum(into.to(tl.float32), 0)
        elif MODE == "k":
            line -= tl.sum(into.to(tl.float32) * delta[:, None], 0)
    if not WRITES:
        mine = strip + order * strips
        tl.store(own + mine * ROOM + tile, state)
        tl.store(own_z + mine * LINE + tl.arange(0, line.shape[0]), line)
        if HALVED:
            tl.store(own + mine * ROOM + tile + BH, state2)
            if MODE == "o":
                tl.store(own_z + mine * LINE + more, line2)
        tl.store(cuts + mine, cut_any)
    else:
        if order == segments - 1:
            if PHI_ROWS:
                tl.store(S_out + which * (K * V) + at, state, mask=held)
                if HALVED:
                    tl.store(S_out + which * (K * V) + at2, state2, mask=held2)
            if MODE == "k" or (MODE == "o" and first == 0):
                tl.store(z_out + which * K + spot, line, mask=live_spot)
                if HALVED:
                    tl.store(z_out + which * K + more, line2, mask=more < K)
        if MAP == "learned" and not PHI_ROWS:
            tl.store(tau_out + strip + order * strips, tl.sum(part, 0))


@triton.jit(do_not_specialize=["T", "H", "batches", "segments", "length", "q0", "q1", "q2", "k0", "k1", "k2", "v0", "v1", "v2"])
def forward(
    q, k, v, tau, reset, valid, S, z, o, S_out, z_out, denominator, own, own_z, cuts, T, H, batches, segments, length,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, UNIT: tl.constexpr, WRITES: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, MAP: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr,
    DOT: tl.constexpr, TF32: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    ROOM: tl.constexpr, LINE: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """o [B, T, H, V], the final state, and the denominators [B, T, H]. Strides q0 (batch), q1 (time), q2 (head) count UNITs."""
    blocks: tl.constexpr = (V + BN - 1) // BN
    strips = batches * H * blocks
    strip, order = tl.program_id(0) % strips, tl.program_id(0) // strips
    which = strip // blocks
    strips = strips.to(tl.int64)
    batch, head = (which // H).to(tl.int64), (which % H).to(tl.int64)
    _sweep(
        "o", WRITES, q + (batch * q0 + head * q2) * UNIT, k + (batch * k0 + head * k2) * UNIT, v + (batch * v0 + head * v2) * UNIT,
        None, None, denominator, tau, reset, valid, S, z, o, S_out, z_out, None, own, own_z, cuts, q1 * UNIT, k1 * UNIT, v1 * UNIT, 0,
        batch, head, (strip % blocks) * BN, order, segments, length, strip, strips, T, H, K, V, MAP, HAS_RESET,
        HAS_VALID, DOT, TF32, C, BK, BN, ROOM, LINE, SPLIT, False, STAGES,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "T", "H", "batches", "segments", "length", "q0", "q1", "q2", "k0", "k1", "k2", "v0", "v1", "v2", "d0", "d1", "d2",
    ]
)  # fmt: skip
def backward(
    q, k, v, o_dot, do, denominator, tau, reset, valid, S, z, dS, dz, dq, dk, dv, S_out, z_out, tau_out, own, own_z, cuts,
    T, H, batches, segments, length, q0, q1, q2, k0, k1, k2, v0, v1, v2, d0, d1, d2, UNIT: tl.constexpr, WRITES: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, MAP: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr,
    DOT: tl.constexpr, TF32: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    ROOM: tl.constexpr, LINE: tl.constexpr, SPLIT: tl.constexpr, GIVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv, each by programs of its own, and the initial state's gradient. o_dot, dq, dk and dv are contiguous."""
    of_k: tl.constexpr = (K + BN - 1) // BN
    blocks: tl.constexpr = 2 * of_k + (V + BN - 1) // BN
    strips = batches * H * blocks
    strip, order = tl.program_id(0) % strips, tl.program_id(0) // strips
    which, kind = strip // blocks, strip % blocks
    strips = strips.to(tl.int64)
    batch, head = (which // H).to(tl.int64), (which % H).to(tl.int64)
    q += (batch * q0 + head * q2) * UNIT
    k += (batch * k0 + head * k2) * UNIT
    v += (batch * v0 + head * v2) * UNIT
    do += (batch * d0 + head * d2) * UNIT
    if not GIVEN:
        o_dot += batch * T * H * V + head * V
    if kind < of_k:
        _sweep(
            "q", WRITES, q, k, v, o_dot, do, denominator, tau, reset, valid, S, z, dq, S_out, z_out, tau_out, own, own_z, cuts,
            q1 * UNIT, k1 * UNIT, v1 * UNIT, d1 * UNIT, batch, head, kind * BN, order, segments, length, strip, strips, T, H,
            K, V, MAP, HAS_RESET, HAS_VALID, DOT, TF32, C, BV, BN, ROOM, LINE, SPLIT, GIVEN, STAGES,
        )  # fmt: skip
    elif kind < 2 * of_k:
        _sweep(
            "k", WRITES, q, k, v, o_dot, do, denominator, tau, reset, valid, dS, dz, dk, S_out, z_out, tau_out, own, own_z, cuts,
            q1 * UNIT, k1 * UNIT, v1 * UNIT, d1 * UNIT, batch, head, (kind - of_k) * BN, order, segments, length, strip, strips, T, H,
            K, V, MAP, HAS_RESET, HAS_VALID, DOT, TF32, C, BV, BN, ROOM, LINE, SPLIT, GIVEN, STAGES,
        )  # fmt: skip
    else:
        _sweep(
            "v", WRITES, q, k, v, o_dot, do, denominator, tau, reset, valid, dS, dz, dv, S_out, z_out, tau_out, own, own_z, cuts,
            q1 * UNIT, k1 * UNIT, v1 * UNIT, d1 * UNIT, batch, head, (kind - 2 * of_k) * BN, order, segments, length, strip, strips, T, H,
            K, V, MAP, HAS_RESET, HAS_VALID, DOT, TF32, C, BK, BN, ROOM, LINE, SPLIT, GIVEN, STAGES,
        )  # fmt: skip
