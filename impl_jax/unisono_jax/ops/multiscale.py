"""InfinityFormer's memory: linear attention at M time scales, each normalised, and the weighted sum of what they read.

S^s_t = λ^s_t S^s_{t−1} + k_t v_tᵀ,  z^s_t = λ^s_t z^s_{t−1} + k'_t,  r^s_t = q_tᵀ S^s_t / (q'_t·z^s_t + ε),  o_t = Σ_s c^s_t ∘ r^s_t.
q, k are φ(q), φ(k) of the numerator, q', k' those of the normaliser: the same arrays, unless RoPE turns the numerator only.

Shapes: q, k, q_norm, k_norm [B, T, H, K], v [B, T, H, V], log_decay (log λ ≤ 0) [B or 1, T or 1, M],
weight (c) [B or 1, T or 1, M, H or 1, V or 1], state (S [B, M, H, K, V], z [B, M, H, K]), reset and valid [B, T] bool or None.
Each form returns (o [B, T, H, V], final state), float32 or wider. o is 0 where a token is not valid, and its decay is not applied.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from unisono_spec.contract.shapes import shaped

from unisono_jax.ops.carry import carried, chunk_length, chunks, joined, shared
from unisono_jax.ops.elementwise import dot, masked, restarted, widened
from unisono_jax.ops.fold import fold
from unisono_jax.registry import chosen

EPS = 1e-6
State = tuple[jax.Array, jax.Array]


def compressed(S: jax.Array, rank: int) -> jax.Array:
    """The best approximation of rank `rank` of each S [..., K, V] (Eckart & Young 1936): U_r U_rᵀ S.

    The projector U_r U_rᵀ carries no gradient: derivatives pass through S alone. On a GPU, cuSOLVER's QR iterations: its Jacobi
    ones, which are the default, leave U up to a hundred roundings away from orthogonal.
    """
    algorithm = lax.linalg.SvdAlgorithm.QR if jax.default_backend() == "gpu" else None
    U = lax.linalg.svd(lax.stop_gradient(S), full_matrices=False, algorithm=algorithm)[0][..., :rank]
    return dot("...kr,...jr,...jv->...kv", U, U, S)


@shaped
def step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_norm: jax.Array,
    k_norm: jax.Array,
    log_decay: jax.Array,
    weight: jax.Array,
    state: State,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    compress: jax.Array | None = None,
    rank: int = 0,
) -> tuple[jax.Array, State]:
    """One token: the arrays without their axis T. compress [B] bool: the token after which each S falls to `rank`."""
    q, k, v, q_norm, k_norm, log_decay, weight, S, z = widened(*masked(valid, q, k, v, q_norm, k_norm, log_decay, weight), *state)
    if reset is not None:
        S, z = masked(~reset, S, z)
    decay = jnp.exp(log_decay)  # [B, M]
    S = decay[..., None, None, None] * S + (k[..., :, None] * v[..., None, :])[:, None]
    z = decay[..., None, None] * z + k_norm[:, None]
    read = dot("bhk,bmhkv->bmhv", q, S) / (dot("bhk,bmhk->bmh", q_norm, z)[..., None] + EPS)
    if compress is not None:
        due = compress if valid is None else compress & valid

        def fall(S: jax.Array) -> jax.Array:
            return jnp.where(due[:, None, None, None, None], compressed(S, rank), S)

        S = lax.cond(due.any(), fall, lambda S: S, S)
    return (weight * read).sum(1), (S, z)


@shaped
def recurrent(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_norm: jax.Array,
    k_norm: jax.Array,
    log_decay: jax.Array,
    weight: jax.Array,
    initial_state: State,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    compress: jax.Array | None = None,
    rank: int = 0,
) -> tuple[jax.Array, State]:
    """The definition: a fold of `step`, [B, T, …] → [B, T, …]. compress [B, T]: it is not associative, so this is its only form."""
    log_decay, weight = _of_each(q, log_decay, weight)
    *inputs, S, z = widened(q, k, v, q_norm, k_norm, log_decay, weight, *initial_state)
    if compress is None:
        return fold(step, inputs, (S, z), reset, valid)

    def compressing(due: jax.Array, *rest: jax.Array) -> tuple[jax.Array, State]:
        return step(*rest, compress=due, rank=rank)  # pyright: ignore[reportArgumentType]

    return fold(compressing, (compress, *inputs), (S, z), reset, valid)


@shaped
def parallel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_norm: jax.Array,
    k_norm: jax.Array,
    log_decay: jax.Array,
    weight: jax.Array,
    initial_state: State,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[jax.Array, State]:
    """Masked matmuls inside chunks of C tokens, and decaying sums over chunks for the states between them.

    All scales share q kᵀ. With weights that are alike along V, they share one masked matmul with v too, whose mask is
    Σ_s c^s_t λ^s(t, j) / (q'_t·z^s_t + ε).
    """
    log_decay, weight = _of_each(q, log_decay, weight)
    S0, z0 = initial_state = restarted(reset, initial_state)
    wide_v = jnp.result_type(v, *(a for a in (q, k, q_norm, k_norm, log_decay, weight, *initial_state) if a.dtype == jnp.float64))
    if chosen(implementation, "multiscale", wide_v, {"K": q.shape[-1], "V": v.shape[-1]}, v.size) != "plain":
        from unisono_jax.kernels.multiscale import attend

        same = q_norm is q and k_norm is k
        q, k, v, log_decay, weight = masked(valid, q, k, v, log_decay, weight)
        q_norm, k_norm = (q, k) if same else masked(valid, q_norm, k_norm)
        return attend(q, k, v, q_norm, k_norm, log_decay, weight, initial_state, reset)
    length = q.shape[1]
    size = chunk_length(chunk_size, length)
    *inputs, S0, z0 = widened(*masked(valid, q, k, v, q_norm, k_norm, log_decay, weight), S0, z0)
    q, k, v, q_norm, k_norm, log_decay, weight = (chunks(a, size) for a in inputs)
    reads, first, _, cut = shared(reset, size)
    reads = reads[:, :, None]  # [.., .., 1, C, C], query by key
    log_decay = jnp.swapaxes(log_decay, 2, 3)  # [B, N, M, C]
    fading = jnp.where(reads, jnp.exp(_between(log_decay)), 0)  # what is left of token j at t [B, N, M, C, C]
    kept = jnp.exp(jnp.cumsum(log_decay, axis=-1))  # what is left of the state before the chunk [B, N, M, C]
    whole = kept[..., -1]
    if first is not None:
        kept = jnp.where(first[:, :, None], kept, 0)

    ahead = fading[..., -1, :]  # what is left of each token at the chunk's end
    own = dot("bnjmhk,bnjhv->bnmhkv", jnp.einsum("bnmj,bnjhk->bnjmhk", ahead, k), v)
    S, S_last = carried(own, S0, cut, whole[..., None, None, None])  # [B, N, M, H, K, V]
    z, z_last = carried(dot("bnmj,bnjhk->bnmhk", ahead, k_norm), z0, cut, whole[..., None, None])  # [B, N, M, H, K]

    scores = dot("bnthk,bnjhk->bnhtj", q, k)
    norms = scores if q_norm is q and k_norm is k else dot("bnthk,bnjhk->bnhtj", q_norm, k_norm)
    by_time = jnp.swapaxes(kept, 2, 3)[..., None]  # [B, N, C, M, 1]
    bottom = dot("bnmtj,bnhtj->bntmh", fading, norms) + by_time * dot("bnthk,bnmhk->bntmh", q_norm, z)
    share = weight / (bottom + EPS)[..., None]  # [B, N, C, M, H, V or 1]
    if share.shape[-1] == 1:
        share = share[..., 0]
        mixed = scores * dot("bntmh,bnmtj->bnhtj", share, fading)
        o = dot("bnhtj,bnjhv->bnthv", mixed, v)
        o = o + dot("bntmhk,bnmhkv->bnthv", (share * by_time)[..., None] * q[:, :, :, None], S)
        return joined(o, length), (S_last, z_last)
    o = jnp.zeros((), v.dtype)
    for m in range(fading.shape[2]):
        read = dot("bnhtj,bnjhv->bnthv", scores * fading[:, :, m, None], v)
        read = read + dot("bnthk,bnhkv->bnthv", q * by_time[:, :, :, m, None], S[:, :, m])
        o = o + share[:, :, :, m] * read
    return joined(o, length), (S_last, z_last)


def _of_each(q: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    """inputs [B or 1, T or 1, …] for each token of q: [B, T, …]."""
    return tuple(jnp.broadcast_to(a, (*q.shape[:2], *a.shape[2:])) for a in inputs)


def _between(log_decay: jax.Array) -> jax.Array:
    """Σ_{j < i ≤ t} log λ_i [..., C] → [..., t, j], each summed on its own and 0 above the diagonal.

    A difference of two running sums would leave a soft decay no digits behind a hard one (log λ = −1000).
    """
    size = log_decay.shape[-1]
    after = jnp.tril(jnp.ones((size, size), bool), -1)  # i > j
    return jnp.cumsum(jnp.where(after, log_decay[..., :, None], 0), axis=-2)
