"""Linear attention forward for a Hopper GPU, in Gluon: outputs, and what segments of time add to the state; conditions are hopper.py's.

Every operand of a product but the masked scores is shared memory, into which tokens are copied chunks ahead and where φ is applied in
place. Sums of φ(k) are a product with a thin matrix of ones, and D's share of the past is one with z, cut into three bfloat16 that add up
to it: no warp waits for another's sums. Past the end v is zero, as are the ones, so that φ(0) there adds nothing.
"""

# Gluon, which a checker of Python reads wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import triton.language as tl

from unisono_torch.kernels.gluon import async_copy, barrier, fence_async_shared, gl, jit, warpgroup_mma, warpgroup_mma_wait
from unisono_torch.kernels.linear_attention.hopper import _copy, _phi, _three, _within

# elu1 of two bfloat16. x + 1 is rounded once, as e^x is, so that the greater is what rounding the greater gives.
ELU1_OF_TWO = tl.constexpr("""{
.reg .b32 n, a, l, h; .reg .f32 x, y;
mov.b32 a, 0;
min.NaN.bf16x2 n, $1, a;
shl.b32 l, n, 16;
and.b32 h, n, 0xffff0000;
mov.b32 x, l;
mov.b32 y, h;
mul.f32 x, x, 0f3FB8AA3B;
mul.f32 y, y, 0f3FB8AA3B;
ex2.approx.ftz.f32 x, x;
ex2.approx.ftz.f32 y, y;
cvt.rn.bf16x2.f32 n, y, x;
mov.b32 a, 0x3f803f80;
fma.rn.bf16x2 a, $1, a, a;
max.NaN.bf16x2 $0, a, n;
}""")


@jit
def _mapped(x, MAP: tl.constexpr, PACKED: tl.constexpr):
    """φ of bfloat16, rounded. PACKED: elu1 of two at a time."""
    if PACKED and MAP == "elu1":
        return gl.inline_asm_elementwise(ELU1_OF_TWO, "=r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2)
    return _phi(x.to(gl.float32), MAP).to(gl.bfloat16)


@jit
def _feature(a, K: tl.constexpr, MAP: tl.constexpr, READ: tl.constexpr, PACKED: tl.constexpr):
    """φ of a tile in place."""
    a.store(_within(_mapped(a.load(READ), MAP, PACKED), K, READ))


@jit
def _features(a, b, K: tl.constexpr, MAP: tl.constexpr, READ: tl.constexpr, APART: tl.constexpr, PACKED: tl.constexpr):
    """φ of both tiles in place. APART: one after the other, where registers are few; at once takes a barrier less."""
    if MAP != "none":
        if APART:
            _feature(a, K, MAP, READ, PACKED)
            _feature(b, K, MAP, READ, PACKED)
        else:
            x, y = a.load(READ), b.load(READ)
            a.store(_within(_mapped(x, MAP, PACKED), K, READ))
            b.store(_within(_mapped(y, MAP, PACKED), K, READ))


@jit(do_not_specialize=["T", "H", "batches", "segments", "length", "q0", "q1", "q2", "k0", "k1", "k2", "v0", "v1", "v2"])
def forward(
    q, k, v, S, z, o, S_out, z_out, denominator, own, own_z, T, H, batches, segments, length,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, UNIT: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, MAP: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, WARPS: tl.constexpr, PACKED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """As sweep.forward where it WRITES.

    Features of a chunk are made while products of the one before are under way; EARLY: its masked scores' product among them.
    Each group of four warps makes all scores, so that none waits for another's.
    """
    EPS: tl.constexpr = 1e-6
    ROOM: tl.constexpr = BK if BK > BV else BV
    GROUPS: tl.constexpr = WARPS // 4
    TALL: tl.constexpr = BK // 64 if BK // 64 < GROUPS else GROUPS  # groups that share the state's rows; the others its columns
    PAIRS: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, C, 16])
    PAST: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 16, 16])
    WIDE: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, BN // GROUPS, 16])
    HELD: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * TALL, GROUPS // TALL], [16, BN // (GROUPS // TALL), 16])
    THIN: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 16, 16])
    SPOT: tl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [WARPS, 1], [1, 0])
    READ: tl.constexpr = gl.BlockedLayout([1, 8], [32 // (BK // 8), BK // 8], [WARPS, 1], [1, 0])
    READ_W: tl.constexpr = gl.BlockedLayout([1, 8], [32 // (BN // 8), BN // 8], [WARPS, 1], [1, 0])
    blocks: tl.constexpr = BV // BN
    strips = batches * H * blocks
    strip, order = gl.program_id(0) % strips, gl.program_id(0) // strips
    which, first = (strip // blocks).to(gl.int64), (strip % blocks) * BN
    strips = strips.to(gl.int64)
    batch, head = which // H, which % H
    q += (batch * q0 + head * q2) * UNIT
    k += (batch * k0 + head * k2) * UNIT
    v += (batch * v0 + head * v2) * UNIT + first
    qt, kt, vt = q1 * UNIT, k1 * UNIT, v1 * UNIT
    of_k: tl.constexpr = None if K == BK else K  # columns that there are, if not all
    of_v = None if V == BV else V - first
    low = order * length
    end = gl.minimum(T, low + length)
    chunks = (end - low + C - 1) // C

    WIDE_S: tl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BK], gl.bfloat16)
    NARROW_S: tl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BN], gl.bfloat16)
    THIN_S: tl.constexpr = gl.NVMMASharedLayout.get_default_for([C, 16], gl.bfloat16)
    qs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, BK], WIDE_S)
    ks = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, BK], WIDE_S)
    vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, BN], NARROW_S)
    ones = gl.allocate_shared_memory(gl.bfloat16, [C, 16], THIN_S)
    S_b = gl.allocate_shared_memory(gl.bfloat16, [BK, BN], NARROW_S)
    z_b = gl.allocate_shared_memory(gl.bfloat16, [BK, 16], THIN_S)
    for j in gl.static_range(STAGES - 1):
        t0 = low + j * C
        _copy(q, t0, end, qt, qs.index(j), of_k, BK, C, READ)
        _copy(k, t0, end, kt, ks.index(j), of_k, BK, C, READ)
        _copy(v, t0, end, vt, vs.index(j), of_v, BN, C, READ_W)
        async_copy.commit_group()

    feature, column = gl.arange(0, BK, layout=gl.SliceLayout(1, HELD)), gl.arange(0, BN, layout=gl.SliceLayout(0, HELD))
    thin_row, thin = gl.arange(0, BK, layout=gl.SliceLayout(1, THIN)), gl.arange(0, 16, layout=gl.SliceLayout(0, THIN))
    tile = feature[:, None] * BN + column[None, :]
    given = which * (K * V) + (feature[:, None] * V + (first + column)[None, :])
    held, live = (feature < K)[:, None] & (first + column < V)[None, :], thin_row < K
    state = gl.load(S + given, mask=held, other=0).to(gl.float32)
    # in column 0, since what comes in lies in three
    line = gl.where(thin[None, :] == 0, gl.load(z + which * K + thin_row, mask=live, other=0).to(gl.float32)[:, None], 0.0)
    for j in range(order):
        before = strip + j * strips
        state += gl.load(own + before * (ROOM * BN) + tile)
        line += gl.where(thin[None, :] == 0, gl.load(own_z + before * ROOM + thin_row)[:, None], 0.0)
    spot_row, spot = gl.arange(0, C, layout=gl.SliceLayout(1, SPOT)), gl.arange(0, 16, layout=gl.SliceLayout(0, SPOT))
    ones.store(gl.where((spot[None, :] == 0) & ((low + spot_row) < end)[:, None], 1.0, 0.0).to(gl.bfloat16))
    S_b.store(state.to(gl.bfloat16))
    z_b.store(_three(gl.sum(line, 1)[:, None] + 0.0 * thin[None, :].to(gl.float32), thin[None, :]))

    mine_w = gl.arange(0, C, layout=gl.SliceLayout(1, READ_W))
    out_column = gl.arange(0, BN, layout=gl.SliceLayout(0, READ_W))
    rows, others = gl.arange(0, C, layout=gl.SliceLayout(1, PAIRS)), gl.arange(0, C, layout=gl.SliceLayout(0, PAIRS))
    per_token = (batch * T) * H + head
    async_copy.wait_group(STAGES - 2)
    _features(qs.index(0), ks.index(0), of_k, MAP, READ, False, PACKED)
    for i in range(chunks):
        t0 = low + i * C
        stage = i % STAGES
        q_i, k_i, v_i = qs.index(stage), ks.index(stage), vs.index(stage)
        if (t0 + C > end) & (i > 0):
            ones.store(gl.where((spot[None, :] == 0) & ((t0 + spot_row) < end)[:, None], 1.0, 0.0).to(gl.bfloat16))
        fence_async_shared()
        scores = warpgroup_mma(q_i, k_i.permute((1, 0)), gl.zeros([C, C], gl.float32, layout=PAIRS), use_acc=False, is_async=True)
        acc = warpgroup_mma(q_i, S_b, gl.zeros([C, BN], gl.float32, layout=WIDE), use_acc=False, is_async=True)
        past = warpgroup_mma(q_i, z_b, gl.zeros([C, 16], gl.float32, layout=PAST), use_acc=False, is_async=True)
        state = warpgroup_mma(k_i.permute((1, 0)), v_i, state, is_async=True)
        line = warpgroup_mma(k_i.permute((1, 0)), ones, line, is_async=True)
        # every warp has passed a barrier since the buffer that is filled now was read
        slot, t1 = (i + STAGES - 1) % STAGES, t0 + (STAGES - 1) * C
        _copy(q, t1, end, qt, qs.index(slot), of_k, BK, C, READ)
        _copy(k, t1, end, kt, ks.index(slot), of_k, BK, C, READ)
        _copy(v, t1, end, vt, vs.index(slot), of_v, BN, C, READ_W)
        async_copy.commit_group()
        async_copy.wait_group(STAGES - 2)
        next_q, next_k = qs.index((i + 1) % STAGES), ks.index((i + 1) % STAGES)
        if not EARLY:
            _features(next_q, next_k, of_k, MAP, READ, BK > 64, PACKED)
        scores = warpgroup_mma_wait(4, deps=[scores])
        scores = gl.where(rows[:, None] >= others[None, :], scores, 0.0)
        pairs = gl.convert_layout(scores.to(gl.bfloat16), gl.DotOperandLayout(0, WIDE, 2))
        D = gl.sum(scores, 1)
        if EARLY:
            acc = warpgroup_mma(pairs, v_i, acc, is_async=True)
            _features(next_q, next_k, of_k, MAP, READ, BK > 64, PACKED)
            acc, past, state, line = warpgroup_mma_wait(0, deps=[acc, past, state, line])
            barrier()  # S_b and z_b are overwritten below, which the other warps' products read, too
        else:
            acc, past = warpgroup_mma_wait(2, deps=[acc, past])
            barrier()  # as there
            acc = warpgroup_mma(pairs, v_i, acc, is_async=True)
            state, line = warpgroup_mma_wait(1, deps=[state, line])
        S_b.store(state.to(gl.bfloat16))
        z_b.store(_three(gl.sum(line, 1)[:, None] + 0.0 * thin[None, :].to(gl.float32), thin[None, :]))
        D += gl.convert_layout(gl.sum(past, 1), gl.SliceLayout(1, PAIRS)) + EPS
        if first == 0:
            gl.store(denominator + per_token + (t0 + rows) * H, D, mask=(t0 + rows) < end)
        if not EARLY:
            acc = warpgroup_mma_wait(0, deps=[acc])
        acc = acc * gl.convert_layout(1 / D, gl.SliceLayout(1, WIDE))[:, None]
        put = o + ((batch * T + t0) * H + head) * V + first + (mine_w[:, None] * (H * V) + out_column[None, :])
        written = ((t0 + mine_w) < end)[:, None]
        if of_v is not None:
            written = written & (out_column < of_v)[None, :]
        gl.store(put, gl.convert_layout(acc.to(gl.bfloat16), READ_W), mask=written)
    async_copy.wait_group(0)
    if order == segments - 1:
        gl.store(S_out + given, state, mask=held)
        if first == 0:
            gl.store(z_out + which * K + thin_row, gl.sum(line, 1), mask=live)


@jit(do_not_specialize=["T", "H", "batches", "segments", "length", "k0", "k1", "k2", "v0", "v1", "v2"])
def added(
    k, v, own, own_z, T, H, batches, segments, length, k0, k1, k2, v0, v1, v2, UNIT: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, MAP: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, WARPS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What each segment but the last adds to the state and to z."""
    ROOM: tl.constexpr = BK if BK > BV else BV
    TALL: tl.constexpr = BK // 64 if BK // 64 < WARPS // 4 else WARPS // 4
    WIDE: tl.constexpr = WARPS // 4 // TALL
    HELD: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * TALL, WIDE], [16, BN // WIDE, 16])
    THIN: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 16, 16])
    SPOT: tl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [WARPS, 1], [1, 0])
    READ: tl.constexpr = gl.BlockedLayout([1, 8], [32 // (BK // 8), BK // 8], [WARPS, 1], [1, 0])
    READ_W: tl.constexpr = gl.BlockedLayout([1, 8], [32 // (BN // 8), BN // 8], [WARPS, 1], [1, 0])
    blocks: tl.constexpr = BV // BN
    strips = batches * H * blocks
    strip, order = gl.program_id(0) % strips, gl.program_id(0) // strips
    which, first = (strip // blocks).to(gl.int64), (strip % blocks) * BN
    batch, head = which // H, which % H
    k += (batch * k0 + head * k2) * UNIT
    v += (batch * v0 + head * v2) * UNIT + first
    kt, vt = k1 * UNIT, v1 * UNIT
    of_k: tl.constexpr = None if K == BK else K
    of_v = None if V == BV else V - first
    low = order * length  # of segments that are whole
    end, chunks = low + length, length // C
    ks = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, BK], gl.NVMMASharedLayout.get_default_for([C, BK], gl.bfloat16))
    vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, BN], gl.NVMMASharedLayout.get_default_for([C, BN], gl.bfloat16))
    ones = gl.allocate_shared_memory(gl.bfloat16, [C, 16], gl.NVMMASharedLayout.get_default_for([C, 16], gl.bfloat16))
    for j in gl.static_range(STAGES - 1):
        _copy(k, low + j * C, end, kt, ks.index(j), of_k, BK, C, READ)
        _copy(v, low + j * C, end, vt, vs.index(j), of_v, BN, C, READ_W)
        async_copy.commit_group()
    spot_row, spot = gl.arange(0, C, layout=gl.SliceLayout(1, SPOT)), gl.arange(0, 16, layout=gl.SliceLayout(0, SPOT))
    ones.store(gl.where(spot[None, :] + 0 * spot_row[:, None] == 0, 1.0, 0.0).to(gl.bfloat16))
    state = gl.zeros([BK, BN], gl.float32, layout=HELD)
    line = gl.zeros([BK, 16], gl.float32, layout=THIN)
    for i in range(chunks):
        stage = i % STAGES
        k_i = ks.index(stage)
        async_copy.wait_group(STAGES - 2)
        if MAP != "none":
            _feature(k_i, of_k, MAP, READ, PACKED)
        fence_async_shared()
        state = warpgroup_mma(k_i.permute((1, 0)), vs.index(stage), state, is_async=True)
        line = warpgroup_mma(k_i.permute((1, 0)), ones, line, is_async=True)
        # every warp has passed a barrier since the buffer that is filled now was read
        slot, t1 = (i + STAGES - 1) % STAGES, low + (i + STAGES - 1) * C
        _copy(k, t1, end, kt, ks.index(slot), of_k, BK, C, READ)
        _copy(v, t1, end, vt, vs.index(slot), of_v, BN, C, READ_W)
        async_copy.commit_group()
        state, line = warpgroup_mma_wait(0, deps=[state, line])
    async_copy.wait_group(0)
    before = strip + order * strips.to(gl.int64)
    feature, column = gl.arange(0, BK, layout=gl.SliceLayout(1, HELD)), gl.arange(0, BN, layout=gl.SliceLayout(0, HELD))
    gl.store(own + before * (ROOM * BN) + (feature[:, None] * BN + column[None, :]), state)
    gl.store(own_z + before * ROOM + gl.arange(0, BK, layout=gl.SliceLayout(1, THIN)), gl.sum(line, 1))
