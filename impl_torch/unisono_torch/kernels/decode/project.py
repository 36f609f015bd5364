"""y = f(norm(x) Wᵀ + b), perhaps added to a residual: a row of W is read once for all sequences, and nothing else is long.

A program owns ROWS rows of W with all their columns, and computes the norm of x again, which is short. What plain operations round to
the compute dtype is rounded here too. Rows that a causal convolution reads go through it here: a program owns their part of its state.

Many sequences are a matter of matrix products (tiles.py).
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from unisono_torch.kernels import barrier
from unisono_torch.kernels.decode import slabs, tiles
from unisono_torch.kernels.decode.common import (
    ACTIVATIONS,
    NORMS,
    activated,
    begun,
    convolved,
    dot_of,
    kind_of,
    launch,
    left,
    normed,
    ready,
)
from unisono_torch.kernels.registry import interpreted

MOST = 4  # sequences; more are a matter of matrix products
LONGEST = 32768  # of a row of W
A_WARP = 2048  # numbers of a row that a warp holds, at most
DEEPEST = 64  # bytes of a row of W at once, where programs of other work share what a multiprocessor has
COLUMNS = 16  # of a product beside another, that are a reduction each
FINISHING = 200  # programs that wait for others of their launch, about


@triton.jit
def finished(
    program, x, W, bias, residual, out, counters, gain, shift, normed, blocks, N, K: tl.constexpr, BATCH: tl.constexpr,
    ARRIVALS: tl.constexpr, PROGRAMS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TALL: tl.constexpr, SPLIT: tl.constexpr, DOT: tl.constexpr, NEXT: tl.constexpr, NEXT_EPS: tl.constexpr,
    SHARE: tl.constexpr, WHOLE: tl.constexpr, TOGETHER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x [BATCH, K], W [N, K] → out [BATCH, N] = x Wᵀ + b, and residual, by the last PROGRAMS of a launch; by tiles of TALL rows of x, if
    that is not 0, then also their norm NEXT; of slabs (slabs.py) where SPLIT is not 0, whose columns of a piece are COLUMNS.

    The programs before them make x, of which ARRIVALS are `done`: they run at once or have begun before, and wait for none of these.
    Those of an interpreter run one after another. counters [2]: arrived and left, 0 before and after.
    """
    TYPE: tl.constexpr = W.dtype.element_ty
    if TALL > 0:
        ACROSS: tl.constexpr = PROGRAMS // ((BATCH + TALL - 1) // TALL)
        block = program // ACROSS
        place = program % ACROSS
        m = block * TALL + tl.arange(0, TALL)
        n = place * ROWS + tl.arange(0, ROWS)
        if SPLIT > 0:
            ROUNDS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
            w = slabs.held(W, n, N, K, ROUNDS, COLUMNS)
        else:
            tiles.fetched(W, n, N, K, EARLY)
        begun(EARLY)
        if TOGETHER:
            barrier.wait(counters, ARRIVALS)
        if SPLIT > 0:
            y = slabs.multiplied(slabs.rows_normed(x, m, BATCH, K, None, K, 0, 0.0, TYPE, ROUNDS, COLUMNS), w, DOT, ROUNDS, COLUMNS, SPLIT)
        else:
            y, _ = tiles.summed(x, W, W, m, n, BATCH, N, K, K, TYPE, DOT, False, COLUMNS)
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        y = y.to(TYPE)
        at = m.to(tl.int64)[:, None] * N + n[None, :]
        mask = (m < BATCH)[:, None] & (n < N)[None, :]
        if HAS_RESIDUAL:
            y = (y.to(tl.float32) + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)).to(TYPE)
        tl.store(out + at, y, mask=mask)
        if NEXT > 0:
            tiles.norm_next(
                out, gain, shift, normed, blocks, block, place, BATCH, N, TALL, ACROSS, NEXT, NEXT_EPS, SHARE, WHOLE, TOGETHER
            )  # fmt: skip
    else:
        n = program * ROWS + tl.arange(0, ROWS)
        k = tl.arange(0, COLUMNS)
        w = tl.load(W + n.to(tl.int64)[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        begun(EARLY)
        if TOGETHER:
            barrier.wait(counters, ARRIVALS)
        for row in tl.static_range(BATCH):
            y = tl.sum(w.to(tl.float32) * tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)[None, :], 1)
            if HAS_BIAS:
                y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
            y = y.to(TYPE)
            if HAS_RESIDUAL:
                y = (y.to(tl.float32) + tl.load(residual + row * N + n, mask=n < N, other=0.0).to(tl.float32)).to(TYPE)
            tl.store(out + row * N + n, y, mask=n < N)
    left(counters, PROGRAMS, TOGETHER)


@triton.jit
def norm_rows(
    x, residual, total, gain, shift, out, spent, x_row, K: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, TYPE: tl.constexpr, COLUMNS: tl.constexpr, SPENT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """out [B, K]: the norm of x [B, K], or of total, which becomes its sum with the residual. spent [SPENT]: counters of launches before
    this one, which become 0."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, COLUMNS)
    ready(EARLY)
    if SPENT > 0 and row == 0:
        tl.store(spent + tl.arange(0, SPENT), 0)
    given = tl.load(x + row * x_row + k, mask=k < K, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        given += tl.load(residual + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        tl.store(total + row * K + k, given.to(TYPE), mask=k < K)
        given = given.to(TYPE).to(tl.float32)
    tl.store(out + row * K + k, normed(given, k, K, gain, shift, NORM, EPS, TYPE).to(TYPE), mask=k < K)


@triton.jit
def activate(
    y, gate, residual, out, SIZE, ACT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out: what `activated` makes of y and gate, and residual; SIZE numbers each."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ready(EARLY)
    own = tl.load(y + i, mask=i < SIZE, other=0.0).to(tl.float32)
    other = own
    if ACT >= 4:
        other = tl.load(gate + i, mask=i < SIZE, other=0.0).to(tl.float32)
    found = activated(own, other, ACT, TYPE).to(TYPE)
    if HAS_RESIDUAL:
        found = (found.to(tl.float32) + tl.load(residual + i, mask=i < SIZE, other=0.0).to(tl.float32)).to(TYPE)
    tl.store(out + i, found, mask=i < SIZE)


@triton.jit
def row_convolved(
    x, row, n, weight, bias, state, row_size, D: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Channels n, below D, of a row of x, in place."""
    y = tl.load(x + row * row_size + n, mask=n < D, other=0.0).to(tl.float32)
    y = convolved(y, n, state + row * (TAPS - 1) * D, weight, bias, n < D, D, TAPS, HAS_BIAS, x.dtype.element_ty)
    tl.store(x + row * row_size + n, y.to(x.dtype.element_ty), mask=n < D)


@triton.jit
def convolve(
    x, weight, bias, state, row_size, D: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """Channels 0 to D of each row of x, in place."""
    ready(EARLY)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_convolved(x, tl.program_id(1).to(tl.int64), n, weight, bias, state, row_size, D, TAPS, HAS_BIAS)


@triton.jit
def columns(x, W, bias, out, x_row, MORE: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr):
    """x [B, K], W [MORE, K] and bias in float32 → out [B, MORE] in float32."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, COLUMNS)
    more = tl.program_id(1)
    w = tl.load(W + more * K + k, mask=k < K, other=0.0)
    ready(EARLY)
    y = tl.sum(w * tl.load(x + row * x_row + k, mask=k < K, other=0.0).to(tl.float32), 0)
    tl.store(out + row * MORE + more, y + tl.load(bias + more))


@triton.jit
def _beside(
    program, x, W, bias, out, gain, shift, x_row, K: tl.constexpr, BATCH: tl.constexpr, N: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, NORMED: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [BATCH, K], W [N, K] and bias in float32 → out [BATCH, N] in float32, of the norm of x in NORMED."""
    n = program * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    w = tl.load(W + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
    ready(EARLY)
    for row in tl.static_range(BATCH):
        given = tl.load(x + row * x_row + k, mask=k < K, other=0.0).to(tl.float32)
        given = normed(given, k, K, gain, shift, NORM, EPS, NORMED)[None, :]
        tl.store(out + row * N + n, tl.sum(w * given, 1) + tl.load(bias + n, mask=n < N, other=0.0), mask=n < N)


@triton.jit
def rows_multiplied(
    program, x, W, W2, bias, bias2, gain, shift, residual, out, conv, conv_weight, conv_bias, N, x_row, out_row, K: tl.constexpr,
    BATCH: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, CONV_BIAS: tl.constexpr, TYPE: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [BATCH, K], ROWS rows of W and W2 [N, K] → as many columns of out [BATCH, N]; residual as out. The first CHANNELS rows go through
    a convolution."""
    n = program * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    inside = (n < N)[:, None] & (k < K)[None, :]
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    w = tl.load(W + at, mask=inside, other=0.0)
    if ACT >= 4:
        w2 = tl.load(W2 + at, mask=inside, other=0.0)
    ready(EARLY)
    for row in tl.static_range(BATCH):
        given = tl.load(x + row * x_row + k, mask=k < K, other=0.0).to(tl.float32)
        given = normed(given, k, K, gain, shift, NORM, EPS, TYPE)[None, :]
        y = tl.sum(w.to(tl.float32) * given, 1)
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        y = y.to(TYPE).to(tl.float32)
        gate = y
        if ACT >= 4:
            gate = tl.sum(w2.to(tl.float32) * given, 1)
            if HAS_BIAS:
                gate += tl.load(bias2 + n, mask=n < N, other=0.0).to(tl.float32)
            gate = gate.to(TYPE).to(tl.float32)
        y = activated(y, gate, ACT, TYPE)
        if CHANNELS > 0:
            own = conv + row * (TAPS - 1) * CHANNELS
            through = convolved(y, n, own, conv_weight, conv_bias, n < CHANNELS, CHANNELS, TAPS, CONV_BIAS, TYPE)
            y = tl.where(n < CHANNELS, through, y)
        y = y.to(TYPE)
        if HAS_RESIDUAL:
            y = (y.to(tl.float32) + tl.load(residual + row * out_row + n, mask=n < N, other=0.0).to(tl.float32)).to(TYPE)
        tl.store(out + row * out_row + n, y, mask=n < N)


@triton.jit
def project(
    x, W, W2, bias, bias2, gain, shift, residual, out, conv, conv_weight, conv_bias, beside, beside_bias, beside_out, N, x_row, out_row,
    MORE: tl.constexpr, PROGRAMS: tl.constexpr, K: tl.constexpr, BATCH: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
    CONV_BIAS: tl.constexpr, TYPE: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`rows_multiplied`. The programs from PROGRAMS on: MORE rows of another product of the same norm, `_beside`."""
    if MORE > 0 and tl.program_id(0) >= PROGRAMS:
        _beside(
            tl.program_id(0) - PROGRAMS, x, beside, beside_bias, beside_out, gain, shift, x_row, K, BATCH, MORE, NORM, EPS, TYPE, EARLY,
            ROWS, COLUMNS,
        )  # fmt: skip
    else:
        rows_multiplied(
            tl.program_id(0), x, W, W2, bias, bias2, gain, shift, residual, out, conv, conv_weight, conv_bias, N, x_row, out_row, K, BATCH,
            NORM, EPS, ACT, HAS_BIAS, HAS_RESIDUAL, CHANNELS, TAPS, CONV_BIAS, TYPE, EARLY, ROWS, COLUMNS,
        )  # fmt: skip


def rows_of(n: int, k: int, paired: bool) -> int:
    """Rows of W a program: programs for two multiprocessors' worth of a large GPU, and no more of a tile than registers hold."""
    if interpreted():
        return min(64, triton.next_power_of_2(n))  # the interpreter pays by the operation
    columns = triton.next_power_of_2(k) * (2 if paired else 1)
    rows = 1
    while rows < 16 and n // (2 * rows) >= 264 and 2 * rows * columns <= 8192:
        rows *= 2
    return rows


class Finish:
    """out = o Wᵀ + b (+ residual), in the launch that makes o, or after it where there are many sequences that are not `joined`; o itself
    without a weight. following: the result's norm, taken with it where they are; by fronts with the product that follows, and out, too.

    owners: pieces of o whose programs take turns.
    """

    def __init__(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        owners: int,
        device: torch.device,
        joined: str = "",
        following: tiles.Next | None = None,
    ) -> None:
        self.weight, self.bias, self.joined, self.following = weight, bias, joined, following
        self.later = joined == "fronts" and following is not None
        self.counters = torch.zeros(2 + owners, dtype=torch.int32, device=device)

    @property
    def turns(self) -> Tensor:
        return self.counters[2:]

    def _joins(self, batch: int) -> bool:
        if self.weight is None or self.later or not self.joined:
            return self._few(batch) and not self.later
        return True

    def _few(self, batch: int) -> bool:
        return self.weight is not None and batch <= MOST and self.weight.shape[1] <= LONGEST

    def launched(self, steps: int, o: Tensor, residual: Tensor | None) -> tuple[int, Tensor, dict[str, Any]]:
        """Programs in all, the result, and the kernel's arguments for it; `steps` programs make o."""
        batch, weight, split = len(o), self.weight if self._joins(len(o)) else None, 0
        if weight is None:
            shape, programs, out = tiles.Tile(0, 1, 1, 4, 1), 0, o
        else:
            (n, k), out = weight.shape, weight.new_empty((batch, len(weight)))
            if self.joined == "slabs" and k <= slabs.LONGEST:
                own = slabs.shape_of(n, k, False, 4)
                shape, split = tiles.Tile(slabs.TALL, own.wide, own.chunk, 4, 1), own.warps
            elif self._few(batch):
                shape = _rows(n, k)
            else:
                shape = tiles.tile(batch, n, k, False, weight.element_size(), DEEPEST)
            programs = triton.cdiv(batch, shape.tall or batch) * triton.cdiv(n, shape.wide)
        given = tiles.NO_NEXT if self.following is None or not shape.tall or split else self.following.launched(out, shape)
        given = {
            **given, "W": o if weight is None else weight, "bias": self.bias, "residual": residual, "out": out, "counters": self.counters,
            "N": out.shape[1], "STEPS": steps, "BATCH": 1 if weight is None else batch, "PROGRAMS": programs,
            "HAS_BIAS": self.bias is not None, "HAS_RESIDUAL": residual is not None, "ROWS": shape.wide, "COLUMNS": shape.deep,
            "TALL": shape.tall, "SPLIT": split, "DOT": dot_of(out.dtype), "TOGETHER": programs > 0 and at_once(), "num_warps": 4,
            **launch(o.device),
        }  # fmt: skip
        return steps + programs, out, given

    def after(self, out: Tensor, residual: Tensor | None) -> Tensor:
        """What a launch left in `out`, which is o where it did not join."""
        if self.weight is None or self._joins(len(out)):
            return out
        if self.later and residual is not None:
            assert self.following is not None
            self.following.parts = tiles.Multiplied(out, self.weight, self.bias), residual
            return torch.empty_like(residual)
        return projected(out, self.weight, self.bias, residual=residual, following=self.following)


def _rows(n: int, k: int) -> tiles.Tile:
    """Rows of W a program that waits for others, all of their columns at once."""
    rows, columns = 1, triton.next_power_of_2(k)
    while (n // rows > FINISHING or interpreted()) and 2 * rows * columns <= 8192 and rows < n:
        rows *= 2
    return tiles.Tile(0, rows, columns, 4, 1)


def at_once() -> bool:
    """Whether programs of one launch run beside each other."""
    return not interpreted()


Norm = tiles.Norm
NO_NORM: Norm = ("none", None, None, 0.0)
Convolution = tuple[Tensor, Tensor | None, Tensor]  # weight [C, 1, w], bias [C], state [B, w − 1, C]


def projected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    second: Tensor | None = None,
    second_bias: Tensor | None = None,
    norm: Norm = NO_NORM,
    act: str = "none",
    residual: Tensor | None = None,
    conv: Convolution | None = None,
    beside: tuple[Tensor, Tensor, Tensor] | None = None,
    following: tiles.Next | None = None,
    joined: str = "",
    parts: tiles.Parts | None = None,
    front: tiles.Front | None = None,
) -> Tensor:
    """x [B, K], weight [N, K] and, where `act` takes two products, second [N, K] → [B, N], in weight's dtype.

    residual [B, N]: what the result is added to. conv: the first C of N go through SiLU of this convolution, whose state moves on.
    beside: weight and bias in float32, and where their product goes. joined: how many sequences are in one launch, "slabs" or "tiles"
    (slabs.py, tiles.py), or "fronts", which are tiles with norms of x before them and a library's products where there is nothing else
    to do; or, whatever they are, "library". following: a norm of the result, which tiles take in the same launch, others with the residual,
    and of fronts the product that follows. parts: what x is to become the sum of.
    """
    (batch, k), n = x.shape, weight.shape[0]
    if joined == "slabs" and k <= slabs.LONGEST:
        return slabs.product(x, weight, bias, second, second_bias, norm, act, residual, conv, beside)
    if batch > MOST or k > LONGEST or joined:
        own = act == "none" and conv is None and beside is None and (residual is None or following is not None)
        narrow = x.dtype != weight.dtype  # of which a library would want a copy
        fitting = own and norm[0] == "none" and parts is None and not narrow  # what a library does in one launch
        if joined == "slabs" or (joined == "fronts" and not fitting):
            before = None if norm[0] == "none" and parts is None else (front or tiles.front(batch, weight), norm, parts)
            return tiles.product(x, weight, bias, second, second_bias, act, residual, conv, beside, None, at_once(), before)
        if parts is not None:
            first = parts[0]
            if isinstance(first, tiles.Multiplied):
                first = _by_matmul(first.x, first.weight, first.bias, None, None, "none", None, None)
            given, _ = norm_apart(first, norm, weight.dtype, parts[1], x)
        else:
            given = x if norm[0] == "none" else norm_apart(x, norm, weight.dtype)[0]
        if joined == "tiles":
            return tiles.product(given, weight, bias, second, second_bias, act, residual, conv, beside, following, at_once())
        if beside is not None:
            _placed(given.to(weight.dtype), *beside)
        if joined == "fronts" and (following is None or residual is not None):
            if tiles.shares(batch, n, k, weight.element_size()):
                made = tiles.shared(x, weight, bias, front or tiles.front(batch, weight))
            else:
                made = _by_matmul(x, weight, bias, None, None, "none", None, None)
            if following is None or residual is None:
                return made
            following.parts = made, residual
            return torch.empty_like(residual)
        if following is None:
            return _by_matmul(given, weight, bias, second, second_bias, act, residual, conv)
        apart = act == "none"
        out = _by_matmul(given, weight, bias, second, second_bias, act, None if apart else residual, conv)
        following.rows, out = norm_apart(out, following.norm, weight.dtype, residual if apart else None, spent=following.spent)
        return out
    out = weight.new_empty((batch, n))
    kind, gain, shift, eps = norm
    conv_weight, conv_bias, state = (None, None, None) if conv is None else conv
    rows = rows_of(n, k, second is not None)
    more, more_bias, to = beside or (None, None, None)
    programs, rest, whole = triton.cdiv(n, rows), 0 if more is None else len(more), triton.next_power_of_2(k)
    project[(programs + triton.cdiv(rest, rows),)](
        x, weight, second, bias, second_bias, gain, shift, residual, out, state, conv_weight, conv_bias, more, more_bias, to, n,
        x.stride(0), n, MORE=rest, PROGRAMS=programs, K=k, BATCH=batch, NORM=NORMS[kind], EPS=eps, ACT=ACTIVATIONS[act],
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, CHANNELS=0 if conv_weight is None else conv_weight.shape[0],
        TAPS=1 if conv_weight is None else conv_weight.shape[-1], CONV_BIAS=conv_bias is not None, TYPE=kind_of(weight.dtype), ROWS=rows,
        COLUMNS=whole, num_warps=max(4, whole // A_WARP), **launch(x.device),
    )  # fmt: skip
    return out


def norm_apart(
    x: Tensor,
    norm: Norm,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    into: Tensor | None = None,
    spent: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of x, or of its sum with the residual, and what it is the norm of, perhaps `into` this. spent: counters that become 0."""
    (kind, gain, shift, eps), (batch, k) = norm, x.shape
    out = torch.empty((batch, k), dtype=dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out) if into is None else into
    norm_rows[(batch,)](
        x, residual, total, gain, shift, out, spent, x.stride(0), K=k, HAS_RESIDUAL=residual is not None, NORM=NORMS[kind], EPS=eps,
        TYPE=kind_of(dtype), COLUMNS=triton.next_power_of_2(k), SPENT=0 if spent is None else len(spent), num_warps=4, **launch(x.device),
    )  # fmt: skip
    return out, total


def _placed(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """out [B, MORE] = x Wᵀ + b of x [B, K], in float32."""
    more, k = weight.shape
    if more > COLUMNS:
        out.copy_(F.linear(x.to(weight.dtype), weight, bias))
    else:
        columns[(len(x), more)](
            x, weight, bias, out, x.stride(0), MORE=more, K=k, COLUMNS=triton.next_power_of_2(k), num_warps=1 if k <= 1024 else 4,
            **launch(x.device),
        )  # fmt: skip


def _by_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    second: Tensor | None,
    second_bias: Tensor | None,
    act: str,
    residual: Tensor | None,
    conv: Convolution | None,
) -> Tensor:
    """As `projected`, by a library's matrix products, without a norm. With a convolution there is no activation."""
    x = x.to(weight.dtype)
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    gate = None if second is None else F.linear(x, second, None if second_bias is None else second_bias.to(x.dtype))
    if act != "none":
        out = torch.empty_like(y)
        activate[(triton.cdiv(y.numel(), 1024),)](
            y, gate, residual, out, y.numel(), ACT=ACTIVATIONS[act], HAS_RESIDUAL=residual is not None, TYPE=kind_of(y.dtype), BLOCK=1024,
            num_warps=4, **launch(y.device),
        )  # fmt: skip
        return out
    if conv is not None:
        conv_weight, conv_bias, state = conv
        d, taps = conv_weight.shape[0], conv_weight.shape[-1]
        shape = {"D": d, "TAPS": taps, "HAS_BIAS": conv_bias is not None, "BLOCK": 256}
        convolve[(triton.cdiv(d, 256), len(x))](y, conv_weight, conv_bias, state, y.shape[1], **shape, num_warps=4, **launch(y.device))
    return y if residual is None else residual + y
