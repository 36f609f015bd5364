"""MARU before the court: one layer as published, and the stack with norms, a projection for erasing, and a noisy router."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from unisono_spec.contract.errors import InputError
from unisono_spec.contract.maru import MARUConfig
from unisono_spec.ops import selective_scan

from unisono_conformance.cases.base import Law, ModelCase
from unisono_conformance.cases.draw import Draw
from unisono_conformance.cases.inputs import Arrays, Inputs
from unisono_conformance.cases.mom_gru import MoMGRU
from unisono_conformance.cases.pairwise import pairwise
from unisono_conformance.cases.selective_scan import nearly_kept

# Beside norms initial weights are small (N(0, 0.02²), and 0.1 of noise), and nine products in a row hide a token: about 1/√width instead.
SEEN = ("embedding.weight", "in_proj.weight", "x_proj.weight", "out_proj.weight", "project.weight", "head.0.weight", "head.1.weight")
BANKED = ("router.1.weight", "router.1.bias", "balance_bias", "balance_load", "memory")  # the leading axis is the banks'


def _buffers(trial) -> None:
    """What training's balancing rule moves has no effect in evaluation, and evaluation does not move it."""
    buffers = [name for name, p in trial.setting.params().items() if not p.trainable]
    moved = {n: a + np.arange(len(a), dtype=a.dtype) if n in buffers else a for n, a in trial.inputs.params.items()}
    (o, last), (o2, last2) = trial.subject.forward(trial.running), trial.subject.forward(trial.running.replace(params=moved))
    trial.same_bits(o, o2, "logits under other balance biases")
    for name in last:
        trial.same_bits(last[name], last2[name], f"final state {name} under other balance biases")
    held = trial.subject.model(trial.inputs.params).params()
    for name in buffers:
        trial.same_bits(held[name], trial.inputs.params[name], f"{name} after and before evaluation")


def _order(trial) -> None:
    """Banks have no order, nor have the slots of a bank: reversing both reverses them in the final memory, and changes nothing else."""

    def reverse(name: str, a: np.ndarray, axis: int = 0) -> np.ndarray:
        if not name.endswith(BANKED):
            return a
        a = np.flip(a, axis)
        return np.flip(a, axis + 1) if name.endswith("memory") else a

    inputs = trial.running
    reversed_ = inputs.replace(
        params={n: reverse(n, a).copy() for n, a in inputs.params.items()},
        state={n: reverse(n, a, 1).copy() for n, a in inputs.state.items()},
    )
    o, last = trial.subject.forward(reversed_)
    trial.agrees((o, {n: reverse(n, a, 1) for n, a in last.items()}), inputs, "banks and slots in reverse order")


class MARU(ModelCase):
    name = arch = "maru"
    defaults = ("plain", "stacked")
    inexact = ((selective_scan, "kept", nearly_kept),)
    regimes = ("tame", "near_one", "forgetting", "saturated", "offset", "large", "dropout")
    laws = (Law("balance buffers", _buffers), Law("order of banks and slots", _order))
    too_narrow: Mapping[str, tuple[str, ...]] = {"saturated": ("bfloat16", "float16"), "large": ("bfloat16",)}
    loops = True

    def __init__(self) -> None:
        # a dropout rate in the config must not act in evaluation
        small: dict[str, Any] = {
            "d_model": 4, "vocab_size": 5, "head_hidden": 4, "d_state": 2, "conv_width": 3, "n_banks": 2, "n_slots": 3, "d_memory": 2,
            "router_hidden": 3, "dropout": 0.25,
        }  # fmt: skip
        self.wide = {"wide": MARUConfig(**{**small, "d_model": 96, "d_memory": 8, "head_hidden": 32})}
        stacked = {"n_layers": 2, "prenorm": True, "erase": "separate", "router": "gumbel", "temperature": 0.7}
        self.variants: Mapping[str, MARUConfig] = {
            "plain": MARUConfig(**small),
            "stacked": MARUConfig(**{**small, **stacked, "expand": 1}),
            **{f"pairs.{i}": MARUConfig(**{**small, **row}) for i, row in enumerate(pairwise(FLAGS, _accepted))},
        }

    def bend(self, draw: Draw, params: Arrays) -> Arrays:
        return {
            name: _bend(draw.regime, name, 4 * p if name.endswith(SEEN) and self.setting(draw).prenorm else p) for name, p in params.items()
        }

    def random_state(self, draw: Draw, inputs: Inputs) -> Arrays:
        """h in (−1, 1), memories near the first ones."""
        random = draw.generator("state")
        state: Arrays = {}
        for name, a in inputs.state.items():
            if name.endswith(".h"):
                state[name] = random.uniform(-1, 1, a.shape).astype(a.dtype)
            else:
                state[name] = (a + 0.3 * random.normal(size=a.shape)).astype(a.dtype)
        return state

    def reach(self, setting: MARUConfig, dtype: str, state: str) -> int | None:
        """The first convolution reads embeddings; later ones read what has a memory."""
        return setting.conv_width - 1 if state == "layers.0.conv" else None


FLAGS = {
    "n_layers": (1, 2),
    "prenorm": (False, True),
    "erase": ("coupled", "separate"),
    "router": ("dense", "gumbel"),
    "dt_rank": (0, 2),
    "expand": (1, 2),
    "conv_width": (1, 4),
    "n_banks": (1, 3),
}


def _accepted(row: dict) -> bool:
    try:
        MARUConfig(**row)
    except InputError:
        return False
    return True


def _bend(regime: str, name: str, p: np.ndarray) -> np.ndarray:
    """A parameter under `regime`."""
    if name.endswith("cell.memory"):
        return {"large": 20 * p, "offset": 4 * p + 1}.get(regime, 4 * p)  # large: addresses one slot of a bank
    if name == "head.0.bias":
        return p + 1  # few of its units are off
    if name.endswith("dt_proj.bias"):
        return {"near_one": p - 2, "forgetting": p + 5}.get(regime, p)  # Δ near 0: exp(ΔA) near 1
    if name.endswith(("input.weight", "hidden.weight")) and regime == "saturated":
        return 8 * p
    if name == "embedding.weight":
        return {"offset": p + 2, "large": 3 * p}.get(regime, p)
    return p


CASES = (MoMGRU(), MARU())
