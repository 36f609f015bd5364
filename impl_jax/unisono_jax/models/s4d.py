"""S4D as a stack: embedding, x ← x + mixer(LN(x)), x ← x + FFN(LN(x)), LN, head."""

from __future__ import annotations

import jax
from flax import nnx
from unisono_spec.contract.s4d import S4DConfig

from unisono_jax.layers.leaves import Arrays, Embedding, How, LayerNorm, Linear, Marks, sub
from unisono_jax.layers.s4d import Block
from unisono_jax.models.base import Dropout, Mask, Model, State


class S4D(Model):
    config: S4DConfig

    def __init__(self, config: S4DConfig, params: Arrays, dtype: str, implementation: str) -> None:
        super().__init__(config, dtype, implementation)
        self.embedding = Embedding(sub(params, "embedding"))
        self.layers = nnx.List([Block(sub(params, f"layers.{i}"), config) for i in range(config.n_layers)])
        self.norm, self.head = LayerNorm(sub(params, "norm")), Linear(sub(params, "head"))

    def _token(self, token: jax.Array, state: State, reset: Mask, valid: Mask, dropout: Dropout) -> tuple[jax.Array, State]:
        return self._read(token, state, (reset, valid), dropout, None)

    def _sequence(
        self, tokens: jax.Array, state: State, reset: Mask, valid: Mask, dropout: Dropout, chunk_size: int
    ) -> tuple[jax.Array, State]:
        return self._read(tokens, state, (reset, valid), dropout, (chunk_size, self.implementation))

    def _read(self, tokens: jax.Array, state: State, marks: Marks, dropout: Dropout, how: How) -> tuple[jax.Array, State]:
        """tokens [B] if `how` is None, else [B, T]."""
        x = self.embedding(tokens, self.dtype)
        a_layer = 2 if self.config.ffn_mult else 1  # updates
        out: State = {}
        for i, layer in enumerate(self.layers):
            masks = (None,) * a_layer if dropout is None else tuple(dropout[a_layer * i : a_layer * (i + 1)])
            x, out[f"layers.{i}.ssm"] = layer(x, state[f"layers.{i}.ssm"], marks, how, masks)
        return self.head(self.norm(x), self.dtype, self.embedding.weight if self.config.tie_head else None), out


MODEL = S4D
