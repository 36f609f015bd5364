"""y = f(norm(x) Wᵀ + b), perhaps added to a residual: a row of W is read once for all sequences, and nothing else is long.

A program owns ROWS rows of W with all their columns, and computes the norm of x again, which is short. What plain operations round to
the compute dtype is rounded here too. Rows that a causal convolution reads go through it here: a program owns their part of its state.

Kernels of a token begin before the one before them has ended (EARLY: programmatic dependent launch, compute capability 9): they read
weights, which nobody writes, then wait for its results.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from unisono_torch.kernels import barrier
from unisono_torch.kernels.gelu import share, sigmoid
from unisono_torch.kernels.registry import interpreted
from unisono_torch.ops.elementwise import LAYER_NORM_EPS

MOST = 8  # sequences; more are a matter of matrix products
LONGEST = 8192  # of a row of W
FINISHING = 200  # programs that wait for others of their launch, about
NORMS = {"none": 0, "rms": 1, "layer": 2}
# activations of one product, then those of two
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "swiglu": 4, "gated_gelu": 5, "glu": 6}
LOG2E = tl.constexpr(1.4426950408889634)
LAYER_EPS = tl.constexpr(LAYER_NORM_EPS)


@triton.jit
def ready(EARLY: tl.constexpr):
    """Let the next kernel begin, and wait for the results of the one before."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def loaded():
    """Between loads of a state and stores to it: several warps may hold a small tile, of which one stores, and others may lag behind."""
    tl.debug_barrier()


@triton.jit
def begun(EARLY: tl.constexpr):
    """Let the next kernel begin: this program waits for others of its own launch."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def done(counters, TOGETHER: tl.constexpr):
    """What `finished` programs of this launch wait for is stored."""
    if TOGETHER:
        barrier.arrive(counters)


@triton.jit
def last(turns, SLICES: tl.constexpr):
    """Whether this is the last of SLICES programs to come here: the others have read what it may change now. The next time begins anew."""
    ends = True
    if SLICES > 1:
        tl.debug_barrier()
        ends = tl.atomic_add(turns, 1) == SLICES - 1
        if ends:
            tl.store(turns, 0)
    return ends


@triton.jit
def finished(
    program, x, W, bias, residual, out, counters, N, K: tl.constexpr, BATCH: tl.constexpr, ARRIVALS: tl.constexpr, PROGRAMS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """x [BATCH, K], W [N, K] → out [BATCH, N] = x Wᵀ + b, and residual, by the last PROGRAMS of a launch.

    The programs before them make x, of which ARRIVALS are `done`: they run at once or have begun before, and wait for none of these.
    Those of an interpreter run one after another. counters [2]: arrived and left, 0 before and after.
    """
    n = program * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    TYPE: tl.constexpr = W.dtype.element_ty
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
    if TOGETHER and tl.atomic_add(counters + 1, 1) == PROGRAMS - 1:
        tl.store(counters, 0)
        tl.store(counters + 1, 0)


@triton.jit
def exact_gelu(x):
    return x * share(x)


@triton.jit
def normed(x, k, K: tl.constexpr, gain, shift, NORM: tl.constexpr, EPS: tl.constexpr, TYPE: tl.constexpr):
    """The norm of a row x, float32 and zero from K on, rounded to TYPE."""
    if NORM == 1:
        x = x / tl.sqrt(tl.sum(x * x, 0) / K + EPS)
        x = (x * tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)).to(TYPE).to(tl.float32)
    if NORM == 2:
        x = tl.where(k < K, x - tl.sum(x, 0) / K, 0.0)
        x = x / tl.sqrt(tl.sum(x * x, 0) / K + LAYER_EPS)
        x = x * tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32) + tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)
        x = x.to(TYPE).to(tl.float32)
    return x


@triton.jit
def activated(y, gate, ACT: tl.constexpr, TYPE: tl.constexpr):
    """What ACTIVATIONS[…] = ACT makes of a product, and of a second one, both float32 and rounded to TYPE."""
    if ACT == 1:
        y = exact_gelu(y)
    if ACT == 2:
        y = y * sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    if ACT == 3:
        y = tl.where(y < 0, 0.0, y)  # and a NaN stays one
    if ACT == 4:
        y = (y * sigmoid(y)).to(TYPE).to(tl.float32) * gate
    if ACT == 5:
        y = exact_gelu((y * sigmoid(gate).to(TYPE).to(tl.float32)).to(TYPE).to(tl.float32))
    if ACT == 6:
        y = y * sigmoid(gate).to(TYPE).to(tl.float32)
    return y


@triton.jit
def norm_rows(
    x, gain, shift, out, x_row, K: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, TYPE: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """out [B, K]: the norm of x [B, K]."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, COLUMNS)
    ready(EARLY)
    given = tl.load(x + row * x_row + k, mask=k < K, other=0.0).to(tl.float32)
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
def convolved(y, n, state, weight, bias, mask, D: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, TYPE: tl.constexpr):
    """SiLU of channels n of the convolution at the token y, float32; weight [D, 1, TAPS], state [TAPS − 1, D], which moves on."""
    total = y * tl.load(weight + n * TAPS + TAPS - 1, mask=mask, other=0.0).to(tl.float32)
    before = ()
    for tap in tl.static_range(TAPS - 1):
        old = tl.load(state + tap * D + n, mask=mask, other=0.0)
        total += old * tl.load(weight + n * TAPS + tap, mask=mask, other=0.0).to(tl.float32)
        before = before + (old,)  # noqa: RUF005 (Triton's tuples grow by +)
    loaded()
    for tap in tl.static_range(1, TAPS - 1):
        tl.store(state + (tap - 1) * D + n, before[tap], mask=mask)
    if TAPS > 1:
        tl.store(state + (TAPS - 2) * D + n, y, mask=mask)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=mask, other=0.0).to(tl.float32)
    total = total.to(TYPE).to(tl.float32)
    return total * sigmoid(total)


@triton.jit
def convolve(x, weight, bias, state, row_size, D: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Channels 0 to D of each row of x, in place."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + row * row_size + n, mask=n < D, other=0.0).to(tl.float32)
    y = convolved(y, n, state + row * (TAPS - 1) * D, weight, bias, n < D, D, TAPS, HAS_BIAS, x.dtype.element_ty)
    tl.store(x + row * row_size + n, y.to(x.dtype.element_ty), mask=n < D)


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
def project(
    x, W, W2, bias, bias2, gain, shift, residual, out, conv, conv_weight, conv_bias, beside, beside_bias, beside_out, N, x_row, out_row,
    MORE: tl.constexpr, PROGRAMS: tl.constexpr, K: tl.constexpr, BATCH: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
    CONV_BIAS: tl.constexpr, TYPE: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [BATCH, K], W and W2 [N, K] → out [BATCH, N]; residual as out. The first CHANNELS rows go through a convolution. The programs from
    PROGRAMS on: MORE rows of another product of the same norm, `_beside`."""
    if MORE > 0 and tl.program_id(0) >= PROGRAMS:
        _beside(
            tl.program_id(0) - PROGRAMS, x, beside, beside_bias, beside_out, gain, shift, x_row, K, BATCH, MORE, NORM, EPS, TYPE, EARLY,
            ROWS, COLUMNS,
        )  # fmt: skip
    else:
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
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
    """out = o Wᵀ + b (+ residual), in the launch that makes o, or after it where there are many sequences; o itself without a weight.

    owners: pieces of o whose programs take turns.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None, owners: int, device: torch.device) -> None:
        self.weight, self.bias = weight, bias
        self.counters = torch.zeros(2 + owners, dtype=torch.int32, device=device)

    @property
    def turns(self) -> Tensor:
        return self.counters[2:]

    def joins(self, batch: int) -> bool:
        return self.weight is not None and batch <= MOST and self.weight.shape[1] <= LONGEST

    def launched(self, steps: int, o: Tensor, residual: Tensor | None) -> tuple[int, Tensor, dict[str, Any]]:
        """Programs in all, the result, and the kernel's arguments for it; `steps` programs make o."""
        batch, join = len(o), self.joins(len(o))
        weight = o if self.weight is None else self.weight
        (n, k), rows = weight.shape, 1
        columns = triton.next_power_of_2(k)
        while (n // rows > FINISHING or interpreted()) and 2 * rows * columns <= 8192 and rows < n:
            rows *= 2
        programs = triton.cdiv(n, rows) if join else 0
        out = weight.new_empty((batch, n)) if join else o
        given = {
            "W": weight, "bias": self.bias, "residual": residual, "out": out, "counters": self.counters, "N": n, "STEPS": steps,
            "BATCH": batch if join else 1, "PROGRAMS": programs, "HAS_BIAS": self.bias is not None, "HAS_RESIDUAL": residual is not None,
            "ROWS": rows, "COLUMNS": columns, "TOGETHER": join and at_once(), **launch(o.device),
        }  # fmt: skip
        return steps + programs, out, given

    def after(self, out: Tensor, residual: Tensor | None) -> Tensor:
        """What a launch left in `out`, which is o where it did not join."""
        if self.weight is None or self.joins(len(out)):
            return out
        return projected(out, self.weight, self.bias, residual=residual)


def at_once() -> bool:
    """Whether programs of one launch run beside each other."""
    return not interpreted()


@functools.cache
def early(device: torch.device) -> bool:
    """Whether kernels there can begin before the one before them has ended."""
    return not interpreted() and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(device: torch.device) -> dict[str, Any]:
    """What every kernel of a token is launched with."""
    return {"EARLY": early(device), **({"launch_pdl": True} if early(device) else {})}


Norm = tuple[str, Tensor | None, Tensor | None, float]  # its kind with gain and shift [K], and ε of "rms"
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
) -> Tensor:
    """x [B, K], weight [N, K] and, where `act` takes two products, second [N, K] → [B, N], in weight's dtype.

    residual [B, N]: what the result is added to. conv: the first C of
    N go through SiLU of this convolution, whose state moves on. beside: weight and bias in float32, and where their product goes.
    """
    (batch, k), n = x.shape, weight.shape[0]
    if batch > MOST or k > LONGEST:
        if beside is not None:
            more, more_bias, to = beside
            to.copy_(_by_matmul(x, more, more_bias, None, None, norm, weight.dtype, "none", None, None))
        return _by_matmul(x, weight, bias, second, second_bias, norm, weight.dtype, act, residual, conv)
    out = weight.new_empty((batch, n))
    kind, gain, shift, eps = norm
    conv_weight, conv_bias, state = (None, None, None) if conv is None else conv
    rows = rows_of(n, k, second is not None)
    more, more_bias, to = beside or (None, None, None)
    programs, rest = triton.cdiv(n, rows), 0 if more is None else len(more)
    project[(programs + triton.cdiv(rest, rows),)](
        x, weight, second, bias, second_bias, gain, shift, residual, out, state, conv_weight, conv_bias, more, more_bias, to, n,
        x.stride(0), n, MORE=rest, PROGRAMS=programs, K=k, BATCH=batch, NORM=NORMS[kind], EPS=eps, ACT=ACTIVATIONS[act],
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, CHANNELS=0 if conv_weight is None else conv_weight.shape[0],
        TAPS=1 if conv_weight is None else conv_weight.shape[-1], CONV_BIAS=conv_bias is not None, TYPE=_type(weight.dtype), ROWS=rows,
        COLUMNS=triton.next_power_of_2(k), num_warps=4, **launch(x.device),
    )  # fmt: skip
    return out


def _type(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


def _by_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    second: Tensor | None,
    second_bias: Tensor | None,
    norm: Norm,
    dtype: torch.dtype,
    act: str,
    residual: Tensor | None,
    conv: Convolution | None,
) -> Tensor:
    """As `projected`, by matrix products; the norm is rounded to `dtype`. With a convolution there is no activation."""
    kind, gain, shift, eps = norm
    if kind != "none":
        given, k = x, x.shape[1]
        x = torch.empty(given.shape, dtype=dtype, device=given.device)
        norm_rows[(len(x),)](
            given, gain, shift, x, given.stride(0), K=k, NORM=NORMS[kind], EPS=eps, TYPE=_type(dtype), COLUMNS=triton.next_power_of_2(k),
            num_warps=4, **launch(x.device),
        )  # fmt: skip
    x = x.to(weight.dtype)
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    gate = None if second is None else F.linear(x, second, None if second_bias is None else second_bias.to(x.dtype))
    if act != "none":
        out = torch.empty_like(y)
        activate[(triton.cdiv(y.numel(), 1024),)](
            y, gate, residual, out, y.numel(), ACT=ACTIVATIONS[act], HAS_RESIDUAL=residual is not None, TYPE=_type(y.dtype), BLOCK=1024,
            num_warps=4, **launch(y.device),
        )  # fmt: skip
        return out
    if conv is not None:
        conv_weight, conv_bias, state = conv
        d, taps = conv_weight.shape[0], conv_weight.shape[-1]
        shape = {"D": d, "TAPS": taps, "HAS_BIAS": conv_bias is not None, "BLOCK": 256}
        convolve[(triton.cdiv(d, 256), len(x))](y, conv_weight, conv_bias, state, y.shape[1], **shape, num_warps=4)
    return y if residual is None else residual + y
