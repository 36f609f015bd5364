"""The selective scan alone before the court, where Δ, A and every gradient can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from unisono_spec.contract import DTYPES, state_dtype
from unisono_spec.ops import selective_scan
from unisono_spec.ops.selective_scan import kept

from unisono_conformance.cases.base import OpCase, Output
from unisono_conformance.cases.draw import Draw
from unisono_conformance.cases.inputs import Arrays, Inputs
from unisono_conformance.judging import numerics

CHANNELS, STATES = 2, 3
SHIFT = {"near_one": -3.0, "forgetting": 3.0}  # of log Δ


def nearly_kept(x: np.ndarray) -> np.ndarray:
    """e^{ΔA} errs by its own last digits however near 1 it is, alike for like ΔA. That of a token that is not valid is exactly 1."""
    return np.where(x == 0, 1, numerics.perturbation("float32", roundings=numerics.ELEMENTARY)(kept(x)))


class SelectiveScan(OpCase):
    """`near_one` and `forgetting`: exp(Δ A) near 1 and near 0. Δ, A and D are in the state dtype, as a Mamba block makes them."""

    name, arch, op, module = "mamba/selective_scan", "mamba", "selective_scan", selective_scan
    variants: Mapping[str, Any] = {"diagonal": {}}
    defaults = ("diagonal",)
    regimes = ("tame", "near_one", "forgetting", "offset", "large")
    narrow = ("u", "B", "C")

    def inputs(self, draw: Draw, dtype: str) -> Inputs:
        random, tokens = draw.generator("tokens"), (draw.batch, draw.length)
        size = 30 if draw.regime == "large" else 1
        arrays = {
            "u": size * random.normal(size=(*tokens, CHANNELS)) + 4 * (draw.regime == "offset"),
            "dt": np.exp(random.normal(size=(*tokens, CHANNELS)) - 3 + SHIFT.get(draw.regime, 0)),
            "B": random.normal(size=(*tokens, STATES)),
            "C": random.normal(size=(*tokens, STATES)),
        }
        fixed = draw.generator("A and D")
        params = {"A": -np.exp(fixed.normal(size=(CHANNELS, STATES))), "D": fixed.normal(size=CHANNELS)}
        params = {name: numerics.representable(a, state_dtype(dtype)) for name, a in params.items()}
        return Inputs(self.cast(arrays, dtype), self.fresh_state(None, params, draw.batch, draw.length, dtype), params=params)

    def fresh_state(self, setting: Any, params: Arrays, batch: int, length: int, dtype: str) -> Arrays:
        return {"initial_state": np.zeros((batch, CHANNELS, STATES), DTYPES[state_dtype(dtype)])}

    def flip(self, setting: dict, inputs: Inputs, time: int) -> Inputs:
        arrays = {name: a.copy() for name, a in inputs.arrays.items()}
        for name in "uBC":
            arrays[name][:, time] = np.where(arrays[name][:, time] > 0, -6, 6)
        arrays["dt"][:, time] = 1
        return inputs.replace(arrays=arrays)

    def terms(self, inputs: Inputs) -> Inputs:
        """Each term is a product with e^−x, x = −A Σ Δ, which errs by x roundings of itself: of x e^−x ≤ e^−x/2, which half of A yields."""
        absolute = inputs.absolute()
        return absolute.replace(params={"A": inputs.params["A"] / 2, "D": np.abs(inputs.params["D"])})

    def steepest(self, inputs: Inputs) -> Inputs:
        return self.terms(inputs)

    def steep(self, setting: dict, inputs: Inputs, form: str, dtype: str = "float64", rounded: Any = None) -> Output:
        """With Δ a state decays faster and gains more: here the slope of e^x is positive along whatever moves x, and both add up."""
        u, dt, B, C = (_wide(inputs.arrays[name]) for name in ("u", "dt", "B", "C"))
        (A, D), h = (_wide(inputs.params[name]) for name in "AD"), _wide(inputs.state["initial_state"])
        if inputs.valid is not None:
            u, dt, B, C = (np.where(inputs.valid[..., None], a, 0) for a in (u, dt, B, C))
        out = []
        for t in range(inputs.length):
            if inputs.reset is not None:
                h = np.where(inputs.reset[:, t, None, None], 0, h)
            x = dt[:, t, :, None] * A
            h = np.exp(np.real(x) + 1j * np.abs(np.imag(x))) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
            out.append((h * C[:, t, None]).sum(-1) + D * u[:, t])
        return np.stack(out, 1), {"initial_state": h}

    def reach(self, setting: dict, dtype: str, state: str) -> int | None:
        return None


def _wide(a: np.ndarray) -> np.ndarray:
    return a if a.dtype.kind == "c" else a.astype(np.float64)
