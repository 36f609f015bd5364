"""One layer of each of CRAM's schemes: the score s_φ, the quadratic key k_Q, and the FFN around the sum (eqs 6–10)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from unisono_spec.contract.cram import CRAMConfig

from unisono_jax.layers.ffn import FFN
from unisono_jax.layers.leaves import Arrays, LayerNorm, Linear, sub
from unisono_jax.layers.reading import Reading
from unisono_jax.layers.retained import retained
from unisono_jax.ops import weighted_sum
from unisono_jax.ops.elementwise import binary_digits, gelu_tanh, linear, wide


class Mixer(nnx.Module):
    """s = s_φ([bits(p), xᵀQx / k_scale]), x [..., D] → s [..., 1] or [..., D], and the sum."""

    def __init__(self, params: Arrays) -> None:
        self.Q = nnx.Param(params["Q"])
        self.score = nnx.List([Linear(sub(params, f"score.{i}")) for i in range(3)])
        self.decay = nnx.data(nnx.Param(params["decay"]) if "decay" in params else None)

    def __call__(self, config: CRAMConfig, x: jax.Array, position: jax.Array) -> jax.Array:
        """x [..., D], position [...] → s [..., 1], or [..., D], float32 or wider."""
        dtype = wide(x)
        k = (x.astype(dtype) * linear(x, self.Q[...]).astype(dtype)).sum(-1, keepdims=True) / config.key_scale  # [..., 1]
        h = jnp.concatenate([binary_digits(position, config.position_bits, dtype), k], -1)  # [..., d_b + 1]
        h = gelu_tanh(self.score[0](h, dtype))
        h = gelu_tanh(self.score[1](h, dtype))
        return self.score[2](h, dtype)

    def summed(
        self, config: CRAMConfig, u: jax.Array, s: jax.Array, sums: Sequence[jax.Array], read: Reading
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """u [..., D], s as `__call__` gives them, the sums so far [B, D] → ξ [..., D], float32 or wider, and the sums then."""
        if config.retains:
            return retained(u, s, None if self.decay is None else self.decay[...], config, sums, read)
        xi, last = read(weighted_sum, u, s[..., 0], *sums, exclusive=config.exclusive)
        return xi, (last,)


class Block(nnx.Module):
    """FFN and norm, and in the adaptive scheme the mixer before them."""

    def __init__(self, params: Arrays, config: CRAMConfig) -> None:
        self.config = config
        if config.scheme == "adaptive":
            if config.input_norm:
                self.input_norm = LayerNorm(sub(params, "input_norm"))
            self.mixer = Mixer(sub(params, "mixer"))
        self.norm, self.ffn = LayerNorm(sub(params, "norm")), FFN(sub(params, "ffn"))

    def scored_input(self, x: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [..., D], position [...] → what is summed u [..., D], and its weights s [..., 1], or [..., D]."""
        if self.config.input_norm:
            x = self.input_norm(x).astype(x.dtype)
        return x, self.mixer(self.config, x, position)

    def __call__(self, x: jax.Array, xi: jax.Array, mask: jax.Array | None, u: jax.Array | None = None) -> jax.Array:
        """x, ξ, u [..., D] → [..., D]: x + FFN(LN(ξ)), of LN(ξ) + u with `skip`, or LN(ξ + FFN(ξ)) with residual="after".

        mask: dropout's, of the FFN's output.
        """
        dtype, acc = x.dtype, wide(x)
        if self.config.residual == "after":
            # ξ is not rounded before the norm that follows it: a prefix sum stays wide
            update = self.ffn(xi, acc)
            return self.norm(xi + (update if mask is None else update * mask)).astype(dtype)
        read = self.norm(xi) if u is None or not self.config.skip else self.norm(xi) + u
        update = self.ffn(read, dtype).astype(acc)
        return (x.astype(acc) + (update if mask is None else update * mask.astype(acc))).astype(dtype)
