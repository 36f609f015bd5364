"""Mamba as a stack: embedding, x ← x + mamba(RMSNorm(x)), RMSNorm, head (Gu & Dao 2024, section 3.4)."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.mamba import MambaConfig
from unisono_spec.layers import mamba
from unisono_spec.layers.norm import norm
from unisono_spec.layers.params import sub
from unisono_spec.models.base import Dropout, Mask, Model
from unisono_spec.ops.elementwise import linear


class Mamba(Model):
    config: MambaConfig

    def _token(self, token: np.ndarray, state: Arrays, reset: Mask, valid: Mask, dropout: Dropout) -> tuple[np.ndarray, Arrays]:
        r = self.rounded
        x = self.params["embedding.weight"][token]  # [B, D]
        out: Arrays = {}
        for i in range(self.config.n_layers):
            p, conv, ssm = sub(self.params, f"layers.{i}"), f"layers.{i}.conv", f"layers.{i}.ssm"
            h = norm(p, "norm", x, r)
            update, (out[conv], out[ssm]) = mamba.token(sub(p, "mixer"), h, (state[conv], state[ssm]), reset, valid, r)
            x = r(x + (update if dropout is None else update * dropout[i]))
        return self._head(x), out

    def _sequence(
        self, tokens: np.ndarray, state: Arrays, reset: Mask, valid: Mask, dropout: Dropout, chunk_size: int
    ) -> tuple[np.ndarray, Arrays]:
        r = self.rounded
        x = self.params["embedding.weight"][tokens]  # [B, T, D]
        out: Arrays = {}
        for i in range(self.config.n_layers):
            p, conv, ssm = sub(self.params, f"layers.{i}"), f"layers.{i}.conv", f"layers.{i}.ssm"
            h = norm(p, "norm", x, r)
            update, (out[conv], out[ssm]) = mamba.sequence(sub(p, "mixer"), h, (state[conv], state[ssm]), reset, valid, chunk_size, r)
            x = r(x + (update if dropout is None else update * dropout[i]))
        return self._head(x), out

    def _head(self, x: np.ndarray) -> np.ndarray:
        p = self.params
        weight = p["embedding.weight" if self.config.tie_head else "head.weight"]
        return self.rounded(linear(norm(p, "norm", x, self.rounded), weight, p.get("head.bias")))


MODEL = Mamba
