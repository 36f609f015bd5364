"""Laws of attention (P13), each a fact of the equations that needs no reference to be checked."""

from __future__ import annotations

import numpy as np
from unisono_spec.contract.lat import LATConfig

from unisono_conformance.cases.base import Law
from unisono_conformance.cases.inputs import Arrays


def _head_order(trial) -> None:
    """Heads have no order: permuting them in parameters and states changes the states' order only."""
    config: LATConfig = trial.case.blocks(trial.setting)
    order, inputs = np.arange(config.n_heads)[::-1], trial.running

    def params(name: str, p: np.ndarray) -> np.ndarray:
        kind = config.kinds[int(name.split(".")[1])] if name.startswith("layers.") else ""
        if kind == "conv" or ".mixer." not in name or name.endswith(("out.bias", "tau", "head_norm.weight")):
            return p
        if name.endswith("out.weight"):  # columns, head after head
            return p.reshape(len(p), config.n_heads, -1)[:, order].reshape(p.shape)
        width = config.n_heads * (config.qk_width if kind == "linear" else config.head_width)
        blocks = np.split(p, [width, 2 * width])
        return np.concatenate([a.reshape(config.n_heads, -1, *a.shape[1:])[order].reshape(a.shape) for a in blocks])

    def states(state: Arrays) -> Arrays:
        axis = {"S": 1, "z": 1, "k": 2, "v": 2}
        return {n: np.take(a, order, axis[n[-1]]) if n[-2:] in (".S", ".z", ".k", ".v") else a for n, a in state.items()}

    o, last = trial.subject.forward(inputs.replace(params={n: params(n, p) for n, p in inputs.params.items()}, state=states(inputs.state)))
    trial.agrees((o, states(last)), inputs, "heads in another order")


def _scaled_values(trial) -> None:
    """States are linear in v: scaling the last mixer's v and its state by a power of two scales every rounding, and so every bit."""
    config: LATConfig = trial.case.blocks(trial.setting)
    layer = f"layers.{max(i for i, kind in enumerate(config.kinds) if kind != 'conv')}"
    mine, inputs = {f"{layer}.S", f"{layer}.v"}, trial.running

    def scaled(arrays: Arrays) -> Arrays:
        return {n: 4 * a if n in mine else a for n, a in arrays.items()}

    def values(name: str, p: np.ndarray) -> np.ndarray:
        if not name.startswith(f"{layer}.mixer.qkv."):
            return p
        return np.concatenate([p[: -config.d_model], 4 * p[-config.d_model :]])

    _, last = trial.subject.forward(inputs)
    _, last4 = trial.subject.forward(inputs.replace(params={n: values(n, p) for n, p in inputs.params.items()}, state=scaled(inputs.state)))
    for name, a in scaled(last).items():
        if name in mine:
            trial.same_bits(a, last4[name], f"final state {name}, times 4, and of 4v")


LAWS = (Law("heads have no order", _head_order), Law("states are linear in v", _scaled_values))
