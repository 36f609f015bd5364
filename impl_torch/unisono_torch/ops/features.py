"""Feature maps φ of linear attention: φ(q)·φ(k) stands for exp(q·k). x [..., K] → [..., K'].

elu1 (Katharopoulos et al. 2020, eq 7), relu, taylor2 (Arora et al. 2024, eq 2), learned: elu1(τ x), one τ a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unisono_torch.ops.fold import masked
from unisono_torch.ops.transforms import transformed


def elu1(x: Tensor) -> Tensor:
    """[...] → [...]: x + 1 above 0 and e^x below, in these two branches: elu(x) + 1 rounds to 0 where e^x has not yet."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not transformed():
        return _Elu1.apply(x)  # pyright: ignore[reportReturnType]
    return torch.relu(x) + x.clamp(max=0).exp()  # one of the terms is 0, or 1, exactly


class _Elu1(torch.autograd.Function):
    """Its slope is 1 above 0 and e^x below: min(φ, 1). Autograd's way back through the two branches takes three times as long."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.relu(x) + x.clamp(max=0).exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (y,) = ctx.saved_tensors
        return dy * y.clamp(max=1).nan_to_num(0.0)  # a NaN of padding, whose dy is 0, must not spread


def relu(x: Tensor) -> Tensor:
    return torch.relu(x)


def taylor2(x: Tensor) -> Tensor:
    """[1, x / K^¼, vec(x xᵀ) / √(2K)], so that φ(q)·φ(k) = 1 + s + s²/2 with s = q·k / √K."""
    k = x.shape[-1]
    square = (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x / k**0.25, square / (2 * k) ** 0.5], -1)


def feature_map(name: str, x: Tensor, tau: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """x [..., K] → [..., F]: φ by its name in a config; `tau` [1] belongs to "learned".

    valid, bool, of x's first axes: where it is false, φ(0), so that a NaN there reaches no gradient, of τ neither.
    """
    (x,) = masked(valid, x)
    if name == "learned":
        assert tau is not None
        return elu1(tau.to(x.dtype) * x)
    return {"elu1": elu1, "relu": relu, "taylor2": taylor2}[name](x)
