"""LAT and Based: embedding, x ← x + mixer(norm(x)), x ← x + ffn(norm(x)), norm, head; as docs/architectures/lat.md resolves them."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.errors import InputError
from unisono_spec.contract.lat import LATConfig
from unisono_spec.layers.lat import conv_inputs, conv_output, ffn_update, from_heads, to_heads
from unisono_spec.layers.params import sub
from unisono_spec.layers.reading import Mask, Reading, Training
from unisono_spec.models.base import Model
from unisono_spec.ops import linear_attention, short_conv, softmax_attention, window


class LAT(Model):
    @property
    def blocks(self) -> LATConfig:
        """What the blocks are made of."""
        assert isinstance(self.config, LATConfig)
        return self.config

    def _read(self, tokens: np.ndarray, state: Arrays, read: Reading, training: Training) -> tuple[np.ndarray, Arrays]:
        config, r = self.blocks, self.rounded
        before = state["position"]
        where, count = read.positions(before, tokens)
        x = self._embed(tokens, where, read.marks.valid)
        out: Arrays = {"position": count}
        for i, kind in enumerate(config.kinds):
            p, layer = sub(self.params, f"layers.{i}"), f"layers.{i}"
            if kind == "conv":
                a, b = conv_inputs(p, x, r)
                name = f"{layer}.conv"
                y, out[name] = read(short_conv, b, p["mixer.conv.weight"], p.get("mixer.conv.bias"), state[name])
                update = conv_output(p, a, y, r)
            else:
                heads = to_heads(p, config, kind, x, where, r)
                if kind == "linear":
                    old = state[f"{layer}.S"], state[f"{layer}.z"]
                    o, (out[f"{layer}.S"], out[f"{layer}.z"]) = read(linear_attention, *heads, old)
                else:
                    cache = state[f"{layer}.k"], state[f"{layer}.v"], before
                    o, (out[f"{layer}.k"], out[f"{layer}.v"], _) = read(window if kind == "window" else softmax_attention, *heads, cache)
                update = from_heads(p, o, r)
            x = self._updated(x, update, training.mask(2 * i))
            x = self._updated(x, ffn_update(p, config, x, r), training.mask(2 * i + 1))
        return x, out

    def _embed(self, tokens: np.ndarray, where: np.ndarray, valid: Mask) -> np.ndarray:
        x = self.params["embedding.weight"][tokens]
        if self.blocks.positions != "learned":
            return x
        most = self.blocks.max_positions
        read = where if valid is None else where[valid]
        if read.size and read.max() >= most:
            raise InputError(f"max_positions: token {read.max() + 1} of a sequence, {most} positions were learned; use positions='rope'")
        return self.rounded(x + self.params["position_embedding.weight"][np.minimum(where, most - 1)])


MODEL = LAT
