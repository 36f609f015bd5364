"""The linear scan s_t = a_t s_{t−1} + g_t σ(x_t) and its gradient, as Triton kernels.

a_t is 0 at a reset, else λ (1 for a weighted sum), and 1 where the token is not valid. g_t is 1−λ, or the weight of row t; 0
where not valid.

Time is cut into segments. A program owns one segment of a block of channels and sweeps it in tiles of ROWS tokens, the state in
registers; in a tile as wide as a warp's loads, each thread scans its own channels with no exchange. What enters a segment comes
from one of:
- `initial`, when there is one segment;
- a halo: the sweep starts `halo` tokens early, where λ^halo is below the accumulator's reach; the bytes stay near the minimum;
- `carry`, for any λ: every segment is first swept without output (REDUCE), then `fold` chains the results in order.
Nothing depends on the order in which programs run, so results are the same bits each time.
"""

# Triton's own language, which a checker of Python reads wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _affine(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _affine_cut(a1, b1, a2, b2):
    # a2 = 0 is a reset, which cuts NaN and infinities too
    return a1 * a2, tl.where(a2 == 0, b2, a2 * b1 + b2)


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _sigmoid(x, FAST: tl.constexpr):
    """σ(x) to a few roundings of itself. FAST: float32 on a GPU, without the care for overflow that approximate units do not need."""
    if FAST:
        return libdevice.fast_dividef(1.0, 1 + libdevice.fast_expf(-x))
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1) / (1 + e)


@triton.jit
def _sigmoid_and_slope(x, FAST: tl.constexpr):
    """σ and σ' = e / (1+e)² where e = e^−|x|: unlike σ (1−σ) it keeps its digits where σ is near 1."""
    if FAST:
        e = libdevice.fast_expf(-tl.abs(x))
        q = libdevice.fast_dividef(1.0, 1 + e)
    else:
        e = tl.exp(-tl.abs(x))
        q = 1 / (1 + e)
    return tl.where(x < 0, e * q, q), e * q * q


@triton.jit
def _scan_rows(a, b, carry, CUT: tl.constexpr):
    """s_r = a_r s_{r−1} + b_r down the rows of a tile, s_{−1} = carry → (s [ROWS, BLOCK], its last row)."""
    rows = tl.arange(0, b.shape[0])
    a = tl.broadcast_to(a[:, None], b.shape)
    first = a * carry[None, :] + b
    if CUT:
        first = tl.where(a == 0, b, first)
    b = tl.where(rows[:, None] == 0, first, b)
    if CUT:
        _, s = tl.associative_scan((a, b), 0, _affine_cut)
    else:
        _, s = tl.associative_scan((a, b), 0, _affine)
    # adding −0 is no operation, for the compiler too
    return s, tl.sum(tl.where(rows[:, None] == b.shape[0] - 1, s, -0.0), 0)


@triton.jit
def _drift(decays, DRIFT: tl.constexpr, ACC: tl.constexpr):
    """What a tile's state lacks, relatively, because λ was rounded; DRIFT is what one token lacks."""
    return tl.sum(decays.to(tl.int32)) * tl.full((), DRIFT, ACC)


@triton.jit
def _place(T, D, segments, length, BLOCK: tl.constexpr):
    """This program's sequence, segment, channels, and rows [low, high)."""
    program = tl.program_id(0)
    blocks = tl.cdiv(D, BLOCK)
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    segment = (program // blocks) % segments
    batch = (program // (blocks * segments)).to(tl.int64)
    low = segment * length
    return batch, segment, channel, low, tl.minimum(low + length, T)


@triton.jit
def forward(
    x, weight, initial, reset, valid, carry, xi, final, local, product,
    T, D, segments, length, halo,
    DECAY: tl.constexpr, DRIFT: tl.constexpr, EXCLUSIVE: tl.constexpr, REDUCE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr, HAS_CARRY: tl.constexpr,
    ACC: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ξ and the final state; with REDUCE instead what each segment adds (`local`) and by what it multiplies (`product`)."""
    batch, segment, channel, low, high = _place(T, D, segments, length, BLOCK)
    inside = channel < D
    decay = tl.full((), DECAY, ACC)
    gain = tl.full((), 1 - DECAY, ACC)
    start = tl.maximum(low - halo, 0)
    state = tl.zeros((BLOCK,), ACC)
    if HAS_CARRY:
        state = tl.load(carry + (batch * segments + segment) * D + channel, mask=inside, other=0)
    elif HAS_INITIAL:
        state = tl.load(initial + batch * D + channel, mask=inside & (start == 0), other=0).to(ACC)
    if EXCLUSIVE and not REDUCE and low == 0:
        before = state
        if HAS_RESET:
            before = tl.where(tl.load(reset + batch * T) != 0, 0, before)
        tl.store(xi + batch * T * D + channel, before.to(xi.dtype.element_ty), mask=inside)
    total = tl.full((), 1, ACC)
    for top in tl.range(start, high, ROWS, num_stages=STAGES):
        t = top + tl.arange(0, ROWS)
        row = batch * T + t
        here = t < high
        live = here
        if HAS_VALID:
            live = here & (tl.load(valid + row, mask=here, other=0) != 0)
        a = tl.where(live, decay, 1)
        if HAS_RESET:
            a = tl.where(tl.load(reset + row, mask=here, other=0) != 0, 0, a)
        at = row[:, None] * D + channel[None, :]
        token = tl.load(x + at, mask=live[:, None] & inside[None, :], other=float("-inf")).to(ACC)  # σ(−∞) = 0
        u = _sigmoid(token, FAST)
        u *= tl.load(weight + row, mask=live, other=0).to(ACC)[:, None] if HAS_WEIGHT else gain
        s, state = _scan_rows(a, u, state, HAS_RESET)
        if REDUCE:
            total *= tl.reduce(a, 0, _multiply)
        if DRIFT != 0:
            drift = _drift(live, DRIFT, ACC)
            state += state * drift
            if REDUCE:
                total += total * drift
        if not REDUCE:
            write = here & (t >= low)
            if EXCLUSIVE:
                at += D
                write = write & (t + 1 < T)
                if HAS_RESET:
                    s = tl.where((tl.load(reset + row + 1, mask=write, other=0) != 0)[:, None], 0, s)
            tl.store(xi + at, s.to(xi.dtype.element_ty), mask=write[:, None] & inside[None, :])
    if REDUCE:
        tl.store(local + (batch * segments + segment) * D + channel, state, mask=inside)
        if tl.program_id(0) % tl.cdiv(D, BLOCK) == 0:
            tl.store(product + batch * segments + segment, total)
    elif high == T:
        tl.store(final + batch * D + channel, state, mask=inside)


@triton.jit
def backward(
    x, weight, reset, valid, carry, dxi, dfinal, dx, dweight, dinitial, local, product,
    T, D, segments, length, halo,
    DECAY: tl.constexpr, DRIFT: tl.constexpr, EXCLUSIVE: tl.constexpr, REDUCE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr, HAS_CARRY: tl.constexpr,
    ACC: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same sweep from the last token to the first, of G_t = ∂L/∂s_t = dξ_t + a_{t+1} G_{t+1}.

    dx = g σ'(x) G; ∂L/∂g_t = Σ_d σ(x) G, one sum a block of channels in `dweight` [blocks, B, T]. Exclusive sums have
    G_t = a_{t+1} (G_{t+1} + dξ_{t+1}).
    """
    batch, segment, channel, low, high = _place(T, D, segments, length, BLOCK)
    inside = channel < D
    decay = tl.full((), DECAY, ACC)
    gain = tl.full((), 1 - DECAY, ACC)
    end = tl.minimum(high + halo, T)
    state = tl.zeros((BLOCK,), ACC)
    if HAS_CARRY:
        state = tl.load(carry + (batch * segments + segment) * D + channel, mask=inside, other=0)
    elif not REDUCE:
        state = tl.load(dfinal + batch * D + channel, mask=inside & (end == T), other=0).to(ACC)
    total = tl.full((), 1, ACC)
    for done in tl.range(0, end - low, ROWS, num_stages=STAGES):
        t = end - 1 - done - tl.arange(0, ROWS)
        row = batch * T + t
        here = t >= low
        later = here & (t + 1 < T)
        passes = later
        if HAS_VALID:
            passes = later & (tl.load(valid + row + 1, mask=later, other=0) != 0)
        a = tl.where(passes, decay, 1)
        if HAS_RESET:
            a = tl.where(tl.load(reset + row + 1, mask=later, other=0) != 0, 0, a)
        at = row[:, None] * D + channel[None, :]
        if EXCLUSIVE:
            grad = tl.load(dxi + at + D, mask=later[:, None] & inside[None, :], other=0).to(ACC)
            if HAS_RESET:
                grad = tl.where(a[:, None] == 0, 0, grad)
        else:
            grad = tl.load(dxi + at, mask=here[:, None] & inside[None, :], other=0).to(ACC)
        g, state = _scan_rows(a, grad, state, HAS_RESET)
        if REDUCE:
            total *= tl.reduce(a, 0, _multiply)
        if DRIFT != 0:
            drift = _drift(passes, DRIFT, ACC)
            state += state * drift
            if REDUCE:
                total += total * drift
        if not REDUCE:
            own = here & (t < high)
            live = own
            if HAS_VALID:
                live = own & (tl.load(valid + row, mask=own, other=0) != 0)
            read = live[:, None] & inside[None, :]
            u, slope = _sigmoid_and_slope(tl.load(x + at, mask=read, other=float("-inf")).to(ACC), FAST)
            if HAS_WEIGHT:
                part = tl.sum(tl.where(read, u * g, 0), 1)
                block = (tl.program_id(0) % tl.cdiv(D, BLOCK)).to(tl.int64)
                batches = tl.num_programs(0) // (tl.cdiv(D, BLOCK) * segments)
                tl.store(dweight + block * batches * T + row, part, mask=own)
                slope = slope * tl.load(weight + row, mask=live, other=0).to(ACC)[:, None]
            else:
                slope = slope * gain
            d = slope * g
            if HAS_VALID:
                d = tl.where(live[:, None], d, 0)
            tl.store(dx + at, d.to(dx.dtype.element_ty), mask=own[:, None] & inside[None, :])
    if REDUCE:
        tl.store(local + (batch * segments + segment) * D + channel, state, mask=inside)
        if tl.program_id(0) % tl.cdiv(D, BLOCK) == 0:
            tl.store(product + batch * segments + segment, total)
    elif HAS_INITIAL and low == 0:
        if EXCLUSIVE:
            state += tl.load(dxi + batch * T * D + channel, mask=inside, other=0).to(ACC)
        state *= tl.where(tl.load(valid + batch * T) != 0, decay, 1) if HAS_VALID else decay
        if HAS_RESET:
            state = tl.where(tl.load(reset + batch * T) != 0, 0, state)
        tl.store(dinitial + batch * D + channel, state, mask=inside)


@triton.jit
def fold(
    local, product, initial, carry, D, segments,
    REVERSE: tl.constexpr, HAS_INITIAL: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """carry [B, segments, D]: the state that enters each segment, from what every segment adds and multiplies by, in order."""
    blocks = tl.cdiv(D, BLOCK)
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    inside = channel < D
    state = tl.zeros((BLOCK,), ACC)
    if HAS_INITIAL:
        state = tl.load(initial + batch * D + channel, mask=inside, other=0).to(ACC)
    entry = segments - 1 if REVERSE else 0
    tl.store(carry + (batch * segments + entry) * D + channel, state, mask=inside)
    for top in range(0, segments, ROWS):
        order = top + tl.arange(0, ROWS)
        here = order < segments
        segment = segments - 1 - order if REVERSE else order
        row = batch * segments + segment
        a = tl.load(product + row, mask=here, other=1)
        at = row[:, None] * D + channel[None, :]
        s, state = _scan_rows(a, tl.load(local + at, mask=here[:, None] & inside[None, :], other=0), state, True)
        if REVERSE:
            at -= D
        else:
            at += D
        tl.store(carry + at, s, mask=(order + 1 < segments)[:, None] & inside[None, :])
