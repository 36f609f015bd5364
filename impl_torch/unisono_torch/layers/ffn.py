"""The feed-forward network: Linear(D→hidden), GELU-tanh, Linear(hidden→D)."""

from __future__ import annotations

from torch import Tensor, nn

from unisono_torch.layers.basic import Linear
from unisono_torch.ops.elementwise import gelu_tanh


class FFN(nn.Module):
    """x [..., D] → [..., D], in x's dtype."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu_tanh(self.up(x)))
