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
from unisono_torch.kernels.decode.common import (
    ACTIVATIONS,
    LAYER_EPS,
    NORMS,
    SHRUNK,
    activated,
    done,
    dot_of,
    kind_of,
    last,
    launch,
    left,
    ready,
    rows_convolved,
    waited,
)
from unisono_torch.kernels.registry import interpreted

_FETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")
SHARED = 96 << 10  # bytes of shared memory, which GPUs have that are no H100
FULL = 120  # programs that a large GPU runs at once, about
AFTER = 140  # programs, about, of which more would be a second round
WIDEST = 1024  # of presets: pieces of longer rows are more on their way, which pays there
FRONT = 4096  # numbers of rows that a program norms before others multiply


Norm = tuple[str, Tensor | None, Tensor | None, float]  # its kind with gain and shift [K], and ε of "rms"


class Tile(NamedTuple):
    """Rows and columns of y, pieces of K, warps, and how many pieces are on their way."""

    tall: int
    wide: int
    deep: int
    warps: int
    stages: int


@triton.jit
def fetched(W, n, N, K: tl.constexpr, EARLY: tl.constexpr, COLUMNS: tl.constexpr = 0, first=0):
    """Rows n of W, or COLUMNS of them from the first on, on their way to the GPU's cache, while the kernel before this one runs."""
    if EARLY:
        UNIT: tl.constexpr = 1024 // W.dtype.element_ty.primitive_bitwidth  # numbers a line
        rows = W + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
        for low in tl.static_range(0, COLUMNS if COLUMNS > 0 else K, 16 * UNIT):
            at = tl.minimum(first + low + tl.arange(0, 16) * UNIT, K - 1)
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
def rows_normed(x, mask, k, K, gain, shift, NORM: tl.constexpr, EPS: tl.constexpr):
    """The norm of rows x [·, columns], float32 and zero outside mask."""
    if NORM == 2:
        x = tl.where(mask, (x - (tl.sum(x, 1) / K)[:, None]) * SHRUNK, 0.0)
    if NORM > 0:
        x = x / tl.sqrt(tl.sum(x * x, 1) / K + (EPS if NORM == 1 else LAYER_EPS))[:, None]
        x = x * tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    if NORM == 2:
        x += tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    return x


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
        x = rows_normed(tl.load(y + at, mask=mask, other=0.0).to(tl.float32), mask, k, N, gain, shift, NORM, EPS)
        tl.store(normed + at, x.to(TYPE), mask=mask)
    left(blocks + 2 * block, ACROSS, TOGETHER)


@triton.jit
def before(
    program, x, other, total, gain, shift, made, M, x_row, K: tl.constexpr, SUM: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    SHARE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """made [M, K]: the norm of SHARE rows of x, a program, or with SUM of x + other, which goes to total."""
    TYPE: tl.constexpr = made.dtype.element_ty
    row = program * SHARE + tl.arange(0, SHARE)
    k = tl.arange(0, COLUMNS)
    mask = (row < M)[:, None] & (k < K)[None, :]
    at = row.to(tl.int64)[:, None] * K + k[None, :]
    a = tl.load(x + row.to(tl.int64)[:, None] * x_row + k[None, :], mask=mask, other=0.0).to(tl.float32)
    if SUM:
        a = (a + tl.load(other + at, mask=mask, other=0.0).to(tl.float32)).to(TYPE).to(tl.float32)
        tl.store(total + at, a.to(TYPE), mask=mask)
    tl.store(made + at, rows_normed(a, mask, k, K, gain, shift, NORM, EPS).to(TYPE), mask=mask)


@triton.jit
def multiplied(
    program, x, W, bias, residual, out, M, N, K: tl.constexpr, HAS_BIAS: tl.constexpr, DOT: tl.constexpr, EARLY: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """x [M, K], W [N, K] → a tile of out [M, N]: their product, bias and residual [M, N]."""
    TYPE: tl.constexpr = out.dtype.element_ty
    across = tl.cdiv(N, WIDE)
    m = (program // across) * TALL + tl.arange(0, TALL)
    n = (program % across) * WIDE + tl.arange(0, WIDE)
    fetched(W, n, N, K, EARLY)
    ready(EARLY)
    y, _ = summed(x, W, W, m, n, M, N, K, K, TYPE, DOT, False, DEEP)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    y = y.to(TYPE).to(tl.float32) + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(TYPE), mask=mask)


@triton.jit
def tiled(
    x, W, W2, bias, bias2, residual, out, conv, conv_weight, conv_bias, beside, beside_bias, beside_out, gain, shift, normed, blocks,
    given, other, total, front_gain, front_shift, counters, first_x, first_W, first_bias, M, N, x_row, given_row, MORE: tl.constexpr,
    ACROSS: tl.constexpr, PROGRAMS: tl.constexpr, WAITING: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, CONV_BIAS: tl.constexpr, TYPE: tl.constexpr, DOT: tl.constexpr,
    NEXT: tl.constexpr, NEXT_EPS: tl.constexpr, SHARE: tl.constexpr, WHOLE: tl.constexpr, FRONT: tl.constexpr, FRONT_SUM: tl.constexpr,
    FRONT_NORM: tl.constexpr, FRONT_EPS: tl.constexpr, FRONT_SHARE: tl.constexpr, FRONT_WHOLE: tl.constexpr, FIRST: tl.constexpr,
    FIRST_K: tl.constexpr, FIRST_BIAS: tl.constexpr, FIRST_DOT: tl.constexpr, FIRST_TALL: tl.constexpr, FIRST_WIDE: tl.constexpr,
    TOGETHER: tl.constexpr, EARLY: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    """x [M, K], W and W2 [N, K] → out [M, N], as `project` (project.py), of which this is the form for many sequences, but for norms: that
    of out, NEXT, is taken here, see `norm_next`, or what x holds is made by FRONT programs, see `before`, for which WAITING others wait,
    of what FIRST programs have made, if there are any, see `multiplied`. counters [4]: arrived and left of both, 0 before and after."""
    program = tl.program_id(0) - FIRST - FRONT
    if FIRST > 0 and tl.program_id(0) < FIRST:
        multiplied(
            tl.program_id(0), first_x, first_W, first_bias, other, total, M, K, FIRST_K, FIRST_BIAS, FIRST_DOT, EARLY, FIRST_TALL,
            FIRST_WIDE, DEEP,
        )  # fmt: skip
        done(counters + 2, TOGETHER)
    elif FRONT > 0 and program < 0:
        waited(counters + 2, FIRST, TOGETHER, EARLY)
        if FIRST > 0:
            left(counters + 2, FRONT, TOGETHER)
        before(
            program + FRONT, given, other, total, front_gain, front_shift, x, M, given_row, K, FRONT_SUM, FRONT_NORM, FRONT_EPS,
            FRONT_SHARE, FRONT_WHOLE,
        )  # fmt: skip
        done(counters, TOGETHER)
    elif MORE > 0 and program >= PROGRAMS:
        waited(counters, FRONT, TOGETHER, EARLY)
        high = tl.cdiv(M, BESIDE)
        row = ((program - PROGRAMS) % high) * BESIDE + tl.arange(0, BESIDE)
        more = ((program - PROGRAMS) // high) * BESIDE + tl.arange(0, BESIDE)
        PIECE: tl.constexpr = 64 if DEEP > 64 else DEEP
        near, _ = summed(x, beside, beside, row, more, M, MORE, x_row, K, TYPE, tl.float32, False, PIECE)
        near += tl.load(beside_bias + more, mask=more < MORE, other=0.0)[None, :]
        tl.store(beside_out + row[:, None] * MORE + more[None, :], near, mask=(row < M)[:, None] & (more < MORE)[None, :])
    else:
        block = program // ACROSS
        place = program % ACROSS
        m = block * TALL + tl.arange(0, TALL)
        n = place * WIDE + tl.arange(0, WIDE)
        fetched(W, n, N, K, EARLY)
        if ACT >= 4:
            fetched(W2, n, N, K, EARLY)
        waited(counters, FRONT, TOGETHER, EARLY)
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
    if FRONT > 0 and program >= 0:
        left(counters, WAITING, TOGETHER)


@triton.jit
def split(
    x, W, bias, out, part, turns, M, N, x_row, ACROSS: tl.constexpr, SPLITS: tl.constexpr, SHARE: tl.constexpr, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, TYPE: tl.constexpr, DOT: tl.constexpr, EARLY: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    DEEP: tl.constexpr,
):  # fmt: skip
    """x [M, K], W [N, K] → out [M, N], SPLITS programs a tile, each of SHARE columns; the last to come adds up what they leave in part
    [tiles, SPLITS, TALL, WIDE], one after the other. turns [tiles]: 0 before and after."""
    PRECISION: tl.constexpr = "tf32x3" if tl.float32 == DOT else "ieee"
    block = tl.program_id(0) // SPLITS
    piece = tl.program_id(0) % SPLITS
    m = (block // ACROSS) * TALL + tl.arange(0, TALL)
    n = (block % ACROSS) * WIDE + tl.arange(0, WIDE)
    first = piece * SHARE
    fetched(W, n, N, K, EARLY, SHARE, first)
    ready(EARLY)
    rows = x + m.to(tl.int64)[:, None] * x_row
    own = n.to(tl.int64)[None, :] * K
    total = tl.zeros((TALL, WIDE), tl.float32)
    for low in range(first, tl.minimum(first + SHARE, K), DEEP):
        k = low + tl.arange(0, DEEP)
        a = tl.load(rows + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0).to(TYPE).to(DOT)
        b = tl.load(W + own + k[:, None], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0).to(DOT)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    cell = tl.arange(0, TALL)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    parts = part + block * SPLITS * TALL * WIDE + cell
    if SPLITS > 1:
        tl.store(parts + piece * TALL * WIDE, total)
    if last(turns + block, SPLITS):
        if SPLITS > 1:
            tl.debug_barrier()
            total = tl.zeros((TALL, WIDE), tl.float32)
            for other in range(SPLITS):
                total += tl.load(parts + other * TALL * WIDE)
        if HAS_BIAS:
            total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        at = m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out + at, total.to(TYPE), mask=(m < M)[:, None] & (n < N)[None, :])


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


def tile_after(m: int, n: int, k: int, paired: bool, size: int) -> Tile:
    """As `tile`, of a product that waits for programs of its launch: many of them, each of which holds little."""
    wider = not interpreted() and size == 2 and k > WIDEST and not paired
    if interpreted() or m <= 32:
        shape = tile(m, n, k, paired, size)
        return Tile(16, 16, 128, 2, 6) if wider and shape.tall == 16 else shape
    wide = 32 // (1 + paired)
    while wide < 128 // (1 + paired) and triton.cdiv(m, 64) * triton.cdiv(n, 2 * wide) >= AFTER:
        wide *= 2
    return Tile(64, wide, min(128 // size, max(16, triton.next_power_of_2(k))), 4, 6 if wider and wide == 32 else 4)


def split_shape(m: int, n: int, k: int, size: int) -> tuple[Tile, int, int]:
    """The tiles of `split`, how many there are, and how many programs each has: two a multiprocessor of a large GPU, about, and of some ten
    sequences in 16 bits three."""
    deep = max(16, min(256 // size, triton.next_power_of_2(k)))
    tall, wide = min(64, max(16, triton.next_power_of_2(m))), 16 if interpreted() else 32
    tiles, splits = triton.cdiv(m, tall) * triton.cdiv(n, wide), 1
    few = size == 2 and m <= 32
    while tiles * splits <= (2 + few) * FULL and (splits + 1) * deep <= k:
        splits += 1
    return Tile(tall, wide, deep, 4, 3 + few), tiles, splits


def shares(m: int, n: int, k: int, size: int) -> bool:
    """Whether a library may have a launch of its own for parts of sums: in float32, and where its tiles are few and long."""
    few = triton.cdiv(m, 64) * triton.cdiv(n, 64) <= 32 and (m <= 32 or n < 2048)  # of 64 rows and 2,048 columns it has none
    return size > 2 or (few and k > 2048)


class Multiplied(NamedTuple):
    """A product that has not been taken: x [B, K] Wᵀ and its bias."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


Parts = tuple[Tensor | Multiplied, Tensor]  # of a sum that has not been made, the second of which is a residual


class Next:
    """A norm of rows that a launch makes, taken in it by `product` and `Finish` (project.py), which leave it in `rows`."""

    def __init__(self, norm: Norm, batch: int, device: torch.device) -> None:
        self.norm = norm
        self.rows: Tensor | None = None  # the norm of what was made, if it is
        self.spent: Tensor | None = None  # counters that are to be 0 again, where the norm has a launch of its own
        self.parts: Parts | None = None  # what was made is to become the sum of
        self.blocks = torch.zeros(2 * triton.cdiv(batch, 16), dtype=torch.int32, device=device)

    def launched(self, out: Tensor, shape: Tile) -> dict[str, Any]:
        """A kernel's arguments for the norm of `out`."""
        kind, gain, shift, eps = self.norm
        self.rows, n = torch.empty_like(out), out.shape[1]
        share = triton.next_power_of_2(triton.cdiv(shape.tall, triton.cdiv(n, shape.wide)))
        given = {"gain": gain, "shift": shift, "normed": self.rows, "blocks": self.blocks, "NEXT": NORMS[kind], "NEXT_EPS": eps}
        return {**given, "SHARE": share, "WHOLE": triton.next_power_of_2(n)}


class Front:
    """What `product` does before it: rows that become a sum, and their norm, by the first programs of the launch; and the turns of as many
    tiles where it is one of `split` instead."""

    def __init__(self, device: torch.device, tiles: int = 0) -> None:
        self.counters = torch.zeros(4, dtype=torch.int32, device=device)
        self.turns = torch.zeros(tiles, dtype=torch.int32, device=device)

    def launched(self, x: Tensor, norm: Norm, parts: Parts | None, made: Tensor) -> dict[str, Any]:
        """A kernel's arguments for made [B, K]: the norm of x, or of the sum of `parts`, which x becomes."""
        (kind, gain, shift, eps), (batch, k) = norm, made.shape
        given, other = (x, None) if parts is None else parts
        found: dict[str, Any] = {"FRONT_SUM": parts is not None}
        if isinstance(given, Multiplied):
            shape = tile_after(batch, k, given.x.shape[1], False, given.weight.element_size())
            first = triton.cdiv(batch, shape.tall) * triton.cdiv(k, shape.wide)
            found = {"FRONT_SUM": False, "first_x": given.x, "first_W": given.weight, "first_bias": given.bias, "FIRST": first}
            found |= {"FIRST_K": given.x.shape[1], "FIRST_BIAS": given.bias is not None, "FIRST_DOT": dot_of(given.weight.dtype)}
            found |= {"FIRST_TALL": shape.tall, "FIRST_WIDE": shape.wide}
            given = x
        whole = triton.next_power_of_2(k)
        share = max(1, min(4, FRONT // whole))
        found |= {"given": given, "other": other, "total": x, "front_gain": gain, "front_shift": shift, "counters": self.counters}
        found |= {"given_row": given.stride(0), "FRONT": triton.cdiv(batch, share), "FRONT_NORM": NORMS[kind], "FRONT_EPS": eps}
        return {**NO_FRONT, **found, "FRONT_SHARE": share, "FRONT_WHOLE": whole}


NO_FRONT: dict[str, Any] = {
    **dict.fromkeys(("given", "other", "total", "front_gain", "front_shift", "counters", "first_x", "first_W", "first_bias")),
    **dict.fromkeys(("given_row", "FRONT", "FRONT_SUM", "FRONT_NORM", "FRONT_EPS", "FIRST", "FIRST_BIAS"), 0),
    **dict.fromkeys(("FRONT_SHARE", "FRONT_WHOLE", "FIRST_K", "FIRST_TALL", "FIRST_WIDE"), 1),
    "FIRST_DOT": tl.float32,
}
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
    front: tuple[Front, Norm, Parts | None] | None = None,
) -> Tensor:
    """As `projected` (project.py), without a norm of x but by `front`: with what it takes beside x. together: whether programs of a launch
    run beside each other."""
    (batch, k), n = x.shape, weight.shape[0]
    out, before = weight.new_empty((batch, n)), NO_FRONT
    if front is not None:
        made = weight.new_empty((batch, k))
        before, x = front[0].launched(x, *front[1:], made), made
    conv_weight, conv_bias, state = (None, None, None) if conv is None else conv
    more, more_bias, to = beside or (None, None, None)
    shape = (tile if front is None else tile_after)(batch, n, k, second is not None, weight.element_size())
    rest, side, across = 0 if more is None else len(more), 16, triton.cdiv(n, shape.wide)
    programs = triton.cdiv(batch, shape.tall) * across
    waiting = programs + triton.cdiv(batch, side) * triton.cdiv(rest, side)
    tiled[(before["FIRST"] + before["FRONT"] + waiting,)](
        x, weight, second, bias, second_bias, residual, out, state, conv_weight, conv_bias, more, more_bias, to, M=batch, N=n,
        x_row=x.stride(0), MORE=rest, ACROSS=across, PROGRAMS=programs, WAITING=waiting, K=k, ACT=ACTIVATIONS[act],
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, CHANNELS=0 if conv_weight is None else conv_weight.shape[0],
        TAPS=1 if conv_weight is None else conv_weight.shape[-1], CONV_BIAS=conv_bias is not None, TYPE=kind_of(weight.dtype),
        DOT=dot_of(weight.dtype), TOGETHER=together, TALL=shape.tall, WIDE=shape.wide, DEEP=shape.deep, BESIDE=side,
        num_warps=shape.warps, num_stages=shape.stages, **(NO_NEXT if following is None else following.launched(out, shape)), **before,
        **launch(x.device),
    )  # fmt: skip
    return out


def front(batch: int, weight: Tensor) -> Front:
    """What a product with weight [N, K] needs in the form "fronts"."""
    given = batch, *weight.shape, weight.element_size()
    return Front(weight.device, split_shape(*given)[1] if shares(*given) else 0)


def shared(x: Tensor, weight: Tensor, bias: Tensor | None, front: Front) -> Tensor:
    """x Wᵀ + b in one launch whose programs share sums."""
    (batch, k), n = x.shape, weight.shape[0]
    shape, tiles, splits = split_shape(batch, n, k, weight.element_size())
    share = triton.cdiv(triton.cdiv(k, splits), shape.deep) * shape.deep
    splits = triton.cdiv(k, share)
    out, part = weight.new_empty((batch, n)), torch.empty(tiles * splits * shape.tall * shape.wide, dtype=torch.float32, device=x.device)
    split[(tiles * splits,)](
        x, weight, bias, out, part, front.turns, M=batch, N=n, x_row=x.stride(0), ACROSS=triton.cdiv(n, shape.wide), SPLITS=splits,
        SHARE=share, K=k, HAS_BIAS=bias is not None, TYPE=kind_of(weight.dtype), DOT=dot_of(weight.dtype), TALL=shape.tall, WIDE=shape.wide,
        DEEP=shape.deep, num_warps=shape.warps, num_stages=shape.stages, **launch(x.device),
    )  # fmt: skip
    return out
