"""S4D as a stack: embedding, x ← x + mixer(LN(x)), x ← x + FFN(LN(x)), LN, head."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.s4d import S4DConfig
from unisono_spec.layers.ffn import gelu_ffn
from unisono_spec.layers.norm import norm
from unisono_spec.layers.params import sub
from unisono_spec.layers.s4d import dynamics, mixer_update
from unisono_spec.models.base import Dropout, Mask, Model
from unisono_spec.ops import diagonal_ssm
from unisono_spec.ops.elementwise import linear


class S4D(Model):
    config: S4DConfig

    def _token(self, token: np.ndarray, state: Arrays, reset: Mask, valid: Mask, dropout: Dropout) -> tuple[np.ndarray, Arrays]:
        r = self.rounded
        masks = None if dropout is None else iter(dropout)
        x = self.params["embedding.weight"][token]  # [B, D]
        out: Arrays = {}
        for i in range(self.config.n_layers):
            p, name = sub(self.params, f"layers.{i}"), f"layers.{i}.ssm"
            y, out[name] = diagonal_ssm.step(norm(p, "mixer_norm", x, r), *dynamics(p), state[name], reset, valid)
            update = mixer_update(p, y, r)
            x = r(x + (update if masks is None else update * next(masks)))
            if self.config.ffn_mult:
                update = gelu_ffn(sub(p, "ffn"), norm(p, "ffn_norm", x, r), r)
                x = r(x + (update if masks is None else update * next(masks)))
        return self._head(x), out

    def _sequence(
        self, tokens: np.ndarray, state: Arrays, reset: Mask, valid: Mask, dropout: Dropout, chunk_size: int
    ) -> tuple[np.ndarray, Arrays]:
        r = self.rounded
        masks = None if dropout is None else iter(dropout)
        x = self.params["embedding.weight"][tokens]  # [B, T, D]
        out: Arrays = {}
        for i in range(self.config.n_layers):
            p, name = sub(self.params, f"layers.{i}"), f"layers.{i}.ssm"
            y, out[name] = diagonal_ssm.parallel(norm(p, "mixer_norm", x, r), *dynamics(p), state[name], reset, valid, chunk_size)
            update = mixer_update(p, y, r)
            x = r(x + (update if masks is None else update * next(masks)))
            if self.config.ffn_mult:
                update = gelu_ffn(sub(p, "ffn"), norm(p, "ffn_norm", x, r), r)
                x = r(x + (update if masks is None else update * next(masks)))
        return self._head(x), out

    def _head(self, x: np.ndarray) -> np.ndarray:
        p = self.params
        weight = p["embedding.weight" if self.config.tie_head else "head.weight"]
        return self.rounded(linear(norm(p, "norm", x, self.rounded), weight, p.get("head.bias")))


MODEL = S4D
