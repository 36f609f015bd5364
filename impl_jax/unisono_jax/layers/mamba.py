"""The Mamba block around its two ops: [u, z] = W_in x, u ← SiLU(conv(u)), y = S6(u), W_out (y ∘ SiLU(z)) (Gu & Dao 2024, figure 3).

Parameters have their published names. State: the convolution's last inputs, and h.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from unisono_jax.layers.leaves import Arrays, Conv, Linear, sub
from unisono_jax.layers.reading import Reading
from unisono_jax.ops import selective_scan, short_conv
from unisono_jax.ops.elementwise import silu, softplus, wide

State = tuple[jax.Array, jax.Array]


class Mamba(nnx.Module):
    def __init__(self, params: Arrays) -> None:
        self.in_proj, self.conv1d, self.x_proj = Linear(sub(params, "in_proj")), Conv(sub(params, "conv1d")), Linear(sub(params, "x_proj"))
        self.dt_proj, self.out_proj = Linear(sub(params, "dt_proj")), Linear(sub(params, "out_proj"))
        self.A_log, self.D = nnx.Param(params["A_log"]), nnx.Param(params["D"])

    def __call__(self, x: jax.Array, state: State, read: Reading) -> tuple[jax.Array, State]:
        """x [B, D] or [B, T, D] → what it adds, the state after it."""
        dtype, acc = x.dtype, wide(x)
        u, z = jnp.split(self.in_proj(x, dtype), 2, -1)
        u, conv = read(short_conv, u, self.conv1d.weight[...], None if self.conv1d.bias is None else self.conv1d.bias[...], state[0])
        u = silu(u.astype(dtype).astype(acc)).astype(dtype)

        n, rank = self.A_log.shape[1], self.dt_proj.weight.shape[1]  # pyright: ignore[reportOptionalMemberAccess]
        delta, B, C = jnp.split(self.x_proj(u, dtype), [rank, rank + n], -1)
        dt = softplus(self.dt_proj(delta, acc))
        y, ssm = read(selective_scan, u, dt, -jnp.exp(self.A_log[...].astype(acc)), B, C, self.D[...], state[1])
        gated = y.astype(dtype).astype(acc) * silu(z.astype(acc))
        return self.out_proj(gated.astype(dtype), dtype), (conv, ssm)
