"""LAT and Based: embedding, x ← x + mixer(norm(x)), x ← x + ffn(norm(x)), norm, head; as docs/architectures/lat.md resolves them."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.errors import InputError
from unisono_spec.contract.lat import LATConfig
from unisono_spec.layers.lat import conv_inputs, conv_output, ffn_update, from_heads, to_heads
from unisono_spec.layers.norm import norm
from unisono_spec.layers.params import sub
from unisono_spec.models.base import Dropout, Mask, Model
from unisono_spec.ops import linear_attention, position, short_conv, softmax_attention, window
from unisono_spec.ops.elementwise import linear


class LAT(Model):
    @property
    def blocks(self) -> LATConfig:
        """What the blocks are made of."""
        assert isinstance(self.config, LATConfig)
        return self.config

    def _token(self, token: np.ndarray, state: Arrays, reset: Mask, valid: Mask, dropout: Dropout) -> tuple[np.ndarray, Arrays]:
        config, r = self.blocks, self.rounded
        before = state["position"]
        where, count = position.step(before, reset, valid)
        x = self._embed(token, where, valid)  # [B, D]
        out: Arrays = {"position": count}
        for i, kind in enumerate(config.kinds):
            p, layer = sub(self.params, f"layers.{i}"), f"layers.{i}"
            if kind == "conv":
                a, b = conv_inputs(p, x, r)
                name = f"{layer}.conv"
                y, out[name] = short_conv.step(b, p["mixer.conv.weight"], p.get("mixer.conv.bias"), state[name], reset, valid)
                update = conv_output(p, a, y, r)
            else:
                q, k, v = to_heads(p, config, kind, x, where, r)
                if kind == "linear":
                    old = state[f"{layer}.S"], state[f"{layer}.z"]
                    o, (out[f"{layer}.S"], out[f"{layer}.z"]) = linear_attention.step(q, k, v, old, reset, valid)
                else:
                    op = window.step if kind == "window" else softmax_attention.step
                    cache = state[f"{layer}.k"], state[f"{layer}.v"], before
                    o, (out[f"{layer}.k"], out[f"{layer}.v"], _) = op(q, k, v, cache, reset, valid)
                update = from_heads(p, o, r)
            x = r(x + (update if dropout is None else update * dropout[2 * i]))
            update = ffn_update(p, config, x, r)
            x = r(x + (update if dropout is None else update * dropout[2 * i + 1]))
        return self._head(x), out

    def _sequence(
        self, tokens: np.ndarray, state: Arrays, reset: Mask, valid: Mask, dropout: Dropout, chunk_size: int
    ) -> tuple[np.ndarray, Arrays]:
        config, r = self.blocks, self.rounded
        before = state["position"]
        where, count = position.parallel(before, tokens.shape[1], reset, valid)
        x = self._embed(tokens, where, valid)  # [B, T, D]
        out: Arrays = {"position": count}
        for i, kind in enumerate(config.kinds):
            p, layer = sub(self.params, f"layers.{i}"), f"layers.{i}"
            marks = reset, valid, chunk_size
            if kind == "conv":
                a, b = conv_inputs(p, x, r)
                name = f"{layer}.conv"
                y, out[name] = short_conv.parallel(b, p["mixer.conv.weight"], p.get("mixer.conv.bias"), state[name], *marks)
                update = conv_output(p, a, y, r)
            else:
                q, k, v = to_heads(p, config, kind, x, where, r)
                if kind == "linear":
                    old = state[f"{layer}.S"], state[f"{layer}.z"]
                    o, (out[f"{layer}.S"], out[f"{layer}.z"]) = linear_attention.parallel(q, k, v, old, *marks)
                else:
                    op = window.parallel if kind == "window" else softmax_attention.parallel
                    cache = state[f"{layer}.k"], state[f"{layer}.v"], before
                    o, (out[f"{layer}.k"], out[f"{layer}.v"], _) = op(q, k, v, cache, *marks)
                update = from_heads(p, o, r)
            x = r(x + (update if dropout is None else update * dropout[2 * i]))
            update = ffn_update(p, config, x, r)
            x = r(x + (update if dropout is None else update * dropout[2 * i + 1]))
        return self._head(x), out

    def _embed(self, tokens: np.ndarray, where: np.ndarray, valid: Mask) -> np.ndarray:
        x = self.params["embedding.weight"][tokens]
        if self.blocks.positions != "learned":
            return x
        most = self.blocks.max_positions
        read = where if valid is None else where[valid]
        if read.size and read.max() >= most:
            raise InputError(f"max_positions: token {read.max() + 1} of a sequence, {most} positions were learned; use positions='rope'")
        return self.rounded(x + self.params["position_embedding.weight"][np.minimum(where, most - 1)])

    def _head(self, x: np.ndarray) -> np.ndarray:
        p = self.params
        weight = p["embedding.weight" if self.blocks.tie_head else "head.weight"]
        return self.rounded(linear(norm(p, "norm", x, self.rounded), weight, p.get("head.bias")))


MODEL = LAT
