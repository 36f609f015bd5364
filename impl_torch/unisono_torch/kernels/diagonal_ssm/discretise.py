"""e^{ΔA} and (e^{ΔA} − 1)/A in float64, and the way back: a launch each, where plain operations take a hundred.

With z = ΔA = x + iy: e^z − 1 = (e^x − 1) cos y − 2 sin²(y/2) + i e^x sin y, which loses nothing where z is small.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

TERMS = 18  # of e^x − 1 below ln 2


@triton.jit
def _less_one(x, TERMS: tl.constexpr):
    """e^x − 1."""
    near = tl.abs(x) < 0.7
    small = tl.where(near, x, 0.0)
    total = tl.zeros_like(x) + 1.0
    for k in tl.static_range(TERMS, 1, -1):
        total = 1.0 + total * small / k
    return tl.where(near, small * total, tl.exp(x) - 1.0)


@triton.jit
def _over(ar, ai, br, bi):
    """a / b."""
    size = br * br + bi * bi
    return (ar * br + ai * bi) / size, (ai * br - ar * bi) / size


@triton.jit
def _known(dt, A, d, P: tl.constexpr, BP: tl.constexpr, TERMS: tl.constexpr):
    """A channel's Δ, A, e^{ΔA} and (e^{ΔA} − 1)/A."""
    p = tl.arange(0, BP)
    re = tl.load(A + (d * P + p) * 2, mask=p < P, other=-1.0).to(tl.float64)
    im = tl.load(A + (d * P + p) * 2 + 1, mask=p < P, other=0.0).to(tl.float64)
    step = tl.load(dt + d).to(tl.float64)
    x, y = step * re, step * im
    size, half = tl.exp(x), tl.sin(y / 2)
    er, ei = size * tl.cos(y), size * tl.sin(y)
    gr, gi = _over(_less_one(x, TERMS) * tl.cos(y) - 2 * half * half, ei, re, im)
    return step, re, im, er, ei, gr, gi


@triton.jit
def forward(dt, A, power, grown, P: tl.constexpr, BP: tl.constexpr, TERMS: tl.constexpr):
    """dt [D], A [D, P, 2] → power, grown [D, P, 2], a channel a program."""
    d = tl.program_id(0).to(tl.int64)
    _, _, _, er, ei, gr, gi = _known(dt, A, d, P, BP, TERMS)
    p = tl.arange(0, BP)
    at = (d * P + p) * 2
    tl.store(power + at, er, mask=p < P)
    tl.store(power + at + 1, ei, mask=p < P)
    tl.store(grown + at, gr, mask=p < P)
    tl.store(grown + at + 1, gi, mask=p < P)


@triton.jit
def backward(dt, A, dpower, dgrown, ddt, dA, P: tl.constexpr, BP: tl.constexpr, TERMS: tl.constexpr):
    """Of f(z) the gradient is that of its value times the conjugate of f'."""
    d = tl.program_id(0).to(tl.int64)
    step, re, im, er, ei, gr, gi = _known(dt, A, d, P, BP, TERMS)
    p = tl.arange(0, BP)
    at = (d * P + p) * 2
    tr = tl.load(dpower + at, mask=p < P, other=0.0).to(tl.float64)
    ti = tl.load(dpower + at + 1, mask=p < P, other=0.0).to(tl.float64)
    wr = tl.load(dgrown + at, mask=p < P, other=0.0).to(tl.float64)
    wi = tl.load(dgrown + at + 1, mask=p < P, other=0.0).to(tl.float64)
    sr, si = _over(step * er - gr, step * ei - gi, re, im)
    to_r = step * (er * tr + ei * ti) + sr * wr + si * wi
    to_i = step * (er * ti - ei * tr) + sr * wi - si * wr
    tl.store(dA + at, to_r.to(dA.dtype.element_ty), mask=p < P)
    tl.store(dA + at + 1, to_i.to(dA.dtype.element_ty), mask=p < P)
    slope = (re * er - im * ei) * tr + (re * ei + im * er) * ti + er * wr + ei * wi
    tl.store(ddt + d, tl.sum(tl.where(p < P, slope, 0.0), 0).to(ddt.dtype.element_ty))
