"""Mistakes in S4D."""

from __future__ import annotations

import numpy as np
from unisono_spec.ops import diagonal_ssm

from unisono_conformance.sabotage import Sabotage

PARALLEL = diagonal_ssm.parallel
NAMES = ("u", "dt", "A", "C", "D", "initial_state", "reset", "valid", "chunk_size")


def ssm(change) -> tuple:
    """The parallel op with some of its arguments changed: `change(arguments by name)` gives the changed ones."""

    def run(*args):
        given = dict(zip(NAMES, args, strict=True))
        return PARALLEL(**{**given, **change(given)})

    return ((diagonal_ssm, "parallel", run),)


def _late_reset(a):
    if a["reset"] is None:
        return {}
    return {"reset": np.concatenate([np.zeros_like(a["reset"][:, :1]), a["reset"][:, :-1]], 1)}


def _padding_turns(a):
    """A token that is not valid adds nothing, but the state decays and turns past it."""
    if a["valid"] is None:
        return {}
    return {"u": np.where(a["valid"][..., None], a["u"], 0), "valid": None}


def _euler(u, dt, A, C, D, initial_state, reset, valid, chunk_size):
    """An input enters with the weight Δ instead of (e^{ΔA} − 1) / A: the same states, each times a number."""

    def times(pairs, by):
        z = (pairs[..., 0] + 1j * pairs[..., 1]) * by
        return np.stack([z.real, z.imag], -1).astype(pairs.dtype)

    z = dt[:, None] * (A[..., 0] + 1j * A[..., 1])
    ratio = z / np.expm1(z)
    y, last = PARALLEL(u, dt, A, times(C, ratio), D, times(initial_state, 1 / ratio), reset, valid, chunk_size)
    return y, times(last, ratio)


SABOTAGES = (
    Sabotage("conjugate pairs counted once", "P1", ssm(lambda a: {"C": a["C"] / 2})),
    Sabotage("Euler's step instead of zero-order hold", "P1", ((diagonal_ssm, "parallel", _euler),)),
    Sabotage("states decay without turning", "P1", ssm(lambda a: {"A": a["A"] * np.array([1, 0.01], a["A"].dtype)})),
    Sabotage("state dropped between calls", "P3", ssm(lambda a: {"initial_state": 0 * a["initial_state"]})),
    Sabotage("reset acts one token late", "P15r", ssm(_late_reset)),
    Sabotage("padding turns the state", "P15v", ssm(_padding_turns)),
)
