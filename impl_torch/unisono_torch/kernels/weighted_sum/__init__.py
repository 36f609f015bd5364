"""CRAM's adaptive scheme as one fused kernel: ξ_t = ξ_{t−1} + s_t σ(x_t) (Muraleedharan, eqs 8–10)."""

from __future__ import annotations

import torch

from unisono_torch.kernels.scan.operator import accumulator, scan


def weighted_sum(
    x: torch.Tensor,
    s: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    exclusive: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, T, D], s [B, T], initial_state [B, D], reset and valid [B, T] bool → ξ [B, T, D], final state [B, D].

    `exclusive` gives at t the sum without token t. Sums are kept in float32 (float64 for float64 x), the dtype of the final
    state and, unless `out_dtype` says otherwise, of ξ. Differentiable in x, s and initial_state; second derivatives are
    made of plain operations.
    """
    return scan(x, s, initial_state, reset, valid, 1.0, exclusive, out_dtype or accumulator(x.dtype))
