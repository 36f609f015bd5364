"""The adaptive scheme's sum with its departures: ξ_t = λ ∘ ξ_{t−1} + (1−λ) ∘ s_t ∘ σ(u_t) (docs/architectures/cram.md).

It is a selective scan with Δ = B = C = 1 and A = log λ, and runs as one.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from unisono_spec.contract.cram import CRAMConfig

from unisono_jax.layers.reading import Reading
from unisono_jax.ops import selective_scan
from unisono_jax.ops.elementwise import sigmoid, softplus, wide

EPS = 1e-6  # beside the sum of weights


def retained(
    u: jax.Array, s: jax.Array, decay: jax.Array | None, config: CRAMConfig, sums: Sequence[jax.Array], read: Reading
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """u [..., D], s [..., 1] or [..., D], decay a [D], λ = σ(a), or None (1), sums [B, D] → ξ [..., D], and the sums after.

    Where `config` is normalised, it is S_t / z_t of S_t = λ ∘ S_{t−1} + w_t ∘ σ(u_t), z_t = λ ∘ z_{t−1} + w_t, w = softplus(s).
    """
    dtype = wide(u)
    u, w = u.astype(dtype), softplus(s) if config.normalised else s
    rate = jnp.zeros(config.d_model, dtype)  # log λ
    if decay is not None:
        a = decay.astype(dtype)
        rate, w = -softplus(-a), w if config.normalised else sigmoid(-a) * w
    terms = w * sigmoid(u)
    if config.normalised:
        terms = jnp.concatenate([terms, jnp.broadcast_to(w, u.shape)], -1)
    rates, one = jnp.tile(rate, len(sums))[:, None], jnp.ones_like(terms[..., :1])
    state = jnp.concatenate(sums, -1)[..., None]
    y, last = read(selective_scan, terms, jnp.ones_like(terms), rates, one, one, jnp.zeros_like(rates[:, 0]), state)
    if not config.normalised:
        return y, (last[..., 0],)
    top, bottom = jnp.split(y, 2, -1)
    return top / (bottom + EPS), tuple(jnp.split(last[..., 0], 2, -1))
