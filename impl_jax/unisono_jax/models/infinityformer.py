"""InfinityFormer: embedding, x ← x + mixer(LN(x)), x ← x + FFN(LN(x)), LN, head; as docs/architectures/infinityformer.md resolves it."""

from __future__ import annotations

import jax
from flax import nnx
from unisono_spec.contract.infinityformer import InfinityFormerConfig

from unisono_jax.layers.infinityformer import Block
from unisono_jax.layers.leaves import Arrays, Embedding, How, LayerNorm, Linear, sub
from unisono_jax.models.base import Dropout, Mask, Model, State
from unisono_jax.ops import position, rotary
from unisono_jax.ops.elementwise import wide


class InfinityFormer(Model):
    config: InfinityFormerConfig

    def __init__(self, config: InfinityFormerConfig, params: Arrays, dtype: str, implementation: str) -> None:
        super().__init__(config, dtype, implementation)
        self.embedding = Embedding(sub(params, "embedding"))
        self.layers = nnx.List([Block(sub(params, f"layers.{i}"), config) for i in range(config.n_layers)])
        self.norm, self.head = LayerNorm(sub(params, "norm")), Linear(sub(params, "head"))

    def _token(self, token: jax.Array, state: State, reset: Mask, valid: Mask, dropout: Dropout) -> tuple[jax.Array, State]:
        where, count = position.step(state["position"], reset, valid)
        return self._read(token, state, where, count, (reset, valid), dropout, None)

    def _sequence(
        self, tokens: jax.Array, state: State, reset: Mask, valid: Mask, dropout: Dropout, chunk_size: int
    ) -> tuple[jax.Array, State]:
        where, count = position.parallel(state["position"], tokens.shape[1], reset, valid)
        return self._read(tokens, state, where, count, (reset, valid), dropout, (chunk_size, self.implementation))

    def _read(
        self, tokens: jax.Array, state: State, where: jax.Array, count: jax.Array, marks: tuple[Mask, Mask], dropout: Dropout, how: How
    ) -> tuple[jax.Array, State]:
        """tokens [B] if `how` is None, else [B, T]; where: their positions; count [B]: the position after them."""
        config = self.config
        x = self.embedding(tokens, self.dtype)
        turn = None if config.rope == "none" else rotary.turn(where, config.head_width, config.rope_base, wide(x))
        due = (where + 1) % config.compress_every == 0 if config.compress_every else None
        out: State = {"position": count}
        for i, layer in enumerate(self.layers):
            S, z = f"layers.{i}.S", f"layers.{i}.z"
            masks = (None, None) if dropout is None else (dropout[2 * i], dropout[2 * i + 1])
            x, (out[S], out[z]) = layer(x, turn, due, (state[S], state[z]), marks, how, masks)
        return self.head(self.norm(x), self.dtype, self.embedding.weight if config.tie_head else None), out


MODEL = InfinityFormer
