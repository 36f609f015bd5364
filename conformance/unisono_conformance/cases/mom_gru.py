"""MARU's cell alone before the court, where h, the memory, each weight and every gradient can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from unisono_spec.contract import DTYPES, init_params, state_dtype
from unisono_spec.contract.maru import MARUConfig
from unisono_spec.ops import mom_gru

from unisono_conformance.cases.base import OpCase, Output
from unisono_conformance.cases.draw import Draw
from unisono_conformance.cases.inputs import Arrays, Inputs
from unisono_conformance.cases.subject import OpSubject
from unisono_conformance.judging import numerics

CELL = "layers.0.cell."
SMALL: dict[str, Any] = {"d_model": 4, "vocab_size": 3, "head_hidden": 2, "d_state": 1, "d_memory": 3, "n_slots": 3, "router_hidden": 3}


class CellSubject(OpSubject):
    elementary = False  # it has as many weights as a model


class MoMGRU(OpCase):
    """`coupled`: erases with what it adds; `separate`: with a projection of its own, and the router takes noise.

    Nothing but x is narrower than float32, and nothing is a sum of terms: rounding is asked what it costs. x, h and the memory, which are
    factors of products, err by ELEMENTARY u, as weights do: kernels make a product of three in tf32, whose operands keep 22 bits.
    """

    name, arch, op, module = "maru/mom_gru", "maru", "mom_gru", mom_gru
    subject, for_kernels, loops = CellSubject, True, True
    realised, roundings = True, numerics.ELEMENTARY
    variants: Mapping[str, Any] = {"coupled": {}, "separate": {"temperature": 0.7}}
    defaults = ("separate",)
    regimes = ("tame", "near_one", "forgetting", "saturated", "offset", "large")
    narrow = ("x",)
    states = ("initial_state.h", "initial_state.M")

    def config(self, draw: Draw) -> MARUConfig:
        more: dict[str, Any] = {"erase": "separate", "router": "gumbel", "n_banks": 2} if draw.variant == "separate" else {"n_banks": 3}
        return MARUConfig(**SMALL, **more)

    def inputs(self, draw: Draw, dtype: str) -> Inputs:
        config, shape = self.config(draw), (draw.batch, draw.length)
        fixed, random = draw.generator("weights"), draw.generator("tokens")
        given = {n.removeprefix(CELL): p for n, p in init_params(config, draw.seed, "float64").items() if n.startswith(CELL)}
        params = {f"p.{n}": _bend(draw.regime, n, p + 0.1 * fixed.normal(size=p.shape)) for n, p in given.items() if n != "balance_load"}
        params = {n: numerics.representable(p, state_dtype(dtype)) for n, p in params.items()}
        arrays = {"x": random.normal(size=(*shape, config.d_model)) + 2 * (draw.regime == "offset")}
        if draw.variant == "separate":
            arrays["noise"] = random.gumbel(size=(*shape, config.n_banks))
        return Inputs(self.cast(arrays, dtype), self.fresh_state(None, params, draw.batch, draw.length, dtype), params=params)

    def fresh_state(self, setting: Any, params: Arrays, batch: int, length: int, dtype: str) -> Arrays:
        memory = params["p.memory"].astype(DTYPES[state_dtype(dtype)])
        h = np.zeros((batch, params["p.hidden.weight"].shape[1]), memory.dtype)
        return dict(zip(self.states, (h, np.repeat(memory[None], batch, 0)), strict=True))

    def random_state(self, draw: Draw, inputs: Inputs) -> Arrays:
        """h in (−1, 1), memories near the first ones."""
        random, (h, M) = draw.generator("state"), (inputs.state[name] for name in self.states)
        moved = random.uniform(-1, 1, h.shape), M + 0.3 * random.normal(size=M.shape)
        return {name: a.astype(h.dtype) for name, a in zip(self.states, moved, strict=True)}

    def flip(self, setting: dict, inputs: Inputs, time: int) -> Inputs:
        x = inputs.arrays["x"].copy()
        x[:, time] = np.where(x[:, time] > 0, -6, 6)
        return inputs.replace(arrays={**inputs.arrays, "x": x})

    def reference(self, setting: dict[str, Any], inputs: Inputs, form: str, dtype: str = "float64", rounded: Any = None) -> Output:
        def wide(a: np.ndarray) -> np.ndarray:
            return a if a.dtype.kind == "c" else a.astype(DTYPES[dtype])

        p = {name.removeprefix("p."): wide(a) for name, a in inputs.params.items()}
        x, (h, M) = wide(inputs.arrays["x"]), (wide(inputs.state[name]) for name in self.states)
        x = x if rounded is None else rounded(x)
        noise = wide(inputs.arrays["noise"]) if "noise" in inputs.arrays else None
        out = []
        with np.errstate(invalid="ignore"):  # NaN where a token is not valid
            for t in range(inputs.length):
                reset, valid, drawn = (None if m is None else m[:, t] for m in (inputs.reset, inputs.valid, noise))
                _, (h, M) = mom_gru.step(x[:, t], p, (h, M), reset, valid, drawn, **setting)
                h, M = (h, M) if rounded is None else (rounded(h), rounded(M))
                out.append(h)
        return np.stack(out, 1), dict(zip(self.states, (h, M), strict=True))

    def reach(self, setting: dict, dtype: str, state: str) -> int | None:
        return None


def _bend(regime: str, name: str, p: np.ndarray) -> np.ndarray:
    """A parameter under `regime`."""
    if name == "memory":
        return {"large": 20 * p, "offset": 4 * p + 1}.get(regime, 4 * p)
    if name == "input.bias" and regime in ("near_one", "forgetting"):  # of ζ, which keeps h
        zeta = np.arange(len(p)) // (len(p) // 3) == 1
        return p + np.where(zeta, 4 if regime == "near_one" else -4, 0)
    if name in ("input.weight", "hidden.weight") and regime == "saturated":
        return 8 * p
    return p
