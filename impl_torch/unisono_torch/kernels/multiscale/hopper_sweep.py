"""One decay for a Hopper GPU, in Gluon: linear_attention/hopper.py's sweeps with what fades in them, under hopper.py's conditions.

A program reads a head's tokens once and keeps its state in registers, so that no states reach memory. What a token still holds of another
is the same in every chunk, and stays in registers; what the state takes is weighed in a copy of its own, and z comes of a product with
three thin columns that add up to the weights. Backward, where log λ is given no gradient: a sweep for queries, which knows
δ = do·N / D once it has what its queries read, and one from the last token to the first for keys and values.
"""

# Gluon, which a checker of Python reads wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton.language as tl

from unisono_torch.kernels.gluon import async_copy, fence_async_shared, gl, jit, warpgroup_mma, warpgroup_mma_wait
from unisono_torch.kernels.multiscale.hopper import copy, three

_COUNTS = ["T", "H", "q0", "q1", "q2", "k0", "k1", "k2", "v0", "v1", "v2"]


@jit
def _rate(log_decay):
    """log₂ λ, rounded once."""
    return (gl.load(log_decay).to(gl.float64) * 1.4426950408889634).to(gl.float32)


@jit(do_not_specialize=[*_COUNTS, "strips", "pieces", "each", "g0", "g1", "g3"])
def forward(
    q, k, v, gain, log_decay, start, start_z, end, end_z, o, denominator, own, own_z, own_w, T, H, strips, pieces, each,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, g0, g1, g3, UNIT: tl.constexpr, N: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """o, D and the final state. each: tokens of a piece; own, own_z, own_w: what pieces before add, and what fades in them."""
    EPS: tl.constexpr = 1e-6
    GROUPS: tl.constexpr = WARPS // 4  # of warps, each of which has some of the state's columns
    TALL: tl.constexpr = C // 64  # groups that share a chunk's queries; the others share their columns, and make all scores each
    PAIRS: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, C, 16])
    WIDE: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * TALL, GROUPS // TALL], [16, N // (GROUPS // TALL), 16])
    PAST: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 16, 16])
    HELD: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, N // GROUPS, 16])
    THIN: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, 16 // GROUPS, 16])
    SPOT: tl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [WARPS, 1], [1, 0])
    READ: tl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [WARPS, 1], [1, 0])
    TILE: tl.constexpr = gl.NVMMASharedLayout.get_default_for([C, N], gl.bfloat16)
    NARROW: tl.constexpr = gl.NVMMASharedLayout.get_default_for([C, 16], gl.bfloat16)
    which, order = (gl.program_id(0) % strips).to(gl.int64), gl.program_id(0) // strips
    batch, head = which // H, which % H
    q += (batch * q0 + head * q2) * UNIT
    k += (batch * k0 + head * k2) * UNIT
    v += (batch * v0 + head * v2) * UNIT
    gain += batch * g0 + head * g3
    rows, others = gl.arange(0, C, layout=gl.SliceLayout(1, PAIRS)), gl.arange(0, C, layout=gl.SliceLayout(0, PAIRS))
    wide_row = gl.arange(0, C, layout=gl.SliceLayout(1, WIDE))
    feature, column = gl.arange(0, N, layout=gl.SliceLayout(1, HELD)), gl.arange(0, N, layout=gl.SliceLayout(0, HELD))
    thin_row, thin = gl.arange(0, N, layout=gl.SliceLayout(1, THIN)), gl.arange(0, 16, layout=gl.SliceLayout(0, THIN))
    spot_row, spot = gl.arange(0, C, layout=gl.SliceLayout(1, SPOT)), gl.arange(0, 16, layout=gl.SliceLayout(0, SPOT))
    mine = gl.arange(0, C, layout=gl.SliceLayout(1, READ))
    at = feature[:, None] * N + column[None, :]
    state = gl.load(start + which * (N * N) + at).to(gl.float32)
    # in column 0, since what comes in lies in three
    line = gl.where(thin[None, :] == 0, gl.load(start_z + which * N + thin_row).to(gl.float32)[:, None], 0.0)
    for j in range(order):
        piece = which + j * strips
        w = gl.load(own_w + piece)
        state = state * w + gl.load(own + piece * (N * N) + at)
        line = line * w + gl.where(thin[None, :] == 0, gl.load(own_z + piece * N + thin_row)[:, None], 0.0)

    qs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, N], TILE)
    ks = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, N], TILE)
    vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, N], TILE)
    weighed = gl.allocate_shared_memory(gl.bfloat16, [C, N], TILE)
    weights = gl.allocate_shared_memory(gl.bfloat16, [C, 16], NARROW)
    held = gl.allocate_shared_memory(gl.bfloat16, [N, N], gl.NVMMASharedLayout.get_default_for([N, N], gl.bfloat16))
    held_z = gl.allocate_shared_memory(gl.bfloat16, [N, 16], gl.NVMMASharedLayout.get_default_for([N, 16], gl.bfloat16))
    low = order * each
    stop = gl.minimum(T, low + each)
    chunks = (stop - low + C - 1) // C
    for j in gl.static_range(STAGES - 1):
        t0 = low + j * C
        copy(q, t0, stop, q1 * UNIT, qs.index(j), N, C, READ)
        copy(k, t0, stop, k1 * UNIT, ks.index(j), N, C, READ)
        copy(v, t0, stop, v1 * UNIT, vs.index(j), N, C, READ)
        async_copy.commit_group()
    rate = _rate(log_decay)
    fade = gl.exp2(rate * gl.maximum(rows[:, None] - others[None, :], 0).to(gl.float32))
    fade = gl.where(rows[:, None] >= others[None, :], fade, 0.0)
    holds = gl.exp2(rate * (rows + 1).to(gl.float32))
    for i in range(chunks):
        t0 = low + i * C
        stage, slot, ahead = i % STAGES, (i + STAGES - 1) % STAGES, t0 + (STAGES - 1) * C
        q_i, k_i, v_i = qs.index(stage), ks.index(stage), vs.index(stage)
        count = gl.minimum(stop - t0, C)
        leaves = gl.exp2(rate * gl.maximum(count - 1 - mine, 0).to(gl.float32))
        leaves_z = gl.exp2(rate * gl.maximum(count - 1 - spot_row, 0).to(gl.float32))
        through = gl.exp2(rate * count.to(gl.float32))
        c = gl.load(gain + (t0 + wide_row).to(gl.int64) * g1, mask=(t0 + wide_row) < stop, other=0).to(gl.float32)
        held.store(state.to(gl.bfloat16))
        held_z.store(three(gl.sum(line, 1)[:, None] + 0.0 * thin[None, :].to(gl.float32), thin[None, :]))
        weights.store(three(leaves_z[:, None] + 0.0 * spot[None, :].to(gl.float32), spot[None, :]))
        async_copy.wait_group(STAGES - 2)
        weighed.store((v_i.load(READ).to(gl.float32) * leaves[:, None]).to(gl.bfloat16))
        state, line = state * through, line * through  # before any product is under way, or ptxas waits for those
        fence_async_shared()
        scores = warpgroup_mma(q_i, k_i.permute((1, 0)), gl.zeros([C, C], gl.float32, layout=PAIRS), use_acc=False, is_async=True)
        acc = warpgroup_mma(q_i, held, gl.zeros([C, N], gl.float32, layout=WIDE), use_acc=False, is_async=True)
        past = warpgroup_mma(q_i, held_z, gl.zeros([C, 16], gl.float32, layout=PAST), use_acc=False, is_async=True)
        state = warpgroup_mma(k_i.permute((1, 0)), weighed, state, is_async=True)
        line = warpgroup_mma(k_i.permute((1, 0)), weights, line, is_async=True)
        # every warp has passed a barrier since the buffer that is filled now was read
        copy(q, ahead, stop, q1 * UNIT, qs.index(slot), N, C, READ)
        copy(k, ahead, stop, k1 * UNIT, ks.index(slot), N, C, READ)
        copy(v, ahead, stop, v1 * UNIT, vs.index(slot), N, C, READ)
        async_copy.commit_group()
        scores = warpgroup_mma_wait(4, deps=[scores]) * fade
        pairs = gl.convert_layout(scores.to(gl.bfloat16), gl.DotOperandLayout(0, WIDE, 2))
        D = gl.sum(scores, 1)
        acc, past = warpgroup_mma_wait(2, deps=[acc, past])
        D += holds * gl.convert_layout(gl.sum(past, 1), gl.SliceLayout(1, PAIRS)) + EPS
        gl.store(denominator + which * T + (t0 + rows), D, mask=(t0 + rows) < stop)
        acc = warpgroup_mma(pairs, v_i, acc * gl.convert_layout(holds, gl.SliceLayout(1, WIDE))[:, None], is_async=True)
        state, line, acc = warpgroup_mma_wait(0, deps=[state, line, acc])
        acc = acc * (c / gl.convert_layout(D, gl.SliceLayout(1, WIDE)))[:, None]
        _put(o, (batch * T + t0) * H + head, t0, stop, H, acc, N, C, READ)
    async_copy.wait_group(0)
    if order == pieces - 1:
        gl.store(end + which * (N * N) + at, state)
        gl.store(end_z + which * N + thin_row, gl.sum(line, 1))


@jit
def _put(out, first, t0, stop, H, x, N: tl.constexpr, C: tl.constexpr, READ: tl.constexpr):
    """A chunk of one head among [B, T, H, N], whose first row is `first`."""
    rows, column = gl.arange(0, C, layout=gl.SliceLayout(1, READ)), gl.arange(0, N, layout=gl.SliceLayout(0, READ))
    at = out + first * N + (rows[:, None] * (H * N) + column[None, :])
    gl.store(at, gl.convert_layout(x.to(gl.bfloat16), READ), mask=((t0 + rows) < stop)[:, None])


@jit
def _times(a, b, M: tl.constexpr, N: tl.constexpr, LAYOUT: tl.constexpr):
    """a b [M, N], under way."""
    return warpgroup_mma(a, b, gl.zeros([M, N], gl.float32, layout=LAYOUT), use_acc=False, is_async=True)


@jit(do_not_specialize=[*_COUNTS, "d0", "d1", "d2", "g0", "g1", "g3"])
def of_queries(
    q, k, v, do, gain, log_decay, start, start_z, denominator, dq, delta, shares, lost, T, H,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, d0, d1, d2, g0, g1, g3, UNIT: tl.constexpr, N: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """dq, and for keys δ, shares = c/D and lost = shares·δ [B, H, T]."""
    GROUPS: tl.constexpr = WARPS // 4
    PAIRS: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, C, 16])
    WIDE: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16])
    HELD: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, N // GROUPS, 16])
    THIN: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, 16 // GROUPS, 16])
    SPOT: tl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [WARPS, 1], [1, 0])
    READ: tl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [WARPS, 1], [1, 0])
    TILE: tl.constexpr = gl.NVMMASharedLayout.get_default_for([C, N], gl.bfloat16)
    which = gl.program_id(0).to(gl.int64)
    batch, head = which // H, which % H
    q += (batch * q0 + head * q2) * UNIT
    k += (batch * k0 + head * k2) * UNIT
    v += (batch * v0 + head * v2) * UNIT
    do += (batch * d0 + head * d2) * UNIT
    gain += batch * g0 + head * g3
    rows, others = gl.arange(0, C, layout=gl.SliceLayout(1, PAIRS)), gl.arange(0, C, layout=gl.SliceLayout(0, PAIRS))
    value, column = gl.arange(0, N, layout=gl.SliceLayout(1, HELD)), gl.arange(0, N, layout=gl.SliceLayout(0, HELD))
    thin_row, thin = gl.arange(0, N, layout=gl.SliceLayout(1, THIN)), gl.arange(0, 16, layout=gl.SliceLayout(0, THIN))
    spot_row, spot = gl.arange(0, C, layout=gl.SliceLayout(1, SPOT)), gl.arange(0, 16, layout=gl.SliceLayout(0, SPOT))
    mine = gl.arange(0, C, layout=gl.SliceLayout(1, READ))
    # the state lies turned, [V, K]
    state = gl.load(start + which * (N * N) + (column[None, :] * N + value[:, None])).to(gl.float32)
    line = gl.where(thin[None, :] == 0, gl.load(start_z + which * N + thin_row).to(gl.float32)[:, None], 0.0)

    qs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, N], TILE)
    ks = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, N], TILE)
    vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, N], TILE)
    gs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, N], TILE)
    weighed = gl.allocate_shared_memory(gl.bfloat16, [C, N], TILE)
    weights = gl.allocate_shared_memory(gl.bfloat16, [C, 16], gl.NVMMASharedLayout.get_default_for([C, 16], gl.bfloat16))
    held = gl.allocate_shared_memory(gl.bfloat16, [N, N], gl.NVMMASharedLayout.get_default_for([N, N], gl.bfloat16))
    held_z = gl.allocate_shared_memory(gl.float32, [N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    chunks = (T + C - 1) // C
    for j in gl.static_range(STAGES - 1):
        first = gl.minimum(j * C, chunks * C)
        copy(q, first, T, q1 * UNIT, qs.index(j), N, C, READ)
        copy(k, first, T, k1 * UNIT, ks.index(j), N, C, READ)
        copy(v, first, T, v1 * UNIT, vs.index(j), N, C, READ)
        copy(do, first, T, d1 * UNIT, gs.index(j), N, C, READ)
        async_copy.commit_group()
    # the state after the last token is read by none, so that each chunk counts as whole
    rate = _rate(log_decay)
    leaves, through = gl.exp2(rate * (C - 1 - mine).to(gl.float32)), gl.exp2(rate * C)
    leaves_z = gl.exp2(rate * (C - 1 - spot_row).to(gl.float32))
    weights.store(three(leaves_z[:, None] + 0.0 * spot[None, :].to(gl.float32), spot[None, :]))
    for i in range(chunks):
        rate = _rate(log_decay)  # again, or what fades would be kept in registers, of which there are too few
        t0 = i * C
        stage, slot, ahead = i % STAGES, (i + STAGES - 1) % STAGES, t0 + (STAGES - 1) * C
        q_i, k_i, v_i, g_i = qs.index(stage), ks.index(stage), vs.index(stage), gs.index(stage)
        token, here = which * T + (t0 + rows), (t0 + rows) < T
        D = gl.load(denominator + token, mask=here, other=1.0)
        c = gl.load(gain + (t0 + rows).to(gl.int64) * g1, mask=here, other=0).to(gl.float32)
        held.store(state.to(gl.bfloat16))
        held_z.store(gl.sum(line, 1))
        async_copy.wait_group(STAGES - 2)
        weighed.store((k_i.load(READ).to(gl.float32) * leaves[:, None]).to(gl.bfloat16))
        fence_async_shared()
        R = _times(g_i, v_i.permute((1, 0)), C, C, PAIRS)
        P = _times(q_i, k_i.permute((1, 0)), C, C, PAIRS)
        acc = _times(g_i, held, C, N, WIDE)
        state = warpgroup_mma(v_i.permute((1, 0)), weighed, state * through, is_async=True)
        line = warpgroup_mma(k_i.permute((1, 0)), weights, line * through, is_async=True)
        # every warp has passed a barrier since the buffers that are filled now were read
        copy(q, ahead, T, q1 * UNIT, qs.index(slot), N, C, READ)
        copy(k, ahead, T, k1 * UNIT, ks.index(slot), N, C, READ)
        copy(v, ahead, T, v1 * UNIT, vs.index(slot), N, C, READ)
        copy(do, ahead, T, d1 * UNIT, gs.index(slot), N, C, READ)
        async_copy.commit_group()
        fade = gl.exp2(rate * gl.maximum(rows[:, None] - others[None, :], 0).to(gl.float32))
        fade = gl.where(rows[:, None] >= others[None, :], fade, 0.0)
        holds = gl.exp2(rate * (rows + 1).to(gl.float32))
        R, P = warpgroup_mma_wait(3, deps=[R, P])
        met = gl.sum(fade * P * R, 1)
        acc = warpgroup_mma_wait(2, deps=[acc])
        met += holds * gl.convert_layout(gl.sum(q_i.load(WIDE).to(gl.float32) * acc, 1), gl.SliceLayout(1, PAIRS))
        d, share = met / D, c / D
        less = share * d
        gl.store(delta + token, d, mask=here)
        gl.store(shares + token, share, mask=here)
        gl.store(lost + token, less, mask=here)
        pairs = (fade * (share[:, None] * R - less[:, None])).to(gl.bfloat16)
        weight = gl.convert_layout(share * holds, gl.SliceLayout(1, WIDE))
        minus = gl.convert_layout(less * holds, gl.SliceLayout(1, WIDE))
        acc = weight[:, None] * acc - minus[:, None] * held_z.load(gl.SliceLayout(0, WIDE))[None, :]
        acc = warpgroup_mma(gl.convert_layout(pairs, gl.DotOperandLayout(0, WIDE, 2)), k_i, acc, is_async=True)
        state, line, acc = warpgroup_mma_wait(0, deps=[state, line, acc])
        _put(dq, (batch * T + t0) * H + head, t0, T, H, acc, N, C, READ)
    async_copy.wait_group(0)


@jit(do_not_specialize=[*_COUNTS, "d0", "d1", "d2"])
def of_keys(
    q, k, v, do, log_decay, end, end_z, shares, lost, dk, dv, start, start_z, T, H,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, d0, d1, d2, UNIT: tl.constexpr, N: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """dk and dv, and the initial state's gradient, start, from the final one's, end."""
    GROUPS: tl.constexpr = WARPS // 4
    PAIRS: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, C, 16])
    WIDE: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16])
    HELD: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, N // GROUPS, 16])
    THIN: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, 16 // GROUPS, 16])
    SPOT: tl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [WARPS, 1], [1, 0])
    READ: tl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [WARPS, 1], [1, 0])
    TILE: tl.constexpr = gl.NVMMASharedLayout.get_default_for([C, N], gl.bfloat16)
    which = gl.program_id(0).to(gl.int64)
    batch, head = which // H, which % H
    q += (batch * q0 + head * q2) * UNIT
    k += (batch * k0 + head * k2) * UNIT
    v += (batch * v0 + head * v2) * UNIT
    do += (batch * d0 + head * d2) * UNIT
    shares += which * T
    lost += which * T
    rows, others = gl.arange(0, C, layout=gl.SliceLayout(1, PAIRS)), gl.arange(0, C, layout=gl.SliceLayout(0, PAIRS))
    feature, column = gl.arange(0, N, layout=gl.SliceLayout(1, HELD)), gl.arange(0, N, layout=gl.SliceLayout(0, HELD))
    wide_row = gl.arange(0, C, layout=gl.SliceLayout(1, WIDE))
    thin_row, thin = gl.arange(0, N, layout=gl.SliceLayout(1, THIN)), gl.arange(0, 16, layout=gl.SliceLayout(0, THIN))
    spot_row, spot = gl.arange(0, C, layout=gl.SliceLayout(1, SPOT)), gl.arange(0, 16, layout=gl.SliceLayout(0, SPOT))
    mine = gl.arange(0, C, layout=gl.SliceLayout(1, READ))
    at = which * (N * N) + (feature[:, None] * N + column[None, :])
    state = gl.load(end + at).to(gl.float32)
    line = gl.where(thin[None, :] == 0, gl.load(end_z + which * N + thin_row).to(gl.float32)[:, None], 0.0)

    qs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, N], TILE)
    ks = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, N], TILE)
    vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, N], TILE)
    gs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, N], TILE)
    weighed = gl.allocate_shared_memory(gl.bfloat16, [C, N], TILE)
    weights = gl.allocate_shared_memory(gl.bfloat16, [C, 16], gl.NVMMASharedLayout.get_default_for([C, 16], gl.bfloat16))
    held = gl.allocate_shared_memory(gl.bfloat16, [N, N], gl.NVMMASharedLayout.get_default_for([N, N], gl.bfloat16))
    held_z = gl.allocate_shared_memory(gl.float32, [N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    chunks = (T + C - 1) // C
    for j in gl.static_range(STAGES - 1):
        t0 = (chunks - 1 - j) * C
        stop = gl.where(j < chunks, T, -65536)
        copy(q, t0, stop, q1 * UNIT, qs.index(j), N, C, READ)
        copy(k, t0, stop, k1 * UNIT, ks.index(j), N, C, READ)
        copy(v, t0, stop, v1 * UNIT, vs.index(j), N, C, READ)
        copy(do, t0, stop, d1 * UNIT, gs.index(j), N, C, READ)
        async_copy.commit_group()
    for i in range(chunks):
        rate = _rate(log_decay)  # again, or what fades would be kept in registers, of which there are too few
        t0 = (chunks - 1 - i) * C
        stage, slot, ahead = i % STAGES, (i + STAGES - 1) % STAGES, t0 - (STAGES - 1) * C
        q_i, k_i, v_i, g_i = qs.index(stage), ks.index(stage), vs.index(stage), gs.index(stage)
        share_row = gl.load(shares + (t0 + mine), mask=(t0 + mine) < T, other=0.0)
        lost_spot = gl.load(lost + (t0 + spot_row), mask=(t0 + spot_row) < T, other=0.0)
        share = gl.load(shares + (t0 + others), mask=(t0 + others) < T, other=0.0)
        less = gl.load(lost + (t0 + others), mask=(t0 + others) < T, other=0.0)
        count = gl.minimum(T - t0, C)
        leaves = gl.exp2(rate * gl.maximum(count - 1 - wide_row, 0).to(gl.float32))
        through = gl.exp2(rate * count.to(gl.float32))
        held.store(state.to(gl.bfloat16))
        held_z.store(gl.sum(line, 1))
        minus = 0.0 - lost_spot * gl.exp2(rate * (spot_row + 1).to(gl.float32))
        weights.store(three(minus[:, None] + 0.0 * spot[None, :].to(gl.float32), spot[None, :]))
        share_row = share_row * gl.exp2(rate * (mine + 1).to(gl.float32))
        async_copy.wait_group(STAGES - 2)
        weighed.store((g_i.load(READ).to(gl.float32) * share_row[:, None]).to(gl.bfloat16))
        fence_async_shared()
        R = _times(v_i, g_i.permute((1, 0)), C, C, PAIRS)
        acc = _times(v_i, held.permute((1, 0)), C, N, WIDE)
        state = warpgroup_mma(q_i.permute((1, 0)), weighed, state * through, is_async=True)
        line = warpgroup_mma(q_i.permute((1, 0)), weights, line * through, is_async=True)
        # every warp has passed a barrier since the buffers that are filled now were read
        stop = gl.where(i + STAGES - 1 < chunks, T, -65536)
        copy(q, ahead, stop, q1 * UNIT, qs.index(slot), N, C, READ)
        copy(k, ahead, stop, k1 * UNIT, ks.index(slot), N, C, READ)
        copy(v, ahead, stop, v1 * UNIT, vs.index(slot), N, C, READ)
        copy(do, ahead, stop, d1 * UNIT, gs.index(slot), N, C, READ)
        async_copy.commit_group()
        fade = gl.exp2(rate * gl.maximum(others[None, :] - rows[:, None], 0).to(gl.float32))  # [key, query]
        fade = gl.where(rows[:, None] <= others[None, :], fade, 0.0)
        R = warpgroup_mma_wait(3, deps=[R])
        pairs = gl.convert_layout((fade * (share[None, :] * R - less[None, :])).to(gl.bfloat16), gl.DotOperandLayout(0, WIDE, 2))
        # values' gradient after keys', whose registers it takes
        acc = warpgroup_mma_wait(2, deps=[acc])
        acc = leaves[:, None] * (acc + held_z.load(gl.SliceLayout(0, WIDE))[None, :])
        acc = warpgroup_mma(pairs, q_i, acc, is_async=True)
        P = _times(k_i, q_i.permute((1, 0)), C, C, PAIRS)
        acc_v = _times(k_i, held, C, N, WIDE)
        acc = warpgroup_mma_wait(2, deps=[acc])
        _put(dk, (batch * T + t0) * H + head, t0, T, H, acc, N, C, READ)
        P, state, line = warpgroup_mma_wait(1, deps=[P, state, line])
        pairs_v = gl.convert_layout((fade * (share[None, :] * P)).to(gl.bfloat16), gl.DotOperandLayout(0, WIDE, 2))
        acc_v = warpgroup_mma_wait(0, deps=[acc_v])
        acc_v = warpgroup_mma(pairs_v, g_i, leaves[:, None] * acc_v, is_async=True)
        acc_v = warpgroup_mma_wait(0, deps=[acc_v])
        _put(dv, (batch * T + t0) * H + head, t0, T, H, acc_v, N, C, READ)
    async_copy.wait_group(0)
    gl.store(start + at, state)
    gl.store(start_z + which * N + thin_row, gl.sum(line, 1))
