"""Somebody else's CRAM op before the court: the decayed sum as one FIR filter, written from the paper without Unisono's code.

    unisono conform --impl own_implementation:make

The file must be importable (here: run from this folder, or with it on PYTHONPATH). An implementation of whole models would also
declare `models=("cram",)` and return a model from `build`; see `unisono_conformance.adapter`.
"""

from __future__ import annotations

import numpy as np
from unisono_conformance.adapter import Capabilities


def decayed_sum(x, decay, initial_state, reset=None, valid=None, chunk_size=64):
    """ξ_t = Σ_j (1−λ) λ^{n(j, t)} σ(x_j) + λ^{n(0, t)} ξ_{−1}: every pair of tokens at once, so for short sequences only."""
    batch, length, _ = x.shape
    reset = np.zeros((batch, length), bool) if reset is None else reset
    valid = np.ones((batch, length), bool) if valid is None else valid
    x = np.where(valid[..., None], x, 0)
    initial_state = np.where(reset[:, :1], 0, initial_state)
    e = np.exp(-np.abs(x))
    u = np.where(valid[..., None], np.where(x >= 0, 1 / (1 + e), e / (1 + e)), 0)
    read = np.cumsum(valid, 1)
    document = np.cumsum(reset, 1)
    same = np.tril(document[:, :, None] == document[:, None, :])
    power = np.where(same, read[:, :, None] - read[:, None, :], 0)
    weight = np.where(same, (1 - decay) * float(decay) ** power, 0).astype(x.dtype)
    kept = np.where(document == 0, float(decay) ** read, 0).astype(x.dtype)
    xi = weight @ u.astype(x.dtype) + kept[..., None] * initial_state[:, None]
    return xi, xi[:, -1]


class Adapter:
    name = "own_implementation:make"
    known_gaps = None
    warnings = ()
    capabilities = Capabilities(models=(), ops=("decayed_sum",), forms=("parallel",), step=False, gradient_forms=())

    def op(self, name, form, arrays, settings, device, implementation):
        return decayed_sum(**arrays, **settings)

    def op_vjp(self, *args):
        raise NotImplementedError("declared: no gradient")

    def build(self, *args):
        raise NotImplementedError("declared: no models")


def make() -> Adapter:
    return Adapter()
