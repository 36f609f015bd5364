"""Feed-forward networks: up, down, and gate where there is one. Hidden values are rounded once to the dtype computed in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unisono_jax.layers.leaves import Arrays, Linear, sub
from unisono_jax.ops.elementwise import gelu, gelu_tanh, sigmoid, silu, wide


class FFN(nnx.Module):
    """x [..., D] → [..., D]: Linear(D→hidden), GELU-tanh, Linear(hidden→D)."""

    def __init__(self, params: Arrays) -> None:
        self.up, self.down = Linear(sub(params, "up")), Linear(sub(params, "down"))

    def __call__(self, x: jax.Array, dtype: Any) -> jax.Array:
        """x [..., D] → [..., D], computed in `dtype`."""
        return self.down(self.hidden(self.up(x, dtype), x), dtype)

    def hidden(self, up: jax.Array, x: jax.Array) -> jax.Array:
        return gelu_tanh(up)


class GELUFFN(FFN):
    """x [..., D] → [..., D]: Linear(D→hidden), exact GELU, Linear(hidden→D)."""

    def hidden(self, up: jax.Array, x: jax.Array) -> jax.Array:
        return gelu(up)


class SwiGLU(FFN):
    """x [..., D] → [..., D]: down(SiLU(gate x) ∘ up x) (Shazeer 2020, eq 6)."""

    def __init__(self, params: Arrays) -> None:
        super().__init__(params)
        self.gate = Linear(sub(params, "gate"))

    def hidden(self, up: jax.Array, x: jax.Array) -> jax.Array:
        gate, acc = self.gate(x, up.dtype), wide(up)
        return (silu(gate.astype(acc)) * up.astype(acc)).astype(up.dtype)


class GatedGELU(FFN):
    """x [..., D] → [..., D], InfinityFormer's: [a, b] = up x, down(GELU(a ∘ σ(b))), exact GELU."""

    def hidden(self, up: jax.Array, x: jax.Array) -> jax.Array:
        a, b = jnp.split(up.astype(wide(up)), 2, -1)
        return gelu(a * sigmoid(b)).astype(up.dtype)
