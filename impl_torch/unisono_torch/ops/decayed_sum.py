"""CRAM's fixed compression scheme: ξ_t = λ ξ_{t−1} + (1−λ) σ(x_t), ξ_{−1} = 0 (Muraleedharan, eqs 2–5, with λ = ½).

ξ_t includes x_t: it is the paper's Ξ_{t+1}, which predicts x_{t+1}.

Shapes: x [B, T, D], state [B, D], reset and valid [B, T] bool or None. Each form returns (ξ, final state), float32 or wider.
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
def step(x: Tensor, decay: float, state: Tensor, reset: Tensor | None = None, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token: x [B, D], reset and valid [B]."""
    dtype = wide(x.dtype)
    state = state.to(dtype)
    if reset is not None:
        state = torch.where(reset[:, None], 0, state)
    if valid is not None:
        x = torch.where(valid[:, None], x, 0)  # so that a NaN reaches no gradient either
    u = sigmoid(x.to(dtype))
    # eq 5. Above ½ the rounding of 1−λ costs less than that of λ, which n steps would raise to the n-th power
    xi = state + (1 - decay) * (u - state) if decay > 0.5 else decay * state + (1 - decay) * u
    if valid is not None:
        xi = torch.where(valid[:, None], xi, state)
    return xi, xi


@shaped
@exact
def recurrent(
    x: Tensor, decay: float, initial_state: Tensor, reset: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    check_length(x)
    state, out = initial_state, []
    # unbind, since each x[:, t] would write a gradient as long as x
    resets, valids = ([None] * x.shape[1] if m is None else m.unbind(1) for m in (reset, valid))
    for x_t, reset_t, valid_t in zip(x.unbind(1), resets, valids, strict=True):
        xi, state = step(x_t, decay, state, reset_t, valid_t)
        out.append(xi)
    return torch.stack(out, 1), state


@shaped
@exact
def parallel(
    x: Tensor,
    decay: float,
    initial_state: Tensor,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The closed form (eq 2) inside chunks of C tokens: ξ_t = Σ_{j≤t} (1−λ) λ^{n_t−n_j} σ(x_j) + λ^{n_t} ξ_{−1}.

    n counts the valid tokens read; a reset cuts both terms.
    """
    initial_state = restarted(reset, initial_state)
    if use_triton(implementation, "decayed_sum", x.device, x.dtype):
        from unisono_torch.kernels.decayed_sum import decayed_sum

        return decayed_sum(x, decay, initial_state, reset, valid)
    dtype = wide(x.dtype)
    if valid is None:
        v = (1 - decay) * sigmoid(x.to(dtype))
    else:
        keep = valid[..., None]
        v = torch.where(keep, (1 - decay) * sigmoid(torch.where(keep, x, 0).to(dtype)), 0)
    xi = chunked(v, decay, initial_state.to(dtype), reset, valid, chunk_size)
    return xi, xi[:, -1].clone()  # a view would keep all of ξ alive
