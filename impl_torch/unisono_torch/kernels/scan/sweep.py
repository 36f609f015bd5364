"""The linear scan s_t = a_t s_{t−1} + (1−λ) σ(x_t) and its gradient, as Triton kernels, for λ small enough. a_t is λ; 0 at a reset.

Time is cut into segments. A program owns one segment of a block of channels and sweeps it in tiles of ROWS tokens, the state in
registers; in a tile as wide as a warp's loads, each thread scans its own channels with no exchange. Instead of waiting for what
enters its segment, a sweep starts `halo` tokens early, where λ^halo is below the accumulator's reach; the bytes stay near the
minimum. So NaN and infinity, which no λ makes small, end where a segment begins more than `halo` tokens after them. Nothing depends
on the order in which programs run, so results are the same bits each time. The width D is known to the compiler, so that loads are
as wide as D allows.
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
def _sigmoid(x, FAST: tl.constexpr):
    """σ(x) to a few roundings of itself. FAST: float32 on a GPU, without the care for overflow that approximate units do not need."""
    if FAST:
        return libdevice.fast_dividef(1.0, 1 + tl.exp2(x * -1.4426950408889634))
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1) / (1 + e)


@triton.jit
def _sigmoid_and_slope(x, FAST: tl.constexpr):
    """σ and σ' = e / (1+e)² where e = e^−|x|: unlike σ (1−σ) it keeps its digits where σ is near 1."""
    if FAST:
        e = tl.exp2(tl.abs(x) * -1.4426950408889634)
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
def _place(T, D: tl.constexpr, segments, length, BLOCK: tl.constexpr):
    """This program's sequence, channels, and rows [low, high)."""
    program = tl.program_id(0)
    blocks = tl.cdiv(D, BLOCK)
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    segment = (program // blocks) % segments
    batch = (program // (blocks * segments)).to(tl.int64)
    low = segment * length
    return batch, channel, low, tl.minimum(low + length, T)


@triton.jit
def forward(
    x, initial, reset, xi, final, T, D: tl.constexpr, segments, length, halo,
    DECAY: tl.constexpr, DRIFT: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_RESET: tl.constexpr,
    ACC: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ξ and the final state."""
    batch, channel, low, high = _place(T, D, segments, length, BLOCK)
    inside = channel < D
    decay = tl.full((), DECAY, ACC)
    gain = tl.full((), 1 - DECAY, ACC)
    start = tl.maximum(low - halo, 0)
    state = tl.zeros((BLOCK,), ACC)
    if HAS_INITIAL:
        state = tl.load(initial + batch * D + channel, mask=inside & (start == 0), other=0).to(ACC)
    for top in tl.range(start, high, ROWS, num_stages=STAGES):
        t = top + tl.arange(0, ROWS)
        row = batch * T + t
        here = t < high
        a = tl.where(here, decay, 1)
        if HAS_RESET:
            a = tl.where(tl.load(reset + row, mask=here, other=0) != 0, 0, a)
        at = row[:, None] * D + channel[None, :]
        token = tl.load(x + at, mask=here[:, None] & inside[None, :], other=float("-inf")).to(ACC)  # σ(−∞) = 0
        u = _sigmoid(token, FAST) * gain
        s, state = _scan_rows(a, u, state, HAS_RESET)
        if DRIFT != 0:
            state += state * _drift(here, DRIFT, ACC)
        write = here & (t >= low)
        tl.store(xi + at, s.to(xi.dtype.element_ty), mask=write[:, None] & inside[None, :])
    if high == T:
        tl.store(final + batch * D + channel, state, mask=inside)


@triton.jit
def backward(
    x, reset, dxi, dfinal, dx, dinitial, T, D: tl.constexpr, segments, length, halo,
    DECAY: tl.constexpr, DRIFT: tl.constexpr, HAS_RESET: tl.constexpr,
    ACC: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same sweep from the last token to the first, of G_t = ∂L/∂s_t = dξ_t + a_{t+1} G_{t+1}; dx = (1−λ) σ'(x) G."""
    batch, channel, low, high = _place(T, D, segments, length, BLOCK)
    inside = channel < D
    decay = tl.full((), DECAY, ACC)
    gain = tl.full((), 1 - DECAY, ACC)
    end = tl.minimum(high + halo, T)
    state = tl.load(dfinal + batch * D + channel, mask=inside & (end == T), other=0).to(ACC)
    for done in tl.range(0, end - low, ROWS, num_stages=STAGES):
        t = end - 1 - done - tl.arange(0, ROWS)
        row = batch * T + t
        here = t >= low
        later = here & (t + 1 < T)
        a = tl.where(later, decay, 1)
        if HAS_RESET:
            a = tl.where(tl.load(reset + row + 1, mask=later, other=0) != 0, 0, a)
        at = row[:, None] * D + channel[None, :]
        grad = tl.load(dxi + at, mask=here[:, None] & inside[None, :], other=0).to(ACC)
        g, state = _scan_rows(a, grad, state, HAS_RESET)
        if DRIFT != 0:
            state += state * _drift(later, DRIFT, ACC)
        own = here & (t < high)
        token = tl.load(x + at, mask=own[:, None] & inside[None, :], other=float("-inf")).to(ACC)
        _, slope = _sigmoid_and_slope(token, FAST)
        d = slope * gain * g
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=own[:, None] & inside[None, :])
    if low == 0:
        state *= decay
        if HAS_RESET:
            state = tl.where(tl.load(reset + batch * T) != 0, 0, state)
        tl.store(dinitial + batch * D + channel, state, mask=inside)
