"""The selective scan of Mamba, S6 (Gu & Dao 2024, eq 2a–2b and algorithm 2, with B discretised as Δ B):

h_t = exp(Δ_t A) ∘ h_{t−1} + Δ_t B_t u_t,  y_t = C_t h_t + D ∘ u_t.

Shapes, with D channels of N states: u, dt (Δ > 0) [B, T, D], A (< 0) [D, N], B, C [B, T, N], D [D], state h [B, D, N], reset and
valid [B, T] bool or None. Each form returns (y [B, T, D], final state), float32 or wider. y is 0 where a token is not valid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from unisono_spec.contract.shapes import shaped

from unisono_torch.ops.dispatch import use_triton
from unisono_torch.ops.elementwise import wide
from unisono_torch.ops.fold import check_length, fold, masked, restarted
from unisono_torch.ops.linear_scan import linear_scan
from unisono_torch.ops.precision import exact
from unisono_torch.ops.transforms import transformed


@exact
def step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: u, dt [B, D], B, C [B, N], reset and valid [B]."""
    dtype = wide(u.dtype)
    if reset is not None:
        (state,) = masked(~reset, state)
    u, dt, B, C = (a.to(dtype) for a in masked(valid, u, dt, B, C))  # Δ = 0 keeps h as it is
    h = torch.exp(dt[..., None] * A.to(dtype)) * state.to(dtype) + (dt * u)[..., None] * B[:, None]
    return (h @ C[..., None])[..., 0] + D.to(dtype) * u, h


@shaped
@exact
def recurrent(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    return fold(lambda u, dt, B, C, *rest: step(u, dt, A, B, C, D, *rest), (u, dt, B, C), initial_state, reset, valid)


@shaped
@exact
def parallel(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Chunk after chunk of C tokens, all at once inside a chunk, whose states [B, C, D, N] are made again for the backward.

    A reset is a step with a factor of 0.
    """
    initial_state = restarted(reset, initial_state)
    if use_triton(implementation, "selective_scan", u.device, u.dtype, {"N": A.shape[1]}):
        from unisono_torch.kernels.selective_scan import selective_scan

        return selective_scan(u, dt, A, B, C, D, initial_state, reset, valid)
    check_length(u)
    dtype = wide(u.dtype)
    u, dt, B, C = (a.to(dtype) for a in masked(valid, u, dt, B, C))
    A, h, out = A.to(dtype), initial_state.to(dtype), []
    resets = [None] * -(-u.shape[1] // chunk_size) if reset is None else reset.split(chunk_size, 1)
    pieces = (a.split(chunk_size, 1) for a in (u, dt, B, C))
    for u_n, dt_n, B_n, C_n, cut in zip(*pieces, resets, strict=True):
        call = A, h, u_n, dt_n, B_n, C_n, cut
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not transformed():
            y, h = checkpoint(_chunk, *call, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
        else:
            y, h = _chunk(*call)
        out.append(y)
    return torch.cat(out, 1) + D.to(dtype) * u, h


def _chunk(A: Tensor, h: Tensor, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """C_t h_t [B, C, D], and the last h [B, D, N]."""
    a = torch.exp(dt[..., None] * A)
    if reset is not None:
        (a,) = masked(~reset, a)
    states = linear_scan(a, (dt * u)[..., None] * B[:, :, None], h)  # [B, C, D, N]
    return (states @ C[..., None])[..., 0], states[:, -1].clone()  # a view would keep all states alive
