"""InfinityFormer: embedding, x ← x + mixer(LN(x)), x ← x + FFN(LN(x)), LN, head; as docs/architectures/infinityformer.md resolves it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from unisono_spec.contract.infinityformer import InfinityFormerConfig

from unisono_torch.layers.basic import Embedding, Head, LayerNorm
from unisono_torch.layers.infinityformer import Block
from unisono_torch.layers.reading import Reading, Training
from unisono_torch.models.base import Model, State
from unisono_torch.ops import rotary
from unisono_torch.ops.elementwise import wide


class InfinityFormer(Model):
    config: InfinityFormerConfig
    layers: Iterable[Any]  # of Block

    def __init__(self, config: InfinityFormerConfig, dtype: str = "float32", implementation: str = "auto") -> None:
        super().__init__(config, dtype, implementation)
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.n_layers)])
        self.norm = LayerNorm(config.d_model)
        self.head = Head(config.d_model, config.vocab_size, config.head_bias, config.tie_head)
        if config.rope != "none":
            rotary.prepare(config.head_width, config.rope_base)

    def _read(self, tokens: Tensor, state: State, read: Reading, training: Training) -> tuple[Tensor, State]:
        config, x = self.config, self.embedding(tokens).to(read.dtype)
        where, count = read.positions(state["position"], tokens)
        rotation = None if config.rope == "none" else read.rotation(where, config.head_width, config.rope_base, wide(x.dtype))
        due = (where + 1) % config.compress_every == 0 if config.compress_every else None
        out: State = {"position": count}
        for i, layer in enumerate(self.layers):
            S, z = f"layers.{i}.S", f"layers.{i}.z"
            x, (out[S], out[z]) = layer(x, rotation, due, (state[S], state[z]), read, training.masks(i))
        return x, out


MODEL = InfinityFormer
