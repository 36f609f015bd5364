"""linear_attention's gradients (sweep.py) for a Hopper GPU, in Gluon: bfloat16, heads of 33 to 256 in blocks of a power of two, no marks;
forward: hopper_forward.py. padded.py copies heads whose widths are no multiples of 8.

The same sums, out_i = Σ_j (a_i·b_j + e_i f_j) w_j, cut in the same way; what differs is where things lie. Every operand of a product but
the masked scores is shared memory, into which tokens are copied chunks ahead and where φ is applied in place; only the state, the scores
and the outputs are registers. Sums of f_j b_j or f_j w_j are a product with a thin matrix whose first columns are f, in three bfloat16 that
add up to it: no warp waits for another's sums.
"""

# Gluon, which a checker of Python reads wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton.language as tl

from unisono_torch.kernels.gluon import async_copy, barrier, fence_async_shared, gl, jit, warpgroup_mma, warpgroup_mma_wait


@jit
def _phi(x, MAP: tl.constexpr):
    """As sweep._phi."""
    if MAP == "relu":
        return gl.where(x < 0, 0.0, x)
    if MAP == "elu1":
        return gl.maximum(x + 1, gl.exp2(gl.where(x > 0, 0.0, x) * 1.4426950408889634))
    return x


@jit
def _slope(g, x, MAP: tl.constexpr):
    if MAP == "relu":
        return gl.where(x > 0, g, 0.0)
    if MAP == "elu1":
        return g * gl.exp2(gl.minimum(x, 0.0) * 1.4426950408889634)
    return g


@jit
def _copy(base, t0, end, step, target, live, N: tl.constexpr, C: tl.constexpr, READ: tl.constexpr):
    """live: columns that there are; the others are 0. None: all N."""
    rows = gl.arange(0, C, layout=gl.SliceLayout(1, READ))
    column = gl.arange(0, N, layout=gl.SliceLayout(0, READ))
    at = base + t0.to(gl.int64) * step + (rows[:, None] * step + column[None, :])
    read = ((t0 + rows) < end)[:, None]
    if live is not None:
        read = read & (column < live)[None, :]
    async_copy.async_copy_global_to_shared(target, at, mask=read)


@jit
def _within(x, live, READ: tl.constexpr):
    """x, but 0 from column `live` on; None: all of it."""
    if live is not None:
        column = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, READ))
        x = gl.where((column < live)[None, :], x, gl.zeros_like(x))
    return x


@jit
def _three(x, column):
    """A float32 as three bfloat16 whose sum it is, in columns 0 to 2."""
    high = x.to(gl.bfloat16)
    rest = x - high.to(gl.float32)
    middle = rest.to(gl.bfloat16)
    low = (rest - middle.to(gl.float32)).to(gl.bfloat16)
    return gl.where(column == 0, high, gl.where(column == 1, middle, gl.where(column == 2, low, gl.zeros_like(low))))


@jit
def _map(tile, t0, end, share, live, MAP: tl.constexpr, DIVIDED: tl.constexpr, C: tl.constexpr, READ: tl.constexpr):
    """φ in place, times share where DIVIDED, 0 past the end and from column `live` on."""
    rows = gl.arange(0, C, layout=gl.SliceLayout(1, READ))
    x = _within(_phi(tile.load(READ).to(gl.float32), MAP), live, READ)
    if DIVIDED:
        x = x * share[:, None]
    tile.store(gl.where(((t0 + rows) < end)[:, None], x, 0.0).to(gl.bfloat16))


@jit
def _sweep(
    MODE: tl.constexpr, WRITES: tl.constexpr, a, b, w, x, at, bt, wt, xt, delta, denominator, S, z, out, S_out, z_out, own, own_z,
    s_row, s_column, batch, head, first, order, segments, length, strip, strips, T, H, which,
    LIVE: tl.constexpr, N: tl.constexpr, F: tl.constexpr, M: tl.constexpr, WHOLE: tl.constexpr, ROOM: tl.constexpr, MAP: tl.constexpr,
    C: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """out_i = Σ_j (a_i·b_j + e_i f_j) w_j. a, b of LIVE columns, in M; w and x of BN columns from `first`, of N; out of N, in all blocks
    WHOLE; z of F."""
    BACK: tl.constexpr = MODE == "k" or MODE == "v"
    GROUPS: tl.constexpr = WARPS // 4  # of warps that share a product
    PAIRS: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, C // GROUPS, 16])
    WIDE: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, BN // GROUPS, 16])
    TALL: tl.constexpr = M // 64 if M // 64 < GROUPS else GROUPS  # groups that share the state's rows; the others its columns
    HELD: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [4 * TALL, GROUPS // TALL], [16, BN // (GROUPS // TALL), 16])
    THIN: tl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, 16, 16])
    SPOT: tl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [WARPS, 1], [1, 0])
    READ: tl.constexpr = gl.BlockedLayout([1, 8], [32 // (M // 8), M // 8], [WARPS, 1], [1, 0])
    READ_W: tl.constexpr = gl.BlockedLayout([1, 8], [32 // (BN // 8), BN // 8], [WARPS, 1], [1, 0])
    feature, column = gl.arange(0, M, layout=gl.SliceLayout(1, HELD)), gl.arange(0, BN, layout=gl.SliceLayout(0, HELD))
    thin_row, thin = gl.arange(0, BN, layout=gl.SliceLayout(1, THIN)), gl.arange(0, 16, layout=gl.SliceLayout(0, THIN))
    z_at = first + thin_row
    of_m: tl.constexpr = None if LIVE == M else LIVE  # columns that there are, if not all
    of_n = None if N == WHOLE else N - first
    tile = feature[:, None] * BN + column[None, :]
    given = feature[:, None] * s_row + (first + column)[None, :] * s_column
    held, live = (feature < LIVE)[:, None] & (first + column < N)[None, :], z_at < F
    state = gl.zeros([M, BN], gl.float32, layout=HELD)
    line = gl.zeros([BN, 16], gl.float32, layout=THIN)
    if WRITES:
        state = gl.load(S + given, mask=held, other=0).to(gl.float32)
        if MODE != "v":
            # in column 0, since what comes in lies in three
            line = gl.where(thin[None, :] == 0, gl.load(z + which * F + z_at, mask=live, other=0).to(gl.float32)[:, None], 0.0)
        for j in range(order):
            before = strip + j * strips
            state += gl.load(own + before * (ROOM * BN) + tile)
            if MODE != "v":
                line += gl.where(thin[None, :] == 0, gl.load(own_z + before * ROOM + thin_row)[:, None], 0.0)

    WIDE_S: tl.constexpr = gl.NVMMASharedLayout.get_default_for([C, M], gl.bfloat16)
    NARROW_S: tl.constexpr = gl.NVMMASharedLayout.get_default_for([C, BN], gl.bfloat16)
    THIN_S: tl.constexpr = gl.NVMMASharedLayout.get_default_for([C, 16], gl.bfloat16)
    VECTOR: tl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, M], WIDE_S)
    ws = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, BN], NARROW_S)
    ones = gl.allocate_shared_memory(gl.bfloat16, [C, 16], THIN_S)
    spot_row, spot = gl.arange(0, C, layout=gl.SliceLayout(1, SPOT)), gl.arange(0, 16, layout=gl.SliceLayout(0, SPOT))
    if MODE == "q":
        ones.store(gl.where(spot[None, :] + 0 * spot_row[:, None] == 0, 1.0, 0.0).to(gl.bfloat16))
    if WRITES:
        as_ = gl.allocate_shared_memory(gl.bfloat16, [STAGES, C, M], WIDE_S)
        S_b = gl.allocate_shared_memory(gl.bfloat16, [M, BN], NARROW_S)
        S_b.store(state.to(gl.bfloat16))
        if MODE == "q" or MODE == "k":
            lines = gl.allocate_shared_memory(gl.float32, [BN], VECTOR)
            deltas = gl.allocate_shared_memory(gl.float32, [C], VECTOR)

    low = (segments - 1 - order if BACK else order) * length
    end = gl.minimum(T, low + length)
    chunks = (end - low + C - 1) // C
    for j in gl.static_range(STAGES - 1):
        t0 = low + (chunks - 1 - j if BACK else j) * C
        stop = gl.where(j < chunks, end, -65536)
        _copy(b, t0, stop, bt, bs.index(j), of_m, M, C, READ)
        _copy(w, t0, stop, wt, ws.index(j), of_n, BN, C, READ_W)
        if WRITES:
            _copy(a, t0, stop, at, as_.index(j), of_m, M, C, READ)
        async_copy.commit_group()
    mine_w = gl.arange(0, C, layout=gl.SliceLayout(1, READ_W))
    out_column = gl.arange(0, BN, layout=gl.SliceLayout(0, READ_W))
    rows, others = gl.arange(0, C, layout=gl.SliceLayout(1, PAIRS)), gl.arange(0, C, layout=gl.SliceLayout(0, PAIRS))
    wide_row = gl.arange(0, C, layout=gl.SliceLayout(1, WIDE))
    per_token = (batch * T) * H + head
    SHARE_ROWS: tl.constexpr = READ_W if MODE == "k" else READ
    share_row = gl.arange(0, C, layout=gl.SliceLayout(1, SHARE_ROWS))
    share_next, delta_next = 0.0, 0.0
    t0 = low + (chunks - 1 if BACK else 0) * C
    if MODE != "q":
        share_next = gl.load(denominator + per_token + (t0 + share_row) * H, mask=(t0 + share_row) < end, other=1.0)
    if MODE != "v":
        delta_next = gl.load(delta + per_token + (t0 + spot_row) * H, mask=(t0 + spot_row) < end, other=0.0)
    for i in range(chunks):
        t0 = low + (chunks - 1 - i if BACK else i) * C
        stage = i % STAGES
        b_i, w_i = bs.index(stage), ws.index(stage)
        async_copy.wait_group(STAGES - 2)
        share = share_next
        if MODE != "q":
            share = 1 / share_next
        if MODE == "q":
            if MAP != "none":
                _map(w_i, t0, end, 1.0, of_n, MAP, False, C, READ_W)
        elif MODE == "k":
            _map(w_i, t0, end, share, of_n, MAP, True, C, READ_W)
        else:
            _map(b_i, t0, end, share, of_m, MAP, True, C, READ)
            if MAP != "none" and WRITES:
                _map(as_.index(stage), t0, end, 1.0, of_m, MAP, False, C, READ)
        if MODE == "k":
            ones.store(_three(0.0 * spot[None, :].to(gl.float32) - delta_next[:, None], spot[None, :]))
        if WRITES and (MODE == "q" or MODE == "k"):
            deltas.store(delta_next)
            lines.store(gl.sum(line, 1))
        fence_async_shared()
        if WRITES:
            a_i = as_.index(stage)
            scores = warpgroup_mma(a_i, b_i.permute((1, 0)), gl.zeros([C, C], gl.float32, layout=PAIRS), use_acc=False, is_async=True)
            acc = warpgroup_mma(a_i, S_b, gl.zeros([C, BN], gl.float32, layout=WIDE), use_acc=False, is_async=True)
        state = warpgroup_mma(b_i.permute((1, 0)), w_i, state, is_async=True)
        if MODE != "v":
            line = warpgroup_mma(w_i.permute((1, 0)), ones, line, is_async=True)
        # every warp has passed a barrier since the buffer that is filled now was read
        slot = (i + STAGES - 1) % STAGES
        t1 = t0 - (STAGES - 1) * C if BACK else t0 + (STAGES - 1) * C
        stop = gl.where(i + STAGES - 1 < chunks, end, -65536)
        _copy(b, t1, stop, bt, bs.index(slot), of_m, M, C, READ)
        _copy(w, t1, stop, wt, ws.index(slot), of_n, BN, C, READ_W)
        if WRITES:
            _copy(a, t1, stop, at, as_.index(slot), of_m, M, C, READ)
        async_copy.commit_group()
        t1 = t0 - C if BACK else t0 + C
        stop = gl.where(i + 1 < chunks, end, -65536)
        if MODE != "q":
            share_next = gl.load(denominator + per_token + (t1 + share_row) * H, mask=(t1 + share_row) < stop, other=1.0)
        if MODE != "v":
            delta_next = gl.load(delta + per_token + (t1 + spot_row) * H, mask=(t1 + spot_row) < stop, other=0.0)
        if WRITES:
            written = ((t0 + mine_w) < end)[:, None]
            if of_n is not None:
                written = written & (out_column < of_n)[None, :]
            if MODE == "q":
                share = gl.load(denominator + per_token + (t0 + wide_row) * H, mask=(t0 + wide_row) < end, other=1.0)
            if MODE == "q" or MODE == "k":
                entry = x + t0.to(gl.int64) * xt + (mine_w[:, None] * xt + out_column[None, :])
                entry = gl.load(entry, mask=written, other=0)
            scores = warpgroup_mma_wait(2 if MODE == "v" else 3, deps=[scores])
            if MODE == "q":
                scores -= deltas.load(gl.SliceLayout(1, PAIRS))[:, None]
            elif MODE == "k":
                scores -= deltas.load(gl.SliceLayout(0, PAIRS))[None, :]
            if BACK:
                scores = gl.where(rows[:, None] <= others[None, :], scores, 0.0)
            else:
                scores = gl.where(rows[:, None] >= others[None, :], scores, 0.0)
            pairs = gl.convert_layout(scores.to(gl.bfloat16), gl.DotOperandLayout(0, WIDE, 2))
            acc = warpgroup_mma_wait(1 if MODE == "v" else 2, deps=[acc])
            barrier()  # S_b is overwritten below, which the other warps' products read, too
            acc = warpgroup_mma(pairs, w_i, acc, is_async=True)
            if MODE == "v":
                state = warpgroup_mma_wait(1, deps=[state])
            else:
                state, line = warpgroup_mma_wait(1, deps=[state, line])
            S_b.store(state.to(gl.bfloat16))
            acc = warpgroup_mma_wait(0, deps=[acc])
            if MODE == "q":
                acc = acc - deltas.load(gl.SliceLayout(1, WIDE))[:, None] * lines.load(gl.SliceLayout(0, WIDE))[None, :]
                acc = acc * (1 / share)[:, None]
            elif MODE == "k":
                acc += lines.load(gl.SliceLayout(0, WIDE))[None, :]
            if MAP != "none" and (MODE == "q" or MODE == "k"):
                made = _slope(gl.convert_layout(acc, READ_W), entry.to(gl.float32), MAP).to(gl.bfloat16)
            else:
                made = gl.convert_layout(acc.to(gl.bfloat16), READ_W)
            put = out + ((batch * T + t0) * H + head) * N + first + (mine_w[:, None] * (H * N) + out_column[None, :])
            gl.store(put, made, mask=written)
        elif MODE == "v":
            state = warpgroup_mma_wait(0, deps=[state])
        else:
            state, line = warpgroup_mma_wait(0, deps=[state, line])
    async_copy.wait_group(0)
    total = gl.sum(line, 1)
    if WRITES:
        if order == segments - 1:
            if MODE == "v":
                gl.store(S_out + given, state, mask=held)
            if MODE == "k":
                gl.store(z_out + which * F + z_at, total, mask=live)
    else:
        mine_own = strip + order * strips
        gl.store(own + mine_own * (ROOM * BN) + tile, state)
        gl.store(own_z + mine_own * ROOM + thin_row, total)


@jit(
    do_not_specialize=[
        "T", "H", "batches", "segments", "length", "q0", "q1", "q2", "k0", "k1", "k2", "v0", "v1", "v2", "d0", "d1", "d2",
    ]
)  # fmt: skip
def backward(
    q, k, v, do, delta, denominator, S, z, dS, dz, dq, dk, dv, S_out, z_out, own, own_z, T, H, batches, segments, length,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, d0, d1, d2, UNIT: tl.constexpr, WRITES: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, MAP: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """As sweep.backward; δ = do·o is given."""
    ROOM: tl.constexpr = BK if BK > BV else BV
    of_k: tl.constexpr = BK // BN
    blocks: tl.constexpr = 2 * of_k + BV // BN
    strips = batches * H * blocks
    strip, order = gl.program_id(0) % strips, gl.program_id(0) // strips
    which, kind = (strip // blocks).to(gl.int64), strip % blocks
    strips = strips.to(gl.int64)
    batch, head = which // H, which % H
    q += (batch * q0 + head * q2) * UNIT
    k += (batch * k0 + head * k2) * UNIT
    v += (batch * v0 + head * v2) * UNIT
    do += (batch * d0 + head * d2) * UNIT
    S += which * (K * V)
    dS += which * (K * V)
    S_out += which * (K * V)
    qt, kt, vt, dt = q1 * UNIT, k1 * UNIT, v1 * UNIT, d1 * UNIT
    if kind < of_k:
        first = kind * BN
        _sweep(
            "q", WRITES, do, v, k + first, q + first, dt, vt, kt, qt, delta, denominator, S, z, dq, S_out, z_out, own, own_z,
            1, V, batch, head, first, order, segments, length, strip, strips, T, H, which, V, K, K, BV, BK, ROOM, MAP, C, BN, STAGES, WARPS,
        )  # fmt: skip
    elif kind < 2 * of_k:
        first = (kind - of_k) * BN
        _sweep(
            "k", WRITES, v, do, q + first, k + first, vt, dt, qt, kt, delta, denominator, dS, dz, dk, S_out, z_out, own, own_z,
            1, V, batch, head, first, order, segments, length, strip, strips, T, H, which, V, K, K, BV, BK, ROOM, MAP, C, BN, STAGES, WARPS,
        )  # fmt: skip
    else:
        first = (kind - 2 * of_k) * BN
        _sweep(
            "v", WRITES, k, q, do + first, None, kt, qt, dt, 0, delta, denominator, dS, dz, dv, S_out, z_out, own, own_z,
            V, 1, batch, head, first, order, segments, length, strip, strips, T, H, which, K, V, K, BK, BV, ROOM, MAP, C, BN, STAGES, WARPS,
        )  # fmt: skip
