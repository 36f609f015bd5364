"""CRAM's fixed scheme as one fused kernel: ξ_t = λ ξ_{t−1} + (1−λ) σ(x_t) (Muraleedharan, eqs 2–5)."""

from __future__ import annotations

import torch

from unisono_torch.kernels.scan.operator import accumulator, scan


def decayed_sum(
    x: torch.Tensor,
    decay: float,
    initial_state: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, T, D], 0 < decay < 1, initial_state [B, D], reset and valid [B, T] bool → ξ [B, T, D], final state [B, D].

    Sums are kept in float32 (float64 for float64 x), the dtype of the final state and, unless `out_dtype` says otherwise, of ξ.
    Differentiable in x and initial_state; second derivatives are made of plain operations. NaN and infinity, of gradients too, may end
    before the next reset: where time is cut (scan/sweep.py), what is 2^−64 of itself by then (2^−128 in float64) is not carried on.
    """
    return scan(x, None, initial_state, reset, valid, decay, False, out_dtype or accumulator(x.dtype))
