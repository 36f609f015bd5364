"""CRAM's adaptive compression scheme: ξ_t = ξ_{t−1} + s_t σ(x_t), ξ_{−1} = 0 (Muraleedharan, eqs 8–10).

Weights carry the source's index, not the output's (eq 7 as printed admits no recurrence). `exclusive` gives the printed
sums, without token t.

Shapes: x [B, T, D], s [B, T], state [B, D], reset and valid [B, T] bool or None. Each form returns (ξ, final state), float32 or
wider.
"""

from __future__ import annotations

import torch
from torch import Tensor
from unisono_spec.contract.shapes import shaped

from unisono_torch.ops.dispatch import use_triton
from unisono_torch.ops.elementwise import sigmoid, wide
from unisono_torch.ops.fold import check_length, restarted
from unisono_torch.ops.precision import exact
from unisono_torch.ops.recurrence import chunked


@exact
def step(
    x: Tensor, s: Tensor, state: Tensor, reset: Tensor | None = None, valid: Tensor | None = None, exclusive: bool = False
) -> tuple[Tensor, Tensor]:
    """One token: x [B, D], s, reset and valid [B]."""
    dtype = wide(x.dtype)
    state = state.to(dtype)
    if reset is not None:
        state = torch.where(reset[:, None], 0, state)
    xi = state + _term(x, s, valid, dtype)  # eq 10
    return (state if exclusive else xi), xi


@shaped
@exact
def recurrent(
    x: Tensor, s: Tensor, initial_state: Tensor, reset: Tensor | None = None, valid: Tensor | None = None, exclusive: bool = False
) -> tuple[Tensor, Tensor]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    check_length(x)
    state, out = initial_state, []
    # unbind, since each x[:, t] would write a gradient as long as x
    resets, valids = ([None] * x.shape[1] if m is None else m.unbind(1) for m in (reset, valid))
    for x_t, s_t, reset_t, valid_t in zip(x.unbind(1), s.unbind(1), resets, valids, strict=True):
        xi, state = step(x_t, s_t, state, reset_t, valid_t, exclusive)
        out.append(xi)
    return torch.stack(out, 1), state


@shaped
@exact
def parallel(
    x: Tensor,
    s: Tensor,
    initial_state: Tensor,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    exclusive: bool = False,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A segmented sum inside chunks of C tokens, as one masked matmul, with a carry between them."""
    initial_state = restarted(reset, initial_state)
    if use_triton(implementation, "weighted_sum", x.device, x.dtype):
        from unisono_torch.kernels.weighted_sum import weighted_sum

        return weighted_sum(x, s, initial_state, reset, valid, exclusive)
    dtype = wide(x.dtype)
    v = _term(x, s, valid, dtype)
    xi = chunked(v, 1, initial_state.to(dtype), reset, valid, chunk_size, exclusive)
    return xi, (xi[:, -1] + v[:, -1] if exclusive else xi[:, -1].clone())  # a view would keep all of ξ alive


def _term(x: Tensor, s: Tensor, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """s σ(x), zero where not valid: both are masked before, so that a NaN reaches no gradient either."""
    if valid is not None:
        x, s = torch.where(valid[..., None], x, 0), torch.where(valid, s, 0)
    return s.to(dtype)[..., None] * sigmoid(x.to(dtype))
