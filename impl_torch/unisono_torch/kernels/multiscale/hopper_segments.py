"""forward.py and backward.py for a Hopper GPU, in Gluon: bfloat16, heads of 64, no marks, decays alike for all tokens, q' = q.

The same sums, of a segment of two blocks in one program, whose tokens and states are copied into shared memory at once. Every tile of
registers lies as products leave it, and every vector as a side of such a tile, so that sums over a row stay within four lanes and no warp
waits for another. Of log λ's gradient the sum over tokens is all that is asked for: (t − j) times each pair, where the tokens between
those of different segments are counted in three: up to the query (of_queries), after the key (of_keys), and whole segments (hopper.py).
Rates are loaded again for each pass over the scales, since what fades would be kept in registers otherwise, of which there are too few.
"""

# Gluon, which a checker of Python reads wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton.language as tl

from unisono_torch.kernels.gluon import async_copy, fence_async_shared, gl, jit, warpgroup_mma, warpgroup_mma_wait
from unisono_torch.kernels.multiscale.hopper import copy

_COUNTS = ["T", "H", "segments", "q0", "q1", "q2", "k0", "k1", "k2", "v0", "v1", "v2"]


@jit
def _rate(hi, lo, s, length):
    """log₂ λ of one scale."""
    return gl.load(hi + s * length) + gl.load(lo + s * length)


@jit
def _fade(rate, apart, s: tl.constexpr, STILL: tl.constexpr):
    """How much of a token is left to another, by scale s; 1 of the first, where that is STILL."""
    left = 1.0
    if not (STILL and s == 0):
        left = gl.exp2(rate * apart)
    return left


@jit
def _times(a, b, LAYOUT: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    """a b [C, N], under way."""
    return warpgroup_mma(a, b, gl.zeros([C, N], gl.float32, layout=LAYOUT), use_acc=False, is_async=True)


@jit
def _add(scores, b, acc, WIDE: tl.constexpr):
    """acc + scores b, scores rounded."""
    pairs = gl.convert_layout(scores.to(gl.bfloat16), gl.DotOperandLayout(0, WIDE, 2))
    return warpgroup_mma_wait(0, deps=[warpgroup_mma(pairs, b, acc, is_async=True)])


@jit
def _put(out, t0, T, step, x, C: tl.constexpr, READ: tl.constexpr):
    rows = gl.arange(0, C, layout=gl.SliceLayout(1, READ))
    column = gl.arange(0, C, layout=gl.SliceLayout(0, READ))
    at = out + t0.to(gl.int64) * step + (rows[:, None] * step + column[None, :])
    gl.store(at, gl.convert_layout(x.to(gl.bfloat16), READ), mask=((t0 + rows) < T)[:, None])


@jit
def _put_back(out, t0, T, step, x, tile, cos, sin, MAP: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr, READ: tl.constexpr):
    """The gradient of what was turned and then mapped by φ to `tile`, from x, that of `tile`; where MAP is "", x itself.

    φ' is found from φ: that of elu1 is φ up to 1, which e^x is there, and 1 beyond.
    """
    if MAP == "":
        _put(out, t0, T, step, x, C, READ)
    else:
        HALF: tl.constexpr = gl.BlockedLayout([1, 8], [512 // C, C // 16], [4, 1], [1, 0])
        if MAP == "elu1":
            mapped = tile.load(WIDE).to(gl.float32)
            x = x * gl.where(mapped <= 1, mapped, 1.0)
        if MAP == "relu":
            x = x * gl.where(tile.load(WIDE).to(gl.float32) > 0, 1.0, 0.0)
        first, second = x.reshape([C, 2, C // 2]).permute((0, 2, 1)).split()
        first, second = gl.convert_layout(first, HALF), gl.convert_layout(second, HALF)
        rows = gl.arange(0, C, layout=gl.SliceLayout(1, HALF))
        column = gl.arange(0, C // 2, layout=gl.SliceLayout(0, HALF))
        here = ((t0 + rows) < T)[:, None]
        turn = t0.to(gl.int64) * (C // 2) + (rows[:, None] * (C // 2) + column[None, :])
        c, s = gl.load(cos + turn, mask=here, other=0.0), gl.load(sin + turn, mask=here, other=0.0)
        at = out + t0.to(gl.int64) * step + (rows[:, None] * step + column[None, :])
        gl.store(at, (first * c + second * s).to(gl.bfloat16), mask=here)
        gl.store(at + C // 2, (second * c - first * s).to(gl.bfloat16), mask=here)


@jit
def _segment(a, b, c, d, at, bt, ct, dt, as_, bs, cs, ds, S, states, n, T, segments, M: tl.constexpr, C: tl.constexpr, READ: tl.constexpr):
    """Copies a segment: a and b as two blocks, c and d as four halves; and the states of all scales."""
    for part in gl.static_range(2):
        t0 = n * (2 * C) + part * C
        copy(a, t0, T, at, as_.index(part), C, C, READ)
        copy(b, t0, T, bt, bs.index(part), C, C, READ)
        for h in gl.static_range(2):
            copy(c, t0 + h * (C // 2), T, ct, cs.index(2 * part + h), C, C // 2, READ)
            copy(d, t0 + h * (C // 2), T, dt, ds.index(2 * part + h), C, C // 2, READ)
    for s in gl.static_range(M):
        copy(S + s * segments * (C * C), n * C, segments * C, C, states.index(s), C, C, READ)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()


@jit(do_not_specialize=[*_COUNTS, "g0", "g1", "g2", "g3"])
def forward(
    q, k, v, gain, hi, lo, S, z, o, denominator, T, H, segments, q0, q1, q2, k0, k1, k2, v0, v1, v2, g0, g1, g2, g3,
    STILL: tl.constexpr, UNIT: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """As forward.forward. STILL: the first scale does not decay."""
    L: tl.constexpr = 2 * C
    EPS: tl.constexpr = 1e-6
    WIDE: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    READ: tl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [4, 1], [1, 0])
    TILE: tl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], gl.bfloat16)
    n, which = gl.program_id(0) % segments, (gl.program_id(0) // segments).to(gl.int64)
    batch, head = which // H, which % H
    q += (batch * q0 + head * q2) * UNIT
    k += (batch * k0 + head * k2) * UNIT
    v += (batch * v0 + head * v2) * UNIT
    mine, length = which * M, (segments * L).to(gl.int64)
    qs = gl.allocate_shared_memory(gl.bfloat16, [2, C, C], TILE)
    ks = gl.allocate_shared_memory(gl.bfloat16, [2, C, C], TILE)
    vs = gl.allocate_shared_memory(gl.bfloat16, [2, C, C], TILE)
    states = gl.allocate_shared_memory(gl.bfloat16, [M, C, C], TILE)
    for part in gl.static_range(2):
        t0 = n * L + part * C
        copy(q, t0, T, q1 * UNIT, qs.index(part), C, C, READ)
        copy(k, t0, T, k1 * UNIT, ks.index(part), C, C, READ)
        copy(v, t0, T, v1 * UNIT, vs.index(part), C, C, READ)
        if part == 0:
            for s in gl.static_range(M):
                copy(S + (mine + s) * segments * (C * C), n * C, segments * C, C, states.index(s), C, C, READ)
        async_copy.commit_group()
    rows, others = gl.arange(0, C, layout=gl.SliceLayout(1, WIDE)), gl.arange(0, C, layout=gl.SliceLayout(0, WIDE))
    row, other = rows.to(gl.float32), others.to(gl.float32)
    for part in gl.static_range(2):
        t0 = n * L + part * C
        token, here = (t0 + rows).to(gl.int64), (t0 + rows) < T
        if part == 0:
            async_copy.wait_group(1)
        else:
            async_copy.wait_group(0)
        fence_async_shared()
        scores = _times(qs.index(part), ks.index(part).permute((1, 0)), WIDE, C, C)
        if part == 1:
            far = _times(qs.index(1), ks.index(0).permute((1, 0)), WIDE, C, C)
            scores, far = warpgroup_mma_wait(0, deps=[scores, far])
        else:
            scores = warpgroup_mma_wait(0, deps=[scores])
        scores = gl.where(rows[:, None] >= others[None, :], scores, 0.0)
        mine_q = qs.index(part).load(WIDE).to(gl.float32)
        apart = gl.maximum(row[:, None] - other[None, :], 0.0)
        share = ()
        for s in gl.static_range(M):
            rate = _rate(hi, lo, s, length)
            D = gl.sum(_fade(rate, apart, s, STILL) * scores, 1) + EPS
            if part == 1:
                D += gl.exp2(rate * (row + 1)) * gl.sum(far * gl.exp2(rate * (C - 1 - other))[None, :], 1)
            line = gl.load(z + ((mine + s) * segments + n) * C + others)
            D += gl.exp2(rate * (part * C + row + 1)) * gl.sum(mine_q * line[None, :], 1)
            gl.store(denominator + (mine + s) * T + token, D, mask=here)
            c = gl.load(gain + batch * g0 + head * g3 + token * g1 + s * g2, mask=here, other=0)
            share += (c.to(gl.float32) / D,)
        weight, weight_far = gl.zeros([C, C], gl.float32, layout=WIDE), gl.zeros([C, C], gl.float32, layout=WIDE)
        for s in gl.static_range(M):
            rate = _rate(hi, lo, s, length)
            weight += share[s][:, None] * _fade(rate, apart, s, STILL)
            if part == 1:
                weight_far += (share[s] * gl.exp2(rate * (row + 1)))[:, None] * gl.exp2(rate * (C - 1 - other))[None, :]
        acc = _add(weight * scores, vs.index(part), gl.zeros([C, C], gl.float32, layout=WIDE), WIDE)
        if part == 1:
            acc = _add(weight_far * far, vs.index(0), acc, WIDE)
        for s in gl.static_range(M):
            rate = _rate(hi, lo, s, length)
            reached = warpgroup_mma_wait(0, deps=[_times(qs.index(part), states.index(s), WIDE, C, C)])
            acc += (share[s] * gl.exp2(rate * (part * C + row + 1)))[:, None] * reached
        _put(o + (batch * T * H + head) * C, t0, T, H * C, acc, C, READ)


@jit(do_not_specialize=[*_COUNTS, "d0", "d1", "d2", "g0", "g1", "g2", "g3", "e0", "e1", "e2"])
def of_queries(
    q, k, v, do, gain, hi, lo, S, z, denominator, dq, delta, shares, lost, back, back_z, fades, cos, sin, T, H, segments, e0, e1, e2,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, d0, d1, d2, g0, g1, g2, g3, MAP: tl.constexpr, SHARED: tl.constexpr, STILL: tl.constexpr,
    UNIT: tl.constexpr, FADES: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """As backward.of_queries, dq by strides, as `_put_back` puts it; cos, sin [B or 1, T, C/2].

    fades [B, H, M, N]: log λ's gradient by what these queries read.
    """
    L: tl.constexpr = 2 * C
    W: tl.constexpr = C // 2
    WIDE: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    THIN: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W, 16])
    SIDE: tl.constexpr = gl.SliceLayout(1, WIDE)
    READ: tl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [4, 1], [1, 0])
    TILE: tl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], gl.bfloat16)
    HALF: tl.constexpr = gl.NVMMASharedLayout.get_default_for([W, C], gl.bfloat16)
    n, which = gl.program_id(0) % segments, (gl.program_id(0) // segments).to(gl.int64)
    batch, head = which // H, which % H
    q += (batch * q0 + head * q2) * UNIT
    k += (batch * k0 + head * k2) * UNIT
    v += (batch * v0 + head * v2) * UNIT
    do += (batch * d0 + head * d2) * UNIT
    if not SHARED:
        cos += batch * T * (C // 2)
        sin += batch * T * (C // 2)
    mine, length = which * M, (segments * L).to(gl.int64)
    qs = gl.allocate_shared_memory(gl.bfloat16, [2, C, C], TILE)
    gs = gl.allocate_shared_memory(gl.bfloat16, [2, C, C], TILE)
    ks = gl.allocate_shared_memory(gl.bfloat16, [4, W, C], HALF)
    vs = gl.allocate_shared_memory(gl.bfloat16, [4, W, C], HALF)
    states = gl.allocate_shared_memory(gl.bfloat16, [M, C, C], TILE)
    _segment(q, do, k, v, q1 * UNIT, d1 * UNIT, k1 * UNIT, v1 * UNIT, qs, gs, ks, vs, S + mine * segments * (C * C), states,
             n, T, segments, M, C, READ)  # fmt: skip
    rows, others = gl.arange(0, C, layout=SIDE), gl.arange(0, C, layout=gl.SliceLayout(0, WIDE))
    row, thin_row = rows.to(gl.float32), gl.arange(0, C, layout=gl.SliceLayout(1, THIN)).to(gl.float32)
    total = ()
    for _ in gl.static_range(M):
        total += (0.0 * row,)
    for part in range(2):
        t0 = n * L + part * C
        token, here = (t0 + rows).to(gl.int64), (t0 + rows) < T
        # do·N, its part from the state apart
        met, met_apart, norm_apart = (), (), ()
        for _ in gl.static_range(M):
            met += (0.0 * thin_row,)
            met_apart += (0.0 * thin_row,)
            norm_apart += (0.0 * thin_row,)
        for h in range(2):
            column = (h * W + gl.arange(0, W, layout=gl.SliceLayout(0, THIN))).to(gl.float32)
            P = _times(qs.index(part), ks.index(2 * part + h).permute((1, 0)), THIN, C, W)
            R = _times(gs.index(part), vs.index(2 * part + h).permute((1, 0)), THIN, C, W)
            P, R = warpgroup_mma_wait(0, deps=[P, R])
            apart = gl.maximum(thin_row[:, None] - column[None, :], 0.0)
            PR = gl.where(thin_row[:, None] >= column[None, :], P * R, 0.0)
            PR_apart, P_apart = apart * PR, apart * P
            met_0, met_apart_0, norm_apart_0 = met, met_apart, norm_apart
            met, met_apart, norm_apart = (), (), ()
            for s in gl.static_range(M):
                fade = _fade(_rate(hi, lo, s, length), apart, s, STILL)
                met += (met_0[s] + gl.sum(fade * PR, 1),)
                if FADES and not (STILL and s == 0):
                    met_apart += (met_apart_0[s] + gl.sum(fade * PR_apart, 1),)
                    norm_apart += (norm_apart_0[s] + gl.sum(fade * P_apart, 1),)
                else:
                    met_apart += (met_apart_0[s],)
                    norm_apart += (norm_apart_0[s],)
        for h in range(2 * part):
            column = (h * W + gl.arange(0, W, layout=gl.SliceLayout(0, THIN))).to(gl.float32)
            P = _times(qs.index(1), ks.index(h).permute((1, 0)), THIN, C, W)
            R = _times(gs.index(1), vs.index(h).permute((1, 0)), THIN, C, W)
            P, R = warpgroup_mma_wait(0, deps=[P, R])
            PR = P * R
            met_0, met_apart_0, norm_apart_0 = met, met_apart, norm_apart
            met, met_apart, norm_apart = (), (), ()
            for s in gl.static_range(M):
                rate = _rate(hi, lo, s, length)
                to, since = gl.exp2(rate * (thin_row + 1)), gl.exp2(rate * (C - 1 - column))
                read = gl.sum(PR * since[None, :], 1)
                met += (met_0[s] + to * read,)
                if FADES and not (STILL and s == 0):
                    since_apart = since * (C - 1 - column)
                    read = gl.sum(PR * since_apart[None, :], 1) + (thin_row + 1) * read
                    met_apart += (met_apart_0[s] + to * read,)
                    norms = gl.sum(P * since_apart[None, :], 1) + (thin_row + 1) * gl.sum(P * since[None, :], 1)
                    norm_apart += (norm_apart_0[s] + to * norms,)
                else:
                    met_apart += (met_apart_0[s],)
                    norm_apart += (norm_apart_0[s],)
        mine_q = qs.index(part).load(WIDE).to(gl.float32)
        acc = gl.zeros([C, C], gl.float32, layout=WIDE)
        share, lose, before = (), (), total
        total = ()
        kept = (part * C + rows + 1).to(gl.float32)
        for s in gl.static_range(M):
            reached = _times(gs.index(part), states.index(s).permute((1, 0)), WIDE, C, C)
            D = gl.load(denominator + (mine + s) * T + token, mask=here, other=1.0)
            c = gl.load(gain + batch * g0 + head * g3 + token * g1 + s * g2, mask=here, other=0)
            line = gl.load(z + ((mine + s) * segments + n) * C + others)
            holds = gl.exp2(_rate(hi, lo, s, length) * kept)
            share_s = c.to(gl.float32) / D
            reached = warpgroup_mma_wait(0, deps=[reached])
            old = holds * gl.sum(mine_q * reached, 1)
            d = (gl.convert_layout(met[s], SIDE) + old) / D  # δ
            weighed = share_s * holds
            acc += weighed[:, None] * (reached - d[:, None] * line[None, :])
            at = (mine + s) * length + token
            gl.store(delta + at, d)
            gl.store(shares + at, share_s)
            gl.store(lost + at, share_s * d)
            gl.store(back + at, weighed)
            gl.store(back_z + at, -weighed * d)
            share += (gl.convert_layout(share_s, gl.SliceLayout(1, THIN)),)
            lose += (gl.convert_layout(share_s * d, gl.SliceLayout(1, THIN)),)
            if FADES and not (STILL and s == 0):
                norm = holds * gl.sum(mine_q * line[None, :], 1)
                pairs = gl.convert_layout(met_apart[s], SIDE) - d * gl.convert_layout(norm_apart[s], SIDE) + kept * (old - d * norm)
                total += (before[s] + share_s * pairs,)
            else:
                total += (before[s],)
        # products are made anew rather than kept, since registers are what is scarce
        for h in range(2):
            column = (h * W + gl.arange(0, W, layout=gl.SliceLayout(0, THIN))).to(gl.float32)
            R = _times(gs.index(part), vs.index(2 * part + h).permute((1, 0)), THIN, C, W)
            R = warpgroup_mma_wait(0, deps=[R])
            apart = gl.maximum(thin_row[:, None] - column[None, :], 0.0)
            scores = gl.zeros([C, W], gl.float32, layout=THIN)
            for s in gl.static_range(M):
                fade = _fade(_rate(hi, lo, s, length), apart, s, STILL)
                scores += fade * (share[s][:, None] * R - lose[s][:, None])
            scores = gl.where(thin_row[:, None] >= column[None, :], scores, 0.0)
            acc = _add(scores, ks.index(2 * part + h), acc, WIDE)
        for h in range(2 * part):
            column = (h * W + gl.arange(0, W, layout=gl.SliceLayout(0, THIN))).to(gl.float32)
            R = _times(gs.index(1), vs.index(h).permute((1, 0)), THIN, C, W)
            R = warpgroup_mma_wait(0, deps=[R])
            scores = gl.zeros([C, W], gl.float32, layout=THIN)
            for s in gl.static_range(M):
                rate = _rate(hi, lo, s, length)
                to, since = gl.exp2(rate * (thin_row + 1)), gl.exp2(rate * (C - 1 - column))[None, :]
                scores += since * ((share[s] * to)[:, None] * R - (lose[s] * to)[:, None])
            acc = _add(scores, ks.index(h), acc, WIDE)
        _put_back(dq + (batch * e0 + head * e2) * UNIT, t0, T, e1 * UNIT, acc, qs.index(part), cos, sin, MAP, C, WIDE, READ)
    if FADES:
        for s in gl.static_range(M):
            gl.store(fades + (mine + s) * segments + n, gl.sum(total[s], 0))


@jit(do_not_specialize=[*_COUNTS, "d0", "d1", "d2", "e0", "e1", "e2"])
def of_keys(
    q, k, v, do, hi, lo, dS, dz, shares, lost, dk, dv, fades, cos, sin, T, H, segments,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, d0, d1, d2, e0, e1, e2, MAP: tl.constexpr, SHARED: tl.constexpr,
    STILL: tl.constexpr, UNIT: tl.constexpr, FADES: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """As backward.of_keys, dk and dv by strides, the same, dk as `_put_back` puts it; cos, sin [B or 1, T, C/2].

    fades [B, H, M, N]: log λ's gradient by what becomes of these keys in later segments.
    """
    L: tl.constexpr = 2 * C
    W: tl.constexpr = C // 2
    WIDE: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    THIN: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W, 16])
    READ: tl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [4, 1], [1, 0])
    TILE: tl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], gl.bfloat16)
    HALF: tl.constexpr = gl.NVMMASharedLayout.get_default_for([W, C], gl.bfloat16)
    n, which = gl.program_id(0) % segments, (gl.program_id(0) // segments).to(gl.int64)
    batch, head = which // H, which % H
    q += (batch * q0 + head * q2) * UNIT
    k += (batch * k0 + head * k2) * UNIT
    v += (batch * v0 + head * v2) * UNIT
    do += (batch * d0 + head * d2) * UNIT
    if not SHARED:
        cos += batch * T * (C // 2)
        sin += batch * T * (C // 2)
    mine, length = which * M, (segments * L).to(gl.int64)
    ks = gl.allocate_shared_memory(gl.bfloat16, [2, C, C], TILE)
    vs = gl.allocate_shared_memory(gl.bfloat16, [2, C, C], TILE)
    qs = gl.allocate_shared_memory(gl.bfloat16, [4, W, C], HALF)
    gs = gl.allocate_shared_memory(gl.bfloat16, [4, W, C], HALF)
    states = gl.allocate_shared_memory(gl.bfloat16, [M, C, C], TILE)
    _segment(k, v, q, do, k1 * UNIT, v1 * UNIT, q1 * UNIT, d1 * UNIT, ks, vs, qs, gs, dS + mine * segments * (C * C), states,
             n, T, segments, M, C, READ)  # fmt: skip
    rows, others = gl.arange(0, C, layout=gl.SliceLayout(1, WIDE)), gl.arange(0, C, layout=gl.SliceLayout(0, WIDE))
    thin_row = gl.arange(0, C, layout=gl.SliceLayout(1, THIN)).to(gl.float32)
    thin_others = gl.arange(0, W, layout=gl.SliceLayout(0, THIN))
    total = ()
    for _ in gl.static_range(M):
        total += (0.0 * rows.to(gl.float32),)
    for part in range(2):
        t0 = n * L + part * C
        acc, acc_v = gl.zeros([C, C], gl.float32, layout=WIDE), gl.zeros([C, C], gl.float32, layout=WIDE)
        for h in range(2):
            queries = h * W + thin_others
            column = queries.to(gl.float32)
            R = _times(vs.index(part), gs.index(2 * part + h).permute((1, 0)), THIN, C, W)  # [key, query]
            P = _times(ks.index(part), qs.index(2 * part + h).permute((1, 0)), THIN, C, W)
            weight, less = gl.zeros([C, W], gl.float32, layout=THIN), gl.zeros([C, W], gl.float32, layout=THIN)
            apart = gl.maximum(column[None, :] - thin_row[:, None], 0.0)
            for s in gl.static_range(M):
                at = (mine + s) * length + (t0 + queries)
                fade = _fade(_rate(hi, lo, s, length), apart, s, STILL)
                weight += fade * gl.load(shares + at)[None, :]
                less += fade * gl.load(lost + at)[None, :]
            R, P = warpgroup_mma_wait(0, deps=[R, P])
            reads = thin_row[:, None] <= column[None, :]
            acc = _add(gl.where(reads, weight * R - less, 0.0), qs.index(2 * part + h), acc, WIDE)
            acc_v = _add(gl.where(reads, weight * P, 0.0), gs.index(2 * part + h), acc_v, WIDE)
        for h in range(2 - 2 * part):
            queries = h * W + thin_others
            R = _times(vs.index(0), gs.index(2 + h).permute((1, 0)), THIN, C, W)
            P = _times(ks.index(0), qs.index(2 + h).permute((1, 0)), THIN, C, W)
            weight, less = gl.zeros([C, W], gl.float32, layout=THIN), gl.zeros([C, W], gl.float32, layout=THIN)
            for s in gl.static_range(M):
                rate = _rate(hi, lo, s, length)
                at = (mine + s) * length + (t0 + C + queries)
                leaves, to = gl.exp2(rate * (C - 1 - thin_row))[:, None], gl.exp2(rate * (queries + 1).to(gl.float32))
                weight += leaves * (to * gl.load(shares + at))[None, :]
                less += leaves * (to * gl.load(lost + at))[None, :]
            R, P = warpgroup_mma_wait(0, deps=[R, P])
            acc = _add(weight * R - less, qs.index(2 + h), acc, WIDE)
            acc_v = _add(weight * P, gs.index(2 + h), acc_v, WIDE)
        mine_k = ks.index(part).load(WIDE).to(gl.float32)
        after = gl.maximum((gl.minimum(T - n * L, L) - 1 - part * C - rows).to(gl.float32), 0.0)  # tokens, in the segment
        before = total
        total = ()
        for s in gl.static_range(M):
            reached = _times(vs.index(part), states.index(s).permute((1, 0)), WIDE, C, C)
            line = gl.load(dz + ((mine + s) * segments + n) * C + others)
            leaves = gl.exp2(_rate(hi, lo, s, length) * after)
            reached = warpgroup_mma_wait(0, deps=[reached]) + line[None, :]
            acc += leaves[:, None] * reached
            reached_v = _times(ks.index(part), states.index(s), WIDE, C, C)
            acc_v += leaves[:, None] * warpgroup_mma_wait(0, deps=[reached_v])
            if FADES and not (STILL and s == 0):
                total += (before[s] + after * leaves * gl.sum(mine_k * reached, 1),)
            else:
                total += (before[s],)
        _put_back(dk + (batch * e0 + head * e2) * UNIT, t0, T, e1 * UNIT, acc, ks.index(part), cos, sin, MAP, C, WIDE, READ)
        _put(dv + (batch * e0 + head * e2) * UNIT, t0, T, e1 * UNIT, acc_v, C, READ)
    if FADES:
        for s in gl.static_range(M):
            gl.store(fades + (mine + s) * segments + n, gl.sum(total[s], 0))
