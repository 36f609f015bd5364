"""What a Mamba block has around its convolution: SiLU after it (Gu & Dao 2024, figure 3).

Shapes as in ops/short_conv.py. Each form returns (SiLU(conv(x)) [B, T, D] in x's dtype, final state). A kernel has SiLU inside.
"""

from __future__ import annotations

from torch import Tensor

from unisono_torch.ops import short_conv
from unisono_torch.ops.elementwise import silu


def step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, reset: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token: x [B, D], reset and valid [B]."""
    y, after = short_conv.step(x, weight, bias, state, reset, valid)
    return silu(y.to(x.dtype)), after


def parallel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    return short_conv.through(x, weight, bias, initial_state, reset, valid, implementation, activated=True)
