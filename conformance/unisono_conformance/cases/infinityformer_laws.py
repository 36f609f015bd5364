"""Laws of InfinityFormer (P13)."""

from __future__ import annotations

import itertools

import numpy as np
from unisono_spec.contract import DTYPES, init_params, initial_state

from unisono_conformance.cases.base import Law
from unisono_conformance.judging import numerics


def _own_gradients(trial) -> None:
    """Each memory learns a time scale of its own: ∂/∂a_s is softmax(c)_s times a function of λ_s, which differs between scales.

    At the initial values: memories that start equal would stay equal for ever.
    """
    target, config = trial.target, trial.setting
    if target.form not in target.adapter.capabilities.gradient_forms or trial.draw.regime != "tame":
        return
    params = {name: numerics.representable(p, trial.dtype) for name, p in init_params(config, trial.draw.seed, "float64").items()}
    model = target.adapter.build(config, {n: p.copy() for n, p in params.items()}, trial.dtype, target.device, target.implementation)
    tokens = trial.inputs.arrays["tokens"]
    state = initial_state(config, params, len(tokens), dtype=trial.dtype)
    dlogits = trial.random("do").normal(size=(*tokens.shape, config.vocab_size)).astype(DTYPES[trial.dtype])
    dstate = {name: np.zeros_like(a) for name, a in state.items() if a.dtype.kind == "f"}
    marks = np.zeros(tokens.shape, bool), np.ones(tokens.shape, bool)
    found = model.vjp(tokens, dlogits, dstate, state, *marks, form=target.form, chunk_size=trial.draw.chunk_size)
    for i in range(config.n_layers):
        share = np.exp(params[f"layers.{i}.mixer.mix"].astype(np.float64))
        name = f"layers.{i}.mixer.decay.bias"
        slope = found.along("params", {name: np.eye(share.size)}) / share
        blur = numerics.formula(trial.dtype, tokens.shape[1], 1, gradient=True) * np.abs(slope).max()
        if not slope.all():
            trial.fail(f"layer {i}: a decay without a gradient: {slope}")
        for s, r in itertools.combinations(range(config.n_scales), 2):
            if abs(slope[s] - slope[r]) <= blur:
                trial.fail(f"layer {i}: memories {s} and {r} have one gradient, {slope[s]}; they would stay one")


LAWS = (Law("each scale has a gradient of its own", _own_gradients),)
