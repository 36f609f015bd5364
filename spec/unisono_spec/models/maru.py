"""MARU: embedding, Mamba block, Linear, MoM-GRU, head; or a stack with norms and residuals. As docs/architectures/maru.md resolves it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.maru import MARUConfig
from unisono_spec.layers import mamba
from unisono_spec.layers.norm import norm
from unisono_spec.layers.params import sub
from unisono_spec.models.base import Dropout, Mask, Model
from unisono_spec.ops import mom_gru
from unisono_spec.ops.elementwise import linear

PARTS = ("conv", "ssm", "h", "memory")  # of a layer's state


class MARU(Model):
    config: MARUConfig

    def _token(
        self, token: np.ndarray, state: Arrays, reset: Mask, valid: Mask, dropout: Dropout, noise: Sequence[np.ndarray] | None = None
    ) -> tuple[np.ndarray, Arrays]:
        r, config = self.rounded, self.config
        x = self.params["embedding.weight"][token]  # [B, D]
        out: Arrays = {}
        for i in range(config.n_layers):
            p, names = sub(self.params, f"layers.{i}"), [f"layers.{i}.{part}" for part in PARTS]
            conv, ssm, h, memory = (state[name] for name in names)
            update, (conv, ssm) = mamba.token(sub(p, "mamba"), self._before(p, "mamba_norm", x), (conv, ssm), reset, valid, r)
            x = self._after(x, update, None if dropout is None else dropout[2 * i])
            y = r(linear(self._before(p, "cell_norm", x), p["project.weight"], p["project.bias"]))
            drawn = None if noise is None else noise[i]
            update, (h, memory) = mom_gru.step(y, sub(p, "cell"), (h, memory), reset, valid, drawn, config.temperature)
            x = self._after(x, r(update), None if dropout is None else dropout[2 * i + 1])
            out |= dict(zip(names, (conv, ssm, h, memory), strict=True))
        return self._head(x), out

    def _sequence(
        self,
        tokens: np.ndarray,
        state: Arrays,
        reset: Mask,
        valid: Mask,
        dropout: Dropout,
        chunk_size: int,
        noise: Sequence[np.ndarray] | None = None,
    ) -> tuple[np.ndarray, Arrays]:
        r, config = self.rounded, self.config
        x = self.params["embedding.weight"][tokens]  # [B, T, D]
        out: Arrays = {}
        for i in range(config.n_layers):
            p, names = sub(self.params, f"layers.{i}"), [f"layers.{i}.{part}" for part in PARTS]
            conv, ssm, h, memory = (state[name] for name in names)
            before = self._before(p, "mamba_norm", x)
            update, (conv, ssm) = mamba.sequence(sub(p, "mamba"), before, (conv, ssm), reset, valid, chunk_size, r)
            x = self._after(x, update, None if dropout is None else dropout[2 * i])
            y = r(linear(self._before(p, "cell_norm", x), p["project.weight"], p["project.bias"]))
            drawn = None if noise is None else noise[i]
            cell = sub(p, "cell"), (h, memory), reset, valid, chunk_size, drawn, config.temperature
            update, (h, memory) = mom_gru.hoisted(y, *cell)
            x = self._after(x, r(update), None if dropout is None else dropout[2 * i + 1])
            out |= dict(zip(names, (conv, ssm, h, memory), strict=True))
        return self._head(x), out

    def _before(self, p: Arrays, name: str, x: np.ndarray) -> np.ndarray:
        return norm(p, name, x, self.rounded) if self.config.prenorm else x

    def _after(self, x: np.ndarray, update: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        update = update if mask is None else self.rounded(update * mask)
        return self.rounded(x + update) if self.config.prenorm else update

    def _head(self, x: np.ndarray) -> np.ndarray:
        p, r = self.params, self.rounded
        hidden = r(linear(self._before(p, "norm", x), p["head.0.weight"], p["head.0.bias"]))
        return r(linear(np.where(np.real(hidden) > 0, hidden, 0), p["head.1.weight"], p["head.1.bias"]))


MODEL = MARU
