"""Normalised causal linear attention (Katharopoulos et al. 2020, eqs 8–12).

S_t = S_{t−1} + φ(k_t) v_tᵀ,  z_t = z_{t−1} + φ(k_t),  o_t = φ(q_t)ᵀ S_t / (φ(q_t)·z_t + ε),  ε = 1e-6, no 1/√K.
q and k arrive here as φ(q) and φ(k).

Shapes: q, k [B, T, H, K], v [B, T, H, V], state (S [B, H, K, V], z [B, H, K]), reset and valid [B, T] bool or None.
Each form returns (o [B, T, H, V], final state). o is 0 where a token is not valid.
"""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.shapes import shaped
from unisono_spec.ops.fold import fold

EPS = 1e-6
State = tuple[np.ndarray, np.ndarray]


def step(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, state: State, reset: np.ndarray | None = None, valid: np.ndarray | None = None
) -> tuple[np.ndarray, State]:
    """One token: q, k [B, H, K], v [B, H, V], reset and valid [B]."""
    S, z = state
    if reset is not None:
        S, z = np.where(reset[:, None, None, None], 0, S), np.where(reset[:, None, None], 0, z)
    if valid is not None:
        q, k, v = (np.where(valid[:, None, None], a, 0) for a in (q, k, v))
    S = S + k[..., :, None] * v[..., None, :]  # eq 10
    z = z + k  # eq 11
    o = (q[..., None] * S).sum(-2) / ((q * z).sum(-1, keepdims=True) + EPS)  # eq 12
    return o, (S, z)


@shaped
def recurrent(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, initial_state: State, reset: np.ndarray | None = None, valid: np.ndarray | None = None
) -> tuple[np.ndarray, State]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    return fold(step, (q, k, v), initial_state, reset, valid)


@shaped
def parallel(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    initial_state: State,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    chunk_size: int = 64,
) -> tuple[np.ndarray, State]:
    """Masked matmuls inside chunks of C tokens, and a carry between them. The normaliser is one more column of v, of ones."""
    batch, length = q.shape[:2]
    reset = np.zeros((batch, length), bool) if reset is None else reset
    valid = np.ones((batch, length), bool) if valid is None else valid
    q, k, v = (np.where(valid[..., None, None], a, 0) for a in (q, k, v))
    v = np.concatenate([v, np.ones_like(v[..., :1])], -1)  # [B, T, H, V+1]
    carry = np.concatenate([initial_state[0], initial_state[1][..., None]], -1)  # [B, H, K, V+1]
    carry, out = np.where(reset[:, 0, None, None, None], 0, carry), []
    for start in range(0, length, chunk_size):
        part = slice(start, start + chunk_size)
        segment = np.cumsum(reset[:, part], 1)  # [B, C]
        reads = np.tril(segment[:, :, None] == segment[:, None, :])  # [B, C, C], query by key
        scores = np.einsum("bthk,bjhk->bhtj", q[:, part], k[:, part]) * reads[:, None]
        first = (segment == 0)[..., None, None]
        read = np.einsum("bhtj,bjhv->bthv", scores, v[:, part]) + np.einsum("bthk,bhkv->bthv", q[:, part] * first, carry)
        out.append(read[..., :-1] / (read[..., -1:] + EPS))
        last = (segment == segment[:, -1:])[..., None, None]
        added = np.einsum("bjhk,bjhv->bhkv", k[:, part] * last, v[:, part])
        carry = added + np.where(first[:, -1:], carry, 0)
    return np.concatenate(out, 1), (carry[..., :-1], carry[..., -1])


def quadratic(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, initial_state: State, reset: np.ndarray | None = None, valid: np.ndarray | None = None
) -> tuple[np.ndarray, State]:
    """The attention matrix written out: o_t = Σ_j a_tj v_j / (Σ_j a_tj + ε), a_tj = φ(q_t)·φ(k_j) over the tokens j that t may read.

    An oracle: quadratic in T. The tokens before the first are summed in the initial state.
    """
    batch, length, heads, _ = q.shape
    S0, z0 = initial_state
    S, z = np.array(S0, np.result_type(S0, k, v)), np.array(z0, np.result_type(z0, k))
    o = np.zeros((batch, length, heads, v.shape[-1]), np.result_type(q, S))
    for b in range(batch):
        begins = 0  # the first token of the sequence that is read
        fresh = False  # whether a reset has cut the initial state off
        for t in range(length):
            if reset is not None and reset[b, t]:
                begins, fresh = t, True
            j = np.array([i for i in range(begins, t + 1) if valid is None or valid[b, i]], int)
            a = np.einsum("hk,jhk->hj", q[b, t], k[b, j])
            top, bottom = np.einsum("hj,jhv->hv", a, v[b, j]), a.sum(-1)
            if not fresh:
                top, bottom = top + np.einsum("hk,hkv->hv", q[b, t], S0[b]), bottom + np.einsum("hk,hk->h", q[b, t], z0[b])
            if valid is None or valid[b, t]:
                o[b, t] = top / (bottom + EPS)[:, None]
            if t == length - 1:
                S[b] = np.einsum("jhk,jhv->hkv", k[b, j], v[b, j]) + (0 if fresh else S0[b])
                z[b] = k[b, j].sum(0) + (0 if fresh else z0[b])
    return o, (S, z)
