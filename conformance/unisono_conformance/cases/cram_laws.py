"""Laws of CRAM (P13), each a fact of the equations that needs no reference to be checked."""

from __future__ import annotations

import numpy as np

from unisono_conformance.cases.base import Law
from unisono_conformance.judging import numerics


def _scaled_weights(trial) -> None:
    """ξ is linear in (s, ξ₋₁): scaling both by a power of two scales every rounding, and so every bit."""
    scaled = trial.inputs.replace(
        arrays={**trial.inputs.arrays, "s": 4 * trial.inputs.arrays["s"]}, state={n: 4 * a for n, a in trial.inputs.state.items()}
    )
    (o, last), (o4, last4) = trial.subject.forward(trial.inputs), trial.subject.forward(scaled)
    trial.same_bits(4 * o, o4, "ξ(4s) and 4 ξ(s)")
    trial.same_bits(4 * last["initial_state"], last4["initial_state"], "final state of 4s and of s, times 4")


def _no_weight(trial) -> None:
    """s = 0 leaves the state as it was."""
    inputs = trial.inputs.replace(arrays={**trial.inputs.arrays, "s": np.zeros_like(trial.inputs.arrays["s"])})
    o, last = trial.subject.forward(inputs)
    before = inputs.state["initial_state"]
    trial.same_bits(o, np.broadcast_to(before[:, None], o.shape), "ξ with s = 0, and the initial state")
    trial.same_bits(last["initial_state"], before, "final state with s = 0, and the initial state")


def _channels(trial) -> None:
    """Channels do not mix: permuting them permutes ξ."""
    order = np.arange(trial.inputs.arrays["x"].shape[-1])[::-1]
    permuted = trial.inputs.replace(
        arrays={**trial.inputs.arrays, "x": trial.inputs.arrays["x"][..., order]},
        state={n: a[..., order] for n, a in trial.inputs.state.items()},
    )
    trial.compare(trial.subject.forward(permuted)[0][..., order], *trial.expected(trial.inputs)[0], "ξ of permuted channels, permuted back")


def _constant(trial) -> None:
    """A constant input gives ξ_t = (1 − λ^{t+1}) σ(x), from ξ₋₁ = 0."""
    x = trial.inputs.arrays["x"]
    inputs = trial.inputs.replace(arrays={"x": np.broadcast_to(x[:, :1], x.shape).copy()})
    wide = x[:, :1].astype(np.float64)
    share = -np.expm1(np.arange(1, inputs.length + 1) * np.log(trial.setting["decay"]))[None, :, None]
    terms = share / (1 + np.exp(-np.abs(wide)))
    budget = numerics.formula(trial.dtype, inputs.length) * terms
    trial.compare(trial.subject.forward(inputs)[0], share / (1 + np.exp(-wide)), budget, "ξ of a constant input")


def _between(trial) -> None:
    """From ξ₋₁ = 0, ξ lies in [0, 1): each ξ_t is a partial average of values of σ. (In float32 σ rounds to 0 and to 1.)"""
    o, _ = trial.subject.forward(trial.inputs)
    if not ((o >= 0) & (o <= 1)).all():
        trial.fail(f"ξ leaves [0, 1]: it spans {o.min()} to {o.max()}")


def _untrained_code(trial) -> None:
    """The fixed scheme's state is a function of the data alone, unless its codes are embeddings."""
    config = trial.setting
    if config.scheme != "fixed" or config.codes == "embedding":
        return
    other = {name: -p for name, p in trial.inputs.params.items()}
    _, last = trial.subject.forward(trial.inputs)
    _, last_other = trial.subject.forward(trial.inputs.replace(params=other))
    trial.same_bits(last["xi"], last_other["xi"], "ξ under other parameters")


DECAYED_LAWS = (Law("constant input", _constant), Law("ξ ∈ [0, 1]", _between), Law("channels", _channels))
WEIGHTED_LAWS = (Law("scale by 4", _scaled_weights), Law("no weight", _no_weight), Law("channels", _channels))
MODEL_LAWS = (Law("ξ is data alone", _untrained_code),)
