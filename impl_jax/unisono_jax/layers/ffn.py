"""The feed-forward network: Linear(D→hidden), GELU-tanh, Linear(hidden→D)."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from unisono_jax.layers.leaves import Arrays, Linear, sub
from unisono_jax.ops.elementwise import gelu_tanh


class FFN(nnx.Module):
    def __init__(self, params: Arrays) -> None:
        self.up, self.down = Linear(sub(params, "up")), Linear(sub(params, "down"))

    def __call__(self, x: jax.Array, dtype: Any) -> jax.Array:
        """x [..., D] → [..., D], computed in `dtype`."""
        return self.down(gelu_tanh(self.up(x, dtype)), dtype)
