"""Softmax attention over a window: blocks of queries meet the blocks of keys in their band, where they lie (Dao et al. 2022).

Tokens of the sequence are numbered from 0, carried keys −w to −1; those that a sequence has not are never read. Products in base 2.
Backward, by queries and by keys, the weights are made again from the logarithm of each query's sum.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

_COUNTS = ["T", "H", *(f"{letter}{i}" for letter in "qkvd" for i in range(3))]


@triton.jit
def _load(base, t0, step, T, rows, width: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens t0 + rows of one head [rows, BLOCK]; 0 where there is none."""
    column = tl.arange(0, BLOCK)
    mask = (t0 + rows < T)[:, None] & (column < width)[None, :]
    return tl.load(base + (t0 + rows).to(tl.int64)[:, None] * step + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, t0, step, T, rows, x, width: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = (t0 + rows < T)[:, None] & (column < width)[None, :]
    at = base + (t0 + rows).to(tl.int64)[:, None] * step + column[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _segment(segment, t0, rows, T, HAS_SEGMENT: tl.constexpr, CARRIED: tl.constexpr):
    """The sequence of each token; carried ones are of the first."""
    zero = 0 * rows
    if HAS_SEGMENT and not CARRIED:
        return tl.load(segment + t0 + rows, mask=t0 + rows < T, other=0)
    return zero


@triton.jit
def _reads(t, j, of_t, of_j, held, W: tl.constexpr, HAS_SEGMENT: tl.constexpr, CARRIED: tl.constexpr):
    """Whether queries t read keys j, which broadcast."""
    reads = (j <= t) & (j > t - W)
    if CARRIED:
        reads = reads & (j >= -held) & (j < 0)
    if HAS_SEGMENT:
        reads = reads & (of_t == of_j)
    return reads


@triton.jit
def _met(q, m, total, acc, k, v, j0, k1, v1, T, t, of_t, segment, held, scale, W: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
         BK: tl.constexpr, BV: tl.constexpr, N: tl.constexpr, HAS_SEGMENT: tl.constexpr, CARRIED: tl.constexpr,
         DOT: tl.constexpr):  # fmt: skip
    """Largest score, sum of weights and weighted values, with a block of keys more."""
    rows = tl.arange(0, N)
    shift = W if CARRIED else 0  # carried keys lie from 0 on
    end = W if CARRIED else T
    keys = _load(k, j0 + shift, k1, end, rows, K, BK).to(DOT)
    values = _load(v, j0 + shift, v1, end, rows, V, BV).to(DOT)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    of_j = _segment(segment, j0, rows, T, HAS_SEGMENT, CARRIED)
    reads = _reads(t[:, None], (j0 + rows)[None, :], of_t[:, None], of_j[None, :], held, W, HAS_SEGMENT, CARRIED)
    scores = tl.where(reads, scores, -float("inf"))
    most = tl.maximum(m, tl.max(scores, 1))
    from_here = tl.where(most == -float("inf"), 0.0, most)
    weight, kept = tl.exp2(scores - from_here[:, None]), tl.exp2(m - from_here)
    acc = tl.dot(weight.to(DOT), values, acc * kept[:, None], input_precision="ieee")
    return most, total * kept + tl.sum(weight, 1), acc


@triton.jit(do_not_specialize=_COUNTS)
def forward(
    q, k, v, keys, values, count, segment, o, log_sum, T, H, q0, q1, q2, k0, k1, k2, v0, v1, v2, scale, UNIT: tl.constexpr,
    W: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_SEGMENT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """o [B, T, H, V] and log₂ of each query's sum [B, H, T]. keys and values [B, w, H, ·] contiguous, count [B], segment [B, T]."""
    blocks = tl.cdiv(T, M)
    t0, which = (tl.program_id(0) % blocks) * M, (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = which // H, which % H
    q += (batch * q0 + head * q2) * UNIT
    k += (batch * k0 + head * k2) * UNIT
    v += (batch * v0 + head * v2) * UNIT
    if HAS_SEGMENT:
        segment += batch * T
    held = tl.load(count + batch)
    rows = tl.arange(0, M)
    t = t0 + rows
    mine = _load(q, t0, q1 * UNIT, T, rows, K, BK).to(DOT)
    of_t = _segment(segment, t0, rows, T, HAS_SEGMENT, False)
    m, total = tl.full([M], -float("inf"), tl.float32), tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BV], tl.float32)
    for j0 in range(tl.maximum(t0 - W + 1, 0) // N * N, t0 + M, N):
        m, total, acc = _met(
            mine, m, total, acc, k, v, j0, k1 * UNIT, v1 * UNIT, T, t, of_t, segment, held, scale, W, K, V, BK, BV, N, HAS_SEGMENT,
            False, DOT,
        )  # fmt: skip
    for j0 in range(t0 - W + 1, 0, N):
        m, total, acc = _met(
            mine, m, total, acc, keys + (batch * W * H + head) * K, values + (batch * W * H + head) * V, j0, H * K, H * V, T, t, of_t,
            segment, held, scale, W, K, V, BK, BV, N, HAS_SEGMENT, True, DOT,
        )  # fmt: skip
    _store(o + (batch * T * H + head) * V, t0, H * V, T, rows, acc / total[:, None], V, BV)
    tl.store(log_sum + which * T + t, m + tl.log2(total), mask=t < T)


@triton.jit
def _of_query(dq, q, do, delta, log_sum, k, v, j0, k1, v1, T, t, of_t, segment, held, scale, W: tl.constexpr, K: tl.constexpr,
              V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, N: tl.constexpr, HAS_SEGMENT: tl.constexpr, CARRIED: tl.constexpr,
              DOT: tl.constexpr):  # fmt: skip
    rows = tl.arange(0, N)
    shift = W if CARRIED else 0
    end = W if CARRIED else T
    keys = _load(k, j0 + shift, k1, end, rows, K, BK).to(DOT)
    values = _load(v, j0 + shift, v1, end, rows, V, BV).to(DOT)
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    of_j = _segment(segment, j0, rows, T, HAS_SEGMENT, CARRIED)
    reads = _reads(t[:, None], (j0 + rows)[None, :], of_t[:, None], of_j[None, :], held, W, HAS_SEGMENT, CARRIED)
    weight = tl.exp2(tl.where(reads, scores - log_sum[:, None], -float("inf")))
    slope = weight * (tl.dot(do, tl.trans(values), input_precision="ieee") - delta[:, None])
    return tl.dot(slope.to(DOT), keys, dq, input_precision="ieee")


@triton.jit(do_not_specialize=_COUNTS)
def of_queries(
    q, k, v, do, keys, values, count, segment, o, log_sum, delta, dq, T, H, q0, q1, q2, k0, k1, k2, v0, v1, v2, d0, d1, d2, scale,
    UNIT: tl.constexpr, W: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, HAS_SEGMENT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """q's gradient [B, T, H, K], and do·o [B, H, T]."""
    blocks = tl.cdiv(T, M)
    t0, which = (tl.program_id(0) % blocks) * M, (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = which // H, which % H
    q += (batch * q0 + head * q2) * UNIT
    k += (batch * k0 + head * k2) * UNIT
    v += (batch * v0 + head * v2) * UNIT
    do += (batch * d0 + head * d2) * UNIT
    if HAS_SEGMENT:
        segment += batch * T
    held = tl.load(count + batch)
    rows = tl.arange(0, M)
    t = t0 + rows
    mine = _load(q, t0, q1 * UNIT, T, rows, K, BK).to(DOT)
    upstream = _load(do, t0, d1 * UNIT, T, rows, V, BV)
    met = tl.sum(upstream.to(tl.float32) * _load(o + (batch * T * H + head) * V, t0, H * V, T, rows, V, BV).to(tl.float32), 1)
    tl.store(delta + which * T + t, met, mask=t < T)
    upstream = upstream.to(DOT)
    logs = tl.load(log_sum + which * T + t, mask=t < T, other=float("inf"))
    of_t = _segment(segment, t0, rows, T, HAS_SEGMENT, False)
    acc = tl.zeros([M, BK], tl.float32)
    for j0 in range(tl.maximum(t0 - W + 1, 0) // N * N, t0 + M, N):
        acc = _of_query(
            acc, mine, upstream, met, logs, k, v, j0, k1 * UNIT, v1 * UNIT, T, t, of_t, segment, held, scale, W, K, V, BK, BV, N,
            HAS_SEGMENT, False, DOT,
        )  # fmt: skip
    for j0 in range(t0 - W + 1, 0, N):
        acc = _of_query(
            acc, mine, upstream, met, logs, keys + (batch * W * H + head) * K, values + (batch * W * H + head) * V, j0, H * K, H * V, T,
            t, of_t, segment, held, scale, W, K, V, BK, BV, N, HAS_SEGMENT, True, DOT,
        )  # fmt: skip
    _store(dq + (batch * T * H + head) * K, t0, H * K, T, rows, acc * (scale * 0.6931471805599453), K, BK)


@triton.jit(do_not_specialize=_COUNTS)
def of_keys(
    q, k, v, do, count, segment, log_sum, delta, dk, dv, T, H, q0, q1, q2, k0, k1, k2, v0, v1, v2, d0, d1, d2, scale,
    UNIT: tl.constexpr, W: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, HAS_SEGMENT: tl.constexpr, CARRIED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values [B, T, H, ·], or of the CARRIED ones [B, w, H, ·]: those are k and v then."""
    tokens = W if CARRIED else T
    blocks = tl.cdiv(tokens, N)
    at, which = (tl.program_id(0) % blocks) * N, (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = which // H, which % H
    q += (batch * q0 + head * q2) * UNIT
    do += (batch * d0 + head * d2) * UNIT
    if HAS_SEGMENT:
        segment += batch * T
    k += batch * k0 * UNIT + head * k2 * UNIT
    v += batch * v0 * UNIT + head * v2 * UNIT
    held = tl.load(count + batch)
    rows, others = tl.arange(0, N), tl.arange(0, M)
    j0 = at - W if CARRIED else at
    keys = _load(k, at, k1 * UNIT, tokens, rows, K, BK).to(DOT)
    values = _load(v, at, v1 * UNIT, tokens, rows, V, BV).to(DOT)
    of_j = _segment(segment, j0, rows, T, HAS_SEGMENT, CARRIED)
    acc, acc_v = tl.zeros([N, BK], tl.float32), tl.zeros([N, BV], tl.float32)
    for t0 in range(tl.maximum(j0, 0) // M * M, tl.minimum(j0 + N + W - 1, T), M):
        query = _load(q, t0, q1 * UNIT, T, others, K, BK).to(DOT)
        upstream = _load(do, t0, d1 * UNIT, T, others, V, BV).to(DOT)
        t = t0 + others
        logs = tl.load(log_sum + which * T + t, mask=t < T, other=float("inf"))
        met = tl.load(delta + which * T + t, mask=t < T, other=0.0)
        of_t = _segment(segment, t0, others, T, HAS_SEGMENT, False)
        reads = _reads(t[None, :], (j0 + rows)[:, None], of_t[None, :], of_j[:, None], held, W, HAS_SEGMENT, CARRIED)
        scores = tl.dot(keys, tl.trans(query), input_precision="ieee") * scale
        weight = tl.exp2(tl.where(reads, scores - logs[None, :], -float("inf")))
        acc_v = tl.dot(weight.to(DOT), upstream, acc_v, input_precision="ieee")
        slope = weight * (tl.dot(values, tl.trans(upstream), input_precision="ieee") - met[None, :])
        acc = tl.dot(slope.to(DOT), query, acc, input_precision="ieee")
    _store(dk + (batch * tokens * H + head) * K, at, H * K, tokens, rows, acc * (scale * 0.6931471805599453), K, BK)
    _store(dv + (batch * tokens * H + head) * V, at, H * V, tokens, rows, acc_v, V, BV)
