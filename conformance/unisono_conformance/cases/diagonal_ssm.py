"""S4D's recurrence alone before the court, where Δ, A, C, D, the state and every gradient can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from unisono_spec.contract import DTYPES, state_dtype
from unisono_spec.ops import diagonal_ssm

from unisono_conformance.cases.base import OpCase, Output
from unisono_conformance.cases.draw import Draw
from unisono_conformance.cases.inputs import Arrays, Inputs
from unisono_conformance.judging import numerics

CHANNELS, PAIRS = 2, 3
SHIFT = {"near_one": -3.0, "forgetting": 3.0}  # of log Δ


class DiagonalSSM(OpCase):
    """`near_one` and `forgetting`: e^{ΔA} near 1 and near 0.

    A state turns, and so do its errors: the sizes of terms are those of a state that decays without turning. What entered n tokens ago
    has met e^{ΔA} n times, whose error, of an elementary function, is the same each time: it counts n of those more. e^{ΔA} and its
    quotient with A are made in float64 (ops/diagonal_ssm.py).
    """

    name, arch, op, module = "s4d/diagonal_ssm", "s4d", "diagonal_ssm", diagonal_ssm
    for_kernels = True
    variants: Mapping[str, Any] = {"diagonal": {}}
    defaults = ("diagonal",)
    regimes = ("tame", "near_one", "forgetting", "offset", "large")
    narrow = ("u",)

    def inputs(self, draw: Draw, dtype: str) -> Inputs:
        random, size = draw.generator("tokens"), 30 if draw.regime == "large" else 1
        u = size * random.normal(size=(draw.batch, draw.length, CHANNELS)) + 4 * (draw.regime == "offset")
        fixed = draw.generator("Δ, A, C and D")
        real, imag = -np.exp(fixed.normal(size=(CHANNELS, PAIRS))), fixed.uniform(-9, 9, (CHANNELS, PAIRS))
        params = {
            "dt": np.exp(fixed.normal(size=CHANNELS) - 3 + SHIFT.get(draw.regime, 0)),
            "A": np.stack([real, imag], -1),
            "C": fixed.normal(size=(CHANNELS, PAIRS, 2)),
            "D": fixed.normal(size=CHANNELS),
        }
        params = {name: numerics.representable(a, state_dtype(dtype)) for name, a in params.items()}
        return Inputs(self.cast({"u": u}, dtype), self.fresh_state(None, params, draw.batch, draw.length, dtype), params=params)

    def fresh_state(self, setting: Any, params: Arrays, batch: int, length: int, dtype: str) -> Arrays:
        return {"initial_state": np.zeros((batch, CHANNELS, PAIRS, 2), DTYPES[state_dtype(dtype)])}

    def flip(self, setting: dict, inputs: Inputs, time: int) -> Inputs:
        u = inputs.arrays["u"].copy()
        u[:, time] = np.where(u[:, time] > 0, -6, 6)
        return inputs.replace(arrays={"u": u})

    def absolute(self, setting: dict, inputs: Inputs, form: str) -> Output:
        positive, h = self.steepest(inputs), np.hypot(*np.moveaxis(inputs.state["initial_state"], -1, 0))
        dt, A, C = (positive.params[name].astype(np.float64) for name in ("dt", "A", "C"))
        still = np.zeros_like(h)
        straight = {"A": np.stack([A[..., 0] + 1j * numerics.STEP / dt[:, None], 0 * A[..., 1]], -1)}
        straight["C"] = np.stack([C.sum(-1), 0 * C[..., 0]], -1)
        given = positive.replace(params={**positive.params, **straight}, state={"initial_state": np.stack([h, still], -1)})
        o, last = self.reference(setting, given, form)

        def sized(a: np.ndarray) -> np.ndarray:
            return np.real(a) + _drifts(inputs) * np.imag(a) / numerics.STEP

        m = sized(last["initial_state"][..., 0])
        return sized(o), {"initial_state": np.stack([m, m], -1)}

    def steepest(self, inputs: Inputs) -> Inputs:
        absolute, A = inputs.absolute(), inputs.params["A"]
        sizes = {name: np.abs(a) for name, a in inputs.params.items()}
        return absolute.replace(params={**sizes, "A": np.stack([A[..., 0], np.abs(A[..., 1])], -1)})

    def steep(self, setting: dict, inputs: Inputs, form: str, dtype: str = "float64", rounded: Any = None) -> Output:
        """Of |u|, |C|, |D| and |h|; each slope is the size of the true one."""
        here, there = (_decayed(inputs, drift) for drift in (0.0, DRIFT))

        def both(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return a + _drifts(inputs) * (b - a) / DRIFT

        return both(here[0], there[0]), {name: both(a, there[1][name]) for name, a in here[1].items()}

    def reach(self, setting: dict, dtype: str, state: str) -> int | None:
        return None


DRIFT = 2.0**-20  # a step of log |e^{ΔA}|, along which each term's derivative is its age times itself


def _drifts(inputs: Inputs) -> float:
    """How the error of e^{ΔA} counts beside the roundings of which the formula has √T."""
    return numerics.ELEMENTARY / (numerics.C2 * float(np.sqrt(inputs.length)))


def _decayed(inputs: Inputs, drift: float) -> Output:
    """The sums of sizes, in which e^{ΔA} is larger by e^drift; the complex step gives the sizes of slopes."""
    wide = {name: _wide(a) for name, a in {**inputs.arrays, **inputs.params, **inputs.state}.items()}
    u, C, D, h = (wide[name] for name in ("u", "C", "D", "initial_state"))
    dt, A = np.real(wide["dt"])[:, None], np.real(wide["A"])
    moved, size = np.imag(wide["dt"])[:, None], np.hypot(A[..., 0], A[..., 1])
    turned = np.imag(wide["A"]).sum(-1)
    x = dt * A[..., 0]
    kept = np.exp(x + drift)  # |e^{ΔA}|, and its slopes: |A| along Δ, Δ along both parts of A
    factor = kept * (1 + 1j * (size * moved + dt * turned))
    # |(e^{ΔA} − 1)/A| = Δ |∫₀¹ e^{sΔA} ds| is no more than without turning. Along Δ its slope is e^{ΔA}; along A, Δ² ∫ s e^{sΔA} ds.
    gained = np.expm1(x) / A[..., 0]
    slope = (x * np.exp(x) - np.expm1(x)) / A[..., 0] ** 2
    if inputs.state["initial_state"].dtype == np.float64:  # a difference of quotients with A, of which float32 feels nothing
        slope = slope + (dt * kept + 3 * gained) / size
    gain = gained + 1j * (np.exp(x) * moved + slope * turned)
    h = np.hypot(np.real(h[..., 0]), np.real(h[..., 1])) + 1j * np.imag(h).sum(-1)
    C, out = C.sum(-1), []
    for t in range(inputs.length):
        if inputs.reset is not None:
            h = np.where(inputs.reset[:, t, None, None], 0, h)
        new, y = factor * h + gain * u[:, t, :, None], D * u[:, t]
        if inputs.valid is not None:
            new, y = np.where(inputs.valid[:, t, None, None], new, h), np.where(inputs.valid[:, t, None], y, 0)
        h = new
        read = 2 * (C * h).sum(-1)
        out.append(y + (read if inputs.valid is None else np.where(inputs.valid[:, t, None], read, 0)))
    return np.stack(out, 1), {"initial_state": np.stack([h, h], -1)}


def _wide(a: np.ndarray) -> np.ndarray:
    return a if a.dtype.kind == "c" else a.astype(np.float64)
