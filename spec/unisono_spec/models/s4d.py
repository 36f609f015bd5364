"""S4D as a stack: embedding, x ← x + mixer(LN(x)), x ← x + FFN(LN(x)), LN, head."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.s4d import S4DConfig
from unisono_spec.layers.ffn import gelu_ffn
from unisono_spec.layers.norm import norm
from unisono_spec.layers.params import sub
from unisono_spec.layers.reading import Reading, Training
from unisono_spec.layers.s4d import dynamics, mixer_update
from unisono_spec.models.base import Model
from unisono_spec.ops import diagonal_ssm


class S4D(Model):
    config: S4DConfig

    def _read(self, tokens: np.ndarray, state: Arrays, read: Reading, training: Training) -> tuple[np.ndarray, Arrays]:
        r, each = self.rounded, 2 if self.config.ffn_mult else 1  # updates of a layer
        x = self.params["embedding.weight"][tokens]
        out: Arrays = {}
        for i in range(self.config.n_layers):
            p, name = sub(self.params, f"layers.{i}"), f"layers.{i}.ssm"
            y, out[name] = read(diagonal_ssm, norm(p, "mixer_norm", x, r), *dynamics(p), state[name])
            x = self._updated(x, mixer_update(p, y, r), training.mask(each * i))
            if self.config.ffn_mult:
                x = self._updated(x, gelu_ffn(sub(p, "ffn"), norm(p, "ffn_norm", x, r), r), training.mask(each * i + 1))
        return x, out


MODEL = S4D
