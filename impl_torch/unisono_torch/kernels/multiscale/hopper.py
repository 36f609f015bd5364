"""states.py for a Hopper GPU, in Gluon: bfloat16, heads of 64 or 128, no marks, decays alike for all tokens, q' = q.

The same sums in the same order. Tokens are copied into shared memory blocks ahead, where y is weighed in place; a product with three thin
columns that add up to the weights sums for z. Of whole's gradient the sum over tokens is all that is asked for; programs add it up.
"""

# Gluon, which a checker of Python reads wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton.language as tl

from unisono_torch.kernels.gluon import async_copy, fence_async_shared, gl, jit, warpgroup_mma, warpgroup_mma_wait


@jit
def copy(base, t0, end, step, target, N: tl.constexpr, C: tl.constexpr, READ: tl.constexpr):
    rows = gl.arange(0, C, layout=gl.SliceLayout(1, READ))
    column = gl.arange(0, N, layout=gl.SliceLayout(0, READ))
    at = base + t0.to(gl.int64) * step + (rows[:, None] * step + column[None, :])
    async_copy.async_copy_global_to_shared(target, at, mask=((t0 + rows) < end)[:, None])


@jit
def three(x, column):
    """A float32 as three bfloat16 whose sum it is, in columns 0 to 2."""
    high = x.to(gl.bfloat16)
    rest = x - high.to(gl.float32)
    middle = rest.to(gl.bfloat16)
    low = (rest - middle.to(gl.float32)).to(gl.bfloat16)
    return gl.where(column == 0, high, gl.where(column == 1, middle, gl.where(column == 2, low, gl.zeros_like(low))))


@jit(do_not_specialize=["T", "H", "batches", "segments", "pieces", "each", "x0", "x1", "x2", "y0", "y1", "y2", "c0", "c1"])
def states(
    x, y, weight, weight_norm, whole, start, start_z, kept, kept_z, end, end_z, before, before_z, through, own, own_z, own_w,
    T, H, batches, segments, pieces, each, x0, x1, x2, y0, y1, y2, c0, c1, UNIT: tl.constexpr, WRITES: tl.constexpr,
    BACK: tl.constexpr, THROUGH: tl.constexpr, M: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, C: tl.constexpr,
    NB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As states.states; through [B, H, M, blocks, pieces]: a program's share of log λ's gradient."""
    L: tl.constexpr = C * NB
    blocks: tl.constexpr = V // BN
    WIDE: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    THIN: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    SPOT: tl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0])
    READ: tl.constexpr = gl.BlockedLayout([1, 8], [32 // (K // 8), K // 8], [4, 1], [1, 0])
    READ_Y: tl.constexpr = gl.BlockedLayout([1, 8], [32 // (BN // 8), BN // 8], [4, 1], [1, 0])
    strips = batches * H * M * blocks
    strip, order = gl.program_id(0) % strips, gl.program_id(0) // strips
    block, s = strip % blocks, (strip // blocks) % M
    head, batch = ((strip // blocks // M) % H).to(gl.int64), (strip // blocks // M // H).to(gl.int64)
    strips = strips.to(gl.int64)
    first = block * BN
    x += (batch * x0 + head * x2) * UNIT
    y += (batch * y0 + head * y2) * UNIT + first
    xt, yt = x1 * UNIT, y1 * UNIT
    weight += batch * c0 + head * c1 + s * (segments * L).to(gl.int64)
    weight_norm += batch * c0 + head * c1 + s * (segments * L).to(gl.int64)
    whole += s * segments
    mine = (batch * H + head) * M + s  # among kept and before
    given = (batch * M + s) * H + head  # among start and end

    feature, column = gl.arange(0, K, layout=gl.SliceLayout(1, WIDE)), gl.arange(0, BN, layout=gl.SliceLayout(0, WIDE))
    thin_row, thin = gl.arange(0, K, layout=gl.SliceLayout(1, THIN)), gl.arange(0, 16, layout=gl.SliceLayout(0, THIN))
    at = feature[:, None] * V + (first + column)[None, :]
    tile = feature[:, None] * BN + column[None, :]
    total = gl.zeros([K, BN], gl.float32, layout=WIDE)
    line = gl.zeros([K, 16], gl.float32, layout=THIN)
    if WRITES:
        total = gl.load(start + given * (K * V) + at).to(gl.float32)
        line = gl.where(thin[None, :] == 0, gl.load(start_z + given * K + thin_row).to(gl.float32)[:, None], 0.0)
        for j in range(order):
            piece = strip + j * strips
            w = gl.load(own_w + piece)
            total = total * w + gl.load(own + piece * (K * BN) + tile)
            line = line * w + gl.where(thin[None, :] == 0, gl.load(own_z + piece * K + thin_row)[:, None], 0.0)
    low = (pieces - 1 - order if BACK else order) * each
    count = gl.minimum(each, segments - low)

    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, K], gl.NVMMASharedLayout.get_default_for([C, K], gl.bfloat16))
    ys = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, BN], gl.NVMMASharedLayout.get_default_for([C, BN], gl.bfloat16))
    fs = gl.allocate_shared_memory(gl.bfloat16, [C, 16], gl.NVMMASharedLayout.get_default_for([C, 16], gl.bfloat16))
    rows, spot_row = gl.arange(0, C, layout=gl.SliceLayout(1, READ_Y)), gl.arange(0, C, layout=gl.SliceLayout(1, SPOT))
    spot = gl.arange(0, 16, layout=gl.SliceLayout(0, SPOT))
    out_row, out_column = gl.arange(0, K, layout=gl.SliceLayout(1, READ_Y)), gl.arange(0, BN, layout=gl.SliceLayout(0, READ_Y))
    out_at = out_row[:, None] * V + (first + out_column)[None, :]
    for j in gl.static_range(STAGES - 1):
        t0 = (low + (count - 1 - j // NB if BACK else j // NB)) * L + j % NB * C
        stop = gl.where(j < count * NB, T, -65536)
        copy(x, t0, stop, xt, xs.index(j), K, C, READ)
        copy(y, t0, stop, yt, ys.index(j), BN, C, READ_Y)
        async_copy.commit_group()
    t0 = (low + (count - 1 if BACK else 0)) * L
    c_next, f_next = gl.load(weight + t0 + rows), gl.load(weight_norm + t0 + spot_row)
    factor, met = 1.0, gl.zeros([K], gl.float32, layout=gl.SliceLayout(1, WIDE))
    met_z = gl.zeros([K], gl.float32, layout=gl.SliceLayout(1, THIN))
    n = low + (count - 1 if BACK else 0)
    w_next, earlier = gl.load(whole + n), gl.zeros([K, BN], gl.bfloat16, layout=READ_Y)
    if THROUGH:
        earlier = gl.load(before + (mine * segments + n) * (K * V) + out_at)
    for i in range(count):
        n = low + (count - 1 - i if BACK else i)
        next_n = gl.maximum(n - 1, low) if BACK else gl.minimum(n + 1, segments - 1)
        w = w_next
        w_next = gl.load(whole + next_n)
        if WRITES:
            if THROUGH:
                passed = w * gl.minimum(L, T - n * L).to(gl.float32)
                met += passed * gl.sum(total * gl.convert_layout(earlier, WIDE).to(gl.float32), 1)
                earlier = gl.load(before + (mine * segments + next_n) * (K * V) + out_at)
                if block == 0:
                    met_z += passed * gl.sum(line, 1) * gl.load(before_z + (mine * segments + n) * K + thin_row)
            gl.store(kept + (mine * segments + n) * (K * V) + out_at, gl.convert_layout(total.to(gl.bfloat16), READ_Y))
            if block == 0:
                gl.store(kept_z + (mine * segments + n) * K + thin_row, gl.sum(line, 1))
        total, line, factor = total * w, line * w, factor * w
        for part in gl.static_range(NB):
            index = i * NB + part
            stage, slot, ahead = index % STAGES, (index + STAGES - 1) % STAGES, index + STAGES - 1
            x_i, y_i = xs.index(stage), ys.index(stage)
            async_copy.wait_group(STAGES - 2)
            y_i.store((y_i.load(READ_Y).to(gl.float32) * c_next[:, None]).to(gl.bfloat16))
            fs.store(three(f_next[:, None] + 0.0 * spot[None, :].to(gl.float32), spot[None, :]))
            fence_async_shared()
            total = warpgroup_mma(x_i.permute((1, 0)), y_i, total, is_async=True)
            line = warpgroup_mma(x_i.permute((1, 0)), fs, line, is_async=True)
            # every warp has passed a barrier since the buffer that is filled now was read
            t1 = (low + (count - 1 - ahead // NB if BACK else ahead // NB)) * L + ahead % NB * C
            stop = gl.where(ahead < count * NB, T, -65536)
            copy(x, t1, stop, xt, xs.index(slot), K, C, READ)
            copy(y, t1, stop, yt, ys.index(slot), BN, C, READ_Y)
            async_copy.commit_group()
            ahead = index + 1
            t1 = (low + (count - 1 - ahead // NB if BACK else ahead // NB)) * L + ahead % NB * C
            more = (spot_row >= 0) & (ahead < count * NB)
            c_next = gl.load(weight + t1 + rows, mask=(rows >= 0) & (ahead < count * NB), other=0.0)
            f_next = gl.load(weight_norm + t1 + spot_row, mask=more, other=0.0)
            total, line = warpgroup_mma_wait(0, deps=[total, line])
    async_copy.wait_group(0)
    if not WRITES:
        piece = strip + order * strips
        gl.store(own + piece * (K * BN) + tile, total)
        gl.store(own_z + piece * K + thin_row, gl.sum(line, 1))
        gl.store(own_w + piece, factor)
    else:
        if THROUGH:
            gl.store(through + (mine * blocks + block) * pieces + order, gl.sum(met, 0) + gl.sum(met_z, 0))
        if order == pieces - 1:
            gl.store(end + given * (K * V) + at, total)
            if block == 0:
                gl.store(end_z + given * K + thin_row, gl.sum(line, 1))
