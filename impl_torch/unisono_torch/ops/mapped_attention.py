"""Linear attention of q and k before their feature map φ, which a kernel applies while it loads them.

As linear_attention.py, with q, k [B, T, H, K] and, after the marks, φ's name and τ [1] of "learned" (features.py).
"""

from __future__ import annotations

from torch import Tensor

from unisono_torch.kernels.linear_attention import table
from unisono_torch.ops import linear_attention
from unisono_torch.ops.dispatch import use_triton
from unisono_torch.ops.elementwise import wide
from unisono_torch.ops.features import feature_map as phi
from unisono_torch.ops.fold import check_length, restarted
from unisono_torch.ops.linear_attention import State
from unisono_torch.ops.precision import exact


def features(
    q: Tensor, k: Tensor, v: Tensor, feature_map: str, tau: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """φ(q) and φ(k), float32 or wider; φ(0) where a token is not valid."""
    q, k = (phi(feature_map, a.to(wide(v.dtype)), tau, valid) for a in (q, k))
    return q, k


@exact
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    feature_map: str = "elu1",
    tau: Tensor | None = None,
) -> tuple[Tensor, State]:
    """One token: q, k [B, H, K], v [B, H, V], reset and valid [B]."""
    return linear_attention.step(*features(q, k, v, feature_map, tau, valid), v, state, reset, valid)


@exact
def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: State,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    feature_map: str = "elu1",
    tau: Tensor | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[Tensor, State]:
    """A kernel takes q and k in v's dtype and gives o in it; plain operations take them as they are and give o float32 or wider."""
    check_length(v)
    widths = {"K": table.features(q.shape[-1]) if feature_map == "taylor2" else q.shape[-1], "V": v.shape[-1]}
    if use_triton(implementation, "linear_attention", v.device, v.dtype, widths, feature_map=feature_map, one_dtype=True):
        from unisono_torch.kernels.linear_attention import linear_attention as kernel

        tau = tau if feature_map == "learned" else None  # a kernel leaves the gradient of others unwritten
        initial_state = restarted(reset, initial_state)
        return kernel(q.to(v.dtype), k.to(v.dtype), v, initial_state, reset, valid, feature_map, tau)
    return linear_attention.parallel(*features(q, k, v, feature_map, tau, valid), v, initial_state, reset, valid, chunk_size, "plain")
