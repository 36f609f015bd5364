"""S4D as a stack: embedding, x ← x + mixer(LN(x)), x ← x + FFN(LN(x)), LN, head."""

from __future__ import annotations

import jax
from flax import nnx
from unisono_spec.contract.s4d import S4DConfig

from unisono_jax.layers.leaves import Arrays, Embedding, LayerNorm, Linear, sub
from unisono_jax.layers.reading import Reading, Training
from unisono_jax.layers.s4d import Block
from unisono_jax.models.base import Model, State


class S4D(Model):
    config: S4DConfig

    def __init__(self, config: S4DConfig, params: Arrays, dtype: str, implementation: str) -> None:
        super().__init__(config, dtype, implementation)
        self.embedding = Embedding(sub(params, "embedding"))
        self.layers = nnx.List([Block(sub(params, f"layers.{i}"), config) for i in range(config.n_layers)])
        self.norm, self.head = LayerNorm(sub(params, "norm")), Linear(sub(params, "head"))

    def _read(self, tokens: jax.Array, state: State, read: Reading, training: Training) -> tuple[jax.Array, State]:
        x = self.embedding(tokens, self.dtype)
        updates = 2 if self.config.ffn_mult else 1  # of a layer
        out: State = {}
        for i, layer in enumerate(self.layers):
            name = f"layers.{i}.ssm"
            x, out[name] = layer(x, state[name], read, training.masks(i, updates))
        return x, out


MODEL = S4D
