"""Feature maps φ of linear attention: φ(q)·φ(k) stands for exp(q·k). x [..., K] → [..., K'].

elu1 (Katharopoulos et al. 2020, eq 7), relu, taylor2 (Arora et al. 2024, eq 2), learned: elu1(τ x), one τ a layer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unisono_jax.ops.elementwise import masked


def elu1(x: jax.Array) -> jax.Array:
    """[...] → [...]: x + 1 above 0 and e^x below, in these two branches: elu(x) + 1 rounds to 0 where e^x has not yet."""
    positive = x > 0
    return jnp.where(positive, x + 1, jnp.exp(jnp.where(positive, 0, x)))


def relu(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 0)


def taylor2(x: jax.Array) -> jax.Array:
    """[1, x / K^¼, vec(x xᵀ) / √(2K)], so that φ(q)·φ(k) = 1 + s + s²/2 with s = q·k / √K."""
    k = x.shape[-1]
    square = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], k * k)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x / k**0.25, square / (2 * k) ** 0.5], -1)


def feature_map(name: str, x: jax.Array, tau: jax.Array | None = None, valid: jax.Array | None = None) -> jax.Array:
    """x [..., K] → [..., F]: φ by its name in a config; `tau` [1] belongs to "learned".

    valid, bool, of x's first axes: where it is false, φ(0), so that a NaN there reaches no gradient, of τ neither.
    """
    (x,) = masked(valid, x)
    if name == "learned":
        assert tau is not None
        return elu1(tau.astype(x.dtype) * x)
    return {"elu1": elu1, "relu": relu, "taylor2": taylor2}[name](x)
