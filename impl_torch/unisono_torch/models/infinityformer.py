"""InfinityFormer: embedding, x ← x + mixer(LN(x)), x ← x + FFN(LN(x)), LN, head; as docs/architectures/infinityformer.md resolves it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from unisono_spec.contract.infinityformer import InfinityFormerConfig

from unisono_torch.arrays import DTYPES
from unisono_torch.layers.basic import Embedding, Head, LayerNorm
from unisono_torch.layers.infinityformer import Block, How
from unisono_torch.models.base import Dropout, Mask, Model, State
from unisono_torch.ops import position, rotary
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

    def _token(self, token: Tensor, state: State, reset: Mask, valid: Mask, dropout: Dropout) -> tuple[Tensor, State]:
        where, count = position.step(state["position"], reset, valid)
        return self._read(token, state, where, count, (reset, valid), dropout, None)

    def _sequence(self, tokens: Tensor, state: State, reset: Mask, valid: Mask, dropout: Dropout, chunk_size: int) -> tuple[Tensor, State]:
        where, count = position.parallel(state["position"], tokens.shape[1], reset, valid)
        return self._read(tokens, state, where, count, (reset, valid), dropout, (chunk_size, self.implementation))

    def _read(
        self, tokens: Tensor, state: State, where: Tensor, count: Tensor, marks: tuple[Mask, Mask], dropout: Dropout, how: How
    ) -> tuple[Tensor, State]:
        """tokens [B] if `how` is None, else [B, T]; where: their positions; count [B]: the position after them."""
        config, x = self.config, self.embedding(tokens).to(DTYPES[self.dtype])
        turn = None if config.rope == "none" else rotary.turn(where, config.head_width, config.rope_base, wide(x.dtype))
        due = (where + 1) % config.compress_every == 0 if config.compress_every else None
        out: State = {"position": count}
        for i, layer in enumerate(self.layers):
            S, z = f"layers.{i}.S", f"layers.{i}.z"
            masks = (None, None) if dropout is None else (dropout[2 * i], dropout[2 * i + 1])
            x, (out[S], out[z]) = layer(x, turn, (state[S], state[z]), marks, how, due, masks)
        return self.head(self.norm(x).to(x.dtype), self.embedding.weight if config.tie_head else None), out


MODEL = InfinityFormer
