"""MARU: embedding, Mamba block, Linear, MoM-GRU, head; or a stack with norms and residuals. As docs/architectures/maru.md resolves it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from unisono_spec.contract.maru import MARUConfig

from unisono_torch.arrays import DTYPES
from unisono_torch.layers.basic import Embedding, Linear, RMSNorm
from unisono_torch.layers.mamba import How
from unisono_torch.layers.maru import Layer
from unisono_torch.models.base import Dropout, Mask, Model, State

PARTS = ("conv", "ssm", "h", "memory")  # of a layer's state
Noise = Sequence[Tensor] | None


class MARU(Model):
    config: MARUConfig
    layers: Iterable[Any]  # of Layer

    def __init__(self, config: MARUConfig, dtype: str = "float32", implementation: str = "auto") -> None:
        super().__init__(config, dtype, implementation)
        d = config.d_model
        self.embedding = Embedding(config.vocab_size, d)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.n_layers)])
        self.norm = RMSNorm(d) if config.prenorm else None
        self.head = nn.ModuleList([Linear(d, config.head_hidden), Linear(config.head_hidden, config.vocab_size)])

    def _token(self, token: Tensor, state: State, reset: Mask, valid: Mask, dropout: Dropout, noise: Noise = None) -> tuple[Tensor, State]:
        return self._read(token, state, (reset, valid), dropout, None, noise)

    def _sequence(
        self,
        tokens: Tensor,
        state: State,
        reset: Mask,
        valid: Mask,
        dropout: Dropout,
        chunk_size: int,
        noise: Noise = None,
        loads: list[Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        return self._read(tokens, state, (reset, valid), dropout, (chunk_size, self.implementation), noise, loads)

    def _read(
        self,
        tokens: Tensor,
        state: State,
        marks: tuple[Mask, Mask],
        dropout: Dropout,
        how: How,
        noise: Noise,
        loads: list[Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """tokens [B] if `how` is None, else [B, T]."""
        x = self.embedding(tokens).to(DTYPES[self.dtype])
        out: State = {}
        for i, layer in enumerate(self.layers):
            names = [f"layers.{i}.{part}" for part in PARTS]
            masks = (None, None) if dropout is None else (dropout[2 * i], dropout[2 * i + 1])
            x, after = layer(x, [state[name] for name in names], marks, how, masks, None if noise is None else noise[i], loads)
            out |= dict(zip(names, after, strict=True))
        x = x if self.norm is None else self.norm(x).to(x.dtype)
        return self.head[1](self.head[0](x).relu()), out


MODEL = MARU
