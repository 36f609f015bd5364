"""InfinityFormer's memory: linear attention at M time scales, each normalised, and the weighted sum of what they read.

S^s_t = λ^s_t S^s_{t−1} + k_t v_tᵀ,  z^s_t = λ^s_t z^s_{t−1} + k'_t,  r^s_t = q_tᵀ S^s_t / (q'_t·z^s_t + ε),  o_t = Σ_s c^s_t ∘ r^s_t.
q, k are φ(q), φ(k) of the numerator, q', k' those of the normaliser: the same arrays, unless RoPE turns the numerator only.

Shapes: q, k, q_norm, k_norm [B, T, H, K], v [B, T, H, V], log_decay (log λ ≤ 0) [B or 1, T or 1, M],
weight (c) [B or 1, T or 1, M, H or 1, V or 1], state (S [B, M, H, K, V], z [B, M, H, K]), reset and valid [B, T] bool or None.
Each form returns (o [B, T, H, V], final state), float32 or wider. o is 0 where a token is not valid, and its decay is not applied.
"""

from __future__ import annotations

import torch
from torch import Tensor
from unisono_spec.contract.shapes import shaped

from unisono_torch.arrays import readable
from unisono_torch.ops.carry import carried, faded
from unisono_torch.ops.dispatch import shorter, use_triton
from unisono_torch.ops.elementwise import wide
from unisono_torch.ops.fold import fold, masked, restarted
from unisono_torch.ops.precision import exact
from unisono_torch.ops.recurrence import chunks
from unisono_torch.ops.rotary import Turn

EPS = 1e-6
State = tuple[Tensor, Tensor]


def compressed(S: Tensor, rank: int) -> Tensor:
    """The best approximation of rank `rank` of each S [..., K, V] (Eckart & Young 1936): U_r U_rᵀ S.

    The projector U_r U_rᵀ carries no gradient: derivatives pass through S alone. On a GPU, cuSOLVER's QR iterations: its Jacobi
    ones, which are the default, leave U up to a hundred roundings away from orthogonal.
    """
    U = torch.linalg.svd(S.detach(), full_matrices=False, driver="gesvd" if S.is_cuda else None)[0][..., :rank]
    return U @ (U.mT @ S)


@exact
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    state: State,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    compress: Tensor | None = None,
    rank: int = 0,
) -> tuple[Tensor, State]:
    """One token: the arrays without their axis T. compress [B] bool: the token after which each S falls to `rank`."""
    dtype = wide(v.dtype)
    S, z = (a.to(dtype) for a in state)
    if reset is not None:
        S, z = masked(~reset, S, z)
    log_decay = log_decay.expand(q.shape[0], -1)
    given = masked(valid, q, k, v, q_norm, k_norm, log_decay, weight)
    q, k, v, q_norm, k_norm, log_decay, weight = (a.to(dtype) for a in given)
    decay = log_decay.exp()  # [B, M]
    S = decay[..., None, None, None] * S + (k[..., :, None] * v[..., None, :])[:, None]
    z = decay[..., None, None] * z + k_norm[:, None]
    read = (q[:, None, :, None] @ S)[..., 0, :] / ((q_norm[:, None] * z).sum(-1, keepdim=True) + EPS)  # [B, M, H, V]
    if compress is not None:
        due = compress if valid is None else compress & valid
        if not readable(due) or due.any():  # a decomposition is dear
            S = torch.where(due[:, None, None, None, None], compressed(S, rank), S)
    return (weight * read).sum(1), (S, z)


@shaped
@exact
def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    initial_state: State,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    compress: Tensor | None = None,
    rank: int = 0,
) -> tuple[Tensor, State]:
    """The definition: a fold of `step`, [B, T, …] → [B, T, …]. compress [B, T]: it is not associative, so this is its only form."""
    tokens = q.shape[:2]
    inputs = (q, k, v, q_norm, k_norm, log_decay.expand(*tokens, -1), weight.expand(*tokens, -1, -1, -1))
    if compress is None:
        return fold(step, inputs, initial_state, reset, valid)

    def compressing(due: Tensor, *at_t) -> tuple[Tensor, State]:
        return step(*at_t, compress=due, rank=rank)

    return fold(compressing, (compress, *inputs), initial_state, reset, valid)


@shaped
@exact
def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    initial_state: State,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[Tensor, State]:
    """Masked matmuls inside chunks of C tokens; the states between chunks obey the same recurrence over chunks.

    All scales share q kᵀ: with a weight per head they are one matmul, masked by Σ_s c^s_t / (q'_t·z^s_t + ε) exp(L^s_t − L^s_j).
    A kernel takes q, k, q_norm and k_norm in v's dtype and gives o in it.
    """
    initial_state = restarted(reset, initial_state)
    same = q is q_norm and k is k_norm
    widths = {"K": q.shape[-1], "V": v.shape[-1], "scales": initial_state[0].shape[1]}
    if use_triton(implementation, "multiscale", v.device, v.dtype, widths):
        from unisono_torch.kernels.multiscale import multiscale as kernel

        q, k = q.to(v.dtype), k.to(v.dtype)
        norms = (None, None) if same else (q_norm.to(v.dtype), k_norm.to(v.dtype))
        return kernel(q, k, v, *norms, log_decay, weight, initial_state, reset, valid)
    dtype, length = wide(v.dtype), q.shape[1]
    S0, z0 = (a.to(dtype) for a in initial_state)
    log_decay = log_decay.expand(log_decay.shape[0] if valid is None else q.shape[0], length, -1)
    weight = weight.expand(-1, length, -1, -1, -1)
    q, k, v, q_norm, k_norm, log_decay, weight = masked(valid, q, k, v, q_norm, k_norm, log_decay, weight)
    size = shorter(chunk_size, length)
    q, k, v = (chunks(a.to(dtype), size).transpose(2, 3).contiguous() for a in (q, k, v))  # [B, N, H, C, ·]
    q_norm, k_norm = (q, k) if same else (chunks(a.to(dtype), size).transpose(2, 3) for a in (q_norm, k_norm))
    log_decay = chunks(log_decay, size).mT  # [B or 1, N, M, C]; 0 behind the last token
    weight = chunks(weight.to(dtype), size).permute(0, 1, 4, 2, 3, 5)  # [B, N, H or 1, C, M, V or 1]
    cut = None if reset is None else chunks(reset, size)
    decay, kept = faded(log_decay, cut, dtype)  # [B or 1, N, M, C, C], [B or 1, N, M, C]

    ahead = decay[..., -1, :].mT[:, :, None, :, :, None]  # [B, N, 1, C, M, 1]
    scales = decay.shape[2]
    own_S = (k[..., None, :] * ahead).flatten(-2).mT @ v  # [B, N, H, M·K, V]
    own_z = (k_norm[..., None, :] * ahead).sum(3)  # [B, N, H, M, K]
    whole, any_cut = log_decay.double().sum(-1), None if cut is None else cut.any(-1)
    S, S_end = _between(own_S.unflatten(3, (scales, -1)), whole, any_cut, S0)  # [B, N, H, M, K, V], [B, M, H, K, V]
    z, z_end = _between(own_z, whole, any_cut, z0)

    scores = q @ k.mT  # [B, N, H, C, C]
    norms = scores if same else q_norm @ k_norm.mT
    kept = kept.mT[:, :, None]  # [B, N, 1, C, M]
    bottom = torch.einsum("bnhij,bnmij->bnhim", norms, decay.expand(q.shape[0], -1, -1, -1, -1))
    coefficient = weight / (bottom + kept * (q_norm @ z.mT) + EPS)[..., None]  # [B, N, H, C, M, V or 1]
    if weight.shape[-1] == 1:
        share = coefficient[..., 0]  # [B, N, H, C, M]
        mask = torch.einsum("bnhim,bnmij->bnhij", share, decay.expand(q.shape[0], -1, -1, -1, -1))
        o = (mask * scores) @ v + ((kept * share)[..., None] * q[..., None, :]).flatten(-2) @ S.flatten(3, 4)
    else:
        o = q.new_zeros(())
        for scale in range(scales):
            read = (decay[:, :, None, scale] * scores) @ v + kept[..., scale, None] * (q @ S[:, :, :, scale])
            o = o + coefficient[..., scale, :] * read
    return o.transpose(2, 3).flatten(1, 2)[:, :length], (S_end, z_end)


def turned(
    qkv: Tensor,
    turn: Turn,
    feature_map: str,
    tau: Tensor | None,
    numerator: bool,
    log_decay: Tensor,
    weight: Tensor,
    initial_state: State,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
    still: bool = False,
) -> tuple[Tensor, State]:
    """`parallel` of q and k turned and mapped by φ (rotary.py), and v: qkv [B, T, 3, H, K]. Kernels of both write one gradient of qkv.

    still: the first scale's log λ is 0 for good, which kernels need not compute with, nor for its gradient.
    """
    K = qkv.shape[-1]
    if not numerator and weight.shape[-1] == 1 and implementation == turn.implementation:
        given = implementation, qkv.device, qkv.dtype, K, initial_state[0].shape[1], feature_map
        if _both_kernels(*given):
            from unisono_torch.kernels.multiscale.turned import turned as kernel

            tau = tau if feature_map == "learned" else None  # a kernel leaves the gradient of others unwritten
            initial_state = restarted(reset, initial_state)
            return kernel(qkv, turn.cos, turn.sin, feature_map, tau, log_decay, weight, initial_state, reset, valid, still)
    if feature_map == "learned":  # whose τ a NaN of padding would reach
        (qkv,) = masked(valid, qkv)
    q, k, v = qkv.unbind(2)
    q, k, q_norm, k_norm = turn(q, k, feature_map, tau, numerator)
    inputs = q, k, v, q_norm, k_norm, log_decay, weight, initial_state, reset, valid
    return parallel(*inputs, chunk_size=chunk_size, implementation=implementation)


def _both_kernels(implementation: str, device: torch.device, dtype: torch.dtype, K: int, scales: int, feature_map: str) -> bool:
    if not use_triton(implementation, "rotary", device, dtype, {"K": K}, feature_map=feature_map):
        return False
    return use_triton(implementation, "multiscale", device, dtype, {"K": K, "V": K, "scales": scales})


def _between(own: Tensor, log_decay: Tensor, cut: Tensor | None, initial: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk [B, N, H, M, …] and after the last [B, M, H, …], from what each chunk adds [B, N, H, M, …]."""
    own = own.transpose(2, 3)
    before, after = carried(own.flatten(3), log_decay, cut, initial.flatten(2))
    return before.reshape(own.shape).transpose(2, 3), after.reshape(initial.shape)
