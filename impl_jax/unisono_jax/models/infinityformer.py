"""InfinityFormer: embedding, x ← x + mixer(LN(x)), x ← x + FFN(LN(x)), LN, head; as docs/architectures/infinityformer.md resolves it."""

from __future__ import annotations

import jax
from flax import nnx
from unisono_spec.contract.infinityformer import InfinityFormerConfig

from unisono_jax.layers.infinityformer import Block
from unisono_jax.layers.leaves import Arrays, Embedding, LayerNorm, Linear, sub
from unisono_jax.layers.reading import Reading, Training
from unisono_jax.models.base import Model, State
from unisono_jax.ops import rotary
from unisono_jax.ops.elementwise import wide


class InfinityFormer(Model):
    config: InfinityFormerConfig

    def __init__(self, config: InfinityFormerConfig, params: Arrays, dtype: str, implementation: str) -> None:
        super().__init__(config, dtype, implementation)
        self.embedding = Embedding(sub(params, "embedding"))
        self.layers = nnx.List([Block(sub(params, f"layers.{i}"), config) for i in range(config.n_layers)])
        self.norm, self.head = LayerNorm(sub(params, "norm")), Linear(sub(params, "head"))

    def _read(self, tokens: jax.Array, state: State, read: Reading, training: Training) -> tuple[jax.Array, State]:
        config, x = self.config, self.embedding(tokens, self.dtype)
        where, count = read.positions(state["position"], tokens)
        rotation = None if config.rope == "none" else rotary.cos_sin(where, config.head_width, config.rope_base, wide(x))
        due = (where + 1) % config.compress_every == 0 if config.compress_every else None
        out: State = {"position": count}
        for i, layer in enumerate(self.layers):
            S, z = f"layers.{i}.S", f"layers.{i}.z"
            x, (out[S], out[z]) = layer(x, rotation, due, (state[S], state[z]), read, training.masks(i))
        return x, out


MODEL = InfinityFormer
