"""The adaptive scheme's sum with its departures: ξ_t = λ ∘ ξ_{t−1} + (1−λ) ∘ s_t ∘ σ(u_t) (docs/architectures/cram.md).

It is a selective scan with Δ = B = C = 1 and A = log λ, and runs as one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from unisono_spec.contract.cram import CRAMConfig

from unisono_torch.layers.reading import Reading
from unisono_torch.ops import selective_scan
from unisono_torch.ops.elementwise import sigmoid, softplus, wide
from unisono_torch.ops.precision import exact

EPS = 1e-6  # beside the sum of weights


@exact
def retained(u: Tensor, s: Tensor, decay: Tensor | None, config: CRAMConfig, sums: Sequence[Tensor], read: Reading) -> tuple[Tensor, ...]:
    """u [..., D], s [..., 1] or [..., D], decay a [D], λ = σ(a), or None (1), sums [B, D] → ξ [..., D], and the sums after.

    Where `config` is normalised, it is S_t / z_t of S_t = λ ∘ S_{t−1} + w_t ∘ σ(u_t), z_t = λ ∘ z_{t−1} + w_t, w = softplus(s).
    """
    dtype = wide(u.dtype)
    u, w = u.to(dtype), softplus(s.to(dtype)) if config.normalised else s.to(dtype)
    rate = u.new_zeros(config.d_model)  # log λ
    if decay is not None:
        a = decay.to(dtype)
        rate, w = -softplus(-a), w if config.normalised else sigmoid(-a) * w
    terms = w * sigmoid(u)
    if config.normalised:
        terms = torch.cat([terms, w.expand_as(u)], -1)
    rates, one = rate.repeat(len(sums))[:, None], torch.ones_like(terms[..., :1])
    state = torch.cat([a.to(dtype) for a in sums], -1)[..., None]
    y, last = read(selective_scan, terms, torch.ones_like(terms), rates, one, one, torch.zeros_like(rates[:, 0]), state)
    if not config.normalised:
        return y, last[..., 0]
    top, bottom = y.chunk(2, -1)
    return top / (bottom + EPS), *(a.contiguous() for a in last[..., 0].chunk(2, -1))
