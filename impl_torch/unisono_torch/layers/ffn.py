"""Feed-forward networks: x [..., D] → [..., D], in x's dtype."""

from __future__ import annotations

from torch import Tensor, nn

from unisono_torch.layers.basic import Linear
from unisono_torch.ops.elementwise import gated_gelu, gelu, gelu_tanh, linear, on_a_gpu, silu


class FFN(nn.Module):
    """x [..., D] → [..., D]: Linear(D→hidden), GELU-tanh, Linear(hidden→D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu_tanh(self.up(x)))


class GELUFFN(nn.Module):
    """x [..., D] → [..., D]: Linear(D→hidden), exact GELU, Linear(hidden→D)."""

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.up = Linear(width, hidden, bias)
        self.down = Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x)))


class SwiGLU(nn.Module):
    """x [..., D] → [..., D]: down(SiLU(gate x) ∘ up x) (Shazeer 2020, eq 6)."""

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.gate = Linear(width, hidden, bias)
        self.up = Linear(width, hidden, bias)
        self.down = Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


class GatedGELU(nn.Module):
    """x [..., D] → [..., D], InfinityFormer's: [a, b] = up x, down(GELU(a ∘ σ(b))), exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, 2 * hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if on_a_gpu(x) and _untouched(self.up):
            return self.down(gated_gelu(linear(x, self.up.weight), self.up.bias))
        return self.down(gated_gelu(self.up(x)))


def _untouched(layer: nn.Module) -> bool:
    """Whether nothing would be missed if its product were made without calling it: it has no hooks, and no `forward` of its own, which is
    how accelerate brings a layer's weights to the GPU."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is Linear and not hooks and "forward" not in layer.__dict__
