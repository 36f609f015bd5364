"""The Mamba block around its ops: [u, z] = W_in x, u ← SiLU(conv(u)), y = S6(u), W_out (y ∘ SiLU(z)) (Gu & Dao 2024, figure 3).

Its parameters have their published names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unisono_torch.layers.basic import Conv, FullLinear, Linear
from unisono_torch.layers.reading import Reading
from unisono_torch.ops import activated_conv, gated_scan
from unisono_torch.ops.elementwise import wide

State = tuple[Tensor, Tensor]  # the convolution's last inputs [B, w−1, inner], and h [B, inner, N]


class MambaBlock(nn.Module):
    def __init__(self, d_model: int, expand: int, d_state: int, conv_width: int, dt_rank: int, bias: bool, conv_bias: bool) -> None:
        super().__init__()
        inner = expand * d_model
        self.widths = dt_rank, d_state, d_state
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.in_proj = Linear(d_model, 2 * inner, bias)
        self.conv1d = Conv(inner, conv_width, conv_bias)
        self.x_proj = Linear(inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = FullLinear(dt_rank, inner)
        self.out_proj = Linear(inner, d_model, bias)

    def forward(self, x: Tensor, state: State, read: Reading) -> tuple[Tensor, State]:
        """x [B, D] or [B, T, D] → the same, the state after it."""
        dtype = wide(x.dtype)
        u, z = self.in_proj(x).chunk(2, -1)
        u, conv = read(activated_conv, u, self.conv1d.weight, self.conv1d.bias, state[0])
        delta, B, C = self.x_proj(u).split(self.widths, -1)
        dt, A = self.dt_proj(delta), -self.A_log.to(dtype).exp()
        y, ssm = read(gated_scan, u, dt, A, B, C, self.D, state[1], z=z)
        return self.out_proj(y), (conv, ssm)
