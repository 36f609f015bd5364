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
"""

# Triton's own language, which a checker of Python reads wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _phi(x, tau, MAP: tl.constexpr):
    """φ(x) in float32."""
    if MAP == "relu":
        return tl.maximum(x, 0.0)
    if MAP == "learned":
        x = x * tau
    if MAP == "elu1" or MAP == "learned":
        return tl.maximum(x + 1, tl.exp2(tl.minimum(x, 0.0) * 1.4426950408889634))  # e^x ≥ x + 1
    return x


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
def _sweep(
    MODE: tl.constexpr, WRITES: tl.constexpr, q, k, v, o, do, denominator, tau, reset, valid, S, z, out, S_out, z_out, tau_out,
    own, own_z, cuts, qt, kt, vt, dt, batch, head, first, order, segments, length, strip, strips, T, H,
    K: tl.constexpr, V: tl.constexpr, MAP: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr,
    DOT: tl.constexpr, TF32: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ROOM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sweep MODE: "o", or the gradient of "q", "k" or "v". WRITES: the outputs, or without it what a segment adds to the state."""
    BACK: tl.constexpr = MODE == "k" or MODE == "v"
    PHI_ROWS: tl.constexpr = MODE == "o" or MODE == "v"  # a and b are features, w values; or the other way round
    M: tl.constexpr = K if PHI_ROWS else V
    N: tl.constexpr = V if PHI_ROWS else K
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    EPS: tl.constexpr = 1e-6
    rows, feature, column = tl.arange(0, C), tl.arange(0, BM), first + tl.arange(0, BN)
    inside, within = (feature < M)[None, :], (column < N)[None, :]
    ahead = rows[:, None] <= rows[None, :] if BACK else rows[:, None] >= rows[None, :]
    which = batch * H + head  # of the heads
    scale = tl.load(tau).to(tl.float32) if MAP == "learned" else 1.0

    # The state lies so that what is as it was loaded, w of features or b of values, is what its update transposes: that is free.
    if PHI_ROWS:
        state, line = tl.zeros((BN, BM), tl.float32), tl.zeros((BM if MODE == "o" else BN,), tl.float32)
        at, held = feature[None, :] * V + column[:, None], inside & (column < N)[:, None]
        tile = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    else:
        state, line = tl.zeros((BM, BN), tl.float32), tl.zeros((BN,), tl.float32)
        at, held = feature[:, None] + column[None, :] * V, (feature < M)[:, None] & within
        tile = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    spot, live_spot = (feature, feature < K) if MODE == "o" else (column, column < K)
    if WRITES:
        state = tl.load(S + which * (K * V) + at, mask=held, other=0).to(tl.float32)
        if MODE != "v":
            line = tl.load(z + which * K + spot, mask=live_spot, other=0).to(tl.float32)
        for j in range(order):
            before = strip + j * strips
            if HAS_RESET:
                cut = tl.load(cuts + before) != 0
                state, line = tl.where(cut, 0.0, state), tl.where(cut, 0.0, line)
            state += tl.load(own + before * (ROOM * BN) + tile)
            line += tl.load(own_z + before * line.shape[0] + tl.arange(0, line.shape[0]))
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
        if PHI_ROWS:
            phi_q = tl.where(read, _phi(_load_wide(q, t0, rows, qt, feature, read), scale, MAP), 0.0)
            phi_k = tl.where(read, _phi(_load_wide(k, t0, rows, kt, feature, read), scale, MAP), 0.0)
        else:
            b_do = _load(do, t0, rows, dt, feature, read)
            b_v = _load(v, t0, rows, vt, feature, read).to(DOT)
            delta = tl.sum(b_do.to(tl.float32) * _load_wide(o, t0, rows, H * V, feature, read), 1)
            b_do = b_do.to(DOT)
        if MODE != "o":
            share = 1 / tl.load(denominator + (token + rows) * H + head, mask=live, other=1.0)[:, None]
        if MODE == "o":
            a, b, w = _narrow(phi_q, DOT, TF32), _narrow(phi_k, DOT, TF32), _load(v, t0, rows, vt, column, owned).to(DOT)
        elif MODE == "q":
            xw = _load_wide(k, t0, rows, kt, column, owned)
            a, b, w = b_do, b_v, _narrow(tl.where(owned, _phi(xw, scale, MAP), 0.0), DOT, TF32)
        elif MODE == "k":
            xw = _load_wide(q, t0, rows, qt, column, owned)
            a, b, w = b_v, b_do, _narrow(tl.where(owned, _phi(xw, scale, MAP) * share, 0.0), DOT, TF32)
        else:
            a, b, w = _narrow(phi_k, DOT, TF32), _narrow(phi_q * share, DOT, TF32), _load(do, t0, rows, dt, column, owned).to(DOT)
        if HAS_RESET:
            segment = tl.cumsum(tl.load(reset + token + rows, mask=here, other=0).to(tl.int32), 0)
            last = tl.max(segment, 0)
            reads, leaves = (segment == last, segment == 0) if BACK else (segment == 0, segment == last)
            keeps = last == 0
            cut_any = tl.maximum(cut_any, last)
        if WRITES:
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
            if MODE == "q":
                acc -= delta[:, None] * line[None, :]
            elif MODE == "k":
                acc += line[None, :]
            if HAS_RESET:
                acc = tl.where(reads[:, None], acc, 0.0)
            acc = tl.dot(_narrow(scores, DOT, TF32), w, acc, input_precision=PRECISION)
            if MODE == "o":
                past = tl.sum(a.to(tl.float32) * line[None, :], 1)
                if HAS_RESET:
                    past = tl.where(reads, past, 0.0)
                D = tl.sum(scores, 1) + past + EPS
                acc = acc * (1 / D)[:, None]
                if first == 0:
                    tl.store(denominator + (token + rows) * H + head, D, mask=here)
            elif MODE == "q":
                x = _load_wide(q, t0, rows, qt, column, owned)
                acc = _slope(acc * share, x, scale, MAP)
            elif MODE == "k":
                x = _load_wide(k, t0, rows, kt, column, owned)
                acc = _slope(tl.where(owned, acc, 0.0), x, scale, MAP)
            if MAP == "learned" and not PHI_ROWS:
                part += tl.sum(acc * x, 0)
                acc = acc * scale
            N_out = out + token.to(tl.int64) * (H * N) + head * N + rows[:, None] * (H * N) + column[None, :]
            tl.store(N_out, acc.to(out.dtype.element_ty), mask=here[:, None] & within)
        into = w
        if HAS_RESET:
            state, line = tl.where(keeps, state, 0.0), tl.where(keeps, line, 0.0)
            if PHI_ROWS:
                b = tl.where(leaves[:, None], b, 0.0).to(DOT)
            else:
                into = tl.where(leaves[:, None], w, 0.0).to(DOT)
        if PHI_ROWS:
            state = tl.dot(tl.trans(w), b, state, input_precision=PRECISION)
        else:
            state = tl.dot(tl.trans(b), into, state, input_precision=PRECISION)
        if MODE == "o":
            line += tl.sum(b.to(tl.float32), 0)
        elif MODE == "q":
            line += tl.sum(into.to(tl.float32), 0)
        elif MODE == "k":
            line -= tl.sum(into.to(tl.float32) * delta[:, None], 0)
    if not WRITES:
        mine = strip + order * strips
        tl.store(own + mine * (ROOM * BN) + tile, state)
        tl.store(own_z + mine * line.shape[0] + tl.arange(0, line.shape[0]), line)
        tl.store(cuts + mine, cut_any)
    else:
        if order == segments - 1:
            if PHI_ROWS:
                tl.store(S_out + which * (K * V) + at, state, mask=held)
            if MODE == "k" or (MODE == "o" and first == 0):
                tl.store(z_out + which * K + spot, line, mask=live_spot)
        if MAP == "learned" and not PHI_ROWS:
            tl.store(tau_out + strip + order * strips, tl.sum(part, 0))


@triton.jit(do_not_specialize=["T", "H", "batches", "segments", "length", "q0", "q1", "q2", "k0", "k1", "k2", "v0", "v1", "v2"])
def forward(
    q, k, v, tau, reset, valid, S, z, o, S_out, z_out, denominator, own, own_z, cuts, T, H, batches, segments, length,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, UNIT: tl.constexpr, WRITES: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, MAP: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr,
    DOT: tl.constexpr, TF32: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
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
        batch, head, (strip % blocks) * BN, order, segments, length, strip, strips, T, H, K, V, MAP, HAS_RESET, HAS_VALID,
        DOT, TF32, C, BK, BN, BK, STAGES,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "T", "H", "batches", "segments", "length", "q0", "q1", "q2", "k0", "k1", "k2", "v0", "v1", "v2", "d0", "d1", "d2",
    ]
)  # fmt: skip
def backward(
    q, k, v, o, do, denominator, tau, reset, valid, S, z, dS, dz, dq, dk, dv, S_out, z_out, tau_out, own, own_z, cuts,
    T, H, batches, segments, length, q0, q1, q2, k0, k1, k2, v0, v1, v2, d0, d1, d2, UNIT: tl.constexpr, WRITES: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, MAP: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr,
    DOT: tl.constexpr, TF32: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv, each by programs of its own, and the initial state's gradient. o, dq, dk and dv are contiguous."""
    ROOM: tl.constexpr = BK if BK > BV else BV
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
    o += batch * T * H * V + head * V
    if kind < of_k:
        _sweep(
            "q", WRITES, q, k, v, o, do, denominator, tau, reset, valid, S, z, dq, S_out, z_out, tau_out, own, own_z, cuts,
            q1 * UNIT, k1 * UNIT, v1 * UNIT, d1 * UNIT, batch, head, kind * BN, order, segments, length, strip, strips, T, H,
            K, V, MAP, HAS_RESET, HAS_VALID, DOT, TF32, C, BV, BN, ROOM, STAGES,
        )  # fmt: skip
    elif kind < 2 * of_k:
        _sweep(
            "k", WRITES, q, k, v, o, do, denominator, tau, reset, valid, dS, dz, dk, S_out, z_out, tau_out, own, own_z, cuts,
            q1 * UNIT, k1 * UNIT, v1 * UNIT, d1 * UNIT, batch, head, (kind - of_k) * BN, order, segments, length, strip, strips, T, H,
            K, V, MAP, HAS_RESET, HAS_VALID, DOT, TF32, C, BV, BN, ROOM, STAGES,
        )  # fmt: skip
    else:
        _sweep(
            "v", WRITES, q, k, v, o, do, denominator, tau, reset, valid, dS, dz, dv, S_out, z_out, tau_out, own, own_z, cuts,
            q1 * UNIT, k1 * UNIT, v1 * UNIT, d1 * UNIT, batch, head, (kind - 2 * of_k) * BN, order, segments, length, strip, strips, T, H,
            K, V, MAP, HAS_RESET, HAS_VALID, DOT, TF32, C, BK, BN, ROOM, STAGES,
        )  # fmt: skip
