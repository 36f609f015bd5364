"""RoPE of queries and keys in one pass, with a feature map before or after it (Su et al. 2021, eq 34)."""

from __future__ import annotations

import torch
from torch import Tensor
from unisono_spec.contract import InputError

from unisono_torch.kernels.registry import check_map
from unisono_torch.kernels.rotary import operator as _operator  # noqa: F401  (registers the operator)


def turned(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, feature_map: str = "none", tau: Tensor | None = None, numerator: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ops/rotary.py's, q and k [B, T, H, K] of one dtype, cos and sin [B or 1, T, K/2] float32 → four arrays of that dtype.

    Differentiable in q, k and tau; a second time by plain operations.
    """
    batch, length, _, width = q.shape
    turns = batch, length, width // 2
    if k.shape != q.shape or k.dtype != q.dtype or width % 2:
        raise InputError(f"q, k: got {q.dtype} {tuple(q.shape)}, {k.dtype} {tuple(k.shape)}; give one dtype and shape [B, T, H, K], K even")
    for name, a in (("cos", cos), ("sin", sin)):
        if a.shape not in (turns, (1, *turns[1:])) or a.shape != cos.shape or a.dtype != torch.float32 or a.device != q.device:
            raise InputError(f"{name}: got {a.dtype} {tuple(a.shape)} on {a.device}; give both float32 {turns}, or [1, …], on {q.device}")
    if tau is not None and (tau.shape != (1,) or tau.device != q.device):
        raise InputError(f"tau: got {tuple(tau.shape)} on {tau.device}; give (1,) on {q.device}")
    check_map("rotary", feature_map, tau)
    q, k, q_norm, k_norm = torch.ops.unisono.rotary(q, k, cos, sin, tau, feature_map, numerator)
    return (q, k, q_norm, k_norm) if numerator else (q, k, q, k)
