"""Normalised causal linear attention (Katharopoulos et al. 2020, eqs 8–12).

S_t = S_{t−1} + φ(k_t) v_tᵀ,  z_t = z_{t−1} + φ(k_t),  o_t = φ(q_t)ᵀ S_t / (φ(q_t)·z_t + ε),  ε = 1e-6, no 1/√K.
q and k arrive here as φ(q) and φ(k).

Shapes: q, k [B, T, H, K], v [B, T, H, V], state (S [B, H, K, V], z [B, H, K]), reset and valid [B, T] bool or None.
Each form returns (o [B, T, H, V], final state), float32 or wider; kernels, o in v's dtype. o is 0 where a token is not valid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from unisono_spec.contract.shapes import shaped

from unisono_torch.ops.dispatch import shorter, use_triton
from unisono_torch.ops.elementwise import wide
from unisono_torch.ops.fold import fold, masked, restarted
from unisono_torch.ops.precision import exact
from unisono_torch.ops.recurrence import UPPER_CHUNK, chunked, chunks

EPS = 1e-6
State = tuple[Tensor, Tensor]


@exact
def step(q: Tensor, k: Tensor, v: Tensor, state: State, reset: Tensor | None = None, valid: Tensor | None = None) -> tuple[Tensor, State]:
    """One token: q, k [B, H, K], v [B, H, V], reset and valid [B]."""
    dtype = wide(v.dtype)
    S, z = (a.to(dtype) for a in state)
    if reset is not None:
        S, z = masked(~reset, S, z)
    q, k, v = (a.to(dtype) for a in masked(valid, q, k, v))
    S = S + k[..., :, None] * v[..., None, :]  # eq 10
    z = z + k  # eq 11
    o = (q[..., None, :] @ S)[..., 0, :] / ((q * z).sum(-1, keepdim=True) + EPS)  # eq 12
    return o, (S, z)


@shaped
@exact
def recurrent(
    q: Tensor, k: Tensor, v: Tensor, initial_state: State, reset: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, State]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    return fold(step, (q, k, v), initial_state, reset, valid)


@shaped
@exact
def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: State,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[Tensor, State]:
    """Masked matmuls inside chunks of C tokens; the states between chunks are a segmented sum over chunks."""
    initial_state = restarted(reset, initial_state)
    given = {"feature_map": "none", "one_dtype": q.dtype == k.dtype == v.dtype}
    if use_triton(implementation, "linear_attention", v.device, v.dtype, {"K": q.shape[-1], "V": v.shape[-1]}, **given):
        from unisono_torch.kernels.linear_attention import linear_attention

        return linear_attention(q, k, v, initial_state, reset, valid)
    dtype, length = wide(v.dtype), q.shape[1]
    S0, z0 = (a.to(dtype) for a in initial_state)
    size = shorter(chunk_size, length)
    q, k, v = (chunks(a.to(dtype), size).transpose(2, 3).contiguous() for a in masked(valid, q, k, v))  # [B, N, H, C, ·]
    scores, first, last, cut = (q @ k.mT).tril(), q, k, None  # what reads the carry, and what goes into the next
    if reset is not None:
        cut = chunks(reset, size)
        segment = cut.cumsum(-1)  # [B, N, C]
        scores = torch.where((segment[..., :, None] == segment[..., None, :])[:, :, None], scores, 0)
        first = torch.where((segment == 0)[:, :, None, :, None], q, 0)
        last = torch.where((segment == segment[..., -1:])[:, :, None, :, None], k, 0)
        cut = cut.any(-1)
    S, S_end = _carried(last.mT @ v, S0, cut)  # [B, N, H, K, V]
    z, z_end = _carried(last.sum(-2), z0, cut)  # [B, N, H, K]
    top = scores @ v + first @ S
    bottom = scores.sum(-1, keepdim=True) + first @ z[..., None]
    o = (top / (bottom + EPS)).transpose(2, 3).flatten(1, 2)
    return o[:, :length], (S_end, z_end)


def _carried(own: Tensor, initial: Tensor, cut: Tensor | None) -> tuple[Tensor, Tensor]:
    """The state before each chunk [B, N, …], and after the last [B, …], from what each chunk adds."""
    after = chunked(own.flatten(2), 1, initial.flatten(1), cut, None, UPPER_CHUNK).reshape(own.shape)
    return torch.cat([initial[:, None], after[:, :-1]], 1), after[:, -1].clone()
