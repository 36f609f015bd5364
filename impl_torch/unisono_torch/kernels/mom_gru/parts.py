"""What both kernels of MoM-GRU share: how programs wait for each other, products with a few rows of a matrix, σ and tanh.

PROGRAMS programs, all of them on the GPU at once, go through the tokens together. Between two phases each arrives at a barrier and waits
for all to arrive: what one stored before, the others load after. Work that no other program needs at once stands between the two. A phase's
work is in blocks (RB rows of a matrix for all sequences, or the memory bank of a sequence), dealt out in steps of PROGRAMS, columns of h to
the first programs and banks to the last: one program alone takes them all, and waits for no one.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false
# ruff: noqa: RUF005 (its tuples grow by +, )

from __future__ import annotations

import triton
import triton.language as tl

from unisono_torch.kernels import barrier

LOG2E = tl.constexpr(1.4426950408889634)


_FETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")


@triton.jit
def arrive(counter, PROGRAMS: tl.constexpr):
    """What this program has stored is there for all who `wait`."""
    if PROGRAMS > 1:
        barrier.arrive(counter)


@triton.jit
def wait(counter, rounds, PROGRAMS: tl.constexpr):
    """Until all programs have arrived `rounds` times. → rounds + 1, for the next time."""
    if PROGRAMS > 1:
        barrier.wait(counter, rounds * PROGRAMS)
    return rounds + 1


@triton.jit
def fetch(p, PROGRAMS: tl.constexpr):
    """Brings what p [N] points to into L2: what comes from memory would keep all programs waiting."""
    if PROGRAMS > 1:
        tl.inline_asm_elementwise(_FETCH, "=r,l", [p], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def product(
    x, batch, live, w, rows, ok, STRIDE: tl.constexpr, K: tl.constexpr, ROW: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
    BB: tl.constexpr, R: tl.constexpr, S: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """x [BB, K] · w[rows] [R, K]ᵀ → [BB, R]; x is the sum of PARTS pieces PART apart, in rows STRIDE apart, 0 where not live [BB].

    K is cut over S warps, 16 at a time; all loads of AHEAD such cuts are issued before the first product.
    """
    CUTS: tl.constexpr = (K + 16 * S - 1) // (16 * S)
    kx = tl.arange(0, S)[:, None, None] * 16 + tl.arange(0, 16)[None, None, :]
    kw = tl.arange(0, S)[:, None, None] * 16 + tl.arange(0, 16)[None, :, None]
    xp = x + batch[None, :, None] * STRIDE + kx
    wp = w + rows[None, None, :] * ROW + kw
    acc = tl.zeros((S, BB, R), x.dtype.element_ty)
    for first in tl.static_range(0, CUTS, AHEAD):
        xs = ()
        ws = ()
        for i in tl.static_range(AHEAD):
            if first + i < CUTS:
                at = (first + i) * 16 * S
                mask = live[None, :, None] & (at + kx < K)
                value = tl.load(xp + at, mask=mask, other=0.0)
                for part in tl.static_range(1, PARTS):
                    value += tl.load(xp + at + part * PART, mask=mask, other=0.0)
                xs = xs + (value,)
                ws = ws + (tl.load(wp + at, mask=ok[None, None, :] & (at + kw < K), other=0.0),)
        for i in tl.static_range(AHEAD):
            if first + i < CUTS:
                acc = tl.dot(xs[i], ws[i], acc, input_precision="tf32x3", out_dtype=x.dtype.element_ty)
    return tl.sum(acc, 0)


@triton.jit
def softmax(s, ok):
    """Of s [L], where ok; 0 elsewhere."""
    s = tl.where(ok, s, -float("inf"))
    most = tl.max(tl.where(s == s, s, -float("inf")), 0)  # a maximum knows no NaN
    e = tl.exp2((s - tl.where(most == -float("inf"), 0.0, most)) * LOG2E)
    return e / tl.sum(e, 0)


@triton.jit
def sigmoid(x):
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def slope(x):
    """Of σ: σ(x) σ(−x), since y(1−y) has no digits where y is nearly 1."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return e / ((1 + e) * (1 + e))


@triton.jit
def tanh(x):
    """(1 − e) / (1 + e), e = e^−2|x|; below ½, where 1 − e loses digits, a convergent of Lambert's continued fraction (off by x¹⁵/10¹²)."""
    q = x * x
    small = x * (135135 + q * (17325 + q * (378 + q))) / (135135 + q * (62370 + q * (3150 + 28 * q)))
    e = tl.exp2(-2 * tl.abs(x) * LOG2E)
    large = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.5, small, tl.where(x < 0, -large, large))
