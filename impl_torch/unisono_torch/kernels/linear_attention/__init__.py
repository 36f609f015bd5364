"""Normalised causal linear attention, its feature map fused (Katharopoulos et al. 2020, eqs 7–12)."""

from __future__ import annotations

import torch
from torch import Tensor
from unisono_spec.contract import InputError

from unisono_torch.kernels.linear_attention import operator as _operator  # noqa: F401  (registers the operator)
from unisono_torch.kernels.registry import check_map


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: tuple[Tensor, Tensor],
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    feature_map: str = "none",
    tau: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """q, k [B, T, H, K], v [B, T, H, V] of one dtype, (S [B, H, K, V], z [B, H, K]), reset and valid [B, T] bool → o, final state.

    feature_map: "elu1", "relu", "taylor2" (K ≤ 16; states of 1 + K + K² features) or "learned" (elu1(τx), tau [1]), applied inside;
    "none" where q and k are features already. o comes in v's dtype, the state in float32. Differentiable in q, k, v, the state and tau; a
    second time by plain operations.
    """
    S, z = initial_state
    batch, length, heads, width = q.shape
    rows = 1 + width + width**2 if feature_map == "taylor2" else width
    shapes = {
        "k": (k, (batch, length, heads, width)), "v": (v, (batch, length, heads, v.shape[-1])),
        "initial_state's S": (S, (batch, heads, rows, v.shape[-1])), "initial_state's z": (z, (batch, heads, rows)),
        "reset": (reset, (batch, length)), "valid": (valid, (batch, length)), "tau": (tau, (1,)),
    }  # fmt: skip
    for name, (a, shape) in shapes.items():
        if a is not None and (a.shape != shape or a.device != q.device or (a.dtype == torch.bool) != (name in ("reset", "valid"))):
            raise InputError(f"{name}: got {a.dtype} {tuple(a.shape)} on {a.device}; give {shape} on {q.device}")
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"q, k, v: got {q.dtype}, {k.dtype}, {v.dtype}; give one dtype")
    check_map("linear_attention", feature_map, tau)
    o, S, z, _ = torch.ops.unisono.linear_attention(q, k, v, S, z, tau, reset, valid, feature_map)
    return o, (S, z)
