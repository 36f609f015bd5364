"""CRAM, both schemes (Muraleedharan, sections 3.1 and 3.2), as docs/architectures/cram.md resolves them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from unisono_spec.contract import state_dtype
from unisono_spec.contract.checks import as_array, check_code
from unisono_spec.contract.cram import CRAMConfig

from unisono_jax.arrays import ARRAYS
from unisono_jax.layers.cram import Block
from unisono_jax.layers.leaves import Arrays, Embedding, LayerNorm, Linear, sub
from unisono_jax.layers.reading import Reading, Training
from unisono_jax.models.base import Dropout, Model, State
from unisono_jax.ops import decayed_sum
from unisono_jax.ops.elementwise import binary_digits


class CRAM(Model):
    config: CRAMConfig

    def __init__(self, config: CRAMConfig, params: Arrays, dtype: str, implementation: str) -> None:
        super().__init__(config, dtype, implementation)
        if config.has_embedding:
            self.embedding = Embedding(sub(params, "embedding"))
        if config.scheme == "fixed":
            self.input = Linear(sub(params, "input"))
        self.layers = nnx.List([Block(sub(params, f"layers.{i}"), config) for i in range(config.n_layers)])
        self.norm = LayerNorm(sub(params, "norm"))
        self.head = Linear(sub(params, "head"))

    def code(self, tokens: jax.Array) -> jax.Array:
        """What the fixed scheme sums, before σ: tokens [...] → x [..., code]."""
        tokens = as_array("tokens", tokens)
        check_code(self.config, tokens=tokens, array=ARRAYS)
        tokens = jnp.asarray(tokens)
        if self.config.codes == "binary":
            return binary_digits(tokens, self.config.code_bits, self.dtype)
        return self.embedding(tokens, self.dtype) if self.config.codes == "embedding" else tokens.astype(self.dtype)

    def readout(self, xi: jax.Array, dropout: Dropout = None, rngs: nnx.Rngs | None = None) -> jax.Array:
        """f_θ of the fixed scheme (eq 6): ξ [..., code] → logits [..., V]. No mixing over time."""
        check_code(self.config, xi=xi, dropout=dropout, array=ARRAYS)
        return self._head(self._below(xi, self._dropout(xi.shape[:-1], dropout, rngs)))

    def _below(self, xi: jax.Array, dropout: Dropout) -> jax.Array:
        """What the head is given."""
        # ξ enters in float32 or wider: in bfloat16 it would remember 8 tokens instead of 21
        x = self.input(jnp.asarray(xi), state_dtype(self.dtype)).astype(self.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, x, None if dropout is None else dropout[i])
        return x

    def _read(self, tokens: jax.Array, state: State, read: Reading, training: Training) -> tuple[jax.Array, State]:
        if self.config.scheme == "fixed":
            xi, last = read(decayed_sum, self.code(tokens), self.config.decay, state["xi"])
            return self._below(xi, training.dropout), {"xi": last}
        x = self.embedding(tokens, self.dtype)
        where, count = read.positions(state["position"], tokens)
        out: State = {"position": count}
        for i, layer in enumerate(self.layers):
            u, s = layer.scored_input(x, where)
            names = [f"layers.{i}.{name}" for name in self.config.sums]
            xi, sums = layer.mixer.summed(self.config, u, s, [state[name] for name in names], read)
            out |= zip(names, sums, strict=True)
            x = layer(x, xi, training.mask(i), u)
        return x, out


MODEL = CRAM
