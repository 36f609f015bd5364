"""One decay forward for a Hopper GPU, in Gluon: linear_attention/hopper.py's sweep with what fades in it, under hopper.py's conditions.

A program reads a head's tokens once and keeps its state in registers, so that no states reach memory. What a token still holds of another
is the same in every chunk, and stays in registers; values that the state takes are weighed in a copy of their own, and z comes of a
product with three thin columns that add up to the weights.
"""

# Gluon, which a checker of Python reads wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton.language as tl

from unisono_torch.kernels.gluon import async_copy, fence_async_shared, gl, jit, warpgroup_mma, warpgroup_mma_wait
from unisono_torch.kernels.multiscale.hopper import copy, three


@jit(
    do_not_specialize=[
        "T", "H", "strips", "pieces", "each", "q0", "q1", "q2", "k0", "k1", "k2", "v0", "v1", "v2", "g0", "g1", "g3",
    ]
)  # fmt: skip
def forward(
    q, k, v, gain, hi, lo, start, start_z, end, end_z, o, denominator, own, own_z, own_w, T, H, strips, pieces, each,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, g0, g1, g3, UNIT: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """o, D and the final state. each: tokens of a piece; own, own_z, own_w: what pieces before add, and what fades in them."""
    EPS: tl.constexpr = 1e-6
    WIDE: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    THIN: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    SPOT: tl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0])
    READ: tl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [4, 1], [1, 0])
    TILE: tl.constexpr = gl.NVMMASharedLayout.get_default_for([C, C], gl.bfloat16)
    NARROW: tl.constexpr = gl.NVMMASharedLayout.get_default_for([C, 16], gl.bfloat16)
    which, order = (gl.program_id(0) % strips).to(gl.int64), gl.program_id(0) // strips
    batch, head = which // H, which % H
    q += (batch * q0 + head * q2) * UNIT
    k += (batch * k0 + head * k2) * UNIT
    v += (batch * v0 + head * v2) * UNIT
    gain += batch * g0 + head * g3
    rows, others = gl.arange(0, C, layout=gl.SliceLayout(1, WIDE)), gl.arange(0, C, layout=gl.SliceLayout(0, WIDE))
    thin_row, thin = gl.arange(0, C, layout=gl.SliceLayout(1, THIN)), gl.arange(0, 16, layout=gl.SliceLayout(0, THIN))
    spot_row, spot = gl.arange(0, C, layout=gl.SliceLayout(1, SPOT)), gl.arange(0, 16, layout=gl.SliceLayout(0, SPOT))
    mine = gl.arange(0, C, layout=gl.SliceLayout(1, READ))
    at = rows[:, None] * C + others[None, :]
    state = gl.load(start + which * (C * C) + at).to(gl.float32)
    # in column 0, since what comes in lies in three
    line = gl.where(thin[None, :] == 0, gl.load(start_z + which * C + thin_row).to(gl.float32)[:, None], 0.0)
    for j in range(order):
        piece = which + j * strips
        w = gl.load(own_w + piece)
        state = state * w + gl.load(own + piece * (C * C) + at)
        line = line * w + gl.where(thin[None, :] == 0, gl.load(own_z + piece * C + thin_row)[:, None], 0.0)

    qs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, C], TILE)
    ks = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, C], TILE)
    vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, C], TILE)
    weighed = gl.allocate_shared_memory(gl.bfloat16, [C, C], TILE)
    weights = gl.allocate_shared_memory(gl.bfloat16, [C, 16], NARROW)
    held = gl.allocate_shared_memory(gl.bfloat16, [C, C], TILE)
    held_z = gl.allocate_shared_memory(gl.bfloat16, [C, 16], NARROW)
    low = order * each
    stop = gl.minimum(T, low + each)
    chunks = (stop - low + C - 1) // C
    for j in gl.static_range(STAGES - 1):
        t0 = low + j * C
        copy(q, t0, stop, q1 * UNIT, qs.index(j), C, C, READ)
        copy(k, t0, stop, k1 * UNIT, ks.index(j), C, C, READ)
        copy(v, t0, stop, v1 * UNIT, vs.index(j), C, C, READ)
        async_copy.commit_group()
    rate = gl.load(hi) + gl.load(lo)
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
        c = gl.load(gain + (t0 + rows).to(gl.int64) * g1, mask=(t0 + rows) < stop, other=0).to(gl.float32)
        held.store(state.to(gl.bfloat16))
        held_z.store(three(gl.sum(line, 1)[:, None] + 0.0 * thin[None, :].to(gl.float32), thin[None, :]))
        weights.store(three(leaves_z[:, None] + 0.0 * spot[None, :].to(gl.float32), spot[None, :]))
        async_copy.wait_group(STAGES - 2)
        weighed.store((v_i.load(READ).to(gl.float32) * leaves[:, None]).to(gl.bfloat16))
        fence_async_shared()
        scores = warpgroup_mma(q_i, k_i.permute((1, 0)), gl.zeros([C, C], gl.float32, layout=WIDE), use_acc=False, is_async=True)
        acc = warpgroup_mma(q_i, held, gl.zeros([C, C], gl.float32, layout=WIDE), use_acc=False, is_async=True)
        past = warpgroup_mma(q_i, held_z, gl.zeros([C, 16], gl.float32, layout=THIN), use_acc=False, is_async=True)
        state = warpgroup_mma(k_i.permute((1, 0)), weighed, state * through, is_async=True)
        line = warpgroup_mma(k_i.permute((1, 0)), weights, line * through, is_async=True)
        # every warp has passed a barrier since the buffer that is filled now was read
        copy(q, ahead, stop, q1 * UNIT, qs.index(slot), C, C, READ)
        copy(k, ahead, stop, k1 * UNIT, ks.index(slot), C, C, READ)
        copy(v, ahead, stop, v1 * UNIT, vs.index(slot), C, C, READ)
        async_copy.commit_group()
        scores = warpgroup_mma_wait(4, deps=[scores]) * fade
        pairs = gl.convert_layout(scores.to(gl.bfloat16), gl.DotOperandLayout(0, WIDE, 2))
        D = gl.sum(scores, 1)
        acc, past = warpgroup_mma_wait(2, deps=[acc, past])
        D += holds * gl.convert_layout(gl.sum(past, 1), gl.SliceLayout(1, WIDE)) + EPS
        gl.store(denominator + which * T + (t0 + rows), D, mask=(t0 + rows) < stop)
        acc = warpgroup_mma(pairs, v_i, acc * holds[:, None], is_async=True)
        state, line, acc = warpgroup_mma_wait(0, deps=[state, line, acc])
        acc = acc * (c / D)[:, None]
        out_column = gl.arange(0, C, layout=gl.SliceLayout(0, READ))
        put = o + ((batch * T + t0) * H + head) * C + (mine[:, None] * (H * C) + out_column[None, :])
        gl.store(put, gl.convert_layout(acc.to(gl.bfloat16), READ), mask=((t0 + mine) < stop)[:, None])
    async_copy.wait_group(0)
    if order == pieces - 1:
        gl.store(end + which * (C * C) + at, state)
        gl.store(end_z + which * C + thin_row, gl.sum(line, 1))
