"""S4D's layer around its op: Δ and A from their logarithms, and GELU, Linear(D→2D), GLU after it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from unisono_spec.contract.s4d import S4DConfig

from unisono_jax.layers.ffn import GELUFFN
from unisono_jax.layers.leaves import Arrays, LayerNorm, Linear, sub, updated
from unisono_jax.layers.reading import Mask, Reading
from unisono_jax.ops import diagonal_ssm
from unisono_jax.ops.elementwise import gelu, sigmoid, wide


class Mixer(nnx.Module):
    """x [B, (T,) D] → the same shape: GLU(Linear(GELU(S4D(x))))."""

    def __init__(self, params: Arrays) -> None:
        self.log_dt, self.log_A_real, self.A_imag = (nnx.Param(params[name]) for name in ("log_dt", "log_A_real", "A_imag"))
        self.C, self.D, self.out = nnx.Param(params["C"]), nnx.Param(params["D"]), Linear(sub(params, "out"))

    def dynamics(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Δ [D], A [D, P, 2], C [D, P, 2], D [D]. The real part of A is −exp(log_A_real), always negative."""
        A = jnp.stack([-jnp.exp(self.log_A_real[...].astype(dtype)), self.A_imag[...].astype(dtype)], -1)
        return jnp.exp(self.log_dt[...].astype(dtype)), A, self.C[...], self.D[...]

    def __call__(self, x: jax.Array, state: jax.Array, read: Reading) -> tuple[jax.Array, jax.Array]:
        """x [B, D] or [B, T, D] → what it adds, the state after it."""
        y, after = read(diagonal_ssm, x, *self.dynamics(wide(x)), state)
        value, gate = jnp.split(self.out(gelu(y.astype(x.dtype)), x.dtype).astype(wide(x)), 2, -1)
        return (value * sigmoid(gate)).astype(x.dtype), after


class Block(nnx.Module):
    """x [B, (T,) D] → the same shape: x ← x + mixer(LN(x)), x ← x + FFN(LN(x)); without an FFN where the config has none."""

    def __init__(self, params: Arrays, config: S4DConfig) -> None:
        self.mixer_norm, self.mixer = LayerNorm(sub(params, "mixer_norm")), Mixer(sub(params, "mixer"))
        self.has_ffn = config.ffn_mult > 0
        if self.has_ffn:
            self.ffn_norm, self.ffn = LayerNorm(sub(params, "ffn_norm")), GELUFFN(sub(params, "ffn"))

    def __call__(self, x: jax.Array, state: jax.Array, read: Reading, masks: tuple[Mask, ...]) -> tuple[jax.Array, jax.Array]:
        """x [B, D] or [B, T, D] → the same, the state after it. masks: what dropout multiplies each update by."""
        update, after = self.mixer(self.mixer_norm(x).astype(x.dtype), state, read)
        x = updated(x, update, masks[0])
        return (updated(x, self.ffn(self.ffn_norm(x), x.dtype), masks[1]) if self.has_ffn else x), after
