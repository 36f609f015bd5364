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
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from unisono_torch.kernels.gelu import share, sigmoid
from unisono_torch.kernels.registry import interpreted
from unisono_torch.ops.elementwise import LAYER_NORM_EPS, gelu, gelu_tanh, layer_norm, rms_norm, silu

MOST = 8  # sequences; more are a matter of matrix products
LONGEST = 8192  # of a row of W
NORMS = {"none": 0, "rms": 1, "layer": 2}
# activations of one product, then those of two
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "swiglu": 4, "gated_gelu": 5, "glu": 6}
PAIRED = ("swiglu", "gated_gelu", "glu")
LOG2E = tl.constexpr(1.4426950408889634)
LAYER_EPS = tl.constexpr(LAYER_NORM_EPS)


@triton.jit
def ready(EARLY: tl.constexpr):
    """Let the next kernel begin, and wait for the results of the one before."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


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
def convolved(y, n, state, weight, bias, mask, D: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, TYPE: tl.constexpr):
    """SiLU of channels n of the convolution at the token y, float32; weight [D, 1, TAPS], state [TAPS − 1, D], which moves on."""
    total = y * tl.load(weight + n * TAPS + TAPS - 1, mask=mask, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        old = tl.load(state + tap * D + n, mask=mask, other=0.0)
        total += old * tl.load(weight + n * TAPS + tap, mask=mask, other=0.0).to(tl.float32)
        if tap > 0:
            tl.store(state + (tap - 1) * D + n, old, mask=mask)
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
def project(
    x, W, W2, bias, bias2, gain, shift, residual, out, conv, conv_weight, conv_bias, N, x_row, out_row,
    K: tl.constexpr, BATCH: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, CONV_BIAS: tl.constexpr, NORMED: tl.constexpr,
    TYPE: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [BATCH, K], W and W2 [N, K] → out [BATCH, N]; residual as out. The first CHANNELS rows go through a convolution."""
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
        given = normed(given, k, K, gain, shift, NORM, EPS, NORMED)[None, :]
        y = tl.sum(w.to(tl.float32) * given, 1)
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        y = y.to(TYPE).to(tl.float32)
        if ACT == 1:
            y = exact_gelu(y)
        if ACT == 2:
            y = y * sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
        if ACT == 3:
            y = tl.maximum(y, 0.0)
        if ACT >= 4:
            gate = tl.sum(w2.to(tl.float32) * given, 1)
            if HAS_BIAS:
                gate += tl.load(bias2 + n, mask=n < N, other=0.0).to(tl.float32)
            gate = gate.to(TYPE).to(tl.float32)
            if ACT == 4:
                y = (y * sigmoid(y)).to(TYPE).to(tl.float32) * gate
            if ACT == 5:
                y = exact_gelu((y * sigmoid(gate).to(TYPE).to(tl.float32)).to(TYPE).to(tl.float32))
            if ACT == 6:
                y = y * sigmoid(gate).to(TYPE).to(tl.float32)
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
    normed: torch.dtype | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    conv: Convolution | None = None,
) -> Tensor:
    """x [B, K], weight [N, K] and, where `act` takes two products, second [N, K] → [B, N], in weight's dtype.

    normed: what the norm of x is rounded to, weight's dtype unless told. residual [B, N]: what the result is added to. conv: the first C of
    N go through SiLU of this convolution, whose state moves on.
    """
    (batch, k), n = x.shape, weight.shape[0]
    if batch > MOST or k > LONGEST:
        return _by_matmul(x, weight, bias, second, second_bias, norm, normed or weight.dtype, act, residual, conv)
    out = weight.new_empty((batch, n))
    kind, gain, shift, eps = norm
    conv_weight, conv_bias, state = (None, None, None) if conv is None else conv
    rows = rows_of(n, k, second is not None)
    project[(triton.cdiv(n, rows),)](
        x, weight, second, bias, second_bias, gain, shift, residual, out, state, conv_weight, conv_bias, n, x.stride(0), n,
        K=k, BATCH=batch, NORM=NORMS[kind], EPS=eps, ACT=ACTIVATIONS[act], HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        CHANNELS=0 if conv_weight is None else conv_weight.shape[0], TAPS=1 if conv_weight is None else conv_weight.shape[-1],
        CONV_BIAS=conv_bias is not None, NORMED=_type(normed or weight.dtype), TYPE=_type(weight.dtype), ROWS=rows,
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
    normed: torch.dtype,
    act: str,
    residual: Tensor | None,
    conv: Convolution | None,
) -> Tensor:
    kind, gain, shift, eps = norm
    if kind != "none":
        assert gain is not None
        x = (rms_norm(x, gain, eps) if shift is None else layer_norm(x, gain, shift)).to(normed)
    x = x.to(weight.dtype)
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if second is not None:
        gate = F.linear(x, second, None if second_bias is None else second_bias.to(x.dtype))
        pairs: dict[str, Callable[[Any, Any], Tensor]] = {
            "swiglu": lambda a, b: silu(a) * b,
            "gated_gelu": lambda a, b: gelu(a * b.sigmoid()),
            "glu": lambda a, b: a * b.sigmoid(),
        }
        y = pairs[act](y, gate)
    elif act != "none":
        y = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": torch.relu}[act](y)
    if conv is not None:
        conv_weight, conv_bias, state = conv
        d, taps = conv_weight.shape[0], conv_weight.shape[-1]
        shape = {"D": d, "TAPS": taps, "HAS_BIAS": conv_bias is not None, "BLOCK": 256}
        convolve[(triton.cdiv(d, 256), len(x))](y, conv_weight, conv_bias, state, y.shape[1], **shape, num_warps=4)
    return y if residual is None else residual + y
