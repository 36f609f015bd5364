"""S4D: h_t = a h_{t−1} + g u_t, y_t = 2 Re Σ_n C_n h_{t,n} + D u_t, with a = e^{ΔA} and g = (e^{ΔA} − 1)/A, complex as two reals.

A program owns ROWS channels of a sequence with all their P states. Time goes in groups of GROUP tokens, whose inputs are loaded while the
group before them is computed; every TILE tokens the states are saved for the backward. That takes tiles from the last to the first: the
states before each token of a group are computed once more, in registers, from those saved before its tile, and swept back:

G_t = 2 C̄ dy_t + ā G_{t+1},  du_t = Re ḡ G_t + D dy_t,  dg = Σ u_t G_t,  da = Σ h̄_{t−1} G_t,  dC = Σ 2 dy_t h̄_t.

Real and imaginary parts are arrays of their own, [..., 2, DIM, P], so that a thread's states are neighbours.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# ruff: noqa: RUF005, SIM102, SIM108 (its tuples grow by +, its constants are no conditions)

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ("T", "count")  # so that no length is compiled anew


@triton.jit
def _states(p, at, cell, mask, SIZE: tl.constexpr):
    return tl.load(p + at + cell, mask=mask, other=0.0), tl.load(p + at + SIZE + cell, mask=mask, other=0.0)


@triton.jit
def _store(p, at, cell, mask, re, im, SIZE: tl.constexpr):
    tl.store(p + at + cell, re, mask=mask)
    tl.store(p + at + SIZE + cell, im, mask=mask)


@triton.jit
def _tokens(p, batch, top, T, row, c, valid, DIM: tl.constexpr, GROUP: tl.constexpr, HAS_VALID: tl.constexpr, ACC: tl.constexpr):
    """GROUP tokens of [B, T, DIM], whose rows lie `row` apart, from `top` on: 0 beyond the end and where they are not valid."""
    out = ()
    for k in tl.static_range(GROUP):
        at = batch * T + top + k
        live = (top + k < T) & (top + k >= 0)
        if HAS_VALID:
            live = live & (tl.load(valid + at, mask=live, other=0) != 0)
        out = out + (tl.load(p + at * row + c, mask=(c < DIM) & live, other=0.0).to(ACC),)
    return out


@triton.jit
def _marks(p, batch, top, T, GROUP: tl.constexpr, HAS: tl.constexpr, DEFAULT: tl.constexpr):
    """Whether each of GROUP tokens is marked, as scalars; none beyond the end."""
    out = ()
    for k in tl.static_range(GROUP):
        here = top + k < T
        if HAS:
            out = out + (tl.load(p + batch * T + top + k, mask=here, other=0) != 0,)
        else:
            out = out + (here & DEFAULT,)
    return out


@triton.jit
def _place(DIM: tl.constexpr, ROWS: tl.constexpr):
    """This program's sequence and channels. A grid's first axis alone counts past 65,535."""
    blocks: tl.constexpr = (DIM + ROWS - 1) // ROWS
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)


@triton.jit
def _advanced(hr, hi, ar, ai, gr, gi, x):
    return ar * hr - ai * hi + gr * x[:, None], ar * hi + ai * hr + gi * x[:, None]


@triton.jit(do_not_specialize=COUNTS)
def forward(
    u, power, grown, C, D, initial, reset, valid, y, final, saved, T, count,
    U_ROW: tl.constexpr, DIM: tl.constexpr, P: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr, SAVE: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y [B, T, DIM], final [B, 2, DIM, P], and with SAVE the states before each tile [B, count, 2, DIM, P]."""
    batch, c = _place(DIM, ROWS)
    p = tl.arange(0, BP)
    mask = (c < DIM)[:, None] & (p < P)[None, :]
    cell = c[:, None] * P + p[None, :]
    SIZE: tl.constexpr = DIM * P
    ar, ai = _states(power, 0, cell, mask, SIZE)
    gr, gi = _states(grown, 0, cell, mask, SIZE)
    cr, ci = _states(C, 0, cell, mask, SIZE)
    skip = tl.load(D + c, mask=c < DIM, other=0.0)
    hr, hi = _states(initial, batch * 2 * SIZE, cell, mask, SIZE)
    ahead = _tokens(u, batch, 0, T, U_ROW, c, valid, DIM, GROUP, HAS_VALID, ACC)
    for top in range(0, T, GROUP):
        x = ahead
        ahead = _tokens(u, batch, top + GROUP, T, U_ROW, c, valid, DIM, GROUP, HAS_VALID, ACC)
        starts = _marks(reset, batch, top, T, GROUP, HAS_RESET, False)
        lives = _marks(valid, batch, top, T, GROUP, HAS_VALID, True)
        if SAVE:
            if top % TILE == 0:
                _store(saved, (batch * count + top // TILE) * 2 * SIZE, cell, mask, hr, hi, SIZE)
        for k in tl.static_range(GROUP):
            if HAS_RESET:
                hr = tl.where(starts[k], 0.0, hr)
                hi = tl.where(starts[k], 0.0, hi)
            nr, ni = _advanced(hr, hi, ar, ai, gr, gi, x[k])
            hr = tl.where(lives[k], nr, hr)
            hi = tl.where(lives[k], ni, hi)
            out = 2 * tl.sum(cr * hr - ci * hi, 1) + skip * x[k]
            out = tl.where(lives[k], out, 0.0)
            tl.store(y + (batch * T + top + k) * DIM + c, out.to(y.dtype.element_ty), mask=(c < DIM) & (top + k < T))
    _store(final, batch * 2 * SIZE, cell, mask, hr, hi, SIZE)


@triton.jit(do_not_specialize=COUNTS)
def backward(
    u, power, grown, C, D, reset, valid, saved, dy, dfinal, du, dpower, dgrown, dC, dD, dinitial, T, count,
    U_ROW: tl.constexpr, DIM: tl.constexpr, P: tl.constexpr, HAS_RESET: tl.constexpr, HAS_VALID: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """All gradients; those of power, grown, C [B, 2, DIM, P] and D [B, DIM] a sequence."""
    batch, c = _place(DIM, ROWS)
    p = tl.arange(0, BP)
    mask = (c < DIM)[:, None] & (p < P)[None, :]
    cell = c[:, None] * P + p[None, :]
    SIZE: tl.constexpr = DIM * P
    ar, ai = _states(power, 0, cell, mask, SIZE)
    gr, gi = _states(grown, 0, cell, mask, SIZE)
    cr, ci = _states(C, 0, cell, mask, SIZE)
    skip = tl.load(D + c, mask=c < DIM, other=0.0)
    own = batch * 2 * SIZE
    Gr, Gi = _states(dfinal, own, cell, mask, SIZE)
    to_ar = tl.zeros((ROWS, BP), ACC)
    to_ai = tl.zeros((ROWS, BP), ACC)
    to_gr = tl.zeros((ROWS, BP), ACC)
    to_gi = tl.zeros((ROWS, BP), ACC)
    to_cr = tl.zeros((ROWS, BP), ACC)
    to_ci = tl.zeros((ROWS, BP), ACC)
    to_D = tl.zeros((ROWS,), ACC)
    for done in range(count):
        low = (count - 1 - done) * TILE
        groups = tl.cdiv(tl.minimum(TILE, T - low), GROUP)
        for undone in range(groups):
            group = groups - 1 - undone
            top = low + group * GROUP
            d = _tokens(dy, batch, top, T, DIM, c, valid, DIM, GROUP, HAS_VALID, ACC)
            hr, hi = _states(saved, (batch * count + count - 1 - done) * 2 * SIZE, cell, mask, SIZE)
            ahead = _tokens(u, batch, low, T, U_ROW, c, valid, DIM, GROUP, HAS_VALID, ACC)
            for before in range(group):
                x = ahead
                first = low + before * GROUP
                ahead = _tokens(u, batch, first + GROUP, T, U_ROW, c, valid, DIM, GROUP, HAS_VALID, ACC)
                starts = _marks(reset, batch, first, T, GROUP, HAS_RESET, False)
                lives = _marks(valid, batch, first, T, GROUP, HAS_VALID, True)
                for k in tl.static_range(GROUP):
                    if HAS_RESET:
                        hr = tl.where(starts[k], 0.0, hr)
                        hi = tl.where(starts[k], 0.0, hi)
                    nr, ni = _advanced(hr, hi, ar, ai, gr, gi, x[k])
                    if HAS_VALID:
                        nr = tl.where(lives[k], nr, hr)
                        ni = tl.where(lives[k], ni, hi)
                    hr = nr
                    hi = ni
            x = ahead
            starts = _marks(reset, batch, top, T, GROUP, HAS_RESET, False)
            lives = _marks(valid, batch, top, T, GROUP, HAS_VALID, True)
            held_r = ()
            held_i = ()
            for k in tl.static_range(GROUP):
                if HAS_RESET:
                    hr = tl.where(starts[k], 0.0, hr)
                    hi = tl.where(starts[k], 0.0, hi)
                held_r = held_r + (hr,)
                held_i = held_i + (hi,)
                nr, ni = _advanced(hr, hi, ar, ai, gr, gi, x[k])
                hr = tl.where(lives[k], nr, hr)
                hi = tl.where(lives[k], ni, hi)
            for k in tl.static_range(GROUP - 1, -1, -1):
                hr = held_r[k]
                hi = held_i[k]
                nr, ni = _advanced(hr, hi, ar, ai, gr, gi, x[k])
                slope = 2 * d[k]
                # where a token is not valid, u and dy are 0, and G stays as it is
                Fr = Gr + cr * slope[:, None]
                Fi = Gi - ci * slope[:, None]
                to_cr += nr * slope[:, None]
                to_ci -= ni * slope[:, None]
                to_gr += Fr * x[k][:, None]
                to_gi += Fi * x[k][:, None]
                out = tl.sum(gr * Fr + gi * Fi, 1) + skip * d[k]
                to_D += d[k] * x[k]
                out = tl.where(lives[k], out, 0.0)
                tl.store(du + (batch * T + top + k) * DIM + c, out.to(du.dtype.element_ty), mask=(c < DIM) & (top + k < T))
                to_ar += tl.where(lives[k], hr * Fr + hi * Fi, 0.0)
                to_ai += tl.where(lives[k], hr * Fi - hi * Fr, 0.0)
                Gr = tl.where(lives[k], ar * Fr + ai * Fi, Gr)
                Gi = tl.where(lives[k], ar * Fi - ai * Fr, Gi)
                if HAS_RESET:
                    Gr = tl.where(starts[k], 0.0, Gr)
                    Gi = tl.where(starts[k], 0.0, Gi)
    _store(dinitial, own, cell, mask, Gr, Gi, SIZE)
    _store(dpower, own, cell, mask, to_ar, to_ai, SIZE)
    _store(dgrown, own, cell, mask, to_gr, to_gi, SIZE)
    _store(dC, own, cell, mask, to_cr, to_ci, SIZE)
    tl.store(dD + batch * DIM + c, to_D, mask=c < DIM)
