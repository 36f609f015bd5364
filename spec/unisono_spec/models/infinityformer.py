"""InfinityFormer: embedding, x ← x + mixer(LN(x)), x ← x + FFN(LN(x)), LN, head; as docs/architectures/infinityformer.md resolves it."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.infinityformer import InfinityFormerConfig
from unisono_spec.layers.infinityformer import ffn_update, mixer_inputs, mixer_update
from unisono_spec.layers.norm import norm
from unisono_spec.layers.params import sub
from unisono_spec.models.base import Dropout, Mask, Model
from unisono_spec.ops import multiscale, position
from unisono_spec.ops.elementwise import linear


class InfinityFormer(Model):
    config: InfinityFormerConfig

    def _token(self, token: np.ndarray, state: Arrays, reset: Mask, valid: Mask, dropout: Dropout) -> tuple[np.ndarray, Arrays]:
        r, config = self.rounded, self.config
        where, count = position.step(state["position"], reset, valid)
        due = (where + 1) % config.compress_every == 0 if config.compress_every else None
        x = self.params["embedding.weight"][token]  # [B, D]
        out: Arrays = {"position": count}
        for i in range(config.n_layers):
            p, S, z = sub(self.params, f"layers.{i}"), f"layers.{i}.S", f"layers.{i}.z"
            inputs = mixer_inputs(p, config, x, where, r)
            o, (out[S], out[z]) = multiscale.step(*inputs, (state[S], state[z]), reset, valid, due, config.compress_rank)
            update = mixer_update(p, o, r)
            x = r(x + (update if dropout is None else update * dropout[2 * i]))
            update = ffn_update(p, x, r)
            x = r(x + (update if dropout is None else update * dropout[2 * i + 1]))
        return self._head(x), out

    def _sequence(
        self, tokens: np.ndarray, state: Arrays, reset: Mask, valid: Mask, dropout: Dropout, chunk_size: int
    ) -> tuple[np.ndarray, Arrays]:
        r, config = self.rounded, self.config
        where, count = position.parallel(state["position"], tokens.shape[1], reset, valid)
        x = self.params["embedding.weight"][tokens]  # [B, T, D]
        out: Arrays = {"position": count}
        for i in range(config.n_layers):
            p, S, z = sub(self.params, f"layers.{i}"), f"layers.{i}.S", f"layers.{i}.z"
            inputs, old = mixer_inputs(p, config, x, where, r), (state[S], state[z])
            if config.compress_every:  # sequential whatever the form: layer by layer instead of token by token
                due = (where + 1) % config.compress_every == 0
                o, (out[S], out[z]) = multiscale.recurrent(*inputs, old, reset, valid, due, config.compress_rank)
            else:
                o, (out[S], out[z]) = multiscale.parallel(*inputs, old, reset, valid, chunk_size)
            update = mixer_update(p, o, r)
            x = r(x + (update if dropout is None else update * dropout[2 * i]))
            update = ffn_update(p, x, r)
            x = r(x + (update if dropout is None else update * dropout[2 * i + 1]))
        return self._head(x), out

    def _head(self, x: np.ndarray) -> np.ndarray:
        p = self.params
        weight = p["embedding.weight" if self.config.tie_head else "head.weight"]
        return self.rounded(linear(norm(p, "norm", x, self.rounded), weight, p.get("head.bias")))


MODEL = InfinityFormer
