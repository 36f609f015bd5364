"""MARU: embedding, Mamba block, Linear, MoM-GRU, head; or a stack with norms and residuals. As docs/architectures/maru.md resolves it."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.maru import MARUConfig
from unisono_spec.layers import mamba
from unisono_spec.layers.norm import norm
from unisono_spec.layers.params import sub
from unisono_spec.layers.reading import Mask, Reading, Training
from unisono_spec.models.base import Model
from unisono_spec.ops import mom_gru
from unisono_spec.ops.elementwise import linear

STATES = ("conv", "ssm", "h", "memory")  # of a layer's state


class MARU(Model):
    config: MARUConfig

    def _read(self, tokens: np.ndarray, state: Arrays, read: Reading, training: Training) -> tuple[np.ndarray, Arrays]:
        r, config, (reset, valid), chunk_size = self.rounded, self.config, read.marks, read.chunk_size
        x = self.params["embedding.weight"][tokens]
        out: Arrays = {}
        for i in range(config.n_layers):
            p, names = sub(self.params, f"layers.{i}"), [f"layers.{i}.{part}" for part in STATES]
            conv, ssm, h, memory = (state[name] for name in names)
            update, (conv, ssm) = mamba.block(sub(p, "mamba"), self._before(p, "mamba_norm", x), (conv, ssm), read, r)
            x = self._after(x, update, training.mask(2 * i))
            y = r(linear(self._before(p, "cell_norm", x), p["project.weight"], p["project.bias"]))
            cell = y, sub(p, "cell"), (h, memory), reset, valid
            noise = training.router(i), config.temperature
            update, (h, memory) = mom_gru.step(*cell, *noise) if chunk_size is None else mom_gru.hoisted(*cell, chunk_size, *noise)
            x = self._after(x, r(update), training.mask(2 * i + 1))
            out |= dict(zip(names, (conv, ssm, h, memory), strict=True))
        return x, out

    def _before(self, p: Arrays, name: str, x: np.ndarray) -> np.ndarray:
        return norm(p, name, x, self.rounded) if self.config.prenorm else x

    def _after(self, x: np.ndarray, update: np.ndarray, mask: Mask) -> np.ndarray:
        update = update if mask is None else self.rounded(update * mask)
        return self._updated(x, update, None) if self.config.prenorm else update

    def _head(self, x: np.ndarray) -> np.ndarray:
        p, r = self.params, self.rounded
        hidden = r(linear(self._before(p, "norm", x), p["head.0.weight"], p["head.0.bias"]))
        return r(linear(np.where(np.real(hidden) > 0, hidden, 0), p["head.1.weight"], p["head.1.bias"]))


MODEL = MARU
