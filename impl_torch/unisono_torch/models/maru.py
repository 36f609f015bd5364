"""MARU: embedding, Mamba block, Linear, MoM-GRU, head; or a stack with norms and residuals. As docs/architectures/maru.md resolves it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from unisono_spec.contract.maru import MARUConfig

from unisono_torch.layers.basic import Embedding, Linear, RMSNorm
from unisono_torch.layers.maru import Layer
from unisono_torch.layers.reading import Reading, Training
from unisono_torch.models.base import Model, State

STATES = ("conv", "ssm", "h", "memory")  # of a layer's state


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

    def _read(self, tokens: Tensor, state: State, read: Reading, training: Training) -> tuple[Tensor, State]:
        x = self.embedding(tokens).to(read.dtype)
        out: State = {}
        for i, layer in enumerate(self.layers):
            names = [f"layers.{i}.{part}" for part in STATES]
            x, after = layer(x, [state[name] for name in names], read, training.masks(i), training.router(i), training.loads)
            out |= dict(zip(names, after, strict=True))
        return x, out

    def _head(self, x: Tensor) -> Tensor:
        return self.head[1](self._hidden(x))

    def _last_product(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        last: Any = self.head[1]
        return self._hidden(x), last.weight, last.bias

    def _hidden(self, x: Tensor) -> Tensor:
        x = x if self.norm is None else self.norm(x).to(x.dtype)
        return self.head[0](x).relu()


MODEL = MARU
