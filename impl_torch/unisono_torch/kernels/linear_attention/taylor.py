"""The sweeps of linear attention (sweep.py) for taylor2: heads of K ≤ 16 whose φ(q)·φ(k) is p(s) = 1 + s + s²/2 of s = q·k / √K.

Inside a chunk p is taken of a product that is K wide, and its gradient is p'(s) = 1 + s. Features are made for the states alone. Those
of memory are 1 + K + K², which say x_a x_b twice. Those of registers say it once, of x filled up to 16 entries: x_a x_(a+d), d ≤ 8 and
indices modulo 16, d after d, then x, then 1; 161 of them, in three blocks of 64. Those of 0 < d < 8 are times √2, so that products of
features are the same. Entries are brought to features by products with matrices of zeros and ones, which are exact, and gradients by
features brought back so.

A program sweeps over a head's tokens with a block of its state in registers and leaves in memory what it was before each stretch of
EVERY tokens: from the first token for o and the gradient of q, from the last for those of k and v. What a chunk gives is made by
programs of their own, of the tokens of its stretch pair by pair and of that state. A program owns BN columns of values: gradients of q
and k are sums over those, and its first also has what comes of the normaliser.
"""

# Triton's own language, which a checker of Python reads wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from unisono_torch.kernels.linear_attention.sweep import _load, _narrow
from unisono_torch.kernels.linear_attention.table import WIDTH, features

X = tl.constexpr(WIDTH)
F = tl.constexpr(features(WIDTH))
PARTS = tl.constexpr(3)  # blocks of 64 features


@triton.jit
def _pair(feature):
    """Which two of what _with_one loads a feature multiplies."""
    left = tl.where(feature < F - 1, feature % X, X)
    right = tl.where(feature < F - 1 - X, (left + feature // X) % X, X)
    return tl.where(feature < F, left, X + 1), tl.where(feature < F, right, X + 1)


@triton.jit
def _factor(feature, ROOT: tl.constexpr):
    """What makes a feature of such a product; ROOT: K^−¼."""
    d = feature // X
    # unless a pair is of an entry with itself, or comes again as (a + 8, a), it stands for both its orders
    pair = tl.where((d == 0) | (2 * d == X), 0.7071067811865476, 1.0) * (ROOT * ROOT)
    return tl.where(feature < F - 1 - X, pair, tl.where(feature < F - 1, ROOT, 1.0))


@triton.jit
def _with_one(base, t0, rows, step, live, K: tl.constexpr, DOT: tl.constexpr):
    """x of a chunk's live tokens, a 1 in column X, and zeros, [C, 2X]; of others zeros alone."""
    place = tl.arange(0, 2 * X)
    x = _load(base, t0, rows, step, place, live[:, None] & (place < K)[None, :]).to(DOT)
    return x + (live[:, None] & (place == X)[None, :]).to(DOT)


@triton.jit
def _entries(x, which, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Columns `which` [64] of x, [C, 64] in float32."""
    chosen = (tl.arange(0, 2 * X)[:, None] == which[None, :]).to(DOT)
    return tl.dot(x, chosen, input_precision=PRECISION)


@triton.jit
def _read(feature, x, state, line, acc, past, DOT: tl.constexpr, TF32: tl.constexpr, PRECISION: tl.constexpr):
    """acc [C, BN] and past [C] with what a block's features of x read of what is kept of the state [64, BN] and the line [64]."""
    left, right = _pair(feature)
    phi = _entries(x, left, DOT, PRECISION) * _entries(x, right, DOT, PRECISION)
    acc = tl.dot(_narrow(phi, DOT, TF32), state, acc, input_precision=PRECISION)
    return acc, past + tl.sum(phi * line[None, :], 1)


@triton.jit
def _slope(feature, w, x, state, line, by_line, dx, DOT: tl.constexpr, TF32: tl.constexpr, PRECISION: tl.constexpr):
    """dx [C, X] with what comes of what is kept of a block's state, read by w [C, BN], and of its line, times by_line [C]."""
    left, right = _pair(feature)
    g = tl.dot(w, tl.trans(state), input_precision=PRECISION) + by_line[:, None] * line[None, :]
    entry = tl.arange(0, X)[None, :]
    by_left = _narrow(g * _entries(x, right, DOT, PRECISION), DOT, TF32)
    dx = tl.dot(by_left, (left[:, None] == entry).to(DOT), dx, input_precision=PRECISION)
    by_right = _narrow(g * _entries(x, left, DOT, PRECISION), DOT, TF32)
    return tl.dot(by_right, (right[:, None] == entry).to(DOT), dx, input_precision=PRECISION)


@triton.jit
def _entries_alone(x, which, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """_entries of x [C, X], 1 where `which` is X."""
    chosen = (tl.arange(0, X)[:, None] == which[None, :]).to(DOT)
    return tl.dot(x, chosen, input_precision=PRECISION) + tl.where(which == X, 1.0, 0.0)[None, :]


# Triton 3.6 miscompiles _slope for the gradient of q, with 4 warps and 64 tokens on an H200: wrong by 0.4 of its norm against float64,
# and illegal accesses with the loop over blocks unrolled. This, of x 16 wide and unrolled, was right with every cut tried.
@triton.jit
def _slope_of_q(feature, w, x, state, line, by_line, seen, dx, ROOT: tl.constexpr, DOT: tl.constexpr, TF32: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """_slope of x [C, X], of a state that is kept with one of two factors."""
    g = tl.dot(w, tl.trans(_narrow(state, DOT, TF32)), input_precision=PRECISION) + by_line[:, None] * line[None, :]
    g = tl.where(seen[:, None], g, 0.0)
    left, right = _pair(feature)
    g = g * _factor(feature, ROOT)[None, :]
    entry = tl.arange(0, X)[None, :]
    by_left = _narrow(g * _entries_alone(x, right, DOT, PRECISION), DOT, TF32)
    dx = tl.dot(by_left, (left[:, None] == entry).to(DOT), dx, input_precision=PRECISION)
    by_right = _narrow(g * _entries_alone(x, left, DOT, PRECISION), DOT, TF32)
    return tl.dot(by_right, (right[:, None] == entry).to(DOT), dx, input_precision=PRECISION)


@triton.jit
def _add(feature, x, w, share, keeps, state, line, DOT: tl.constexpr, TF32: tl.constexpr, PRECISION: tl.constexpr):
    """A block's state and line after a chunk, whose tokens' line has their products of x [C, 2X] times share [C]; features are [64, C],
    which a product with a state takes from registers."""
    left, right = _pair(feature)
    entry = tl.arange(0, 2 * X)[None, :]
    by_left = tl.dot((left[:, None] == entry).to(DOT), tl.trans(x), input_precision=PRECISION)
    phi = by_left * tl.dot((right[:, None] == entry).to(DOT), tl.trans(x), input_precision=PRECISION)
    state, line = tl.where(keeps, state, 0.0), tl.where(keeps, line, 0.0)
    state = tl.dot(_narrow(phi, DOT, TF32), w, state, input_precision=PRECISION)
    return state, line + tl.sum(phi * share[None, :], 1)


@triton.jit
def _places(feature, K: tl.constexpr):
    """Of a state of 1 + K + K² features: a feature's row, that of the pair's other order, whether it stands for both, and whether it is
    there."""
    d, left = feature // X, feature % X
    pair, right = feature < F - 1 - X, (left + d) % X
    row = tl.where(pair, 1 + K + left * K + right, tl.where(feature < F - 1, 1 + left, 0))
    there = tl.where(feature < F - 1, (left < K) & ((right < K) | (feature >= F - 1 - X)), feature < F)
    return row, 1 + K + right * K + left, pair & (d > 0) & (2 * d < X), there


@triton.jit
def _given(feature, base, base_z, column, V, K: tl.constexpr):
    """A block's state and line of what is given, which says pairs in both orders and has features' factors."""
    row, other, twice, there = _places(feature, K)
    held = there[:, None] & (column < V)[None, :]
    state = tl.load(base + row[:, None] * V + column[None, :], mask=held, other=0.0)
    again = tl.load(base + other[:, None] * V + column[None, :], mask=held & twice[:, None], other=0.0)
    line = tl.load(base_z + row, mask=there, other=0.0)
    line_again = tl.load(base_z + other, mask=there & twice, other=0.0)
    share = tl.where(twice, 0.7071067811865476, 1.0) / _factor(feature, K**-0.25)
    return (state + again) * share[:, None], (line + line_again) * share


@triton.jit
def _store(feature, state, line, base, base_z, out, out_z, column, mask, first, kept, V, K: tl.constexpr):
    """A block's state and line into rows of 1 + K + K². What was given of a pair in one order and not in the other nobody reads, and
    nothing adds to: kept says whether no reset came."""
    row, other, twice, there = _places(feature, K)
    at, at_other = row[:, None] * V + column[None, :], other[:, None] * V + column[None, :]
    held = there[:, None] & (column < V)[None, :] & mask
    both = held & twice[:, None]
    unread = (tl.load(base + at, mask=both & kept, other=0.0) - tl.load(base + at_other, mask=both & kept, other=0.0)) * 0.5
    share = tl.where(twice, 0.7071067811865476, 1.0) * _factor(feature, K**-0.25)
    state, line = state * share[:, None], line * share
    tl.store(out + at, state + unread, mask=held)
    tl.store(out + at_other, state - unread, mask=both)
    held_z = there & mask & (first == 0)
    both_z = held_z & twice
    unread_z = (tl.load(base_z + row, mask=both_z & kept, other=0.0) - tl.load(base_z + other, mask=both_z & kept, other=0.0)) * 0.5
    tl.store(out_z + row, line + unread_z, mask=held_z)
    tl.store(out_z + other, line - unread_z, mask=both_z)


@triton.jit
def _before(feature, S, z, own, own_z, cuts, column, order, strip, strips, V, WRITES: tl.constexpr, HAS_RESET: tl.constexpr,
            K: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """A block's state and line before a segment: what is given and what the segments before it add; without WRITES, 0."""
    state, line = tl.zeros((64, BN), tl.float32), tl.zeros((64,), tl.float32)
    if WRITES:
        state, line = _given(feature, S, z, column, V, K)
        for j in range(order):
            before = strip + j * strips
            if HAS_RESET:
                cut = tl.load(cuts + before) != 0
                state, line = tl.where(cut, 0.0, state), tl.where(cut, 0.0, line)
            state += tl.load(own + before * (64 * BN) + tl.arange(0, 64)[:, None] * BN + tl.arange(0, BN)[None, :])
            line += tl.load(own_z + before * 64 + tl.arange(0, 64))
    return state, line


@triton.jit
def _after(feature, state, line, S, z, S_out, z_out, own, own_z, column, mine, ends, first, kept, V, WRITES: tl.constexpr,
           K: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """ends: whether this is the last segment, whose state is what comes out."""
    if WRITES:
        _store(feature, state, line, S, z, S_out, z_out, column, ends, first, kept, V, K)
    else:
        tl.store(own + mine * (64 * BN) + tl.arange(0, 64)[:, None] * BN + tl.arange(0, BN)[None, :], state)
        tl.store(own_z + mine * 64 + tl.arange(0, 64), line)


@triton.jit
def _keep(feature, state, line, states, lines, column, first, MODE: tl.constexpr, ROOT: tl.constexpr, WIDE: tl.constexpr):
    """A block's state and line into states [PARTS · 64, WIDE] and lines [PARTS · 64], with factors of both sides; of "q" with the keys'."""
    factor = _factor(feature, ROOT)
    if MODE != "q":
        factor = factor * factor
    kept = (state * factor[:, None]).to(states.dtype.element_ty)
    tl.store(states + feature[:, None] * WIDE + column[None, :], kept, mask=(column < WIDE)[None, :])
    tl.store(lines + feature, line * factor, mask=first == 0)


@triton.jit
def _sweep(
    MODE: tl.constexpr, WRITES: tl.constexpr, q, k, v, do, delta_at, denominator, reset, valid, S, z, states, lines, S_out, z_out, own,
    own_z, cuts, qt, kt, vt, dt, batch, head, first, feature, order, segments, length, strip, strips, T, H, K: tl.constexpr,
    V: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr, DOT: tl.constexpr, TF32: tl.constexpr, C: tl.constexpr,
    BN: tl.constexpr, EVERY: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The states that "o" reads, or the gradient of "q", or those of "k" and v. WRITES: BN columns from `first` of those before each
    stretch, and of the last; without it what a segment adds to the state."""
    BACK: tl.constexpr = MODE == "k"
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    ROOT: tl.constexpr = K**-0.25
    rows, column = tl.arange(0, C), first + tl.arange(0, BN)
    rows_of: tl.constexpr = 1 + K + K * K
    which = batch * H + head  # of the heads
    S, z = S + which * (rows_of * V), z + which * rows_of
    if MODE != "q":
        S_out, z_out = S_out + which * (rows_of * V), z_out + which * rows_of
    state, line = _before(feature, S, z, own, own_z, cuts, column, order, strip, strips, V, WRITES, HAS_RESET, K, BN)
    cut_any, cut_before = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    if HAS_RESET and WRITES:
        for j in range(order):
            cut_before = tl.maximum(cut_before, tl.load(cuts + strip + j * strips))
    low = (segments - 1 - order if BACK else order) * length
    chunks = tl.cdiv(tl.minimum(length, T - low), C)
    for i in tl.range(0, chunks, num_stages=STAGES):
        t0 = low + (chunks - 1 - i if BACK else i) * C
        here = t0 + rows < T
        live, token = here, batch * T + t0
        if HAS_VALID:
            live = here & (tl.load(valid + token + rows, mask=here, other=0) != 0)
        goes, keeps = live, True
        if HAS_RESET:
            segment = tl.cumsum(tl.load(reset + token + rows, mask=here, other=0).to(tl.int32), 0)
            last = tl.max(segment, 0)
            goes, keeps = live & (segment == (0 if BACK else last)), last == 0
            cut_any = tl.maximum(cut_any, last)
        within = live[:, None] & (column < V)[None, :]
        if BACK:
            x, w = _with_one(q, t0, rows, qt, goes, K, DOT), _load(do, t0, rows, dt, column, within).to(tl.float32)
            share = 1 / tl.load(denominator + (token + rows) * H + head, mask=live, other=1.0)
            w = _narrow(w * share[:, None], DOT, TF32)
            # of the normaliser, once
            each = -tl.load(delta_at + (token + rows) * H + head, mask=live & (first == 0), other=0.0) * share
        else:
            x, w = _with_one(k, t0, rows, kt, goes, K, DOT), _load(v, t0, rows, vt, column, within).to(DOT)
            each = tl.full((C,), 1.0, tl.float32)
        if WRITES:
            edge = ((t0 + C) % EVERY == 0) | (t0 + C >= T) if BACK else t0 % EVERY == 0
            if edge:
                at = which * tl.cdiv(T, EVERY) + t0 // EVERY
                to, to_line = states + at * (PARTS * 64 * WIDE), lines + at * (PARTS * 64)
                _keep(feature, state, line, to, to_line, column, first, MODE, ROOT, WIDE)
        state, line = _add(feature, x, w, each, keeps, state, line, DOT, TF32, PRECISION)
    mine, ends, kept = strip + order * strips, order == segments - 1, tl.maximum(cut_any, cut_before) == 0
    if not WRITES:
        tl.store(cuts + mine, cut_any)
    if MODE != "q" or not WRITES:
        _after(feature, state, line, S, z, S_out, z_out, own, own_z, column, mine, ends, first, kept, V, WRITES, K, BN)


@triton.jit(
    do_not_specialize=[
        "T", "H", "batches", "segments", "length", "q0", "q1", "q2", "k0", "k1", "k2", "v0", "v1", "v2", "d0", "d1", "d2",
    ]
)  # fmt: skip
def sweeps(
    q, k, v, delta, do, denominator, reset, valid, S, z, states, lines, S_out, z_out, own, own_z, cuts, T, H, batches, segments, length,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, d0, d1, d2, UNIT: tl.constexpr, MODE: tl.constexpr, WRITES: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr, DOT: tl.constexpr, TF32: tl.constexpr, C: tl.constexpr,
    BN: tl.constexpr, EVERY: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """states [B · H, ⌈T / EVERY⌉, PARTS · 64, WIDE], lines without WIDE, and, but for "q", the final state; of "k" S and z are dS and dz.
    Strides q0 (batch), q1 (time), q2 (head) count UNITs."""
    blocks: tl.constexpr = (V + BN - 1) // BN
    strips = batches * H * blocks * PARTS
    strip, order = tl.program_id(0) % strips, tl.program_id(0) // strips
    feature = strip % PARTS * 64 + tl.arange(0, 64)
    which, first = strip // (PARTS * blocks), strip // PARTS % blocks * BN
    strips = strips.to(tl.int64)
    batch, head = (which // H).to(tl.int64), (which % H).to(tl.int64)
    if MODE == "k":
        q, do = q + (batch * q0 + head * q2) * UNIT, do + (batch * d0 + head * d2) * UNIT
    else:
        k, v = k + (batch * k0 + head * k2) * UNIT, v + (batch * v0 + head * v2) * UNIT
    _sweep(
        MODE, WRITES, q, k, v, do, delta, denominator, reset, valid, S, z, states, lines, S_out, z_out, own, own_z, cuts, q1 * UNIT,
        k1 * UNIT, v1 * UNIT, d1 * UNIT, batch, head, first, feature, order, segments, length, strip, strips, T, H, K, V, HAS_RESET,
        HAS_VALID, DOT, TF32, C, BN, EVERY, WIDE, STAGES,
    )  # fmt: skip


@triton.jit
def _resets(reset, token, t0, begin, rows, T, here, EVERY: tl.constexpr):
    """How many resets the stretch from `begin` has up to each token of the chunk from t0, itself included."""
    stretch = tl.arange(0, EVERY)
    before = tl.load(reset + token + begin + stretch, mask=begin + stretch < t0, other=0).to(tl.int32)
    return tl.cumsum(tl.load(reset + token + t0 + rows, mask=here, other=0).to(tl.int32), 0) + tl.sum(before, 0)


@triton.jit
def _kept(feature, states, lines, column, WIDE: tl.constexpr):
    """What _keep has stored."""
    state = tl.load(states + feature[:, None] * WIDE + column[None, :], mask=(column < WIDE)[None, :], other=0)
    return state, tl.load(lines + feature)


@triton.jit(
    do_not_specialize=["T", "H", "batches", "q0", "q1", "q2", "k0", "k1", "k2", "v0", "v1", "v2", "d0", "d1", "d2"]
)  # fmt: skip
def chunks(
    q, k, v, delta, do, denominator, reset, valid, states, lines, out, dx_out, T, H, batches, q0, q1, q2, k0, k1, k2, v0, v1, v2,
    d0, d1, d2, UNIT: tl.constexpr, MODE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HAS_RESET: tl.constexpr,
    HAS_VALID: tl.constexpr, DOT: tl.constexpr, TF32: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, EVERY: tl.constexpr,
    WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of one chunk, MODE "o": out = o, and the denominators; "q": dx_out = dq; "k": dx_out = dk, out = dv. dq and dk are [blocks of
    values, B, T, H, K]."""
    BACK: tl.constexpr = MODE == "k"
    EPS: tl.constexpr = 1e-6
    PRECISION: tl.constexpr = "tf32" if TF32 else "ieee"
    ROOT: tl.constexpr = K**-0.25
    blocks: tl.constexpr = (V + BN - 1) // BN
    count = tl.cdiv(T, C)
    chunk, part = tl.program_id(0) % count, tl.program_id(0) // count
    first, which = part % blocks * BN, part // blocks
    batch, head = (which // H).to(tl.int64), (which % H).to(tl.int64)
    q += (batch * q0 + head * q2) * UNIT
    k += (batch * k0 + head * k2) * UNIT
    v += (batch * v0 + head * v2) * UNIT
    qt, kt, vt = q1 * UNIT, k1 * UNIT, v1 * UNIT
    if MODE != "o":
        do, dt = do + (batch * d0 + head * d2) * UNIT, d1 * UNIT
    rows, entry, column = tl.arange(0, C), tl.arange(0, X), first + tl.arange(0, BN)
    token, t0 = batch * T, chunk * C
    begin = t0 // EVERY * EVERY
    end = tl.minimum(begin + EVERY, T)
    here = t0 + rows < T
    live = here
    if HAS_VALID:
        live = here & (tl.load(valid + token + t0 + rows, mask=here, other=0) != 0)
    within, inside = live[:, None] & (column < V)[None, :], live[:, None] & (entry < K)[None, :]
    if BACK:
        x, w = _load(k, t0, rows, kt, entry, inside).to(DOT), _load(v, t0, rows, vt, column, within).to(DOT)
        by_line = tl.where(live & (first == 0), 1.0, 0.0)  # dz is a gradient by the first program's line
    else:
        x = _load(q, t0, rows, qt, entry, inside).to(DOT)
    if MODE == "q":
        w = _load(do, t0, rows, dt, column, within).to(tl.float32)
        share = 1 / tl.load(denominator + (token + t0 + rows) * H + head, mask=live, other=1.0)
        w = _narrow(w * share[:, None], DOT, TF32)
        by_line = -tl.load(delta + (token + t0 + rows) * H + head, mask=live & (first == 0), other=0.0) * share
    seen = live
    if HAS_RESET:
        segment = _resets(reset, token, t0, begin, rows, T, here, EVERY)
        stretch = begin + tl.arange(0, EVERY)
        last = tl.sum(tl.load(reset + token + stretch, mask=stretch < end, other=0).to(tl.int32), 0)
        seen = live & (segment == (last if BACK else 0))
    dx, acc, past = tl.zeros((C, X), tl.float32), tl.zeros((C, BN), tl.float32), tl.zeros((C,), tl.float32)
    for i in tl.range(0, tl.cdiv(end - t0, C) if BACK else (t0 - begin) // C + 1, num_stages=STAGES):
        u0 = (t0 if BACK else begin) + i * C
        near = u0 + rows < T
        alive = near
        if HAS_VALID:
            alive = near & (tl.load(valid + token + u0 + rows, mask=near, other=0) != 0)
        mask = live[:, None] & alive[None, :]
        mask = mask & (t0 + rows[:, None] <= u0 + rows[None, :] if BACK else t0 + rows[:, None] >= u0 + rows[None, :])
        if HAS_RESET:
            mask = mask & (segment[:, None] == _resets(reset, token, u0, begin, rows, T, near, EVERY)[None, :])
        reads, holds = alive[:, None] & (entry < K)[None, :], alive[:, None] & (column < V)[None, :]
        if BACK:
            y, u = _load(q, u0, rows, qt, entry, reads).to(DOT), _load(do, u0, rows, dt, column, holds).to(tl.float32)
            its = 1 / tl.load(denominator + (token + u0 + rows) * H + head, mask=alive, other=1.0)
            u = _narrow(u * its[:, None], DOT, TF32)
            off = -tl.load(delta + (token + u0 + rows) * H + head, mask=alive & (first == 0), other=0.0) * its
        else:
            y, u = _load(k, u0, rows, kt, entry, reads).to(DOT), _load(v, u0, rows, vt, column, holds).to(DOT)
        s = tl.dot(x, tl.trans(y), input_precision=PRECISION) * (ROOT * ROOT)
        if MODE != "q":
            p = tl.where(mask, 1 + s * (1 + 0.5 * s), 0.0)
            acc = tl.dot(_narrow(p, DOT, TF32), u, acc, input_precision=PRECISION)
        if MODE == "o":
            past += tl.sum(p, 1)
        else:
            g = tl.dot(w, tl.trans(u), input_precision=PRECISION)
            g = g + off[None, :] if BACK else g + by_line[:, None]
            g = tl.where(mask, g * (1 + s), 0.0) * (ROOT * ROOT)
            dx = tl.dot(_narrow(g, DOT, TF32), y, dx, input_precision=PRECISION)
    at = which.to(tl.int64) * tl.cdiv(T, EVERY) + t0 // EVERY
    states, lines = states + at * (PARTS * 64 * WIDE), lines + at * (PARTS * 64)
    if MODE == "q":
        for block in tl.static_range(PARTS):
            feature = block * 64 + tl.arange(0, 64)
            state, line = _kept(feature, states, lines, column, WIDE)
            dx = _slope_of_q(feature, w, x, state.to(tl.float32), line, by_line, seen, dx, ROOT, DOT, TF32, PRECISION)
    else:
        whole = _with_one(k if BACK else q, t0, rows, kt if BACK else qt, seen, K, DOT)
        if HAS_RESET and BACK:
            w, by_line = tl.where(seen[:, None], w, 0.0).to(DOT), tl.where(seen, by_line, 0.0)
        for block in tl.range(0, PARTS, num_stages=1):
            feature = block * 64 + tl.arange(0, 64)
            state, line = _kept(feature, states, lines, column, WIDE)
            state = _narrow(state, DOT, TF32)
            acc, past = _read(feature, whole, state, line, acc, past, DOT, TF32, PRECISION)
            if BACK:
                dx = _slope(feature, w, whole, state, line, by_line, dx, DOT, TF32, PRECISION)
    to = (token + t0) * H + head
    if MODE == "o":
        D = past + EPS
        acc = acc * (1 / D)[:, None]
        if first == 0:
            tl.store(denominator + to + rows * H, D, mask=here)
    else:
        dx_out += (part % blocks).to(tl.int64) * batches * T * H * K
        inside = here[:, None] & (entry < K)[None, :]
        tl.store(dx_out + to * K + rows[:, None] * (H * K) + entry[None, :], dx.to(dx_out.dtype.element_ty), mask=inside)
    if MODE != "q":
        within = here[:, None] & (column < V)[None, :]
        tl.store(out + to * V + rows[:, None] * (H * V) + column[None, :], acc.to(out.dtype.element_ty), mask=within)
