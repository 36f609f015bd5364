"""S4D as a stack: embedding, x ← x + mixer(LN(x)), x ← x + FFN(LN(x)), LN, head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from unisono_spec.contract.s4d import S4DConfig

from unisono_torch.arrays import DTYPES
from unisono_torch.layers.basic import Embedding, Head, LayerNorm
from unisono_torch.layers.s4d import Block, How
from unisono_torch.models.base import Dropout, Mask, Model, State


class S4D(Model):
    config: S4DConfig
    layers: Iterable[Any]  # of Block

    def __init__(self, config: S4DConfig, dtype: str = "float32", implementation: str = "auto") -> None:
        super().__init__(config, dtype, implementation)
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.n_layers)])
        self.norm = LayerNorm(config.d_model)
        self.head = Head(config.d_model, config.vocab_size, config.head_bias, config.tie_head)

    def _token(self, token: Tensor, state: State, reset: Mask, valid: Mask, dropout: Dropout) -> tuple[Tensor, State]:
        return self._read(token, state, (reset, valid), dropout, None)

    def _sequence(self, tokens: Tensor, state: State, reset: Mask, valid: Mask, dropout: Dropout, chunk_size: int) -> tuple[Tensor, State]:
        return self._read(tokens, state, (reset, valid), dropout, (chunk_size, self.implementation))

    def _read(self, tokens: Tensor, state: State, marks: tuple[Mask, Mask], dropout: Dropout, how: How) -> tuple[Tensor, State]:
        """tokens [B] if `how` is None, else [B, T]."""
        x = self.embedding(tokens).to(DTYPES[self.dtype])
        each = 2 if self.config.ffn_mult else 1  # updates of a layer
        out: State = {}
        for i, layer in enumerate(self.layers):
            name = f"layers.{i}.ssm"
            masks = (None, None) if dropout is None else (dropout[each * i], dropout[each * i + each - 1])
            x, out[name] = layer(x, state[name], marks, how, masks)
        return self.head(self.norm(x).to(x.dtype), self.embedding.weight if self.config.tie_head else None), out


MODEL = S4D
