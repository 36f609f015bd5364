"""Normalised causal linear attention (Katharopoulos et al. 2020, eqs 8–12).

S_t = S_{t−1} + φ(k_t) v_tᵀ,  z_t = z_{t−1} + φ(k_t),  o_t = φ(q_t)ᵀ S_t / (φ(q_t)·z_t + ε),  ε = 1e-6, no 1/√K.
q and k arrive here as φ(q) and φ(k).

Shapes: q, k [B, T, H, K], v [B, T, H, V] of any float dtype, state (S [B, H, K, V], z [B, H, K]), reset and valid [B, T] bool or
None. Each form returns (o [B, T, H, V], final state), float32 or wider; kernels round q, k and o to v's dtype. o is 0 where a token is
not valid.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from unisono_spec.contract.shapes import shaped

from unisono_jax.ops.carry import carried, chunk_length, chunks, joined, shared
from unisono_jax.ops.elementwise import dot, masked, restarted, widened
from unisono_jax.ops.fold import fold
from unisono_jax.registry import chosen

EPS = 1e-6
State = tuple[jax.Array, jax.Array]


@shaped
def step(
    q: jax.Array, k: jax.Array, v: jax.Array, state: State, reset: jax.Array | None = None, valid: jax.Array | None = None
) -> tuple[jax.Array, State]:
    """One token: q, k [B, H, K], v [B, H, V], reset and valid [B]."""
    q, k, v, S, z = widened(*masked(valid, q, k, v), *state)
    if reset is not None:
        S, z = masked(~reset, S, z)
    S = S + k[..., :, None] * v[..., None, :]  # eq 10
    z = z + k  # eq 11
    o = dot("bhk,bhkv->bhv", q, S) / (dot("bhk,bhk->bh", q, z)[..., None] + EPS)  # eq 12
    return o, (S, z)


@shaped
def recurrent(
    q: jax.Array, k: jax.Array, v: jax.Array, initial_state: State, reset: jax.Array | None = None, valid: jax.Array | None = None
) -> tuple[jax.Array, State]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    q, k, v, *state = widened(q, k, v, *initial_state)
    return fold(step, (q, k, v), tuple(state), reset, valid)


@shaped
def parallel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    initial_state: State,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[jax.Array, State]:
    """Masked matmuls inside chunks of C tokens, and a sum over chunks for the states between them."""
    S0, z0 = initial_state = restarted(reset, initial_state)
    wide_v = jnp.result_type(v, *(a for a in (q, k, *initial_state) if a.dtype == jnp.float64))
    if chosen(implementation, "linear_attention", wide_v, {"K": q.shape[-1], "V": v.shape[-1]}, v.size) != "plain":
        from unisono_jax.kernels.linear_attention import attend

        q, k, v = masked(valid, q, k, v)
        return attend(q, k, v, initial_state, reset)
    length = q.shape[1]
    size = chunk_length(chunk_size, length)
    q, k, v, S0, z0 = widened(*masked(valid, q, k, v), S0, z0)
    q, k, v = (chunks(a, size) for a in (q, k, v))  # [B, N, C, H, ·]
    reads, first, last, cut = shared(reset, size)
    scores = jnp.where(reads[:, :, None], dot("bnthk,bnjhk->bnhtj", q, k), 0)
    (q,), (k,) = masked(first, q), masked(last, k)  # what reads the state before, and what goes into the next
    S, S_last = carried(dot("bnjhk,bnjhv->bnhkv", k, v), S0, cut)  # [B, N, H, K, V]
    z, z_last = carried(k.sum(2), z0, cut)  # [B, N, H, K]
    top = dot("bnhtj,bnjhv->bnthv", scores, v) + dot("bnthk,bnhkv->bnthv", q, S)
    bottom = jnp.swapaxes(scores.sum(-1), 2, 3) + dot("bnthk,bnhk->bnth", q, z)
    return joined(top / (bottom + EPS)[..., None], length), (S_last, z_last)
