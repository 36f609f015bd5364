"""Functions without memory, and the dtype that sums are held in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unisono_torch.ops.transforms import transformed

LAYER_NORM_EPS = 1e-5
RMS_NORM_EPS = 1e-6


def wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype of norms, scores, sums and states under compute dtype `dtype`: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def sigmoid(x: Tensor) -> Tensor:
    """The logistic function σ. Its slope is σ(x) σ(−x), to its last digits however small: torch's y(1−y) has none where y is nearly 1."""
    if not torch.is_grad_enabled():
        return torch.sigmoid(x)
    if not torch.compiler.is_compiling() and not transformed():
        return _Sigmoid.apply(x)  # pyright: ignore[reportReturnType]
    e = torch.where(x >= 0, -x, x).exp()
    return torch.where(x >= 0, 1, e) / (1 + e)


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return dy * torch.sigmoid(x) * sigmoid(-x)


def gelu_tanh(x: Tensor) -> Tensor:
    """[...] → [...]: GELU in its tanh form (Hendrycks & Gimpel 2016, section 2)."""
    return F.gelu(x, approximate="tanh")


def gelu(x: Tensor) -> Tensor:
    """[...] → [...]: GELU, exact: x Φ(x) (Hendrycks & Gimpel 2016, section 2)."""
    return F.gelu(x)


def silu(x: Tensor) -> Tensor:
    """[...] → [...]: x σ(x)."""
    return F.silu(x)


def softplus(x: Tensor) -> Tensor:
    """[...] → [...]: log(1 + e^x) at every x; F.softplus would give x itself above a threshold."""
    return -F.logsigmoid(-x)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., D] → [..., D]: RMSNorm, ε = 1e-6 (Zhang & Sennrich 2019, eq 4), computed and returned in float32 or wider."""
    dtype = wide(x.dtype)
    return F.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), RMS_NORM_EPS)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., D] → [..., D]: LayerNorm, ε = 1e-5 (Ba et al. 2016, eq 3), computed and returned in float32 or wider."""
    dtype = wide(x.dtype)
    x = x.to(dtype)
    # torch's kernels compute x·rstd − mean·rstd, forward and backward: where all of x shares a large part, as the entries of ξ do,
    # the difference has few digits left. Without that part it has all of them.
    return F.layer_norm(x - x.mean(-1, keepdim=True), x.shape[-1:], weight.to(dtype), bias.to(dtype), LAYER_NORM_EPS)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] → [..., out], in x's dtype whatever dtype the parameters are held in."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def binary_digits(n: Tensor, digits: int, dtype: torch.dtype) -> Tensor:
    """The last `digits` binary digits of non-negative integers, most significant first: [...] → [..., digits]."""
    shifts = torch.arange(digits - 1, -1, -1, device=n.device)
    # the function and not >>, which does not export to ONNX
    return torch.bitwise_and(torch.bitwise_right_shift(n.long()[..., None], shifts), 1).to(dtype)
