"""y = f(x Wᵀ + b) of many sequences, perhaps added to a residual, in one launch, and the norm of y: tiles of a matrix product by tensor
cores. float32 is a product of three in tf32.

A program owns a tile of y. Those whose tiles lie side by side wait for each other where the rows' norm is asked, and each norms some rows.
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

from unisono_torch.kernels import barrier
from unisono_torch.kernels.decode.common import ACTIVATIONS, LAYER_EPS, NORMS, activated, dot_of, kind_of, launch, ready, rows_convolved
from unisono_torch.kernels.registry import interpreted

_FETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")
SHARED = 96 << 10  # bytes of shared memory, which GPUs have that are no H100
FULL = 120  # programs that a large GPU runs at once, about


Norm = tuple[str, Tensor | None, Tensor | None, float]  # its kind with gain and shift [K], and ε of "rms"


class Tile(NamedTuple):
    """Rows and columns of y, pieces of K, warps, and how many pieces are on their way."""

    tall: int
    wide: int
    deep: int
    warps: int
    stages: int


@triton.jit
def fetched(W, n, N, K: tl.constexpr, EARLY: tl.constexpr):
    """Rows n of W on their way to the GPU's cache, while the kernel before this one runs."""
    if EARLY:
        UNIT: tl.constexpr = 1024 // W.dtype.element_ty.primitive_bitwidth  # numbers a line
        rows = W + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
        for low in tl.static_range(0, K, 16 * UNIT):
            at = tl.minimum(low + tl.arange(0, 16) * UNIT, K - 1)
            tl.inline_asm_elementwise(_FETCH, "=r,l", [rows + at[None, :]], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def summed(
    x, W, W2, m, n, M, N, x_row, K: tl.constexpr, TYPE: tl.constexpr, DOT: tl.constexpr, PAIRED: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Rows m of x, rounded to TYPE, times rows n of W and W2 → [m, n] twice, float32; DEEP columns after others."""
    PRECISION: tl.constexpr = "tf32x3" if tl.float32 == DOT else "ieee"
    rows = x + m.to(tl.int64)[:, None] * x_row
    own = n.to(tl.int64)[None, :] * K
    total = tl.zeros((m.shape[0], n.shape[0]), tl.float32)
    other = tl.zeros((m.shape[0], n.shape[0]), tl.float32)
    for low in range(0, K, DEEP):
        k = low + tl.arange(0, DEEP)
        a = tl.load(rows + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0).to(TYPE).to(DOT)
        mask = (k < K)[:, None] & (n < N)[None, :]
        total = tl.dot(a, tl.load(W + own + k[:, None], mask=mask, other=0.0).to(DOT), total, input_precision=PRECISION)
        if PAIRED:
            other = tl.dot(a, tl.load(W2 + own + k[:, None], mask=mask, other=0.0).to(DOT), other, input_precision=PRECISION)
    return total, other


@triton.jit
def norm_next(
    y, gain, shift, normed, blocks, block, place, M, N, TALL: tl.constexpr, ACROSS: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    SHARE: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """normed [M, N]: the norm of rows of y, of which ACROSS programs side by side have made TALL, each a place: each norms SHARE of them.

    They wait for each other, which began one after another; those of an interpreter run so, and the last norms all. blocks [·, 2]: arrived
    and left, 0 before and after.
    """
    first = place
    end = place + 1
    if TOGETHER:
        barrier.arrive(blocks + 2 * block)
        barrier.wait(blocks + 2 * block, ACROSS)
    else:
        first = tl.where(place == ACROSS - 1, 0, ACROSS)
        end = first * 0 + ACROSS
    k = tl.arange(0, COLUMNS)
    TYPE: tl.constexpr = y.dtype.element_ty
    for part in range(first, end):
        own = part * SHARE + tl.arange(0, SHARE)
        row = block * TALL + own
        mask = ((own < TALL) & (row < M))[:, None] & (k < N)[None, :]
        at = row.to(tl.int64)[:, None] * N + k[None, :]
        x = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        if NORM == 2:
            x = tl.where(mask, x - (tl.sum(x, 1) / N)[:, None], 0.0)
        x = x / tl.sqrt(tl.sum(x * x, 1) / N + (EPS if NORM == 1 else LAYER_EPS))[:, None]
        x = x * tl.load(gain + k, mask=k < N, other=0.0).to(tl.float32)[None, :]
        if NORM == 2:
            x += tl.load(shift + k, mask=k < N, other=0.0).to(tl.float32)[None, :]
        tl.store(normed + at, x.to(TYPE), mask=mask)
    if TOGETHER and tl.atomic_add(blocks + 2 * block + 1, 1) == ACROSS - 1:
        tl.store(blocks + 2 * block, 0)
        tl.store(blocks + 2 * block + 1, 0)


@triton.jit
def tiled(
    x, W, W2, bias, bias2, residual, out, conv, conv_weight, conv_bias, beside, beside_bias, beside_out, gain, shift, normed, blocks, M, N,
    x_row, MORE: tl.constexpr, ACROSS: tl.constexpr, PROGRAMS: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, CONV_BIAS: tl.constexpr, TYPE: tl.constexpr, DOT: tl.constexpr,
    NEXT: tl.constexpr, NEXT_EPS: tl.constexpr, SHARE: tl.constexpr, WHOLE: tl.constexpr, TOGETHER: tl.constexpr, EARLY: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """x [M, K], W and W2 [N, K] → out [M, N], as `project` (project.py), of which this is the form for many sequences, but for norms: that
    of out, NEXT, is taken here, see `norm_next`."""
    if MORE > 0 and tl.program_id(0) >= PROGRAMS:
        ready(EARLY)
        high = tl.cdiv(M, BESIDE)
        row = ((tl.program_id(0) - PROGRAMS) % high) * BESIDE + tl.arange(0, BESIDE)
        more = ((tl.program_id(0) - PROGRAMS) // high) * BESIDE + tl.arange(0, BESIDE)
        PIECE: tl.constexpr = 64 if DEEP > 64 else DEEP
        near, _ = summed(x, beside, beside, row, more, M, MORE, x_row, K, TYPE, tl.float32, False, PIECE)
        near += tl.load(beside_bias + more, mask=more < MORE, other=0.0)[None, :]
        tl.store(beside_out + row[:, None] * MORE + more[None, :], near, mask=(row < M)[:, None] & (more < MORE)[None, :])
    else:
        block = tl.program_id(0) // ACROSS
        place = tl.program_id(0) % ACROSS
        m = block * TALL + tl.arange(0, TALL)
        n = place * WIDE + tl.arange(0, WIDE)
        fetched(W, n, N, K, EARLY)
        if ACT >= 4:
            fetched(W2, n, N, K, EARLY)
        ready(EARLY)
        y, gate = summed(x, W, W2, m, n, M, N, x_row, K, TYPE, DOT, ACT >= 4, DEEP)
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            if ACT >= 4:
                gate += tl.load(bias2 + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        y = activated(y.to(TYPE).to(tl.float32), gate.to(TYPE).to(tl.float32), ACT, TYPE)
        mask = (m < M)[:, None] & (n < N)[None, :]
        if CHANNELS > 0:
            y = rows_convolved(y, m, n, conv, conv_weight, conv_bias, mask, CHANNELS, TAPS, CONV_BIAS, TYPE)
        y = y.to(TYPE)
        at = m.to(tl.int64)[:, None] * N + n[None, :]
        if HAS_RESIDUAL:
            y = (y.to(tl.float32) + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)).to(TYPE)
        tl.store(out + at, y, mask=mask)
        if NEXT > 0:
            norm_next(out, gain, shift, normed, blocks, block, place, M, N, TALL, ACROSS, NEXT, NEXT_EPS, SHARE, WHOLE, TOGETHER)


def tile(m: int, n: int, k: int, paired: bool, size: int, deepest: int = 256) -> Tile:
    """Of a product [m, k] × [k, n] of numbers of `size` bytes, at most `deepest` of them of a row at once: the largest of which there are
    enough for a GPU."""
    if interpreted():
        return Tile(16, min(32, max(16, triton.next_power_of_2(n))), max(16, min(64, triton.next_power_of_2(k))), 4, 1)
    tall, wide = min(64, max(16, triton.next_power_of_2(m))), 32
    while triton.cdiv(m, tall) * triton.cdiv(n, wide) >= 2 * FULL and wide < 128 // (1 + paired):
        wide *= 2
    if tall == 16 and k >= 1024 and not paired:
        wide, deepest = 16, 2 * deepest
    deep, stages = max(16, min(deepest // size, triton.next_power_of_2(k))), 3
    while (tall + wide * (1 + paired)) * deep * size * stages > SHARED:
        deep //= 2
    return Tile(tall, wide, deep, 4, stages)


class Next:
    """A norm of rows that a launch makes, taken in it by `product` and `Finish` (project.py), which leave it in `rows`."""

    def __init__(self, norm: Norm, batch: int, device: torch.device) -> None:
        self.norm, self.rows = norm, torch.empty(0)
        self.blocks = torch.zeros(2 * triton.cdiv(batch, 16), dtype=torch.int32, device=device)

    def launched(self, out: Tensor, shape: Tile) -> dict[str, Any]:
        """A kernel's arguments for the norm of `out`."""
        kind, gain, shift, eps = self.norm
        self.rows, n = torch.empty_like(out), out.shape[1]
        share = triton.next_power_of_2(triton.cdiv(shape.tall, triton.cdiv(n, shape.wide)))
        given = {"gain": gain, "shift": shift, "normed": self.rows, "blocks": self.blocks, "NEXT": NORMS[kind], "NEXT_EPS": eps}
        return {**given, "SHARE": share, "WHOLE": triton.next_power_of_2(n)}


NO_NEXT: dict[str, Any] = {**dict.fromkeys(("gain", "shift", "normed", "blocks")), "NEXT": 0, "NEXT_EPS": 0.0, "SHARE": 1, "WHOLE": 1}


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    second: Tensor | None,
    second_bias: Tensor | None,
    act: str,
    residual: Tensor | None,
    conv: tuple[Tensor, Tensor | None, Tensor] | None,
    beside: tuple[Tensor, Tensor, Tensor] | None,
    following: Next | None,
    together: bool,
) -> Tensor:
    """As `projected` (project.py), without a norm of x. together: whether programs of a launch run beside each other."""
    (batch, k), n = x.shape, weight.shape[0]
    out = weight.new_empty((batch, n))
    conv_weight, conv_bias, state = (None, None, None) if conv is None else conv
    more, more_bias, to = beside or (None, None, None)
    shape = tile(batch, n, k, second is not None, weight.element_size())
    rest, side, across = 0 if more is None else len(more), 16, triton.cdiv(n, shape.wide)
    programs = triton.cdiv(batch, shape.tall) * across
    tiled[(programs + triton.cdiv(batch, side) * triton.cdiv(rest, side),)](
        x, weight, second, bias, second_bias, residual, out, state, conv_weight, conv_bias, more, more_bias, to, M=batch, N=n,
        x_row=x.stride(0), MORE=rest, ACROSS=across, PROGRAMS=programs, K=k, ACT=ACTIVATIONS[act], HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, CHANNELS=0 if conv_weight is None else conv_weight.shape[0],
        TAPS=1 if conv_weight is None else conv_weight.shape[-1], CONV_BIAS=conv_bias is not None, TYPE=kind_of(weight.dtype),
        DOT=dot_of(weight.dtype), TOGETHER=together, TALL=shape.tall, WIDE=shape.wide, DEEP=shape.deep, BESIDE=side,
        num_warps=shape.warps, num_stages=shape.stages, **(NO_NEXT if following is None else following.launched(out, shape)),
        **launch(x.device),
    )  # fmt: skip
    return out
