"""S4D as a stack: embedding, x ← x + mixer(LN(x)), x ← x + FFN(LN(x)), LN, head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from unisono_spec.contract.s4d import S4DConfig

from unisono_torch.layers.basic import Embedding, Head, LayerNorm
from unisono_torch.layers.reading import Reading, Training
from unisono_torch.layers.s4d import Block
from unisono_torch.models.base import Model, State


class S4D(Model):
    config: S4DConfig
    layers: Iterable[Any]  # of Block

    def __init__(self, config: S4DConfig, dtype: str = "float32", implementation: str = "auto") -> None:
        super().__init__(config, dtype, implementation)
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.n_layers)])
        self.norm = LayerNorm(config.d_model)
        self.head = Head(config.d_model, config.vocab_size, config.head_bias, config.tie_head)

    def _read(self, tokens: Tensor, state: State, read: Reading, training: Training) -> tuple[Tensor, State]:
        x = self.embedding(tokens).to(read.dtype)
        updates = 2 if self.config.ffn_mult else 1  # of a layer
        out: State = {}
        for i, layer in enumerate(self.layers):
            name = f"layers.{i}.ssm"
            x, out[name] = layer(x, state[name], read, training.masks(i, updates))
        return x, out


MODEL = S4D
