"""InfinityFormer's memory: linear attention at M time scales, each normalised, and the weighted sum of what they read.

S^s_t = λ^s_t S^s_{t−1} + k_t v_tᵀ,  z^s_t = λ^s_t z^s_{t−1} + k'_t,  r^s_t = q_tᵀ S^s_t / (q'_t·z^s_t + ε),  o_t = Σ_s c^s_t ∘ r^s_t.
q, k are φ(q), φ(k) of the numerator, q', k' those of the normaliser: the same arrays, unless RoPE turns the numerator only.

Shapes: q, k, q_norm, k_norm [B, T, H, K], v [B, T, H, V], log_decay (log λ ≤ 0) [B or 1, T or 1, M],
weight (c) [B or 1, T or 1, M, H or 1, V or 1], state (S [B, M, H, K, V], z [B, M, H, K]), reset and valid [B, T] bool or None.
Each form returns (o [B, T, H, V], final state). o is 0 where a token is not valid, and its decay is not applied.
"""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.shapes import shaped
from unisono_spec.ops.fold import fold

EPS = 1e-6
State = tuple[np.ndarray, np.ndarray]


def compressed(S: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of rank `rank` of each S [..., K, V] (Eckart & Young 1936): U_r U_rᵀ S.

    The projector U_r U_rᵀ carries no gradient: derivatives pass through S alone (and the complex step sees just that).
    """
    U = np.linalg.svd(np.real(S), full_matrices=False)[0][..., :rank]
    return U @ (np.swapaxes(U, -1, -2) @ S)


def step(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_norm: np.ndarray,
    k_norm: np.ndarray,
    log_decay: np.ndarray,
    weight: np.ndarray,
    state: State,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    compress: np.ndarray | None = None,
    rank: int = 0,
) -> tuple[np.ndarray, State]:
    """One token: the arrays without their axis T. compress [B] bool: the token after which each S falls to `rank`."""
    S, z = state
    if reset is not None:
        S, z = np.where(reset[:, None, None, None, None], 0, S), np.where(reset[:, None, None, None], 0, z)
    if valid is not None:
        q, k, v, q_norm, k_norm = (np.where(valid[:, None, None], a, 0) for a in (q, k, v, q_norm, k_norm))
        log_decay, weight = np.where(valid[:, None], log_decay, 0), np.where(valid[:, None, None, None], weight, 0)
    decay = np.exp(log_decay)  # [B, M]
    S = decay[..., None, None, None] * S + (k[..., :, None] * v[..., None, :])[:, None]
    z = decay[..., None, None] * z + k_norm[:, None]
    read = (q[:, None, ..., None] * S).sum(-2) / ((q_norm[:, None] * z).sum(-1, keepdims=True) + EPS)  # [B, M, H, V]
    if compress is not None:
        due = compress if valid is None else compress & valid
        if due.any():
            S = np.where(due[:, None, None, None, None], compressed(S, rank), S)
    return (weight * read).sum(1), (S, z)


@shaped
def recurrent(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_norm: np.ndarray,
    k_norm: np.ndarray,
    log_decay: np.ndarray,
    weight: np.ndarray,
    initial_state: State,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    compress: np.ndarray | None = None,
    rank: int = 0,
) -> tuple[np.ndarray, State]:
    """The definition: a fold of `step`, [B, T, …] → [B, T, …]. compress [B, T]: it is not associative, so this is its only form."""
    tokens = q.shape[:2]
    log_decay, weight = (np.broadcast_to(a, (*tokens, *a.shape[2:])) for a in (log_decay, weight))
    inputs = (q, k, v, q_norm, k_norm, log_decay, weight)
    if compress is None:
        return fold(step, inputs, initial_state, reset, valid)

    def compressing(*at_t: np.ndarray) -> tuple[np.ndarray, State]:
        due, *rest = at_t
        return step(*rest, compress=due, rank=rank)  # pyright: ignore[reportArgumentType]

    return fold(compressing, (compress, *inputs), initial_state, reset, valid)


@shaped
def parallel(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    q_norm: np.ndarray,
    k_norm: np.ndarray,
    log_decay: np.ndarray,
    weight: np.ndarray,
    initial_state: State,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    chunk_size: int = 64,
) -> tuple[np.ndarray, State]:
    """Masked matmuls inside chunks of C tokens, and a carry between them.

    All scales share q kᵀ. Token j's weight at t is exp(L_t − L_j), where L sums log λ over the chunk: a difference that is
    masked before exp, so that nothing overflows.
    """
    batch, length = q.shape[:2]
    reset = np.zeros((batch, length), bool) if reset is None else reset
    valid = np.ones((batch, length), bool) if valid is None else valid
    q, k, v, q_norm, k_norm = (np.where(valid[..., None, None], a, 0) for a in (q, k, v, q_norm, k_norm))
    log_decay, weight = np.where(valid[..., None], log_decay, 0), np.where(valid[..., None, None, None], weight, 0)
    S, z = (np.where(reset[:, 0].reshape(-1, *(1,) * (a.ndim - 1)), 0, a) for a in initial_state)
    out, wide = [], np.result_type(log_decay.dtype, np.float64)
    for start in range(0, length, chunk_size):
        part = slice(start, start + chunk_size)
        segment = np.cumsum(reset[:, part], 1)  # [B, C]
        # a float32 sum that passed one hard decay would leave the soft ones after it no digits
        total = np.moveaxis(np.cumsum(log_decay[:, part].astype(wide), 1), -1, 1)  # L [B, M, C]
        reads = np.tril(segment[:, :, None] == segment[:, None, :])[:, None]  # [B, 1, C, C], query by key
        decay = np.exp(np.where(reads, total[..., :, None] - total[..., None, :], -np.inf)).astype(log_decay.dtype)[:, :, None]
        first = (segment == 0)[:, None]
        kept = np.exp(np.where(first, total, -np.inf)).astype(log_decay.dtype)  # [B, M, C]

        Q, K, V, Qz, Kz = (np.swapaxes(a[:, part], 1, 2)[:, None] for a in (q, k, v, q_norm, k_norm))  # [B, 1, H, C, ·]
        carried = kept[:, :, None, :, None]  # [B, M, 1, C, 1]
        top = (decay * (Q @ np.swapaxes(K, -1, -2))) @ V + carried * (Q @ S)  # [B, M, H, C, V]
        bottom = (decay * (Qz @ np.swapaxes(Kz, -1, -2))).sum(-1, keepdims=True) + carried * (Qz @ z[..., None])
        read = np.moveaxis(top / (bottom + EPS), 3, 1)  # [B, C, M, H, V]
        out.append((weight[:, part] * read).sum(2))

        last = (segment == segment[:, -1:])[:, None]
        ahead = np.exp(np.where(last, total[..., -1:] - total, -np.inf)).astype(log_decay.dtype)[:, :, None, :, None]  # [B, M, 1, C, 1]
        S = np.swapaxes(ahead * K, -1, -2) @ V + kept[..., -1, None, None, None] * S
        z = (ahead * Kz).sum(-2) + kept[..., -1, None, None] * z
    return np.concatenate(out, 1), (S, z)
