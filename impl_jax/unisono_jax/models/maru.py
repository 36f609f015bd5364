"""MARU: embedding, Mamba block, Linear, MoM-GRU, head; or a stack with norms and residuals. As docs/architectures/maru.md resolves it."""

from __future__ import annotations

import jax
from flax import nnx
from unisono_spec.contract.maru import MARUConfig

from unisono_jax.layers.leaves import Arrays, Embedding, Linear, RMSNorm, sub
from unisono_jax.layers.maru import Block
from unisono_jax.layers.reading import Reading, Training
from unisono_jax.models.base import Model, State

STATES = ("conv", "ssm", "h", "memory")  # of a layer's state


class MARU(Model):
    config: MARUConfig

    def __init__(self, config: MARUConfig, params: Arrays, dtype: str, implementation: str) -> None:
        super().__init__(config, dtype, implementation)
        self.embedding = Embedding(sub(params, "embedding"))
        self.layers = nnx.List([Block(sub(params, f"layers.{i}"), config) for i in range(config.n_layers)])
        if config.prenorm:
            self.norm = RMSNorm(sub(params, "norm"))
        self.head = nnx.List([Linear(sub(params, f"head.{i}")) for i in range(2)])

    def _read(self, tokens: jax.Array, state: State, read: Reading, training: Training) -> tuple[jax.Array, State]:
        x = self.embedding(tokens, self.dtype)
        out: State = {}
        for i, layer in enumerate(self.layers):
            names = [f"layers.{i}.{part}" for part in STATES]
            x, after = layer(x, tuple(state[name] for name in names), read, training.masks(i), training.router(i), training.loads)
            out |= dict(zip(names, after, strict=True))
        return x, out

    def _head(self, x: jax.Array) -> jax.Array:
        hidden = self.head[0](self.norm(x) if self.config.prenorm else x, self.dtype)
        return self.head[1](jax.nn.relu(hidden), self.dtype)


MODEL = MARU
