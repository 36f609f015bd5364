"""Mamba as a stack: embedding, x ← x + mamba(RMSNorm(x)), RMSNorm, head (Gu & Dao 2024, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from unisono_spec.contract.mamba import MambaConfig

from unisono_torch.layers.basic import Embedding, Head, RMSNorm, updated
from unisono_torch.layers.mamba import MambaBlock
from unisono_torch.layers.reading import Mask, Reading, Training
from unisono_torch.models.base import Model, State


class Layer(nn.Module):
    """x [B, (T,) D] → the same shape: x ← x + mamba(RMSNorm(x))."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        sizes = config.expand, config.d_state, config.conv_width, config.rank
        self.mixer = MambaBlock(config.d_model, *sizes, config.bias, config.conv_bias)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor], read: Reading, mask: Mask) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        update, after = self.mixer(self.norm(x).to(x.dtype), state, read)
        return updated(x, update, mask), after


class Mamba(Model):
    config: MambaConfig
    layers: Iterable[Any]  # of Layer

    def __init__(self, config: MambaConfig, dtype: str = "float32", implementation: str = "auto") -> None:
        super().__init__(config, dtype, implementation)
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.n_layers)])
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = Head(config.d_model, config.vocab_size, config.head_bias, config.tie_head)

    def _read(self, tokens: Tensor, state: State, read: Reading, training: Training) -> tuple[Tensor, State]:
        x = self.embedding(tokens).to(read.dtype)
        out: State = {}
        for i, layer in enumerate(self.layers):
            conv, ssm = f"layers.{i}.conv", f"layers.{i}.ssm"
            x, (out[conv], out[ssm]) = layer(x, (state[conv], state[ssm]), read, training.mask(i))
        return x, out


MODEL = Mamba
