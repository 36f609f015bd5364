"""Mistakes in InfinityFormer."""

from __future__ import annotations

from typing import Any

import numpy as np
from unisono_spec.layers import infinityformer as layer
from unisono_spec.models import infinityformer as model
from unisono_spec.ops import multiscale, position
from unisono_spec.ops.fold import fold

from unisono_conformance.sabotage import Adapter, Sabotage
from unisono_conformance.sabotage.lat import two_digits

STEP, PARALLEL, POSITION, INPUTS = multiscale.step, multiscale.parallel, position.parallel, layer.mixer_inputs
NAMES = ("q", "k", "v", "q_norm", "k_norm", "log_decay", "weight", "initial_state", "reset", "valid", "chunk_size")


def memory(change) -> tuple:
    """The parallel op with some of its arguments changed: `change(arguments by name)` gives the changed ones."""

    def run(*args):
        given = dict(zip(NAMES, args, strict=True))
        return PARALLEL(**{**given, **change(given)})

    return ((multiscale, "parallel", run),)


def _late_decay(a):
    """Each token decays by its predecessor's λ."""
    return {"log_decay": np.concatenate([np.zeros_like(a["log_decay"][:, :1]), a["log_decay"][:, :-1]], 1)}


def _context_forgets(a):
    return {"log_decay": np.concatenate([a["log_decay"][..., 1:2], a["log_decay"][..., 1:]], -1)}


def _clamped(a):
    return {"log_decay": np.where(np.real(a["log_decay"]) < -5, -5, a["log_decay"])}


def _no_carried_normaliser(a):
    S, z = a["initial_state"]
    return {"initial_state": (S, np.zeros_like(z))}


def _reset_at_chunks(a):
    if a["reset"] is None:
        return {}
    return {"reset": a["reset"] & (np.arange(a["reset"].shape[1]) % a["chunk_size"] == 0)}


def _padded_keys(a):
    """Padding is masked in the numerator only."""
    valid = a["valid"]
    if valid is None:
        return {}
    masked = {n: np.where(valid[..., None, None], a[n], 0) for n in ("q", "k", "v", "q_norm")}
    log_decay = np.where(valid[..., None], a["log_decay"], 0)
    return {**masked, "log_decay": log_decay, "weight": np.where(valid[..., None, None, None], a["weight"], 0), "valid": None}


def _cut_normaliser(a):
    return {n: a[n].real.astype(a[n].dtype) for n in ("q_norm", "k_norm")}


def _one_normaliser(q, k, v, q_norm, k_norm, log_decay, weight, initial_state, reset, valid, chunk_size):
    """Every scale is divided by the context path's denominator."""

    def step(q, k, v, q_norm, k_norm, log_decay, weight, state, reset, valid):
        _, (S, z) = STEP(q, k, v, q_norm, k_norm, log_decay, weight, state, reset, valid)
        read = (q[:, None, ..., None] * S).sum(-2) / ((q_norm * z[:, 0]).sum(-1)[:, None, :, None] + multiscale.EPS)
        return (weight * read).sum(1), (S, z)

    return fold(step, (q, k, v, q_norm, k_norm, log_decay, weight), initial_state, reset, valid)


def _other_gate(p, *args):
    """1 − g where g belongs."""
    return INPUTS({n: -a if "mixer.gate" in n else a for n, a in p.items()}, *args)


def _turned_normaliser(p, config, *args):
    q, k, v, q_norm, k_norm, *rest = INPUTS(p, config, *args)
    return (q, k, v, q, k, *rest) if config.rope == "numerator" else (q, k, v, q_norm, k_norm, *rest)


def _restarted(initial_state, length, reset=None, valid=None):
    return POSITION(np.zeros_like(initial_state), length, reset, valid)


def _counts_padding(initial_state, length, reset=None, valid=None):
    return POSITION(initial_state, length, reset, None)


def _equal_decays(adapter: Adapter) -> None:
    build = adapter.build

    def equal(config: Any, params: Any, *args):
        return build(config, {n: np.full_like(a, a.mean()) if n.endswith("decay.bias") else a for n, a in params.items()}, *args)

    adapter.build = equal  # pyright: ignore[reportAttributeAccessIssue]


SABOTAGES = (
    Sabotage("decay off by one position", "P1", memory(_late_decay)),
    Sabotage("context path decays too", "P1", memory(_context_forgets)),
    Sabotage("gate on the wrong path", "P1", ((model, "mixer_inputs", _other_gate),)),
    Sabotage("scales share one normaliser", "P1", ((multiscale, "parallel", _one_normaliser),)),
    Sabotage("normaliser turned where only the numerator is", "P1", ((model, "mixer_inputs", _turned_normaliser),)),
    Sabotage("log λ clamped in one form only", "P2", memory(_clamped)),
    Sabotage("normaliser missing from the state", "P3", memory(_no_carried_normaliser)),
    Sabotage("positions restart after hand-over", "P3", ((position, "parallel", _restarted),)),
    Sabotage("far positions turn by their last two digits", "P1", ((layer, "rotate", two_digits),)),
    Sabotage("gradient cut at the normaliser", "P7", memory(_cut_normaliser)),
    Sabotage("equal initial decays", "P13", adapter=_equal_decays),
    Sabotage("reset ignored inside a chunk", "P15r", memory(_reset_at_chunks)),
    Sabotage("padded keys in the denominator", "P15v", memory(_padded_keys)),
    Sabotage("invalid tokens advance the position", "P15v", ((position, "parallel", _counts_padding),)),
)
