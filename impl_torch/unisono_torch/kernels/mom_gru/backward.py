"""MoM-GRU's way back: from the last token to the first, four phases a token.

With the names of ops/mom_gru.py, and G the gradient of M:
1. A bank of a sequence: the gradient of what token t read, G += (ρα) dcᵀ + dscores qᵀ; then of what token t−1 wrote, which leaves
   gradients of its key, value(, erase) and γ. The memories of a segment are made again from the one saved before it, in a scratch.
2. h' of token t−1, complete now: gradients of its candidate and of ζ.
3. r.
4. c; and, while others wait for it, what h before that token gets from the gates.

Gradients of weights are products over all tokens of what this leaves: they need no loop.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from unisono_torch.kernels.mom_gru.parts import arrive, fetch, product, sigmoid, slope, softmax, tanh, wait


@triton.jit
def _written(later, b, memory, inside, m, slot, WIDTH: tl.constexpr, SLOTS: tl.constexpr, AFTER: tl.constexpr):
    """What a token writes and where: key, a, e, σ(γ), and its softmax over a bank."""
    at = later + b * AFTER
    key = tl.load(at + m, mask=inside, other=0.0)
    add = tanh(tl.load(at + WIDTH + m, mask=inside, other=0.0))
    erase = sigmoid(tl.load(at + AFTER - 1 - WIDTH + m, mask=inside, other=0.0))
    gamma = sigmoid(tl.load(at + AFTER - 1))
    return key, add, erase, gamma, softmax(tl.sum(memory * key[None, :], 1), slot < SLOTS)


@triton.jit
def _narrow(x, w, column, ok, k, K: tl.constexpr, ROW: tl.constexpr):
    """x [BB, BK] · w[column, k]ᵀ → [BB, RB]."""
    value = tl.load(w + column[None, :] * ROW + k[:, None], mask=ok[None, :] & (k < K)[:, None], other=0.0)
    return tl.dot(x, value, input_precision="tf32x3", out_dtype=x.dtype)


@triton.jit(do_not_specialize=("T", "B"))
def backward(
    h, dM, dout, reset, valid, w_h, w_c, w_candidate, w_after, router, fresh,
    before, rho, gates, candidate, later, memories, dx, dafter, dlogits, dh, dfresh,
    past, writes, shares, queries, routes, dc, base, counter, T, B,
    D: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BANKS: tl.constexpr, SLOTS: tl.constexpr, AFTER: tl.constexpr,
    HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr, SEGMENT: tl.constexpr,
    PROGRAMS: tl.constexpr, BB: tl.constexpr, RB: tl.constexpr, S: tl.constexpr, AHEAD: tl.constexpr,
    BW: tl.constexpr, BL: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Weights transposed: w_h [D, hidden | d_m | 2D], w_c [d_m, 3D], w_candidate [D, D], w_after [D, key | value (| erase) | γ].

    dx [T, B, hidden | d_m | 3D], dafter [T, B, …], dlogits [T, B, n]; dh [B, D] of the first state; dM in and out.
    """
    KNOWN: tl.constexpr = HIDDEN + WIDTH
    GIVEN: tl.constexpr = KNOWN + 3 * D
    COLUMNS: tl.constexpr = (D + RB - 1) // RB
    MEMORIES: tl.constexpr = (WIDTH + RB - 1) // RB
    SEPARATE: tl.constexpr = AFTER > 2 * WIDTH + 1
    BANK: tl.constexpr = SLOTS * WIDTH
    program = tl.program_id(0)
    scale = 1.0 / tl.sqrt(tl.full((), WIDTH, h.dtype.element_ty))
    lane = tl.arange(0, RB)
    m = tl.arange(0, BW)
    inside = m < WIDTH
    slot = tl.arange(0, BL)
    tile = slot[:, None] * WIDTH + m[None, :]
    held = (slot < SLOTS)[:, None] & inside[None, :]
    unit = tl.arange(0, BH)
    rounds = 1
    for done in range(T + 1):
        t = T - done
        now = tl.cast(t, tl.int64) * B
        last = now - B

        for number in range(PROGRAMS - 1 - program, B * BANKS, PROGRAMS):
            b = number // BANKS
            bank = number % BANKS
            own = dM + tl.cast(number, tl.int64) * BANK
            made = past + tl.cast(number, tl.int64) * BANK
            G = tl.load(own + tile, mask=held, other=0.0)
            if t < T:
                memory = tl.load(made + tl.cast(t % SEGMENT, tl.int64) * B * BANKS * BANK + tile, mask=held, other=0.0)
                query = tl.load(before + (now + b) * KNOWN + HIDDEN + m, mask=inside, other=0.0)
                share = tl.load(rho + (now + b) * BANKS + bank)
                gradient = tl.load(dc + b * WIDTH + m, mask=inside, other=0.0)
                alpha = softmax(tl.sum(memory * query[None, :], 1), slot < SLOTS)
                weighted = alpha * tl.sum(memory * gradient[None, :], 1)
                total = tl.sum(weighted, 0)
                scores = (weighted - alpha * total) * share
                tl.store(queries + number * WIDTH + m, tl.sum(scores[:, None] * memory, 0) * scale, mask=inside)
                gamma = sigmoid(tl.load(later + (now + b) * AFTER + AFTER - 1))
                tl.store(routes + number, total + tl.load(shares + number) * gamma)
                G += (alpha * share)[:, None] * gradient[None, :] + scores[:, None] * query[None, :]
                if HAS_RESET:
                    cut = tl.load(reset + now + b) != 0
                    to_fresh = dfresh + tl.cast(number, tl.int64) * BANK + tile
                    tl.store(to_fresh, tl.load(to_fresh, mask=held, other=0.0) + tl.where(cut, G, 0.0), mask=held)
                    G = tl.where(cut, 0.0, G)
            if t > 0:
                u = t - 1
                if (t == T) | (t % SEGMENT == 0):
                    start = u // SEGMENT * SEGMENT
                    memory = tl.load(memories + (tl.cast(u // SEGMENT, tl.int64) * B * BANKS + number) * BANK + tile, mask=held, other=0.0)
                    for s in range(start, u + 1):
                        row = tl.cast(s, tl.int64) * B + b
                        if HAS_RESET:
                            old = tl.load(fresh + bank * BANK + tile, mask=held, other=0.0)
                            memory = tl.where(tl.load(reset + row) != 0, old, memory)
                        tl.store(made + tl.cast(s - start, tl.int64) * B * BANKS * BANK + tile, memory, mask=held)
                        key, add, erase, gamma, beta = _written(later, row, memory, inside, m, slot, WIDTH, SLOTS, AFTER)
                        weight = beta * (tl.load(rho + row * BANKS + bank) * gamma)
                        new = memory + weight[:, None] * (add[None, :] - erase[None, :] * memory)
                        if HAS_VALID:
                            new = tl.where(tl.load(valid + row) != 0, new, memory)
                        memory = new
                    tl.debug_barrier()
                memory = tl.load(made + tl.cast(u % SEGMENT, tl.int64) * B * BANKS * BANK + tile, mask=held, other=0.0)
                key, add, erase, gamma, beta = _written(later, last + b, memory, inside, m, slot, WIDTH, SLOTS, AFTER)
                share = tl.load(rho + (last + b) * BANKS + bank) * gamma
                into = G
                if HAS_VALID:
                    into = tl.where(tl.load(valid + last + b) != 0, G, 0.0)
                weight = beta * share
                erased = into * memory
                weighted = beta * tl.sum(into * add[None, :] - erased * erase[None, :], 1)
                total = tl.sum(weighted, 0)
                scores = (weighted - beta * total) * share
                to = writes + number * (3 * WIDTH) + m
                tl.store(to, tl.sum(scores[:, None] * memory, 0) * scale, mask=inside)
                tl.store(to + WIDTH, tl.sum(weight[:, None] * into, 0), mask=inside)
                tl.store(to + 2 * WIDTH, -tl.sum(weight[:, None] * erased, 0), mask=inside)
                tl.store(shares + number, total)
                G += scores[:, None] * key[None, :] - (weight[:, None] * erase[None, :]) * into
            tl.store(own + tile, G, mask=held)
        arrive(counter, PROGRAMS)
        rounds = wait(counter, rounds, PROGRAMS)

        for block in range(program, COLUMNS, PROGRAMS):
            column = block * RB + lane
            ok = column < D
            for first in range(0, B, BB):
                batch = first + tl.arange(0, BB)
                here = batch < B
                mask = here[:, None] & ok[None, :]
                wide = here[:, None] & inside[None, :]
                at = batch[:, None] * D + column[None, :]
                G = tl.zeros((BB, RB), h.dtype.element_ty)
                if t < T:
                    # the router's logits: dlogits_i = ρ_i (dρ_i − Σ ρ dρ)
                    mean = tl.zeros((BB,), h.dtype.element_ty)
                    to_query = tl.zeros((BB, BW), h.dtype.element_ty)
                    for i in tl.static_range(BANKS):
                        share = tl.load(rho + (now + batch) * BANKS + i, mask=here, other=0.0)
                        mean += share * tl.load(routes + batch * BANKS + i, mask=here, other=0.0)
                        to_query += tl.load(queries + (batch[:, None] * BANKS + i) * WIDTH + m[None, :], mask=wide, other=0.0)
                    known = (now + batch)[:, None] * KNOWN + unit[None, :]
                    units = here[:, None] & (unit < HIDDEN)[None, :]
                    active = tl.load(before + known, mask=units, other=0.0) > 0
                    to_hidden = tl.zeros((BB, BH), h.dtype.element_ty)
                    for i in tl.static_range(BANKS):
                        share = tl.load(rho + (now + batch) * BANKS + i, mask=here, other=0.0)
                        logit = share * (tl.load(routes + batch * BANKS + i, mask=here, other=0.0) - mean)
                        w = tl.load(router + i * HIDDEN + unit, mask=unit < HIDDEN, other=0.0)
                        to_hidden += logit[:, None] * w[None, :]
                        tl.store(dlogits + (now + batch) * BANKS + i, logit, mask=here & (block == 0))
                    to_hidden = tl.where(active, to_hidden, 0.0)
                    tl.store(dx + (now + batch)[:, None] * GIVEN + unit[None, :], to_hidden, mask=units & (block == 0))
                    tl.store(dx + (now + batch)[:, None] * GIVEN + HIDDEN + m[None, :], to_query, mask=wide & (block == 0))
                    G = tl.load(base + at, mask=mask, other=0.0)
                    G += _narrow(to_hidden, w_h, column, ok, unit, HIDDEN, KNOWN + 2 * D)
                    G += _narrow(to_query, w_h + HIDDEN, column, ok, m, WIDTH, KNOWN + 2 * D)
                    if HAS_VALID:
                        through = tl.load(dh + at, mask=mask, other=0.0)
                        G = tl.where(tl.load(valid + now + batch, mask=here, other=0)[:, None] != 0, G, through)
                    if HAS_RESET:
                        G = tl.where(tl.load(reset + now + batch, mask=here, other=0)[:, None] != 0, 0.0, G)
                if t > 0:
                    G += tl.load(dout + last * D + at, mask=mask, other=0.0)
                tl.store(dh + at, G, mask=mask)
                if t > 0:
                    if HAS_VALID:
                        G = tl.where(tl.load(valid + last + batch, mask=here, other=0)[:, None] != 0, G, 0.0)
                    to_key = tl.zeros((BB, BW), h.dtype.element_ty)
                    to_value = tl.zeros((BB, BW), h.dtype.element_ty)
                    to_erase = tl.zeros((BB, BW), h.dtype.element_ty)
                    to_gamma = tl.zeros((BB,), h.dtype.element_ty)
                    for i in tl.static_range(BANKS):
                        of = writes + (batch[:, None] * BANKS + i) * (3 * WIDTH) + m[None, :]
                        to_key += tl.load(of, mask=wide, other=0.0)
                        to_value += tl.load(of + WIDTH, mask=wide, other=0.0)
                        to_erase += tl.load(of + 2 * WIDTH, mask=wide, other=0.0)
                        share = tl.load(rho + (last + batch) * BANKS + i, mask=here, other=0.0)
                        to_gamma += share * tl.load(shares + batch * BANKS + i, mask=here, other=0.0)
                    of = (last + batch)[:, None] * AFTER + m[None, :]
                    to_value *= 4 * slope(2 * tl.load(later + of + WIDTH, mask=wide, other=0.0))
                    to_erase *= slope(tl.load(later + of + AFTER - 1 - WIDTH, mask=wide, other=0.0))
                    of_gamma = (last + batch) * AFTER + AFTER - 1
                    to_gamma *= slope(tl.load(later + of_gamma, mask=here, other=0.0))
                    if not SEPARATE:
                        to_value += to_erase
                    G += _narrow(to_key, w_after, column, ok, m, WIDTH, AFTER)
                    G += _narrow(to_value, w_after + WIDTH, column, ok, m, WIDTH, AFTER)
                    if SEPARATE:
                        G += _narrow(to_erase, w_after + 2 * WIDTH, column, ok, m, WIDTH, AFTER)
                    G += to_gamma[:, None] * tl.load(w_after + column * AFTER + AFTER - 1, mask=ok, other=0.0)[None, :]
                    tl.store(dafter + of, to_key, mask=wide & (block == 0))
                    tl.store(dafter + of + WIDTH, to_value, mask=wide & (block == 0))
                    if SEPARATE:
                        tl.store(dafter + of + 2 * WIDTH, to_erase, mask=wide & (block == 0))
                    tl.store(dafter + of_gamma, to_gamma, mask=here & (block == 0))
                    # h' = h̃ + ζ ∘ (h − h̃)
                    z = tl.load(gates + (last + batch)[:, None] * (2 * D) + D + column[None, :], mask=mask, other=0.0)
                    x = tl.load(candidate + last * D + at, mask=mask, other=0.0)
                    old = tl.load(h + last * D + at, mask=mask, other=0.0)
                    if HAS_RESET:
                        old = tl.where(tl.load(reset + last + batch, mask=here, other=0)[:, None] != 0, 0.0, old)
                    to = dx + (last + batch)[:, None] * GIVEN + KNOWN + column[None, :]
                    tl.store(to + D, G * (old - tanh(x)) * slope(z), mask=mask)
                    tl.store(to + 2 * D, G * (4 * slope(2 * x)) * sigmoid(-z), mask=mask)
                    tl.store(base + at, G * sigmoid(z), mask=mask)

        if t > 0:
            arrive(counter, PROGRAMS)
            rounds = wait(counter, rounds, PROGRAMS)
            gradients = dx + last * GIVEN + KNOWN
            for block in range(PROGRAMS - 1 - program, MEMORIES, PROGRAMS):
                column = block * RB + lane
                ok = column < WIDTH
                for first in range(0, B, BB):
                    batch = first + tl.arange(0, BB)
                    here = batch < B
                    y = product(gradients + D, batch, here, w_c + D, column, ok, GIVEN, 2 * D, 3 * D, 1, 0, BB, RB, S, AHEAD)
                    tl.store(dc + batch[:, None] * WIDTH + column[None, :], y, mask=here[:, None] & ok[None, :])
            for block in range(program, COLUMNS, PROGRAMS):
                column = block * RB + lane
                ok = column < D
                for first in range(0, B, BB):
                    batch = first + tl.arange(0, BB)
                    here = batch < B
                    mask = here[:, None] & ok[None, :]
                    at = batch[:, None] * D + column[None, :]
                    r = tl.load(gates + (last + batch)[:, None] * (2 * D) + column[None, :], mask=mask, other=0.0)
                    old = tl.load(h + last * D + at, mask=mask, other=0.0)
                    if HAS_RESET:
                        old = tl.where(tl.load(reset + last + batch, mask=here, other=0)[:, None] != 0, 0.0, old)
                    y = product(gradients + 2 * D, batch, here, w_candidate, column, ok, GIVEN, D, D, 1, 0, BB, RB, S, AHEAD)
                    tl.store(gradients + batch[:, None] * GIVEN + column[None, :], y * old * slope(r), mask=mask)
                    tl.store(base + at, tl.load(base + at, mask=mask, other=0.0) + y * sigmoid(r), mask=mask)
            arrive(counter, PROGRAMS)
            rounds = wait(counter, rounds, PROGRAMS)
            for block in range(PROGRAMS - 1 - program, MEMORIES, PROGRAMS):
                column = block * RB + lane
                ok = column < WIDTH
                for first in range(0, B, BB):
                    batch = first + tl.arange(0, BB)
                    here = batch < B
                    at = batch[:, None] * WIDTH + column[None, :]
                    mask = here[:, None] & ok[None, :]
                    rest = tl.load(dc + at, mask=mask, other=0.0)
                    y = product(gradients, batch, here, w_c, column, ok, GIVEN, D, 3 * D, 1, 0, BB, RB, S, AHEAD)
                    tl.store(dc + at, rest + y, mask=mask)
            arrive(counter, PROGRAMS)
            for block in range(program, COLUMNS, PROGRAMS):
                column = block * RB + lane
                ok = column < D
                for first in range(0, B, BB):
                    batch = first + tl.arange(0, BB)
                    here = batch < B
                    mask = here[:, None] & ok[None, :]
                    at = batch[:, None] * D + column[None, :]
                    rest = tl.load(base + at, mask=mask, other=0.0)
                    y = product(gradients, batch, here, w_h + KNOWN, column, ok, GIVEN, 2 * D, KNOWN + 2 * D, 1, 0, BB, RB, S, AHEAD)
                    tl.store(base + at, rest + y, mask=mask)
            for number in range(PROGRAMS - 1 - program, B * BANKS, PROGRAMS):  # what this program reads next but once
                if t > 1:
                    slots = tl.minimum(tl.arange(0, 256) * (BANK // 256 + 1), BANK - 1)
                    fetch(past + (tl.cast((t - 2) % SEGMENT, tl.int64) * B * BANKS + number) * BANK + slots, PROGRAMS)
            if (t > 1) & (program * 256 < B * 2 * D // 32):
                line = tl.minimum((program * 256 + tl.arange(0, 256)) * 32, B * 2 * D - 1)
                fetch(gates + (last - B) * (2 * D) + line, PROGRAMS)
                line = tl.minimum(line, B * D - 1)
                fetch(candidate + (last - B) * D + line, PROGRAMS)
                fetch(h + (last - B) * D + line, PROGRAMS)
                fetch(dout + (last - B) * D + line, PROGRAMS)
            rounds = wait(counter, rounds, PROGRAMS)
