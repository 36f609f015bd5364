"""Normalised causal linear attention, its feature map fused (Katharopoulos et al. 2020, eqs 7–12)."""

from __future__ import annotations

import torch
from torch import Tensor
from unisono_spec.contract import InputError

from unisono_torch.kernels.linear_attention import operator as _operator  # noqa: F401  (registers the operator)
from unisono_torch.kernels.linear_attention import pairs


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
        "reset": (reset, (batch, length)), "valid": (valid, (batch, length)),
    }  # fmt: skip
    for name, (a, shape) in shapes.items():
        if a is not None and (a.shape != shape or a.device != q.device or (a.dtype == torch.bool) != (name in ("reset", "valid"))):
            raise InputError(f"{name}: got {a.dtype} {tuple(a.shape)} on {a.device}; give {shape} on {q.device}")
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(f"q, k, v: got {q.dtype}, {k.dtype}, {v.dtype}; give one dtype")
    if feature_map != "taylor2":
        o, S, z, _ = torch.ops.unisono.linear_attention(q, k, v, S, z, tau, reset, valid, feature_map)
        return o, (S, z)
    held = pairs.held(S.float(), width, 2), pairs.held(z.float(), width, 2)
    # what a state given has in one order of a pair and not in the other, nobody reads, and nothing adds to
    rest = tuple(a - pairs.given(b, width, 2) for a, b in zip((S, z), held, strict=True))
    if reset is not None:
        kept = ~reset.any(1)
        rest = tuple(torch.where(kept.reshape(-1, *(1,) * (a.ndim - 1)), a, 0) for a in rest)
    o, *ends, _ = torch.ops.unisono.linear_attention(q, k, v, *held, tau, reset, valid, feature_map)
    S, z = (pairs.given(a, width, 2) + b for a, b in zip(ends, rest, strict=True))
    return o, (S, z)
