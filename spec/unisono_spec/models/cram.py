"""CRAM, both schemes (Muraleedharan, sections 3.1 and 3.2), as docs/architectures/cram.md resolves them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.checks import check_code
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.layers.cram import ffn_update, norm_after, scored_input, summed
from unisono_spec.layers.params import sub
from unisono_spec.layers.reading import Reading, Training
from unisono_spec.models.base import Model
from unisono_spec.ops import decayed_sum
from unisono_spec.ops.elementwise import binary_digits, linear


class CRAM(Model):
    config: CRAMConfig

    def code(self, tokens: np.ndarray) -> np.ndarray:
        """What the fixed scheme sums, before σ: tokens [...] → x [..., code]."""
        check_code(self.config, tokens=tokens, array=np.ndarray, complex_step=True)
        if self.config.codes == "binary":
            return binary_digits(tokens, self.config.code_bits, np.dtype(self.dtype))
        if self.config.codes == "embedding":
            return self._embed(tokens)
        return tokens if tokens.dtype.kind == "c" else tokens.astype(self.dtype)

    def readout(self, xi: np.ndarray, dropout: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """f_θ of the fixed scheme (eq 6): ξ [..., code] → logits [..., V]. No mixing over time."""
        check_code(self.config, xi=xi, dropout=dropout, array=np.ndarray, complex_step=True)
        return self._head(self._below(xi, dropout))

    def _below(self, xi: np.ndarray, dropout: Sequence[np.ndarray] | None) -> np.ndarray:
        """What the head is given."""
        p, r = self.params, self.rounded
        x = r(linear(xi, p["input.weight"], p["input.bias"]))
        for i in range(self.config.n_layers):
            layer = sub(p, f"layers.{i}")
            x = self._updated(x, ffn_update(layer, x, r), None if dropout is None else dropout[i])
        return x

    def _read(self, tokens: np.ndarray, state: Arrays, read: Reading, training: Training) -> tuple[np.ndarray, Arrays]:
        if self.config.scheme == "fixed":
            xi, last = read(decayed_sum, self.code(tokens), self.config.decay, state["xi"])
            return self._below(xi, training.dropout), {"xi": last}
        x = self._embed(tokens)
        where, count = read.positions(state["position"], tokens)
        out: Arrays = {"position": count}
        for i in range(self.config.n_layers):
            p = sub(self.params, f"layers.{i}")
            u, s = scored_input(p, self.config, x, where, self.rounded)
            xi, after = summed(p, self.config, u, s, [state[f"layers.{i}.{name}"] for name in self.config.sums], read)
            out |= {f"layers.{i}.{name}": a for name, a in after.items()}
            if self.config.residual == "after":
                x = norm_after(p, xi, training.mask(i), self.rounded)
            else:
                x = self._updated(x, ffn_update(p, xi, self.rounded, u if self.config.skip else 0.0), training.mask(i))
        return x, out

    def _embed(self, tokens: np.ndarray) -> np.ndarray:
        return self.params["embedding.weight"][tokens]


MODEL = CRAM
