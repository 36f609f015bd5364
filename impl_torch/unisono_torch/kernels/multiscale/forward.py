"""What the tokens of a block read: o_t = Σ_s c^s_t N^s_t / D^s_t, from their own segment by masked products and from the states before it.

All scales share q kᵀ, which is masked by Σ_s c^s_t / D^s_t λ_s^(t−j). Rounded to the dtype before a product: the masked scores and the
states. D [B, H, M, T] is what the backward keeps.
"""

# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from unisono_torch.kernels.multiscale.functions import faded, fading, narrow, rate_of, reads, state, tokens


@triton.jit(
    do_not_specialize=[
        "T", "H", "batches", "segments", "q0", "q1", "q2", "k0", "k1", "k2", "v0", "v1", "v2", "a0", "a1", "a2", "b0", "b1", "b2",
        "g0", "g1", "g2", "g3", "p0",
    ]
)  # fmt: skip
def forward(
    q, k, v, q_norm, k_norm, gain, valid, section, hi, lo, near, kept, S, z, o, denominator, T, H, batches, segments,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, a0, a1, a2, b0, b1, b2, g0, g1, g2, g3, p0, UNIT: tl.constexpr,
    SAME: tl.constexpr, ALIKE: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr, M: tl.constexpr, SCALES: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, NB: tl.constexpr,
    DOT: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """gain: c, with strides g0 … g3 of batch, time, scale and head. p0: the stride over batches of what functions.prepare left."""
    L: tl.constexpr = C * NB
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    EPS: tl.constexpr = 1e-6
    blocks: tl.constexpr = (V + BN - 1) // BN
    index = tl.program_id(0)
    part, n = index % NB, (index // NB) % segments
    block, which = (index // NB // segments) % blocks, index // NB // segments // blocks
    head, batch = (which % H).to(tl.int64), (which // H).to(tl.int64)
    rows, feature, column = tl.arange(0, C), tl.arange(0, BK), block * BN + tl.arange(0, BN)
    q += (batch * q0 + head * q2) * UNIT
    k += (batch * k0 + head * k2) * UNIT
    v += (batch * v0 + head * v2) * UNIT
    if not SAME:
        q_norm += (batch * a0 + head * a2) * UNIT
        k_norm += (batch * b0 + head * b2) * UNIT
    t0, length = n * L + part * C, (segments * L).to(tl.int64)
    here, live = reads(t0, rows, T, valid, batch, HAS_VALID)
    a = tokens(q, t0, rows, q1 * UNIT, feature, live, K, DOT)
    scores = tl.dot(a, tl.trans(tokens(k, t0, rows, k1 * UNIT, feature, live, K, DOT)), input_precision=PRECISION)
    a_norm, norms = a, scores
    if not SAME:
        a_norm = tokens(q_norm, t0, rows, a1 * UNIT, feature, live, K, DOT)
        norms = tl.dot(a_norm, tl.trans(tokens(k_norm, t0, rows, b1 * UNIT, feature, live, K, DOT)), input_precision=PRECISION)
    same = rows[:, None] >= rows[None, :]
    sections = rows
    if HAS_RESET:
        sections = tl.load(section + batch * length + t0 + rows)
        same = same & (sections[:, None] == sections[None, :])
    at = batch * p0 + t0  # of scale 0, among what was prepared
    D = ()  # of each scale
    for s in tl.static_range(M):
        rate = rate_of(hi, lo, s, length, ALIKE)
        D += (tl.sum(fading(hi, lo, at + s * length, rows, same, rate, False, ALIKE) * norms, 1) + EPS,)
    u0 = tl.maximum(t0 - C, 0)  # of the block before, which the second of a segment reads, too
    _, alive = reads(u0, rows, T, valid, batch, HAS_VALID)
    far = tl.zeros((C, C), tl.float32)
    if part == 1:
        far = tl.dot(a, tl.trans(tokens(k, u0, rows, k1 * UNIT, feature, alive, K, DOT)), input_precision=PRECISION)
        if HAS_RESET:
            linked = sections[:, None] == tl.load(section + batch * length + u0 + rows)[None, :]
            far = tl.where(linked, far, 0.0)
        far_norms = far
        if not SAME:
            far_norms = tl.dot(a_norm, tl.trans(tokens(k_norm, u0, rows, b1 * UNIT, feature, alive, K, DOT)), input_precision=PRECISION)
            if HAS_RESET:
                far_norms = tl.where(linked, far_norms, 0.0)
        more = ()
        for s in tl.static_range(M):
            rate = rate_of(hi, lo, s, length, ALIKE)
            other = faded(near, at + s * length - C, rows, rate, C - 1 - rows, ALIKE)
            more += (D[s] + faded(near, at + s * length, rows, rate, rows + 1, ALIKE) * tl.sum(far_norms * other[None, :], 1),)
        D = more
    mine = (batch * H + head) * M
    token = (t0 + rows).to(tl.int64)
    gains = gain + batch * g0 + head * g3 + token * g1
    share, weight = (), tl.zeros((C, C), tl.float32)
    for s in tl.static_range(M):
        rate = rate_of(hi, lo, s, length, ALIKE)
        line = tl.load(z + ((mine + s) * segments + n) * K + feature, mask=feature < K, other=0)
        holds = faded(kept, at + s * length, rows, rate, part * C + rows + 1, ALIKE)
        D_s = D[s] + holds * tl.sum(a_norm.to(tl.float32) * line[None, :], 1)
        if block == 0:
            tl.store(denominator + (mine + s) * T + token, D_s, mask=here)
        share += (tl.load(gains + s * g2, mask=live, other=0).to(tl.float32) / D_s,)
        weight += share[s][:, None] * fading(hi, lo, at + s * length, rows, same, rate, False, ALIKE)
    w = tokens(v, t0, rows, v1 * UNIT, column, live, V, DOT)
    acc = tl.dot(narrow(weight * scores, DOT, TF32), w, input_precision=PRECISION)
    if part == 1:
        weight = tl.zeros((C, C), tl.float32)
        for s in tl.static_range(M):
            rate = rate_of(hi, lo, s, length, ALIKE)
            mine_s = share[s] * faded(near, at + s * length, rows, rate, rows + 1, ALIKE)
            weight += mine_s[:, None] * faded(near, at + s * length - C, rows, rate, C - 1 - rows, ALIKE)[None, :]
        w = tokens(v, u0, rows, v1 * UNIT, column, alive, V, DOT)
        acc = tl.dot(narrow(weight * far, DOT, TF32), w, acc, input_precision=PRECISION)
    for s in tl.static_range(M):
        before = state(S + ((mine + s) * segments + n) * (K * V), feature, column, K, V)
        rate = rate_of(hi, lo, s, length, ALIKE)
        factor = share[s] * faded(kept, at + s * length, rows, rate, part * C + rows + 1, ALIKE)
        acc += factor[:, None] * tl.dot(a, before, input_precision=PRECISION)
    out = o + (batch * T + t0) * (H * V) + head * V + rows[:, None] * (H * V) + column[None, :]
    tl.store(out, acc.to(o.dtype.element_ty), mask=here[:, None] & (column < V)[None, :])
