"""S4D's layer around its op: Δ and A from their logarithms, GELU, Linear(D→2D) and GLU after it; and the block around that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from unisono_spec.contract.s4d import S4DConfig

from unisono_torch.layers.basic import LayerNorm, Linear, updated
from unisono_torch.layers.ffn import GELUFFN
from unisono_torch.layers.reading import Mask, Reading
from unisono_torch.ops import diagonal_ssm
from unisono_torch.ops.elementwise import gelu, sigmoid


class Mixer(nn.Module):
    """The real part of A is −exp(log_A_real), always negative."""

    def __init__(self, config: S4DConfig) -> None:
        super().__init__()
        d, pairs = config.d_model, config.d_state // 2
        self.log_dt = nn.Parameter(torch.empty(d))
        self.log_A_real = nn.Parameter(torch.empty(d, pairs))
        self.A_imag = nn.Parameter(torch.empty(d, pairs))
        self.C = nn.Parameter(torch.empty(d, pairs, 2))
        self.D = nn.Parameter(torch.empty(d))
        self.out = Linear(d, 2 * d)

    def forward(self, h: Tensor, state: Tensor, read: Reading) -> tuple[Tensor, Tensor]:
        """h [B, D] or [B, T, D] → what it adds, the state after it."""
        # float64, as the op takes their powers
        A = torch.stack([-self.log_A_real.double().exp(), self.A_imag.double()], -1)
        y, after = read(diagonal_ssm, h, self.log_dt.double().exp(), A, self.C, self.D, state)
        value, gate = self.out(gelu(y.to(h.dtype))).chunk(2, -1)
        return value * sigmoid(gate), after


class Block(nn.Module):
    """x [B, (T,) D] → the same shape: x ← x + mixer(LN(x)), x ← x + FFN(LN(x)); the latter unless ffn_mult is 0."""

    def __init__(self, config: S4DConfig) -> None:
        super().__init__()
        d = config.d_model
        self.mixer_norm = LayerNorm(d)
        self.mixer = Mixer(config)
        self.ffn_norm = LayerNorm(d) if config.ffn_mult else None
        self.ffn = GELUFFN(d, config.ffn_mult * d) if config.ffn_mult else None

    def forward(self, x: Tensor, state: Tensor, read: Reading, masks: Sequence[Mask]) -> tuple[Tensor, Tensor]:
        """x [B, D] or [B, T, D] → the same, the state after it. masks: dropout's, of each update."""
        update, after = self.mixer(self.mixer_norm(x).to(x.dtype), state, read)
        x = updated(x, update, masks[0])
        if self.ffn is not None and self.ffn_norm is not None:
            x = updated(x, self.ffn(self.ffn_norm(x).to(x.dtype)), masks[1])
        return x, after
