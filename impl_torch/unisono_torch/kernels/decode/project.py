"""y = f(norm(x) Wᵀ + b), perhaps added to a residual: a row of W is read once for all sequences, and nothing else is long.

A program owns ROWS rows of W with all their columns, and computes the norm of x again, which is short. What plain operations round to
the compute dtype is rounded here too.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from unisono_torch.kernels.registry import interpreted
from unisono_torch.ops.elementwise import LAYER_NORM_EPS, RMS_NORM_EPS, gelu, gelu_tanh, layer_norm, rms_norm, silu

MOST = 8  # sequences; more are a matter of matrix products
LONGEST = 8192  # of a row of W
NORMS = {"none": 0, "rms": 1, "layer": 2}
# activations of one product, then those of two
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "swiglu": 4, "gated_gelu": 5, "glu": 6}
PAIRED = ("swiglu", "gated_gelu", "glu")
LOG2E = tl.constexpr(1.4426950408889634)
RMS_EPS, LAYER_EPS = tl.constexpr(RMS_NORM_EPS), tl.constexpr(LAYER_NORM_EPS)


@triton.jit
def sigmoid(x):
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def exact_gelu(x):
    """x Φ(x), Φ(x) = ½ erfc(−x/√2), since ½(1 + erf) has no digits where it is small; Triton has no erfc.

    erfc(z) = t p(t) e^{−z²}, t = 2 / (2 + z), for z ≥ 0: p of degree 8, with the least greatest relative error up to z = 10, where erfc
    leaves float32 (Lawson's algorithm; off by 0.7 roundings). erfc(−z) = 2 − erfc(z).
    """
    z = tl.abs(x) * 0.7071067811865476
    t = 2 / (2 + z)
    p = t * -0.0590977468 + 0.284715757
    p = p * t - 0.487492211
    p = p * t + 0.27840257
    p = p * t - 0.0268574829
    p = p * t + 0.20278531
    p = p * t + 0.243078783
    p = p * t + 0.282378758
    p = p * t + 0.28208622
    tail = p * t * tl.exp2(z * z * -LOG2E)
    return x * 0.5 * tl.where(x > 0, 2 - tail, tail)


@triton.jit
def normed(x, k, K: tl.constexpr, gain, shift, NORM: tl.constexpr, TYPE: tl.constexpr):
    """The norm of a row x, float32 and zero from K on, rounded to TYPE."""
    if NORM == 1:
        x = x / tl.sqrt(tl.sum(x * x, 0) / K + RMS_EPS)
        x = (x * tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)).to(TYPE).to(tl.float32)
    if NORM == 2:
        x = tl.where(k < K, x - tl.sum(x, 0) / K, 0.0)
        x = x / tl.sqrt(tl.sum(x * x, 0) / K + LAYER_EPS)
        x = x * tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32) + tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)
        x = x.to(TYPE).to(tl.float32)
    return x


@triton.jit
def project(
    x, W, W2, bias, bias2, gain, shift, residual, out, N, x_row, out_row,
    K: tl.constexpr, BATCH: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    TYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [BATCH, K], W and W2 [N, K] → out [BATCH, N]; residual as out."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    inside = (n < N)[:, None] & (k < K)[None, :]
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    w = tl.load(W + at, mask=inside, other=0.0)
    if ACT >= 4:
        w2 = tl.load(W2 + at, mask=inside, other=0.0)
    for row in tl.static_range(BATCH):
        given = tl.load(x + row * x_row + k, mask=k < K, other=0.0).to(tl.float32)
        given = normed(given, k, K, gain, shift, NORM, TYPE)[None, :]
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


def projected(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    second: Tensor | None = None,
    second_bias: Tensor | None = None,
    norm: tuple[str, Tensor | None, Tensor | None] = ("none", None, None),
    act: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """x [B, K], weight [N, K] and, where `act` takes two products, second [N, K], in one dtype → [B, N].

    norm: its kind with gain and shift [K]. residual [B, N]: what the result is added to.
    """
    (batch, k), n = x.shape, weight.shape[0]
    if batch > MOST or k > LONGEST:
        return _by_matmul(x, weight, bias, second, second_bias, norm, act, residual)
    out = x.new_empty((batch, n))
    kind, gain, shift = norm
    rows = rows_of(n, k, second is not None)
    project[(triton.cdiv(n, rows),)](
        x, weight, second, bias, second_bias, gain, shift, residual, out, n, x.stride(0), n,
        K=k, BATCH=batch, NORM=NORMS[kind], ACT=ACTIVATIONS[act], HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        TYPE=getattr(tl, str(x.dtype).removeprefix("torch.")), ROWS=rows, COLUMNS=triton.next_power_of_2(k), num_warps=4,
    )  # fmt: skip
    return out


def _by_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    second: Tensor | None,
    second_bias: Tensor | None,
    norm: tuple[str, Tensor | None, Tensor | None],
    act: str,
    residual: Tensor | None,
) -> Tensor:
    kind, gain, shift = norm
    if kind != "none":
        assert gain is not None
        x = (rms_norm(x, gain) if shift is None else layer_norm(x, gain, shift)).to(x.dtype)
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
    return y if residual is None else residual + y
