"""y = f(norm(x) Wᵀ + b) of some ten sequences, perhaps added to a residual, in one launch, by tensor cores.

A program owns WIDE rows of W with all their columns, which it holds in registers before the kernel before it has ended, and norms the rows
of x itself. Its warps share the columns: each takes a product of some of them, and the products are added, so that none is a long chain.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from unisono_torch.kernels.decode.common import (
    ACTIVATIONS,
    LAYER_EPS,
    NORMS,
    SHRUNK,
    activated,
    dot_of,
    kind_of,
    launch,
    ready,
    rows_convolved,
)
from unisono_torch.kernels.registry import interpreted

TALL = 16  # rows of x a program, which is what a tensor core takes
LONGEST = 4096  # columns of W, which registers hold with as many of x
HELD = 24 << 10  # numbers of 16 bits of W that a program holds
REGISTERS = 200  # of a thread, for two numbers of 16 bits each
ENOUGH = 120  # programs that a large GPU runs at once, about

Norm = tuple[str, Tensor | None, Tensor | None, float]


class Slab(NamedTuple):
    """Rows of W a program, pieces of a row and their columns, warps, of which each has its own columns of a piece."""

    wide: int
    rounds: int
    chunk: int
    warps: int


@triton.jit
def held(W, n, N, K: tl.constexpr, ROUNDS: tl.constexpr, CHUNK: tl.constexpr):
    """Rows n of W, in ROUNDS pieces [·, CHUNK]."""
    rows = W + n.to(tl.int64)[:, None] * K
    pieces = ()
    for piece in tl.static_range(ROUNDS):
        k = piece * CHUNK + tl.arange(0, CHUNK)
        pieces = pieces + (tl.load(rows + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0),)  # noqa: RUF005
    return pieces


@triton.jit
def scales(gain, shift, K: tl.constexpr, NORM: tl.constexpr, ROUNDS: tl.constexpr, CHUNK: tl.constexpr):
    """A norm's gain and shift, in pieces."""
    pieces = ()
    for piece in tl.static_range(ROUNDS):
        k = piece * CHUNK + tl.arange(0, CHUNK)
        more = tl.zeros((CHUNK,), tl.float32)
        one = more
        if NORM > 0:
            one = tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
        if NORM == 2:
            more = tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)
        pieces = pieces + ((one, more),)  # noqa: RUF005
    return pieces


@triton.jit
def rows_normed(
    x, m, M, x_row, scale, K: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, TYPE: tl.constexpr, ROUNDS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Rows m of x in pieces, in TYPE, and their norm where there is one."""
    rows = x + m.to(tl.int64)[:, None] * x_row
    given = ()
    for piece in tl.static_range(ROUNDS):
        k = piece * CHUNK + tl.arange(0, CHUNK)
        a = tl.load(rows + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        given = given + ((a.to(tl.float32) if NORM > 0 else a.to(TYPE)),)  # noqa: RUF005
    if NORM > 0:
        SHARE: tl.constexpr = SHRUNK if NORM == 2 else 1.0
        mean = tl.zeros((m.shape[0],), tl.float32)
        if NORM == 2:
            for piece in tl.static_range(ROUNDS):
                mean += tl.sum(given[piece], 1)
            mean = mean / K
        square = tl.zeros((m.shape[0],), tl.float32)
        for piece in tl.static_range(ROUNDS):
            k = piece * CHUNK + tl.arange(0, CHUNK)
            a = tl.where((k < K)[None, :], (given[piece] - mean[:, None]) * SHARE, 0.0)
            square += tl.sum(a * a, 1)
        rate = 1 / tl.sqrt(square / K + (EPS if NORM == 1 else LAYER_EPS))
        made = ()
        for piece in tl.static_range(ROUNDS):
            a = (given[piece] - mean[:, None]) * SHARE * rate[:, None] * scale[piece][0][None, :]
            if NORM == 2:
                a += scale[piece][1][None, :]
            made = made + (a.to(TYPE),)  # noqa: RUF005
        given = made
    return given


@triton.jit
def multiplied(a, w, DOT: tl.constexpr, ROUNDS: tl.constexpr, CHUNK: tl.constexpr, SPLIT: tl.constexpr):
    """Pieces a [m, CHUNK] times pieces w [n, CHUNK] → [m, n] float32; SPLIT parts of a piece are products of their own."""
    m: tl.constexpr = a[0].shape[0]
    n: tl.constexpr = w[0].shape[0]
    total = tl.zeros((SPLIT, m, n), tl.float32)
    for piece in tl.static_range(ROUNDS):
        left = tl.permute(tl.reshape(a[piece].to(DOT), (m, SPLIT, CHUNK // SPLIT)), (1, 0, 2))
        right = tl.permute(tl.reshape(w[piece].to(DOT), (n, SPLIT, CHUNK // SPLIT)), (1, 2, 0))
        total = tl.dot(left, right, total, input_precision="ieee")
    return tl.sum(total, 0)


@triton.jit
def slab(
    x, W, W2, bias, bias2, gain, shift, residual, out, conv, conv_weight, conv_bias, beside, beside_bias, beside_out, M, N, x_row,
    MORE: tl.constexpr, PROGRAMS: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, CONV_BIAS: tl.constexpr,
    TYPE: tl.constexpr, DOT: tl.constexpr, EARLY: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, ROUNDS: tl.constexpr,
    CHUNK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """x [M, K], W and W2 [N, K] → out [M, N], as `project` (project.py), of which this is the form for some ten sequences. The programs
    from PROGRAMS on: MORE columns of another product of the same norm, in float32."""
    m = tl.program_id(1) * TALL + tl.arange(0, TALL)
    scale = scales(gain, shift, K, NORM, ROUNDS, CHUNK)
    if MORE > 0 and tl.program_id(0) >= PROGRAMS:
        more = tl.program_id(0) - PROGRAMS
        ready(EARLY)
        given = rows_normed(x, m, M, x_row, scale, K, NORM, EPS, TYPE, ROUNDS, CHUNK)
        near = tl.zeros((TALL,), tl.float32) + tl.load(beside_bias + more)
        for piece in tl.static_range(ROUNDS):
            k = piece * CHUNK + tl.arange(0, CHUNK)
            near += tl.sum(given[piece].to(tl.float32) * tl.load(beside + more * K + k, mask=k < K, other=0.0)[None, :], 1)
        tl.store(beside_out + m * MORE + more, near, mask=m < M)
    else:
        n = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
        w = held(W, n, N, K, ROUNDS, CHUNK)
        if ACT >= 4:
            w2 = held(W2, n, N, K, ROUNDS, CHUNK)
        if HAS_BIAS:
            add = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
            if ACT >= 4:
                add2 = tl.load(bias2 + n, mask=n < N, other=0.0).to(tl.float32)
        mask = (m < M)[:, None] & (n < N)[None, :]
        at = m.to(tl.int64)[:, None] * N + n[None, :]
        ready(EARLY)
        if HAS_RESIDUAL:
            before = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        given = rows_normed(x, m, M, x_row, scale, K, NORM, EPS, TYPE, ROUNDS, CHUNK)
        y = multiplied(given, w, DOT, ROUNDS, CHUNK, SPLIT)
        if HAS_BIAS:
            y += add[None, :]
        y = y.to(TYPE).to(tl.float32)
        gate = y
        if ACT >= 4:
            gate = multiplied(given, w2, DOT, ROUNDS, CHUNK, SPLIT)
            if HAS_BIAS:
                gate += add2[None, :]
            gate = gate.to(TYPE).to(tl.float32)
        y = activated(y, gate, ACT, TYPE)
        if CHANNELS > 0:
            y = rows_convolved(y, m, n, conv, conv_weight, conv_bias, mask, CHANNELS, TAPS, CONV_BIAS, TYPE)
        y = y.to(TYPE)
        if HAS_RESIDUAL:
            y = (y.to(tl.float32) + before).to(TYPE)
        tl.store(out + at, y, mask=mask)


def shape_of(n: int, k: int, paired: bool, warps: int = 4) -> Slab:
    """Of a product with W [n, k]: as many programs as a GPU runs at once, or fewer; no more of W than registers hold."""
    rounds, chunk = pieces(k)
    if interpreted():
        return Slab(min(32, max(16, triton.next_power_of_2(n))), rounds, chunk, min(warps, chunk // 16))
    wide = 32 // (1 + paired)
    while wide > 8 and (triton.cdiv(n, wide) < ENOUGH or wide * rounds * chunk * (1 + paired) > HELD):
        wide //= 2
    if (TALL + wide * (1 + paired)) * rounds * chunk > REGISTERS * 64 * warps:
        warps *= 2
    return Slab(wide, rounds, chunk, max(1, min(warps, chunk // 16)))


def pieces(k: int) -> tuple[int, int]:
    """How many pieces of how many columns, a power of two, hold k of them and few more."""
    whole = max(16, triton.next_power_of_2(k))
    found = [(triton.cdiv(k, chunk), chunk) for chunk in (whole, whole // 2, whole // 4, whole // 8) if chunk >= min(whole, 128)]
    least = min(rounds * chunk for rounds, chunk in found)
    return next((rounds, chunk) for rounds, chunk in found if rounds * chunk == least)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    second: Tensor | None,
    second_bias: Tensor | None,
    norm: Norm,
    act: str,
    residual: Tensor | None,
    conv: tuple[Tensor, Tensor | None, Tensor] | None,
    beside: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """As `projected` (project.py)."""
    (batch, k), n = x.shape, weight.shape[0]
    out = weight.new_empty((batch, n))
    kind, gain, shift, eps = norm
    conv_weight, conv_bias, state = (None, None, None) if conv is None else conv
    more, more_bias, to = beside or (None, None, None)
    shape, rest = shape_of(n, k, second is not None), 0 if more is None else len(more)
    programs = triton.cdiv(n, shape.wide)
    slab[(programs + rest, triton.cdiv(batch, TALL))](
        x, weight, second, bias, second_bias, gain, shift, residual, out, state, conv_weight, conv_bias, more, more_bias, to, M=batch, N=n,
        x_row=x.stride(0), MORE=rest, PROGRAMS=programs, K=k, NORM=NORMS[kind], EPS=eps, ACT=ACTIVATIONS[act], HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, CHANNELS=0 if conv_weight is None else conv_weight.shape[0],
        TAPS=1 if conv_weight is None else conv_weight.shape[-1], CONV_BIAS=conv_bias is not None, TYPE=kind_of(weight.dtype),
        DOT=dot_of(weight.dtype), TALL=TALL, WIDE=shape.wide, ROUNDS=shape.rounds, CHUNK=shape.chunk, SPLIT=shape.warps,
        num_warps=shape.warps, **launch(x.device),
    )  # fmt: skip
    return out
