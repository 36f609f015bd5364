"""MARU: embedding, Mamba block, Linear, MoM-GRU, head; or a stack with norms and residuals. As docs/architectures/maru.md resolves it."""

from __future__ import annotations

import jax
from flax import nnx
from unisono_spec.contract.maru import MARUConfig

from unisono_jax.layers.leaves import Arrays, Embedding, How, Linear, Marks, RMSNorm, sub
from unisono_jax.layers.maru import Block
from unisono_jax.models.base import Dropout, Mask, Model, Noise, State

PARTS = ("conv", "ssm", "h", "memory")  # of a layer's state


class MARU(Model):
    config: MARUConfig

    def __init__(self, config: MARUConfig, params: Arrays, dtype: str, implementation: str) -> None:
        super().__init__(config, dtype, implementation)
        self.embedding = Embedding(sub(params, "embedding"))
        self.layers = nnx.List([Block(sub(params, f"layers.{i}"), config) for i in range(config.n_layers)])
        if config.prenorm:
            self.norm = RMSNorm(sub(params, "norm"))
        self.head = nnx.List([Linear(sub(params, f"head.{i}")) for i in range(2)])

    def _token(
        self, token: jax.Array, state: State, reset: Mask, valid: Mask, dropout: Dropout, noise: Noise = None
    ) -> tuple[jax.Array, State]:
        return self._read(token, state, (reset, valid), dropout, noise, None)

    def _sequence(
        self,
        tokens: jax.Array,
        state: State,
        reset: Mask,
        valid: Mask,
        dropout: Dropout,
        chunk_size: int,
        noise: Noise = None,
        loads: list[jax.Array] | None = None,
    ) -> tuple[jax.Array, State]:
        return self._read(tokens, state, (reset, valid), dropout, noise, (chunk_size, self.implementation), loads)

    def _read(
        self,
        tokens: jax.Array,
        state: State,
        marks: Marks,
        dropout: Dropout,
        noise: Noise,
        how: How,
        loads: list[jax.Array] | None = None,
    ) -> tuple[jax.Array, State]:
        """tokens [B] if `how` is None, else [B, T]."""
        x = self.embedding(tokens, self.dtype)
        out: State = {}
        for i, layer in enumerate(self.layers):
            names = [f"layers.{i}.{part}" for part in PARTS]
            masks = (None, None) if dropout is None else (dropout[2 * i], dropout[2 * i + 1])
            drawn = None if noise is None else noise[i]
            x, after = layer(x, tuple(state[name] for name in names), marks, how, masks, drawn, loads)
            out |= dict(zip(names, after, strict=True))
        hidden = self.head[0](self.norm(x) if self.config.prenorm else x, self.dtype)
        return self.head[1](jax.nn.relu(hidden), self.dtype), out


MODEL = MARU
