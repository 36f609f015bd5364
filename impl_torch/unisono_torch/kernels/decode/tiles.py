"""y = f(norm(x) Wᵀ + b) of many sequences, perhaps added to a residual, in one launch: tiles of a matrix product by tensor cores.

A program owns a tile of y. It takes its rows' mean and scale first, and norms pieces of them again on their way into the product, rounded
as plain operations round. float32 is a product of three in tf32.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unisono_torch.kernels.decode.common import ACTIVATIONS, LAYER_EPS, NORMS, activated, convolved, kind_of, launch, ready
from unisono_torch.kernels.registry import interpreted

FULL = 120  # programs that a large GPU runs at once, about


class Tile(NamedTuple):
    """Rows and columns of y, pieces of K, warps, and how many pieces are on their way."""

    tall: int
    wide: int
    deep: int
    warps: int
    stages: int


@triton.jit
def summed(
    x, W, W2, gain, shift, m, n, M, N, x_row, K: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, TYPE: tl.constexpr,
    DOT: tl.constexpr, PAIRED: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Rows m of norm(x), rounded to TYPE, times rows n of W and W2 → [m, n] twice, float32."""
    rows = m.to(tl.int64)[:, None] * x_row
    inside = (m < M)[:, None]
    PIECE: tl.constexpr = 8192 // m.shape[0]  # of rows, in registers
    mean = tl.zeros((m.shape[0],), tl.float32)
    rate = tl.zeros((m.shape[0],), tl.float32)
    if NORM == 2:
        for low in range(0, K, PIECE):
            k = low + tl.arange(0, PIECE)
            mean += tl.sum(tl.load(x + rows + k[None, :], mask=inside & (k < K)[None, :], other=0.0).to(tl.float32), 1)
        mean = mean / K
    if NORM > 0:
        for low in range(0, K, PIECE):
            k = low + tl.arange(0, PIECE)
            held = tl.load(x + rows + k[None, :], mask=inside & (k < K)[None, :], other=0.0).to(tl.float32)
            held = tl.where((k < K)[None, :], held - mean[:, None], 0.0)
            rate += tl.sum(held * held, 1)
        rate = 1 / tl.sqrt(rate / K + (EPS if NORM == 1 else LAYER_EPS))
    PRECISION: tl.constexpr = "tf32x3" if tl.float32 == DOT else "ieee"
    own = n.to(tl.int64)[None, :] * K
    total = tl.zeros((m.shape[0], n.shape[0]), tl.float32)
    other = tl.zeros((m.shape[0], n.shape[0]), tl.float32)
    for low in range(0, K, DEEP):
        k = low + tl.arange(0, DEEP)
        a = tl.load(x + rows + k[None, :], mask=inside & (k < K)[None, :], other=0.0)
        if NORM > 0:
            a = (a.to(tl.float32) - mean[:, None]) * rate[:, None]
            a = a * tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            if NORM == 2:
                a += tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        a = a.to(TYPE).to(DOT)
        mask = (k < K)[:, None] & (n < N)[None, :]
        total = tl.dot(a, tl.load(W + own + k[:, None], mask=mask, other=0.0).to(DOT), total, input_precision=PRECISION)
        if PAIRED:
            other = tl.dot(a, tl.load(W2 + own + k[:, None], mask=mask, other=0.0).to(DOT), other, input_precision=PRECISION)
    return total, other


@triton.jit
def tiled(
    x, W, W2, bias, bias2, gain, shift, residual, out, conv, conv_weight, conv_bias, beside, beside_bias, beside_out, M, N, x_row,
    MORE: tl.constexpr, PROGRAMS: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, CONV_BIAS: tl.constexpr,
    TYPE: tl.constexpr, DOT: tl.constexpr, EARLY: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
    BESIDE: tl.constexpr,
):  # fmt: skip
    """x [M, K], W and W2 [N, K] → out [M, N], as `project` (project.py), of which this is the form for many sequences."""
    ready(EARLY)
    high = tl.cdiv(M, TALL)
    if MORE > 0 and tl.program_id(0) >= PROGRAMS:
        program = tl.program_id(0) - PROGRAMS
        row = (program % high) * TALL + tl.arange(0, TALL)
        more = (program // high) * BESIDE + tl.arange(0, BESIDE)
        PIECE: tl.constexpr = 16 if DEEP < 64 else DEEP // 4
        near, _ = summed(x, beside, beside, gain, shift, row, more, M, MORE, x_row, K, NORM, EPS, TYPE, tl.float32, False, PIECE)
        near += tl.load(beside_bias + more, mask=more < MORE, other=0.0)[None, :]
        tl.store(beside_out + row[:, None] * MORE + more[None, :], near, mask=(row < M)[:, None] & (more < MORE)[None, :])
    else:
        m = (tl.program_id(0) % high) * TALL + tl.arange(0, TALL)
        n = (tl.program_id(0) // high) * WIDE + tl.arange(0, WIDE)
        y, gate = summed(x, W, W2, gain, shift, m, n, M, N, x_row, K, NORM, EPS, TYPE, DOT, ACT >= 4, DEEP)
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            if ACT >= 4:
                gate += tl.load(bias2 + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        y = activated(y.to(TYPE).to(tl.float32), gate.to(TYPE).to(tl.float32), ACT, TYPE)
        mask = (m < M)[:, None] & (n < N)[None, :]
        if CHANNELS > 0:
            c = n[None, :] + 0 * m[:, None]
            own = conv + m.to(tl.int64)[:, None] * ((TAPS - 1) * CHANNELS)
            through = convolved(y, c, own, conv_weight, conv_bias, mask & (c < CHANNELS), CHANNELS, TAPS, CONV_BIAS, TYPE)
            y = tl.where(c < CHANNELS, through, y)
        y = y.to(TYPE)
        at = m.to(tl.int64)[:, None] * N + n[None, :]
        if HAS_RESIDUAL:
            y = (y.to(tl.float32) + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)).to(TYPE)
        tl.store(out + at, y, mask=mask)


def dot_of(dtype: torch.dtype) -> Any:
    """In what products are taken; the interpreter knows none of 16 bits."""
    return tl.float32 if interpreted() else kind_of(dtype)


def tile(m: int, n: int, k: int, paired: bool, size: int, deepest: int = 256) -> Tile:
    """Of a product [m, k] × [k, n] of numbers of `size` bytes, at most `deepest` of them of a row at once: the largest of which there are
    enough for a GPU."""
    if interpreted():
        return Tile(16, min(32, max(16, triton.next_power_of_2(n))), max(16, min(64, triton.next_power_of_2(k))), 4, 1)
    tall, wide = min(64, max(16, triton.next_power_of_2(m))), 64 if paired else 128
    while triton.cdiv(m, tall) * triton.cdiv(n, wide) < FULL and tall * wide > 16 * 32:
        if wide > 32 and (wide >= tall or tall == 16):
            wide //= 2
        else:
            tall //= 2
    deep = max(16, min(deepest // size // (2 if tall * wide >= 64 * 64 else 1), triton.next_power_of_2(k)))
    return Tile(tall, wide, deep, 8 if tall * wide >= 128 * 64 else 4, 3)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    second: Tensor | None,
    second_bias: Tensor | None,
    norm: tuple[str, Tensor | None, Tensor | None, float],
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
    shape = tile(batch, n, k, second is not None, weight.element_size())
    high, rest, width = triton.cdiv(batch, shape.tall), 0 if more is None else len(more), 16
    programs = high * triton.cdiv(n, shape.wide)
    tiled[(programs + high * triton.cdiv(rest, width),)](
        x, weight, second, bias, second_bias, gain, shift, residual, out, state, conv_weight, conv_bias, more, more_bias, to, batch, n,
        x.stride(0), MORE=rest, PROGRAMS=programs, K=k, NORM=NORMS[kind], EPS=eps, ACT=ACTIVATIONS[act], HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, CHANNELS=0 if conv_weight is None else conv_weight.shape[0],
        TAPS=1 if conv_weight is None else conv_weight.shape[-1], CONV_BIAS=conv_bias is not None, TYPE=kind_of(weight.dtype),
        DOT=dot_of(weight.dtype), TALL=shape.tall, WIDE=shape.wide, DEEP=shape.deep, BESIDE=width, num_warps=shape.warps,
        num_stages=shape.stages, **launch(x.device),
    )  # fmt: skip
    return out
