"""The scan of sweep.py in one pass for any λ, for weights and for tokens that are not valid: a chained scan (Yan et al. 2013, StreamScan).

A program loads a tile, sums it in registers, waits for the state that enters it, leaves the state after it to its successor, then
sweeps the tile again from the state that entered, and writes. Each number is read once and written once.

A tile's tokens are cut into CHUNKS of ROWS each. A thread sums the rows of its chunk with no exchange, so a tile is ROWS tensors
[CHUNKS, BLOCK] of channels; only what the chunks sum to is scanned across threads. The width D is known to the compiler, so that a
thread's rows share one address and loads are as wide as D allows.

Sums are made in one order, whoever runs first, so results are the same bits each time. Programs wait only for programs of smaller
number. GPUs start programs in the order of their numbers, so whoever is waited for has started, however few run at once; CUDA does
not promise that order, but CUB's scans, which PyTorch's cumsum runs, rely on it too.
"""

# Triton's own language, which a checker of Python reads wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from unisono_torch.kernels.scan.sweep import _sigmoid, _sigmoid_and_slope


@triton.jit
def _continue(a, state, b, ONE: tl.constexpr, CUT: tl.constexpr):
    """a state + b. ONE: every a is 1. CUT: an a of 0 is a reset, which cuts NaN and infinities too."""
    if ONE:
        return state + b
    if CUT:
        return tl.where(a == 0, b, a * state + b)
    return a * state + b


# Scans that give, beside the sums s of all up to an element (and the products a), those of all before it: e (and c). The shift is
# part of the scan because moving a tensor's rows by one has no cheap form, and subtracting the last would not survive NaN.


@triton.jit
def _sum_before(e1, s1, e2, s2):
    return s1 + e2, s1 + s2


@triton.jit
def _state_before(c1, e1, a1, s1, c2, e2, a2, s2):
    return a1 * c2, c2 * s1 + e2, a1 * a2, a2 * s1 + s2


@triton.jit
def _state_before_cut(c1, e1, a1, s1, c2, e2, a2, s2):
    return a1 * c2, tl.where(c2 == 0, e2, c2 * s1 + e2), a1 * a2, tl.where(a2 == 0, s2, a2 * s1 + s2)


@triton.jit
def _position(batches, D: tl.constexpr, BLOCK: tl.constexpr):
    """This program's tile, sequence and block of channels: every sequence's first tile, then every sequence's second."""
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    strip = tl.program_id(0) % (batches * blocks)
    return tl.program_id(0) // (batches * blocks), (strip // blocks).to(tl.int64), strip % blocks


@triton.jit
def _enter(
    a, s, count, initial, states, tile, batches, batch, channel, D: tl.constexpr,
    DRIFT: tl.constexpr, LAG: tl.constexpr, HAS_INITIAL: tl.constexpr, ONE: tl.constexpr, CUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The states that enter and leave each chunk [CHUNKS, BLOCK].

    From what the chunks multiply by, a [CHUNKS, 1], and add, s [CHUNKS, BLOCK]; `count` [CHUNKS]: how often λ, which was rounded.
    """
    chunk = tl.arange(0, s.shape[0])[:, None]
    inside = (channel < D)[None, :]
    left = states + (tile * batches + batch) * D + channel  # what this tile leaves
    entering = left - batches * D
    # A word says by itself that it is there: it held −1, the bits of a NaN that no state has. Each thread asks for its own, early,
    # and they are nearly always there when they are needed.
    words = tl.load(entering[None, :] + chunk * 0, mask=inside & (tile > 0), other=0, volatile=True)
    if DRIFT != 0:
        drift = (count * tl.full((), DRIFT, ACC))[:, None]
        s += s * tl.full((), LAG, ACC)  # its own terms met λ less often, the newest never
        a += a * drift
    before = tl.zeros_like(s)
    factor = a
    if ONE:
        before, s = tl.associative_scan((before, s), 0, _sum_before)
    else:
        factor = tl.full(s.shape, 1, ACC)
        a = tl.broadcast_to(a, s.shape)
        if CUT:
            factor, before, a, s = tl.associative_scan((factor, before, a, s), 0, _state_before_cut)
        else:
            factor, before, a, s = tl.associative_scan((factor, before, a, s), 0, _state_before)
    if tl.max(tl.max((words == -1).to(tl.int32), 1), 0) != 0:
        # an atomic reads once for all threads; by loads, one could see a word that another does not see yet
        word = tl.where(channel < D, tl.atomic_add(entering, 0, mask=channel < D, sem="relaxed"), 0)
        while tl.max((word == -1).to(tl.int32), 0) != 0:
            word = tl.where(channel < D, tl.atomic_add(entering, 0, mask=channel < D, sem="relaxed"), 0)
        words = tl.broadcast_to(word[None, :], words.shape)
    state = words.to(ACC, bitcast=True)
    if HAS_INITIAL and tile == 0:
        state += tl.load(initial + batch * D + channel, mask=channel < D, other=0).to(ACC)[None, :]
    after = _continue(a, state, s, ONE, CUT)
    word = tl.where(after == after, after, float("nan")).to(states.dtype.element_ty, bitcast=True)
    tl.atomic_xchg(left[None, :] + chunk * 0, word, mask=inside & (chunk == s.shape[0] - 1), sem="relaxed")
    return _continue(factor, state, before, ONE, CUT), after


@triton.jit(do_not_specialize=["T", "tiles", "batches"])
def forward(
    x, weight, initial, reset, valid, xi, final, states, T, tiles, batches, D: tl.constexpr,
    DECAY: tl.constexpr, DRIFT: tl.constexpr, LAG: tl.constexpr, EXCLUSIVE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr, ACC: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ξ and the final state."""
    ONE: tl.constexpr = DECAY == 1 and not HAS_RESET
    tile, batch, block = _position(batches, D, BLOCK)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    top = tile * (ROWS * CHUNKS) + tl.arange(0, CHUNKS) * ROWS
    # everything is loaded first, so that it comes at once
    lives, gains, decays, tokens = (), (), (), ()
    count = tl.zeros((CHUNKS,), tl.int32)
    for r in tl.static_range(ROWS):
        t = top + r
        row = batch * T + t
        live = t < T
        if HAS_VALID:
            live = live & (tl.load(valid + row, mask=live, other=0) != 0)
        gain = tl.full((), 1 - DECAY, ACC)
        if HAS_WEIGHT:
            gain = tl.load(weight + row, mask=live, other=0).to(ACC)[:, None]
        a = tl.where(live, tl.full((), DECAY, ACC), 1)
        if HAS_RESET:
            a = tl.where(tl.load(reset + row, mask=t < T, other=0) != 0, 0, a)
        lives += (live,)
        gains += (gain,)
        decays += (a[:, None],)
        count += live.to(tl.int32)
    for r in tl.static_range(ROWS):
        at = (batch * T + top + r)[:, None] * D + channel[None, :]
        tokens += (tl.load(x + at, mask=lives[r][:, None] & inside[None, :], other=float("-inf")),)  # σ(−∞) = 0
    s = tl.zeros((CHUNKS, BLOCK), ACC)
    product = tl.full((CHUNKS, 1), 1, ACC)
    terms = ()
    for r in tl.static_range(ROWS):
        terms += (_sigmoid(tokens[r].to(ACC), FAST) * gains[r],)
        s = _continue(decays[r], s, terms[r], ONE, HAS_RESET)
        product *= decays[r]
    s, state = _enter(product, s, count, initial, states, tile, batches, batch, channel, D, DRIFT, LAG, HAS_INITIAL, ONE, HAS_RESET, ACC)
    if EXCLUSIVE and tile == 0:
        first = tl.zeros((BLOCK,), ACC)
        if HAS_INITIAL:
            first = tl.load(initial + batch * D + channel, mask=inside, other=0).to(ACC)
        if HAS_RESET:
            first = tl.where(tl.load(reset + batch * T) != 0, 0, first)
        tl.store(xi + batch * T * D + channel, first.to(xi.dtype.element_ty), mask=inside)
    for r in tl.static_range(ROWS):
        s = _continue(decays[r], s, terms[r], ONE, HAS_RESET)
        out = s
        t = top + r
        if EXCLUSIVE:
            t += 1
            if HAS_RESET:
                out = tl.where((tl.load(reset + batch * T + t, mask=t < T, other=0) != 0)[:, None], 0, s)
        at = (batch * T + t)[:, None] * D + channel[None, :]
        tl.store(xi + at, out.to(xi.dtype.element_ty), mask=(t < T)[:, None] & inside[None, :])
    if tile == tiles - 1:
        leaves = (tl.arange(0, CHUNKS) == CHUNKS - 1)[:, None] & inside[None, :]
        tl.store(final + batch * D + channel[None, :] + tl.zeros((CHUNKS, 1), tl.int32), state, mask=leaves)


@triton.jit(do_not_specialize=["T", "tiles", "batches"])
def backward(
    x, weight, reset, valid, dxi, dfinal, dx, dweight, dinitial, states, T, tiles, batches, D: tl.constexpr,
    DECAY: tl.constexpr, DRIFT: tl.constexpr, LAG: tl.constexpr, EXCLUSIVE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr, ACC: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same from the last token to the first, of G_t = ∂L/∂s_t = dξ_t + a_{t+1} G_{t+1}.

    dx = g σ'(x) G; ∂L/∂g_t = Σ_d σ(x) G, one sum a block of channels in `dweight` [blocks, B, T]. Exclusive sums, which have λ = 1,
    have G_t = a_{t+1} (G_{t+1} + dξ_{t+1}).
    """
    ONE: tl.constexpr = DECAY == 1 and not HAS_RESET
    tile, batch, block = _position(batches, D, BLOCK)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    top = T - 1 - tile * (ROWS * CHUNKS) - tl.arange(0, CHUNKS) * ROWS
    lives, gains, decays, grads, tokens = (), (), (), (), ()
    count = tl.zeros((CHUNKS,), tl.int32)
    for r in tl.static_range(ROWS):
        t = top - r
        row = batch * T + t
        live = t >= 0
        passes = live & (t + 1 < T)
        reads = passes if EXCLUSIVE else live
        if HAS_VALID:
            live = live & (tl.load(valid + row, mask=live, other=0) != 0)
            passes = passes & (tl.load(valid + row + 1, mask=passes, other=0) != 0)
        gain = tl.full((), 1 - DECAY, ACC)
        if HAS_WEIGHT:
            gain = tl.load(weight + row, mask=live, other=0).to(ACC)[:, None]
        a = tl.where(passes, tl.full((), DECAY, ACC), 1)
        if HAS_RESET:
            cut = tl.load(reset + row + 1, mask=(t >= 0) & (t + 1 < T), other=0) != 0
            a = tl.where(cut, 0, a)
            if EXCLUSIVE:
                reads = reads & ~cut
        at = row[:, None] * D + channel[None, :]
        grads += (tl.load(dxi + at + (D if EXCLUSIVE else 0), mask=reads[:, None] & inside[None, :], other=0),)
        lives += (live,)
        gains += (gain,)
        decays += (a[:, None],)
        count += passes.to(tl.int32)
    for r in tl.static_range(ROWS):
        at = (batch * T + top - r)[:, None] * D + channel[None, :]
        tokens += (tl.load(x + at, mask=lives[r][:, None] & inside[None, :], other=float("-inf")),)
    s = tl.zeros((CHUNKS, BLOCK), ACC)
    product = tl.full((CHUNKS, 1), 1, ACC)
    for r in tl.static_range(ROWS):
        s = _continue(decays[r], s, grads[r].to(ACC), ONE, HAS_RESET)
        product *= decays[r]
    s, state = _enter(product, s, count, dfinal, states, tile, batches, batch, channel, D, DRIFT, LAG, True, ONE, HAS_RESET, ACC)
    column = tl.arange(0, ROWS)[None, :]
    partial = tl.zeros((CHUNKS, ROWS), ACC)
    for r in tl.static_range(ROWS):
        t = top - r
        s = _continue(decays[r], s, grads[r].to(ACC), ONE, HAS_RESET)
        u, slope = _sigmoid_and_slope(tokens[r].to(ACC), FAST)
        if HAS_WEIGHT:
            part = tl.sum(u * s, 1)
            if HAS_VALID:
                part = tl.where(lives[r], part, 0)
            partial = tl.where(column == r, part[:, None], partial)
        d = slope * gains[r] * s
        if HAS_VALID:
            d = tl.where(lives[r][:, None], d, 0)
        at = (batch * T + t)[:, None] * D + channel[None, :]
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=(t >= 0)[:, None] & inside[None, :])
    if HAS_WEIGHT:
        t = top[:, None] - column
        tl.store(dweight + (block * batches + batch) * T + t, partial, mask=t >= 0)
    if tile == tiles - 1:
        leaves = (tl.arange(0, CHUNKS) == CHUNKS - 1)[:, None] & inside[None, :]
        if EXCLUSIVE:
            state += tl.load(dxi + batch * T * D + channel, mask=inside, other=0).to(ACC)[None, :]
        state *= tl.where(tl.load(valid + batch * T) != 0, tl.full((), DECAY, ACC), 1) if HAS_VALID else DECAY
        if HAS_RESET:
            state = tl.where(tl.load(reset + batch * T) != 0, 0, state)
        tl.store(dinitial + batch * D + channel[None, :] + tl.zeros((CHUNKS, 1), tl.int32), state, mask=leaves)
