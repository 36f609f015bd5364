"""What JAX's ops are timed on, and what one writes in their place first."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from unisono_jax.ops.features import elu1

Arrays = tuple[jax.Array, ...]


def attention_inputs(shape: tuple[int, ...], seed: int) -> Arrays:
    """φ(q), φ(k), v, S, z."""
    batch, _, heads, width = shape
    q, k, v = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(seed), 3))
    q, k, v = (a.astype(jnp.bfloat16) for a in (elu1(q), elu1(k), v))
    return q, k, v, jnp.zeros((batch, heads, width, width)), jnp.zeros((batch, heads, width))


def scales_inputs(shape: tuple[int, ...], seed: int) -> Arrays:
    """φ(q), φ(k), v, log λ, weights, S, z: the first scale forgets nothing, one weight a token, as InfinityFormer has them."""
    batch, length, heads, width, scales = shape
    q, k, v, *_ = attention_inputs(shape[:4], seed)
    decay, weight = (jax.random.normal(key, (batch, length, scales)) for key in jax.random.split(jax.random.key(seed + 100)))
    log_decay = -jnp.exp(decay - 2).at[..., 0].set(0)
    state = jnp.zeros((batch, scales, heads, width, width)), jnp.zeros((batch, scales, heads, width))
    return q, k, v, log_decay, jax.nn.sigmoid(weight)[..., None, None], *state


def chunked_einsum(q: jax.Array, k: jax.Array, v: jax.Array, size: int = 64) -> jax.Array:
    """What one writes first: bf16 einsums in chunks, states of chunks by lax.associative_scan."""
    batch, length, heads, width = q.shape
    q, k, v = (a.reshape(batch, length // size, size, heads, width) for a in (q, k, v))

    def dot(subscripts: str, *arrays: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, *arrays, preferred_element_type=jnp.float32)

    scores = jnp.where(jnp.tril(jnp.ones((size, size), bool)), dot("bnthk,bnjhk->bnhtj", q, k), 0)
    own = dot("bnjhk,bnjhv->bnhkv", k, v), k.astype(jnp.float32).sum(2)
    S, z = (lax.associative_scan(jnp.add, a, axis=1) - a for a in own)
    top = dot("bnhtj,bnjhv->bnthv", scores.astype(v.dtype), v) + dot("bnthk,bnhkv->bnthv", q, S.astype(v.dtype))
    bottom = jnp.swapaxes(scores.sum(-1), 2, 3) + dot("bnthk,bnhk->bnth", q.astype(jnp.float32), z)
    return (top / (bottom + 1e-6)[..., None]).astype(v.dtype).reshape(batch, length, heads, width)


def scan_inputs(shape: tuple[int, ...], seed: int) -> Arrays:
    """u, Δ, A, B, C, D, h: Δ between e^−5 and e^−1 for most."""
    b, t, d, n = shape
    keys = iter(jax.random.split(jax.random.key(seed), 7))

    def normal(*size: int) -> jax.Array:
        return jax.random.normal(next(keys), size)

    u, dt, A, B, C = normal(b, t, d), jax.nn.softplus(normal(b, t, d) - 3), -jnp.exp(normal(d, n)), normal(b, t, n), normal(b, t, n)
    u, B, C = (a.astype(jnp.bfloat16) for a in (u, B, C))
    return u, dt, A, B, C, normal(d), normal(b, d, n)


def associative(u: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, D: jax.Array, h: jax.Array) -> jax.Array:
    """lax.associative_scan over tokens."""
    a = jnp.exp(dt[..., None] * A)
    b = (dt * u)[..., None] * B[:, :, None].astype(jnp.float32)
    b = b.at[:, 0].add(a[:, 0] * h)
    states = lax.associative_scan(lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1]), (a, b), axis=1)[1]
    return (states * C[:, :, None]).sum(-1) + D * u
