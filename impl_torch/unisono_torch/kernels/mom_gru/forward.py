"""MoM-GRU forward: four phases a token (ops/mom_gru.py has the equations), of which the first belongs to the token before, too.

1. Products with h: r and ζ; what the router and the query need; and of the token before: key, value(, erase), γ.
2. A bank of a sequence: what the token before writes; then what this one reads, ρ_i α_iᵀM_i.
3. r and ζ whole; r∘h.
4. The candidate; h'.

M lives in memory (in L2, for 128 KiB a sequence). What the backward wants of a token is kept where KEEP is set; else one token's space
serves all.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# ruff: noqa: SIM102 (a constant decides what is compiled)

from __future__ import annotations

import triton
import triton.language as tl

from unisono_torch.kernels.mom_gru.parts import arrive, fetch, product, sigmoid, softmax, tanh, wait


@triton.jit(do_not_specialize=("T", "B"))
def forward(
    h, M, given, drawn, reset, valid, w_h, w_c, w_candidate, w_after, after_bias, router, router_bias, fresh,
    before, rho, parts, c, gates, candidate, later, reads, memories, residual, out, counter, T, B,
    D: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BANKS: tl.constexpr, SLOTS: tl.constexpr, AFTER: tl.constexpr,
    HAS_DRAWN: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr, KEEP: tl.constexpr, SEGMENT: tl.constexpr,
    SETTLE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PROGRAMS: tl.constexpr, BB: tl.constexpr, RB: tl.constexpr, S: tl.constexpr, SW: tl.constexpr, AHEAD: tl.constexpr,
    BW: tl.constexpr, BL: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """h [T+1, B, D], of which the first is given, M [B, n·L, d_m] in and out, given [T, B, hidden | d_m | 3D]: the products with x.

    SETTLE: of one token, h' also becomes the first h, and on residual [B, D] out; counter [2], else [1], is 0 again."""
    KNOWN: tl.constexpr = HIDDEN + WIDTH
    GIVEN: tl.constexpr = KNOWN + 3 * D
    COLUMNS: tl.constexpr = (D + RB - 1) // RB
    KNOWNS: tl.constexpr = (KNOWN + RB - 1) // RB
    AFTERS: tl.constexpr = (AFTER + RB - 1) // RB
    ERASE: tl.constexpr = AFTER - 1 - WIDTH
    program = tl.program_id(0)
    scale = 1.0 / tl.sqrt(tl.full((), WIDTH, h.dtype.element_ty))
    pair = tl.arange(0, 2 * RB)
    lane = tl.arange(0, RB)
    m = tl.arange(0, BW)
    slot = tl.arange(0, BL)
    tile = slot[:, None] * WIDTH + m[None, :]
    held = (slot < SLOTS)[:, None] & (m < WIDTH)[None, :]
    bank_of = tl.arange(0, BN)
    unit = tl.arange(0, BH)
    to_bank = (bank_of < BANKS)[:, None] & (unit < HIDDEN)[None, :]
    w_bank = tl.load(router + bank_of[:, None] * HIDDEN + unit[None, :], mask=to_bank, other=0.0)
    b_bank = tl.load(router_bias + bank_of, mask=bank_of < BANKS, other=0.0)
    rounds = 1
    for t in range(T + 1):
        now = tl.cast(t, tl.int64) * B  # the first row of this token
        kept = now if KEEP else now * 0
        last = now - B if KEEP else now * 0

        for block in range((program + PROGRAMS - COLUMNS % PROGRAMS) % PROGRAMS, KNOWNS + AFTERS, PROGRAMS):
            for first in range(0, B, BB):
                batch = first + tl.arange(0, BB)
                here = batch < B
                if block < KNOWNS:
                    if t < T:
                        row = block * RB + lane
                        ok = row < KNOWN
                        mask = here[:, None] & ok[None, :]
                        x = tl.load(given + (now + batch)[:, None] * GIVEN + row[None, :], mask=mask, other=0.0)
                        live = here
                        if HAS_RESET:
                            live = here & (tl.load(reset + now + batch, mask=here, other=0) == 0)
                        y = x + product(h + now * D, batch, live, w_h, row, ok, D, D, D, 1, 0, BB, RB, S, AHEAD)
                        y = tl.where((row < HIDDEN)[None, :], tl.where(y <= 0, 0.0, y), y * scale)
                        tl.store(before + (kept + batch)[:, None] * KNOWN + row[None, :], y, mask=mask)
                elif t > 0:
                    row = (block - KNOWNS) * RB + lane
                    ok = row < AFTER
                    y = product(h + now * D, batch, here, w_after, row, ok, D, D, D, 1, 0, BB, RB, S, AHEAD)
                    y += tl.load(after_bias + row, mask=ok, other=0.0)[None, :]
                    y = tl.where((row < WIDTH)[None, :], y * scale, y)
                    tl.store(later + (last + batch)[:, None] * AFTER + row[None, :], y, mask=here[:, None] & ok[None, :])
        arrive(counter, PROGRAMS)
        if t < T:
            for block in range(program, COLUMNS, PROGRAMS):
                for first in range(0, B, BB):
                    batch = first + tl.arange(0, BB)
                    here = batch < B
                    live = here
                    if HAS_RESET:
                        live = here & (tl.load(reset + now + batch, mask=here, other=0) == 0)
                    column = block * RB + pair % RB
                    ok = column < D
                    row = column + (pair // RB) * D
                    mask = here[:, None] & ok[None, :]
                    x = tl.load(given + (now + batch)[:, None] * GIVEN + KNOWN + row[None, :], mask=mask, other=0.0)
                    y = x + product(h + now * D, batch, live, w_h + KNOWN * D, row, ok, D, D, D, 1, 0, BB, 2 * RB, S, AHEAD)
                    tl.store(gates + (kept + batch)[:, None] * (2 * D) + row[None, :], y, mask=mask)
            if PROGRAMS > 1:
                if program * 256 < B * GIVEN // 32:
                    line = tl.minimum((program * 256 + tl.arange(0, 256)) * 32, B * GIVEN - 1)
                    fetch(given + tl.minimum(now + B, (T - 1) * B) * GIVEN + line, PROGRAMS)
        rounds = wait(counter, rounds, PROGRAMS)

        for number in range(PROGRAMS - 1 - program, B * BANKS, PROGRAMS):
            b = number // BANKS
            bank = number % BANKS
            own = M + tl.cast(number, tl.int64) * (SLOTS * WIDTH)
            memory = tl.load(own + tile, mask=held, other=0.0)
            inside = m < WIDTH
            if t > 0:
                written = later + (last + b) * AFTER
                key = tl.load(written + m, mask=inside, other=0.0)
                add = tanh(tl.load(written + WIDTH + m, mask=inside, other=0.0))
                erase = sigmoid(tl.load(written + ERASE + m, mask=inside, other=0.0))
                share = tl.load(rho + (last + b) * BANKS + bank) * sigmoid(tl.load(written + AFTER - 1))
                weight = softmax(tl.sum(memory * key[None, :], 1), slot < SLOTS) * share
                new = memory + weight[:, None] * (add[None, :] - erase[None, :] * memory)
                if HAS_VALID:
                    new = tl.where(tl.load(valid + now - B + b) != 0, new, memory)
                memory = new
            if KEEP:
                if (t < T) & (t % SEGMENT == 0):
                    at = tl.cast(t // SEGMENT, tl.int64) * B * BANKS + number
                    tl.store(memories + at * (SLOTS * WIDTH) + tile, memory, mask=held)
            if t < T:
                if HAS_RESET:
                    old = tl.load(fresh + bank * (SLOTS * WIDTH) + tile, mask=held, other=0.0)
                    memory = tl.where(tl.load(reset + now + b) != 0, old, memory)
                known = before + (kept + b) * KNOWN
                hidden = tl.load(known + unit, mask=unit < HIDDEN, other=0.0)
                query = tl.load(known + HIDDEN + m, mask=inside, other=0.0)
                logits = tl.sum(w_bank * hidden[None, :], 1) + b_bank
                if HAS_DRAWN:
                    logits += tl.load(drawn + (now + b) * BANKS + bank_of, mask=bank_of < BANKS, other=0.0)
                share = tl.sum(tl.where(bank_of == bank, softmax(logits, bank_of < BANKS), 0.0), 0)
                tl.store(rho + (kept + b) * BANKS + bank, share)
                alpha = softmax(tl.sum(memory * query[None, :], 1), slot < SLOTS) * share
                tl.store(parts + number * WIDTH + m, tl.sum(alpha[:, None] * memory, 0), mask=inside)
            tl.store(own + tile, memory, mask=held)

        if t < T:
            arrive(counter, PROGRAMS)
            rounds = wait(counter, rounds, PROGRAMS)
            for block in range(program, COLUMNS, PROGRAMS):
                column = block * RB + lane
                ok = column < D
                for first in range(0, B, BB):
                    batch = first + tl.arange(0, BB)
                    here = batch < B
                    live = here
                    if HAS_RESET:
                        live = here & (tl.load(reset + now + batch, mask=here, other=0) == 0)
                    mask = here[:, None] & ok[None, :]
                    at = batch[:, None] * D + column[None, :]
                    of_gates = gates + (kept + batch)[:, None] * (2 * D) + column[None, :]
                    r = tl.load(of_gates, mask=mask, other=0.0)
                    old = tl.load(h + now * D + at, mask=mask & live[:, None], other=0.0)
                    r += product(parts, batch, here, w_c, column, ok, BANKS * WIDTH, WIDTH, WIDTH, BANKS, WIDTH, BB, RB, SW, AHEAD)
                    tl.store(of_gates, r, mask=mask)
                    tl.store(reads + at, sigmoid(r) * old, mask=mask)
            arrive(counter, PROGRAMS)
            for block in range(program, COLUMNS, PROGRAMS):
                column = block * RB + lane
                ok = column < D
                for first in range(0, B, BB):
                    batch = first + tl.arange(0, BB)
                    here = batch < B
                    mask = here[:, None] & ok[None, :]
                    at = batch[:, None] * D + column[None, :]
                    of_gates = gates + (kept + batch)[:, None] * (2 * D) + D + column[None, :]
                    z = tl.load(of_gates, mask=mask, other=0.0)
                    x = tl.load(given + (now + batch)[:, None] * GIVEN + KNOWN + 2 * D + column[None, :], mask=mask, other=0.0)
                    z += product(parts, batch, here, w_c, column + D, ok, BANKS * WIDTH, WIDTH, WIDTH, BANKS, WIDTH, BB, RB, SW, AHEAD)
                    x += product(parts, batch, here, w_c, column + 2 * D, ok, BANKS * WIDTH, WIDTH, WIDTH, BANKS, WIDTH, BB, RB, SW, AHEAD)
                    tl.store(of_gates, z, mask=mask)
                    tl.store(candidate + kept * D + at, x, mask=mask)
                    if KEEP:
                        if block == 0:
                            where = batch[:, None] * (BANKS * WIDTH) + m[None, :]
                            inner = here[:, None] & (m < WIDTH)[None, :]
                            whole = tl.zeros((BB, BW), h.dtype.element_ty)
                            for i in tl.static_range(BANKS):
                                whole += tl.load(parts + where + i * WIDTH, mask=inner, other=0.0)
                            tl.store(c + (kept + batch)[:, None] * WIDTH + m[None, :], whole, mask=inner)
            rounds = wait(counter, rounds, PROGRAMS)
            for block in range(program, COLUMNS, PROGRAMS):
                column = block * RB + lane
                ok = column < D
                for first in range(0, B, BB):
                    batch = first + tl.arange(0, BB)
                    here = batch < B
                    live = here
                    if HAS_RESET:
                        live = here & (tl.load(reset + now + batch, mask=here, other=0) == 0)
                    mask = here[:, None] & ok[None, :]
                    at = batch[:, None] * D + column[None, :]
                    z = tl.load(gates + (kept + batch)[:, None] * (2 * D) + D + column[None, :], mask=mask, other=0.0)
                    x = tl.load(candidate + kept * D + at, mask=mask, other=0.0)
                    old = tl.load(h + now * D + at, mask=mask & live[:, None], other=0.0)
                    x += product(reads, batch, here, w_candidate, column, ok, D, D, D, 1, 0, BB, RB, S, AHEAD)
                    new = sigmoid(z) * old + sigmoid(-z) * tanh(x)  # 1 − ζ keeps its digits
                    if HAS_VALID:
                        new = tl.where(tl.load(valid + now + batch, mask=here, other=0)[:, None] != 0, new, old)
                    tl.store(h + (now + B) * D + at, new, mask=mask)
                    if SETTLE:
                        tl.debug_barrier()  # several warps may hold what one stores: others have loaded it
                        tl.store(h + at, new, mask=mask)
                        if HAS_RESIDUAL:
                            new = new.to(out.dtype.element_ty).to(h.dtype.element_ty)
                            new += tl.load(residual + at, mask=mask, other=0.0).to(h.dtype.element_ty)
                        tl.store(out + at, new.to(out.dtype.element_ty), mask=mask)
                    if KEEP:
                        tl.store(candidate + kept * D + at, x, mask=mask)
            arrive(counter, PROGRAMS)
            rounds = wait(counter, rounds, PROGRAMS)
    if SETTLE:
        if PROGRAMS > 1:
            if tl.atomic_add(counter + 1, 1) == PROGRAMS - 1:
                tl.store(counter, 0)
                tl.store(counter + 1, 0)
