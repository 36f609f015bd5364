"""Mistakes in Mamba."""

from __future__ import annotations

import numpy as np
from unisono_spec.layers import mamba as layer
from unisono_spec.layers.norm import norm
from unisono_spec.models import mamba as model
from unisono_spec.ops import selective_scan, short_conv
from unisono_spec.ops.fold import fold

from unisono_conformance.sabotage import Sabotage

SCAN, CONV, SELECTION = selective_scan.parallel, short_conv.parallel, layer._selection
NAMES = ("u", "dt", "A", "B", "C", "D", "initial_state", "reset", "valid", "chunk_size")


def scan(change) -> tuple:
    """The parallel scan with some of its arguments changed: `change(arguments by name)` gives the changed ones."""

    def run(*args, **more):
        # models call it by place, the court by name
        given = {"reset": None, "valid": None, **dict(zip(NAMES, args, strict=False)), **more}
        return SCAN(**{**given, **change(given)})

    return ((selective_scan, "parallel", run),)


def conv(change) -> tuple:
    """The convolution with its weight, state and reset changed."""

    def run(x, weight, bias, initial_state, reset, valid, chunk_size):
        weight, initial_state, reset = change(weight, initial_state, reset)
        return CONV(x, weight, bias, initial_state, reset, valid, chunk_size)

    return ((short_conv, "parallel", run),)


def _held(u, dt, A, B, C, D, initial_state, reset=None, valid=None, chunk_size=64):
    """B discretised by zero-order hold, as A is."""

    def step(u, dt, B, C, h, reset, valid):
        if reset is not None:
            h = np.where(reset[:, None, None], 0, h)
        a = np.exp(dt[..., None] * A)
        new = a * h + (a - 1) / A * u[..., None] * B[:, None]
        keep = np.ones(len(u), bool) if valid is None else valid
        y = (new * C[:, None]).sum(-1) + D * u
        return np.where(keep[:, None], y, 0), np.where(keep[:, None, None], new, h)

    return fold(step, (u, dt, B, C), initial_state, reset, valid)


def _late_reset(a):
    if a["reset"] is None:
        return {}
    return {"reset": np.concatenate([np.zeros_like(a["reset"][:, :1]), a["reset"][:, :-1]], 1)}


def _padding_decays(a):
    """A token that is not valid adds nothing, but its Δ lets the state decay."""
    if a["valid"] is None:
        return {}
    return {**{n: np.where(a["valid"][..., None], a[n], 0) for n in ("u", "B", "C")}, "valid": None}


def _cut_selection(p, u, rounded):
    dt, *rest = SELECTION(p, u, rounded)
    return np.real(dt).astype(dt.dtype), *rest


SABOTAGES = (
    Sabotage("the norms' ε not the config's", "P1", ((model, "norm", lambda p, name, x, rounded, eps: norm(p, name, x, rounded)),)),
    Sabotage("Δ without softplus", "P1", ((layer, "softplus", lambda x: x),)),
    Sabotage("A = exp(A_log) without its sign", "P1", scan(lambda a: {"A": -a["A"]})),
    Sabotage("B discretised by zero-order hold", "P1", ((selective_scan, "parallel", _held),)),
    Sabotage("D forgotten", "P1", scan(lambda a: {"D": 0 * a["D"]})),
    Sabotage("convolution's taps in reverse", "P1", conv(lambda weight, state, reset: (weight[..., ::-1], state, reset))),
    Sabotage("convolution window dropped between calls", "P3", conv(lambda weight, state, reset: (weight, 0 * state, reset))),
    Sabotage("gradient cut at Δ", "P7", ((layer, "_selection", _cut_selection),)),
    Sabotage("convolution reads across a reset", "P15r", conv(lambda weight, state, reset: (weight, state, None))),
    Sabotage("reset acts one token late", "P15r", scan(_late_reset)),
    Sabotage("padding decays the state through Δ", "P15v", scan(_padding_decays)),
)
