"""S4D by matrix products: what stands between a library's.

Tokens go in chunks of C. A channel's matrix, [C + 2P, C + 2P], makes of a chunk's inputs x and of the state h before it the outputs y and
what the chunk adds to the state after it: [y, own] = [x, h] [[K, W], [R, –]], with a = e^{ΔA} and g = (e^{ΔA} − 1)/A

K[j, i] = 2 Re C a^{i−j} g, i ≥ j, and D where i = j;  W[j] = a^{C−1−j} g;  R[·, i] = (2 Re C a^{i+1}, −2 Im C a^{i+1}).

A state is its P real parts, then its P imaginary ones. The rows of a sequence are its chunks and one more: the last C tokens' place, of
which those of the last chunk stand there and zeros elsewhere. That row makes the final state, whatever the length; from the last chunk
itself no state is handed on. The way back takes the same matrix transposed, and its gradient is a product of rows, [x, h]ᵀ [dy, F] with F
the gradient of the state after a chunk. Powers of a are made by squaring in float64.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ("T", "rows", "batch")  # so that no length is compiled anew


@triton.jit
def _pairs(p, d, P: tl.constexpr, BP: tl.constexpr):
    """A channel's complex numbers out of [DIM, P, 2], as two [BP, 1] in float64."""
    k = tl.arange(0, BP)
    re = tl.load(p + (d * P + k) * 2, mask=k < P, other=0.0)
    im = tl.load(p + (d * P + k) * 2 + 1, mask=k < P, other=0.0)
    return re.to(tl.float64)[:, None], im.to(tl.float64)[:, None]


@triton.jit
def _times(ar, ai, br, bi):
    return ar * br - ai * bi, ar * bi + ai * br


@triton.jit
def _against(ar, ai, br, bi):
    """ā b."""
    return ar * br + ai * bi, ar * bi - ai * br


@triton.jit
def _turned(ar, ai, q, BITS: tl.constexpr):
    """a^q [BP, Q] of a [BP, 1] and q [Q] from 0 on."""
    re = tl.zeros_like(ar) + tl.zeros_like(q)[None, :] + 1.0
    im = tl.zeros_like(re)
    for k in tl.static_range(BITS):
        odd = ((q >> k) & 1)[None, :] != 0
        nr, ni = _times(re, im, ar, ai)
        re = tl.where(odd, nr, re)
        im = tl.where(odd, ni, im)
        ar, ai = _times(ar, ai, ar, ai)
    return re, im


@triton.jit
def _power(p, d, q, P: tl.constexpr, BP: tl.constexpr, BITS: tl.constexpr):
    """A channel's a^q for one q, [BP] in float64."""
    ar, ai = _pairs(p, d, P, BP)
    re, im = _turned(ar, ai, q + tl.arange(0, 1), BITS)
    return tl.sum(re, 1), tl.sum(im, 1)


@triton.jit
def entries(
    power, grown, C, D, kernel, matrix,
    P: tl.constexpr, CHUNK: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """W and R of `matrix` [DIM, S, S], and a column of K, `kernel` [DIM, CHUNK]: of a channel, BQ powers a program."""
    S: tl.constexpr = CHUNK + 2 * P
    d = (tl.program_id(0) // (CHUNK // BQ)).to(tl.int64)
    q = tl.program_id(0) % (CHUNK // BQ) * BQ + tl.arange(0, BQ)
    p = tl.arange(0, BP)
    ar, ai = _pairs(power, d, P, BP)
    cr, ci = _pairs(C, d, P, BP)
    gr, gi = _pairs(grown, d, P, BP)
    tr, ti = _turned(ar, ai, q, BITS)
    mask = (p < P)[:, None] & (q >= 0)[None, :]
    wr, wi = _times(tr, ti, gr, gi)
    at = matrix + d * S * S + (CHUNK - 1 - q)[None, :] * S + CHUNK + p[:, None]
    tl.store(at, wr.to(matrix.dtype.element_ty), mask=mask)
    tl.store(at + P, wi.to(matrix.dtype.element_ty), mask=mask)
    lag = 2 * tl.sum(cr * wr - ci * wi, 0)
    lag += tl.where(q == 0, tl.load(D + d).to(tl.float64), 0.0)
    tl.store(kernel + d * CHUNK + q, lag.to(kernel.dtype.element_ty))
    tr, ti = _times(tr, ti, ar, ai)
    rr, ri = _times(tr, ti, cr, ci)
    at = matrix + d * S * S + (CHUNK + p)[:, None] * S + q[None, :]
    tl.store(at, (2 * rr).to(matrix.dtype.element_ty), mask=mask)
    tl.store(at + P * S, (-2 * ri).to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def toeplitz(kernel, matrix, P: tl.constexpr, CHUNK: tl.constexpr, BJ: tl.constexpr):
    """K of `matrix`, BJ rows a program."""
    S: tl.constexpr = CHUNK + 2 * P
    d = (tl.program_id(0) // (CHUNK // BJ)).to(tl.int64)
    j = (tl.program_id(0) % (CHUNK // BJ) * BJ + tl.arange(0, BJ))[:, None]
    i = tl.arange(0, CHUNK)[None, :]
    value = tl.load(kernel + d * CHUNK + i - j, mask=i >= j, other=0.0)
    tl.store(matrix + d * S * S + j * S + i, value)


@triton.jit
def _tile(T, rows, batch, DIM: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """This program's channels [BD], sequence, row, and places in it [BT]."""
    blocks: tl.constexpr = (DIM + BD - 1) // BD
    at = tl.program_id(0)
    d = at % blocks * BD + tl.arange(0, BD)
    at = at // blocks
    j = at % (CHUNK // BT) * BT + tl.arange(0, BT)
    at = at // (CHUNK // BT)
    return d.to(tl.int64), (at // rows).to(tl.int64), (at % rows).to(tl.int64), j


@triton.jit(do_not_specialize=COUNTS)
def spread(
    a, out, T, rows, batch,
    ROW: tl.constexpr, DIM: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """a [batch, T, DIM], whose tokens lie ROW apart, to the first CHUNK columns of out [DIM, batch, rows, S]; without LAST zeros to the
    last row."""
    S: tl.constexpr = CHUNK + 2 * P
    d, b, n, j = _tile(T, rows, batch, DIM, CHUNK, BT, BD)
    last = n == rows - 1
    t = tl.where(last, T - CHUNK, n * CHUNK) + j
    live = (t < T) & (t >= tl.where(last, (rows - 2) * CHUNK, 0))
    if not LAST:
        live = live & (n < rows - 1)
    value = tl.load(a + (b * T + t)[:, None] * ROW + d[None, :], mask=live[:, None] & (d < DIM)[None, :], other=0.0)
    to = out + ((d[None, :] * batch + b) * rows + n) * S + j[:, None]
    tl.store(to, value.to(out.dtype.element_ty), mask=(d < DIM)[None, :] & (j >= 0)[:, None])


@triton.jit(do_not_specialize=COUNTS)
def collect(
    a, out, T, rows, batch,
    DIM: tl.constexpr, CHUNK: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """a [DIM, batch, rows, CHUNK] as out [batch, T, DIM]; with LAST what stands in the last row is added to its tokens."""
    d, b, n, j = _tile(T, rows, batch, DIM, CHUNK, BT, BD)
    t = n * CHUNK + j
    mask = ((t < T) & (n < rows - 1))[:, None] & (d < DIM)[None, :]
    own = a + (d[None, :] * batch + b) * rows * CHUNK
    value = tl.load(own + t[:, None], mask=mask, other=0.0)
    if LAST:
        late = rows * CHUNK - T + t
        value += tl.load(own + late[:, None], mask=mask & (n == rows - 2), other=0.0)
    tl.store(out + (b * T + t)[:, None] * DIM + d[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _row(a, n, p, P: tl.constexpr, S: tl.constexpr):
    return tl.load(a + n * S + p, mask=p < P, other=0.0), tl.load(a + n * S + P + p, mask=p < P, other=0.0)


@triton.jit
def _put(a, n, p, re, im, P: tl.constexpr, S: tl.constexpr):
    tl.store(a + n * S + p, re, mask=p < P)
    tl.store(a + n * S + P + p, im, mask=p < P)


@triton.jit(do_not_specialize=COUNTS)
def carry(
    z, power, initial, final, T, rows, batch,
    DIM: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, BP: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """z [DIM, batch, rows, S]: what each chunk adds to a state becomes the state before it; initial and final [batch, DIM, P, 2]."""
    S: tl.constexpr = CHUNK + 2 * P
    d, b = (tl.program_id(0) // batch).to(tl.int64), (tl.program_id(0) % batch).to(tl.int64)
    p = tl.arange(0, BP)
    acc = z.dtype.element_ty
    ar, ai = _power(power, d, CHUNK, P, BP, BITS)
    er, ei = _power(power, d, T - (rows - 2) * CHUNK, P, BP, BITS)
    ar, ai, er, ei = ar.to(acc), ai.to(acc), er.to(acc), ei.to(acc)
    at = ((b * DIM + d) * P + p) * 2
    hr = tl.load(initial + at, mask=p < P, other=0.0)
    hi = tl.load(initial + at + 1, mask=p < P, other=0.0)
    own = z + tl.program_id(0).to(tl.int64) * rows * S + CHUNK
    xr, xi = _row(own, 0, p, P, S)
    for n in range(rows - 1):
        last = n == rows - 2
        nr, ni = _row(own, n + 1, p, P, S)
        _put(own, n, p, hr, hi, P, S)
        hr, hi = _times(tl.where(last, er, ar), tl.where(last, ei, ai), hr, hi)
        hr += tl.where(last, nr, xr)
        hi += tl.where(last, ni, xi)
        xr, xi = nr, ni
    tl.store(final + at, hr, mask=p < P)
    tl.store(final + at + 1, hi, mask=p < P)


@triton.jit(do_not_specialize=COUNTS)
def carry_back(
    q, z, power, dfinal, dinitial, dpowers, T, rows, batch,
    DIM: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, BP: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """q [DIM, batch, rows, S]: the gradients of the states before chunks, as far as the chunks' own outputs tell them, become those of
    the states after chunks. dpowers [DIM, batch, 2, P, 2]: of a^CHUNK and of what the last tokens make of a state."""
    S: tl.constexpr = CHUNK + 2 * P
    d, b = (tl.program_id(0) // batch).to(tl.int64), (tl.program_id(0) % batch).to(tl.int64)
    p = tl.arange(0, BP)
    acc = z.dtype.element_ty
    ar, ai = _power(power, d, CHUNK, P, BP, BITS)
    er, ei = _power(power, d, T - (rows - 2) * CHUNK, P, BP, BITS)
    ar, ai, er, ei = ar.to(acc), ai.to(acc), er.to(acc), ei.to(acc)
    at = ((b * DIM + d) * P + p) * 2
    fr = tl.load(dfinal + at, mask=p < P, other=0.0)
    fi = tl.load(dfinal + at + 1, mask=p < P, other=0.0)
    place = tl.program_id(0).to(tl.int64) * rows * S + CHUNK
    own, held = q + place, z + place
    end = rows - 2
    xr, xi = _row(own, end, p, P, S)
    hr, hi = _row(held, end, p, P, S)
    _put(own, end + 1, p, fr, fi, P, S)
    _put(own, end, p, tl.zeros_like(fr), tl.zeros_like(fi), P, S)
    last_r, last_i = _against(hr, hi, fr, fi)
    to_r = tl.zeros_like(fr)
    to_i = tl.zeros_like(fi)
    fr, fi = _against(er, ei, fr, fi)
    fr += xr
    fi += xi
    # a row ahead; of the first, itself again
    xr, xi = _row(own, tl.maximum(end - 1, 0), p, P, S)
    hr, hi = _row(held, tl.maximum(end - 1, 0), p, P, S)
    for done in range(rows - 2):
        n = end - 1 - done
        next_xr, next_xi = _row(own, tl.maximum(n - 1, 0), p, P, S)
        next_hr, next_hi = _row(held, tl.maximum(n - 1, 0), p, P, S)
        _put(own, n, p, fr, fi, P, S)
        mr, mi = _against(hr, hi, fr, fi)
        to_r += mr
        to_i += mi
        fr, fi = _against(ar, ai, fr, fi)
        fr += xr
        fi += xi
        xr, xi, hr, hi = next_xr, next_xi, next_hr, next_hi
    tl.store(dinitial + at, fr, mask=p < P)
    tl.store(dinitial + at + 1, fi, mask=p < P)
    to = dpowers + (tl.program_id(0).to(tl.int64) * 2 * P + p) * 2
    tl.store(to, to_r, mask=p < P)
    tl.store(to + 1, to_i, mask=p < P)
    tl.store(to + 2 * P, last_r, mask=p < P)
    tl.store(to + 2 * P + 1, last_i, mask=p < P)


@triton.jit
def lags(slope, dkernel, P: tl.constexpr, CHUNK: tl.constexpr):
    """dkernel [DIM, CHUNK]: sums over the diagonals of K's gradient in slope [DIM, S, S]."""
    S: tl.constexpr = CHUNK + 2 * P
    d = tl.program_id(0).to(tl.int64)
    q = tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), tl.float64)
    for j in range(CHUNK):
        total += tl.load(slope + d * S * S + j * (S + 1) + q, mask=q < CHUNK - j, other=0.0).to(tl.float64)
    tl.store(dkernel + d * CHUNK + q, total)


@triton.jit(do_not_specialize=COUNTS)
def fold(
    slope, dkernel, dpowers, power, grown, C, dpower, dgrown, dC, dD, T, rows,
    P: tl.constexpr, CHUNK: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Gradients of power, grown, C [DIM, P, 2] and D [DIM] from the matrix's: of a channel a program. dpowers [DIM, 2, P, 2]."""
    S: tl.constexpr = CHUNK + 2 * P
    d = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BP)
    ar, ai = _pairs(power, d, P, BP)
    cr, ci = _pairs(C, d, P, BP)
    gr, gi = _pairs(grown, d, P, BP)
    br, bi = _times(cr, ci, gr, gi)
    to_ar = tl.zeros((BP,), tl.float64)
    to_ai = tl.zeros((BP,), tl.float64)
    to_cr = tl.zeros((BP,), tl.float64)
    to_ci = tl.zeros((BP,), tl.float64)
    to_gr = tl.zeros((BP,), tl.float64)
    to_gi = tl.zeros((BP,), tl.float64)
    own = slope + d * S * S
    for top in range(0, CHUNK, BQ):
        q = top + tl.arange(0, BQ)
        mask = (p < P)[:, None] & (q >= 0)[None, :]
        more = mask & (q < CHUNK - 1)[None, :]
        tr, ti = _turned(ar, ai, q, BITS)
        # a^q g stands in W at CHUNK − 1 − q, a^{q+1} C in R at q, C a^q g in K
        at = own + (CHUNK + p)[:, None] * S + q[None, :]
        zr = 2 * tl.load(at, mask=mask, other=0.0).to(tl.float64)
        zi = -2 * tl.load(at + P * S, mask=mask, other=0.0).to(tl.float64)
        at = own + (CHUNK - 1 - q)[None, :] * S + CHUNK + p[:, None]
        wr = tl.load(at, mask=mask, other=0.0).to(tl.float64)
        wi = tl.load(at + P, mask=mask, other=0.0).to(tl.float64)
        vr = tl.load(at - S, mask=more, other=0.0).to(tl.float64)
        vi = tl.load(at - S + P, mask=more, other=0.0).to(tl.float64)
        k = 2 * tl.load(dkernel + d * CHUNK + q)[None, :]
        k1 = 2 * tl.load(dkernel + d * CHUNK + q + 1, mask=q < CHUNK - 1, other=0.0)[None, :]
        mr, mi = _against(cr, ci, k, tl.zeros_like(k))
        mr, mi = _against(tr, ti, wr + mr, wi + mi)
        to_gr += tl.sum(mr, 1)
        to_gi += tl.sum(mi, 1)
        mr, mi = _against(gr, gi, k, tl.zeros_like(k))
        nr, ni = _against(ar, ai, zr, zi)
        mr, mi = _against(tr, ti, mr + nr, mi + ni)
        to_cr += tl.sum(mr, 1)
        to_ci += tl.sum(mi, 1)
        mr, mi = _against(cr, ci, zr, zi)
        nr, ni = _against(gr, gi, vr, vi)
        lr, li = _against(br, bi, k1, tl.zeros_like(k1))
        mr, mi = _against(tr, ti, mr + nr + lr, mi + ni + li)
        times = (q + 1).to(tl.float64)[None, :]
        to_ar += tl.sum(times * mr, 1)
        to_ai += tl.sum(times * mi, 1)
    place = (d * P + p) * 2
    for which in tl.static_range(2):
        count = CHUNK if which == 0 else T - (rows - 2) * CHUNK
        tr, ti = _power(power, d, count - 1, P, BP, BITS)
        at = dpowers + (d * 2 + which) * 2 * P + p * 2
        mr = tl.load(at, mask=p < P, other=0.0).to(tl.float64)
        mi = tl.load(at + 1, mask=p < P, other=0.0).to(tl.float64)
        mr, mi = _against(tr, ti, mr, mi)
        to_ar += count * mr
        to_ai += count * mi
    tl.store(dpower + place, to_ar.to(dpower.dtype.element_ty), mask=p < P)
    tl.store(dpower + place + 1, to_ai.to(dpower.dtype.element_ty), mask=p < P)
    tl.store(dgrown + place, to_gr.to(dgrown.dtype.element_ty), mask=p < P)
    tl.store(dgrown + place + 1, to_gi.to(dgrown.dtype.element_ty), mask=p < P)
    tl.store(dC + place, to_cr.to(dC.dtype.element_ty), mask=p < P)
    tl.store(dC + place + 1, to_ci.to(dC.dtype.element_ty), mask=p < P)
    tl.store(dD + d, tl.load(dkernel + d * CHUNK).to(dD.dtype.element_ty))
