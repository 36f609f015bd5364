"""CRAM's layers: an FFN block of the fixed scheme's readout, and a whole layer of the adaptive scheme (eqs 7–10)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from unisono_spec.contract.cram import CRAMConfig

from unisono_torch.layers.basic import LayerNorm, Linear
from unisono_torch.layers.ffn import FFN
from unisono_torch.layers.reading import Reading
from unisono_torch.layers.retained import retained
from unisono_torch.ops import weighted_sum
from unisono_torch.ops.elementwise import binary_digits, gelu_tanh, linear, wide


class Readout(nn.Module):
    """x [..., D] → [..., D]: x ← x + FFN(LN(x)), the fixed scheme's residual block."""

    def __init__(self, config: CRAMConfig) -> None:
        super().__init__()
        self.norm = LayerNorm(config.d_model)
        self.ffn = FFN(config.d_model, config.ffn_mult * config.d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + _dropped(self.ffn(self.norm(x).to(x.dtype)), mask)


class Score(nn.Module):
    """k_Q and s_φ: x [..., D], position [...] → s = s_φ([bits(p), xᵀQx / k_scale]) [..., 1], or [..., D], float32 or wider; and the sum."""

    def __init__(self, config: CRAMConfig) -> None:
        super().__init__()
        d, bits = config.d_model, config.position_bits + 1
        self.position_bits, self.key_scale = config.position_bits, config.key_scale
        self.Q = nn.Parameter(torch.empty(d, d))
        self.config = config
        self.score = nn.ModuleList([Linear(bits, bits), Linear(bits, d), Linear(d, d if config.channel_weights else 1)])
        self.decay = nn.Parameter(torch.empty(d)) if config.learned_decay else None

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        dtype = wide(x.dtype)
        k = (x.to(dtype) * linear(x, self.Q).to(dtype)).sum(-1, keepdim=True) / self.key_scale  # [..., 1]
        h = torch.cat([binary_digits(position, self.position_bits, dtype), k], -1)  # [..., d_b + 1]
        h = gelu_tanh(self.score[0](h))
        return self.score[2](gelu_tanh(self.score[1](h)))

    def summed(self, u: Tensor, s: Tensor, sums: Sequence[Tensor], read: Reading) -> tuple[Tensor, ...]:
        """u [..., D], s as `forward` gives them, the sums so far [B, D] → ξ [..., D], float32 or wider, and the sums then."""
        if self.config.retains:
            return retained(u, s, self.decay, self.config, sums, read)
        return read(weighted_sum, u, s[..., 0], *sums, exclusive=self.config.exclusive)


class Block(nn.Module):
    """One adaptive layer, around the sum: `scored_input` comes before it and `forward` after it."""

    def __init__(self, config: CRAMConfig) -> None:
        super().__init__()
        self.residual, self.skip = config.residual, config.skip
        self.input_norm = LayerNorm(config.d_model) if config.input_norm else None
        self.mixer = Score(config)
        self.norm = LayerNorm(config.d_model, large=not config.normalised)  # nothing bounds a sum of s_t σ(x_t)
        self.ffn = FFN(config.d_model, config.ffn_mult * config.d_model)

    def scored_input(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D], position [...] → what is summed u [..., D], and its weights s [..., 1], or [..., D]."""
        if self.input_norm is not None:
            x = self.input_norm(x).to(x.dtype)
        return x, self.mixer(x, position)

    def forward(self, x: Tensor, u: Tensor, xi: Tensor, mask: Tensor | None = None) -> Tensor:
        """x, u, ξ [..., D] → [..., D]: x + FFN(LN(ξ)), of LN(ξ) + u with `skip`, or LN(ξ + FFN(ξ)) with residual="after".

        mask: dropout's, of the FFN's output.
        """
        if self.residual == "after":
            # all in ξ's dtype: a prefix sum rounded to 16 bits before its norm loses its latest terms, or overflows
            return self.norm(xi + _dropped(self.ffn(xi), mask)).to(x.dtype)
        read = self.norm(xi)
        return x + _dropped(self.ffn((read + u if self.skip else read).to(x.dtype)), mask)


def _dropped(update: Tensor, mask: Tensor | None) -> Tensor:
    return update if mask is None else update * mask.to(update.dtype)
