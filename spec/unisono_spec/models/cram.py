"""CRAM, both schemes (Muraleedharan, sections 3.1 and 3.2), as docs/architectures/cram.md resolves them."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.errors import InputError
from unisono_spec.layers.cram import block, scored_input
from unisono_spec.layers.ffn import ffn
from unisono_spec.layers.params import sub
from unisono_spec.models.base import Dropout, Mask, Model
from unisono_spec.ops import decayed_sum, position, weighted_sum
from unisono_spec.ops.elementwise import binary_digits, layer_norm, linear


class CRAM(Model):
    config: CRAMConfig

    def code(self, tokens: np.ndarray) -> np.ndarray:
        """What the fixed scheme sums, before σ: tokens [...] → x [..., code]."""
        if self.config.codes == "binary":
            return binary_digits(tokens, self.config.code_bits, np.dtype(self.dtype))
        if self.config.codes == "embedding":
            return self._embed(tokens)
        return tokens if tokens.dtype.kind == "c" else tokens.astype(self.dtype)

    def readout(self, xi: np.ndarray, dropout: Dropout = None) -> np.ndarray:
        """f_θ of the fixed scheme (eq 6): ξ [..., code] → logits [..., V]. No mixing over time."""
        if self.config.scheme != "fixed":
            raise InputError("readout: ξ of the adaptive scheme lies inside each layer; call forward")
        p, r = self.params, self.rounded
        x = r(linear(xi, p["input.weight"], p["input.bias"]))
        for i in range(self.config.n_layers):
            layer = sub(p, f"layers.{i}")
            update = ffn(sub(layer, "ffn"), r(layer_norm(x, layer["norm.weight"], layer["norm.bias"])), r)
            x = r(x + (update if dropout is None else update * dropout[i]))
        return self._head(x)

    def _token(self, token: np.ndarray, state: Arrays, reset: Mask, valid: Mask, dropout: Dropout) -> tuple[np.ndarray, Arrays]:
        if self.config.scheme == "fixed":
            xi, last = decayed_sum.step(self.code(token), self.config.decay, state["xi"], reset, valid)
            return self.readout(xi, dropout), {"xi": last}
        x = self._embed(token)  # [B, D]
        where, count = position.step(state["position"], reset, valid)
        out: Arrays = {"position": count}
        for i in range(self.config.n_layers):
            p, name = sub(self.params, f"layers.{i}"), f"layers.{i}.xi"
            u, s = scored_input(p, self.config, x, where, self.rounded)
            xi, out[name] = weighted_sum.step(u, s, state[name], reset, valid, self.config.exclusive)
            x = block(p, self.config, x, xi, None if dropout is None else dropout[i], self.rounded)
        return self._head(x), out

    def _sequence(
        self, tokens: np.ndarray, state: Arrays, reset: Mask, valid: Mask, dropout: Dropout, chunk_size: int
    ) -> tuple[np.ndarray, Arrays]:
        if self.config.scheme == "fixed":
            xi, last = decayed_sum.parallel(self.code(tokens), self.config.decay, state["xi"], reset, valid, chunk_size)
            return self.readout(xi, dropout), {"xi": last}
        x = self._embed(tokens)  # [B, T, D]
        where, count = position.parallel(state["position"], tokens.shape[1], reset, valid)
        out: Arrays = {"position": count}
        for i in range(self.config.n_layers):
            p, name = sub(self.params, f"layers.{i}"), f"layers.{i}.xi"
            u, s = scored_input(p, self.config, x, where, self.rounded)
            xi, out[name] = weighted_sum.parallel(u, s, state[name], reset, valid, self.config.exclusive, chunk_size)
            x = block(p, self.config, x, xi, None if dropout is None else dropout[i], self.rounded)
        return self._head(x), out

    def _embed(self, tokens: np.ndarray) -> np.ndarray:
        return self.params["embedding.weight"][tokens]

    def _head(self, x: np.ndarray) -> np.ndarray:
        p = self.params
        weight = p["embedding.weight" if self.config.tie_head else "head.weight"]
        x = self.rounded(layer_norm(x, p["norm.weight"], p["norm.bias"]))
        return self.rounded(linear(x, weight, p.get("head.bias")))


MODEL = CRAM
