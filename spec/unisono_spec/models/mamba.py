"""Mamba as a stack: embedding, x ← x + mamba(RMSNorm(x)), RMSNorm, head (Gu & Dao 2024, section 3.4)."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.mamba import MambaConfig
from unisono_spec.layers import mamba
from unisono_spec.layers.norm import norm
from unisono_spec.layers.params import sub
from unisono_spec.layers.reading import Reading, Training
from unisono_spec.models.base import Model


class Mamba(Model):
    config: MambaConfig

    def _read(self, tokens: np.ndarray, state: Arrays, read: Reading, training: Training) -> tuple[np.ndarray, Arrays]:
        r = self.rounded
        x = self.params["embedding.weight"][tokens]
        out: Arrays = {}
        for i in range(self.config.n_layers):
            p, conv, ssm = sub(self.params, f"layers.{i}"), f"layers.{i}.conv", f"layers.{i}.ssm"
            h = norm(p, "norm", x, r, self.config.norm_eps)
            update, (out[conv], out[ssm]) = mamba.block(sub(p, "mixer"), h, (state[conv], state[ssm]), read, r)
            x = self._updated(x, update, training.mask(i))
        return x, out


MODEL = Mamba
