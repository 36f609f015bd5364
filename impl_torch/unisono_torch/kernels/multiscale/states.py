"""The states of every scale before each segment, or, from the last token to the first, their gradients after each.

S ← λ(segment) S + Σ_t (x_t)(c_t y_t)ᵀ [K, V],  z ← λ(segment) z + Σ_t d_t x'_t [K]: of keys and values weighed by what fades until the
segment's end; back, of queries and gradients do weighed by c/D and what has faded since its beginning. A program owns some columns of one
scale of one head. Where there are few, time is cut into pieces: a launch without outputs leaves what each adds.
"""

# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from unisono_torch.kernels.multiscale.functions import narrow, reads, tokens
from unisono_torch.kernels.multiscale.functions import state as state_of


@triton.jit(
    do_not_specialize=[
        "T", "H", "batches", "segments", "pieces", "each", "x0", "x1", "x2", "y0", "y1", "y2", "n0", "n1", "n2", "w0", "c0", "c1",
    ]
)  # fmt: skip
def states(
    x, y, x_norm, valid, weight, weight_norm, whole, start, start_z, kept, kept_z, end, end_z, before, before_z, through, own, own_z, own_w,
    T, H, batches, segments, pieces, each, x0, x1, x2, y0, y1, y2, n0, n1, n2, w0, c0, c1, UNIT: tl.constexpr, WRITES: tl.constexpr,
    BACK: tl.constexpr, SAME: tl.constexpr, THROUGH: tl.constexpr, HAS_VALID: tl.constexpr, M: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, C: tl.constexpr, NB: tl.constexpr,
    DOT: tl.constexpr, TF32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x, x_norm [B, T, H, K] and y [B, T, H, V] with strides in UNITs; weight, weight_norm […, M, N·L] with strides c0, c1.

    kept [B, H, M, N, K, V], kept_z [B, H, M, N, K]; before: those of the way forward, where BACK and THROUGH ask for what whole's
    gradient is [blocks, B, H, M, N].
    """
    L: tl.constexpr = C * NB
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    blocks: tl.constexpr = (V + BN - 1) // BN
    strips = batches * H * M * blocks
    strip, order = tl.program_id(0) % strips, tl.program_id(0) // strips
    block, s = strip % blocks, (strip // blocks) % M
    head, batch = ((strip // blocks // M) % H).to(tl.int64), (strip // blocks // M // H).to(tl.int64)
    strips = strips.to(tl.int64)
    rows, feature, column = tl.arange(0, C), tl.arange(0, BK), block * BN + tl.arange(0, BN)
    x += (batch * x0 + head * x2) * UNIT
    y += (batch * y0 + head * y2) * UNIT
    if not SAME:
        x_norm += (batch * n0 + head * n2) * UNIT
    weight += batch * c0 + head * c1 + s * (segments * L).to(tl.int64)
    weight_norm += batch * c0 + head * c1 + s * (segments * L).to(tl.int64)
    whole += batch * w0 + s * segments
    mine = (batch * H + head) * M + s  # among kept and before
    given = (batch * M + s) * H + head  # among start and end

    held = (feature < K)[:, None] & (column < V)[None, :]
    at = feature[:, None] * V + column[None, :]
    tile = tl.arange(0, BK)[:, None] * BN + tl.arange(0, BN)[None, :]
    total, line, factor = tl.zeros((BK, BN), tl.float32), tl.zeros((BK,), tl.float32), tl.full((), 1.0, tl.float32)
    if WRITES:
        total = tl.load(start + given * (K * V) + at, mask=held, other=0).to(tl.float32)
        line = tl.load(start_z + given * K + feature, mask=feature < K, other=0).to(tl.float32)
        for j in range(order):
            piece = strip + j * strips
            w = tl.load(own_w + piece)
            total = total * w + tl.load(own + piece * (BK * BN) + tile)
            line = line * w + tl.load(own_z + piece * BK + tl.arange(0, BK))
    low = (pieces - 1 - order if BACK else order) * each
    count = tl.minimum(each, segments - low)
    for i in tl.range(0, count, num_stages=STAGES):
        n = low + (count - 1 - i if BACK else i)
        w = tl.load(whole + n)
        if WRITES:
            tl.store(kept + (mine * segments + n) * (K * V) + at, narrow(total, DOT, TF32), mask=held)
            if block == 0:
                tl.store(kept_z + (mine * segments + n) * K + feature, line, mask=feature < K)
            if THROUGH:
                met = tl.sum(total * state_of(before + (mine * segments + n) * (K * V), feature, column, K, V).to(tl.float32))
                if block == 0:
                    met += tl.sum(line * tl.load(before_z + (mine * segments + n) * K + feature, mask=feature < K, other=0))
                tl.store(through + (block * batches * H * M + mine) * segments + n, w * met)
        total, line, factor = total * w, line * w, factor * w
        for part in tl.static_range(NB):
            t0 = n * L + part * C
            _, live = reads(t0, rows, T, valid, batch, HAS_VALID)
            a = tokens(x, t0, rows, x1 * UNIT, feature, live, K, DOT)
            b = tokens(y, t0, rows, y1 * UNIT, column, live, V, tl.float32)
            b = narrow(b * tl.load(weight + t0 + rows)[:, None], DOT, TF32)
            total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
            if block == 0:
                f = tl.load(weight_norm + t0 + rows)
                if SAME:
                    line += tl.sum(a.to(tl.float32) * f[:, None], 0)
                else:
                    line += tl.sum(tokens(x_norm, t0, rows, n1 * UNIT, feature, live, K, tl.float32) * f[:, None], 0)
    if not WRITES:
        piece = strip + order * strips
        tl.store(own + piece * (BK * BN) + tile, total)
        tl.store(own_z + piece * BK + tl.arange(0, BK), line)
        tl.store(own_w + piece, factor)
    elif order == pieces - 1:
        tl.store(end + given * (K * V) + at, total, mask=held)
        if block == 0:
            tl.store(end_z + given * K + feature, line, mask=feature < K)
