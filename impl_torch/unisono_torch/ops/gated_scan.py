"""What a Mamba block has around its selective scan: Δ = softplus(dt) before it, the gate SiLU(z) after it (Gu & Dao 2024, figure 3).

Shapes as in ops/selective_scan.py, with any dt, and z as u. Each form returns (y ∘ SiLU(z) [B, T, D] in u's dtype, final state). A kernel
has softplus and gate inside.
"""

from __future__ import annotations

from torch import Tensor

from unisono_torch.ops import selective_scan
from unisono_torch.ops.dispatch import use_triton
from unisono_torch.ops.elementwise import silu, softplus
from unisono_torch.ops.fold import check_length, restarted


def gate(scanned: tuple[Tensor, Tensor], u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """What the block does with y."""
    return scanned[0].to(u.dtype) * silu(z), scanned[1]


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
    *,
    z: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token: u, dt, z [B, D], B, C [B, N], reset and valid [B]."""
    return gate(selective_scan.step(u, softplus(dt), A, B, C, D, state, reset, valid), u, z)


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
    *,
    z: Tensor,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """z is not read where a token is not valid, by the kernel; there y is 0."""
    check_length(u)
    if use_triton(implementation, "selective_scan", u.device, u.dtype, {"N": A.shape[1]}):
        from unisono_torch.kernels.selective_scan import selective_scan as kernel

        initial_state = restarted(reset, initial_state)
        return kernel(u, dt, A, B, C, D, initial_state, reset, valid, z, softplus=True, out_dtype=u.dtype)
    return gate(selective_scan.parallel(u, softplus(dt), A, B, C, D, initial_state, reset, valid, chunk_size, implementation), u, z)
