"""Linear maps, norms and a depthwise convolution's weights that hold their parameters in one dtype and compute in another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unisono_torch.ops.elementwise import RMS_NORM_EPS, layer_norm, linear, linear_in_full, rms_norm


class Linear(nn.Module):
    """x [..., in] → [..., out], in x's dtype. Parameters are uninitialised: a model loads them by name."""

    def __init__(self, into: int, out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, into))
        self.bias = nn.Parameter(torch.empty(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        out, into = self.weight.shape
        return f"{into}, {out}, bias={self.bias is not None}"


class FullLinear(Linear):
    """x [..., in] → [..., out], in float32 or wider whatever dtype x has."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_in_full(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    """[..., D] → [..., D]: LayerNorm over the last axis; comes out float32 or wider. large: of entries up to 10²⁹."""

    def __init__(self, width: int, large: bool = False) -> None:
        super().__init__()
        self.large = large
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, large=self.large)

    def extra_repr(self) -> str:
        return str(len(self.weight))


class RMSNorm(nn.Module):
    """[..., D] → [..., D]: RMSNorm over the last axis; comes out float32 or wider."""

    def __init__(self, width: int, eps: float = RMS_NORM_EPS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps:g}"


class Conv(nn.Module):
    """The weight [channels, 1, width] and bias [channels] of ops/short_conv.py."""

    def __init__(self, channels: int, width: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def extra_repr(self) -> str:
        channels, _, width = self.weight.shape
        return f"{channels}, width={width}, bias={self.bias is not None}"


class Embedding(nn.Module):
    """Ids [...] → rows [..., D] of the table."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width))

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids.long(), self.weight)

    def extra_repr(self) -> str:
        rows, width = self.weight.shape
        return f"{rows}, {width}"


class Head(nn.Module):
    """x [..., D] → logits [..., V]. A tied head has no weight of its own and is given the embedding's."""

    def __init__(self, into: int, out: int, bias: bool, tied: bool) -> None:
        super().__init__()
        self.weight = None if tied else nn.Parameter(torch.empty(out, into))
        self.bias = nn.Parameter(torch.empty(out)) if bias else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        return linear(x, *self.weights(embedding))

    def weights(self, embedding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[V, D], [V]."""
        weight = self.weight if embedding is None else embedding
        assert weight is not None
        return weight, self.bias

    def extra_repr(self) -> str:
        shape = "tied" if self.weight is None else f"{self.weight.shape[1]}, {self.weight.shape[0]}"
        return f"{shape}, bias={self.bias is not None}"


def updated(x: Tensor, update: Tensor, mask: Tensor | None) -> Tensor:
    """x [..., D] → [..., D]: x + update. mask: what dropout multiplies the update by."""
    return x + (update if mask is None else update * mask.to(update.dtype))
