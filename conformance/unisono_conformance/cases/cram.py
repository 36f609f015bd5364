"""CRAM before the court: its two ops and its models, both schemes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from unisono_spec.contract import preset
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.errors import InputError
from unisono_spec.layers import cram as layer
from unisono_spec.ops import decayed_sum, selective_scan, weighted_sum
from unisono_spec.ops.elementwise import sigmoid

from unisono_conformance.cases.base import ModelCase, OpCase, Output
from unisono_conformance.cases.cram_laws import DECAYED_LAWS, MODEL_LAWS, WEIGHTED_LAWS
from unisono_conformance.cases.draw import Draw, far
from unisono_conformance.cases.inputs import Arrays, Inputs
from unisono_conformance.cases.pairwise import pairwise
from unisono_conformance.cases.selective_scan import nearly_kept
from unisono_conformance.judging import numerics

REGIMES = ("tame", "near_one", "forgetting", "saturated", "offset", "large")
NEAR_ONE, FORGETTING = 0.999, 0.001


class DecayedSum(OpCase):
    name, arch, op, module = "cram/decayed_sum", "cram", "decayed_sum", decayed_sum
    variants: Mapping[str, Any] = {"half": {"decay": 0.5}, "slow": {"decay": NEAR_ONE}, "fast": {"decay": FORGETTING}}
    defaults = ("half", "slow")
    in_full = True
    long_in_each_dtype = True
    regimes = ("tame", "saturated", "offset", "large")
    laws = DECAYED_LAWS

    def inputs(self, draw: Draw, dtype: str) -> Inputs:
        x = _bend(draw, draw.generator("x").normal(size=(draw.batch, draw.length, self.width)))
        return Inputs(self.cast({"x": x}, dtype), self.fresh_state(None, {}, draw.batch, draw.length, dtype))

    def flip(self, setting: dict, inputs: Inputs, time: int) -> Inputs:
        return _push(inputs, time)

    def reach(self, setting: dict, dtype: str, state: str) -> int | None:
        return numerics.visible_reach(setting["decay"], 0.5, dtype)

    def terms(self, inputs: Inputs) -> Inputs:
        """σ(x) = ½ + ½tanh(x/2) has the terms ½ and ½|tanh(x/2)|, which add up to σ(|x|)."""
        return inputs.absolute()

    def steepest(self, inputs: Inputs) -> Inputs:
        """σ' is positive, and is computed to a few roundings of itself, however small."""
        return inputs.replace(state={name: np.abs(a) for name, a in inputs.state.items()})


class WeightedSum(OpCase):
    name, arch, op, module = "cram/weighted_sum", "cram", "weighted_sum", weighted_sum
    variants: Mapping[str, Any] = {"inclusive": {"exclusive": False}, "exclusive": {"exclusive": True}}
    defaults = ("inclusive", "exclusive")
    in_full = True
    long_in_each_dtype = True
    regimes = ("tame", "saturated", "offset", "large")
    laws = WEIGHTED_LAWS

    def inputs(self, draw: Draw, dtype: str) -> Inputs:
        random = draw.generator("x")
        x = _bend(draw, random.normal(size=(draw.batch, draw.length, self.width)))
        s = random.normal(size=(draw.batch, draw.length))
        if draw.regime == "large":
            s = 1e4 * np.abs(s)  # a running sum beyond float16's largest number
        return Inputs(self.cast({"x": x, "s": s}, dtype), self.fresh_state(None, {}, draw.batch, draw.length, dtype))

    def flip(self, setting: dict, inputs: Inputs, time: int) -> Inputs:
        return _push(inputs, time)

    def reach(self, setting: dict, dtype: str, state: str) -> int | None:
        return None

    def reads_itself(self, setting: dict) -> bool:
        return not setting["exclusive"]

    def terms(self, inputs: Inputs) -> Inputs:
        return inputs.absolute()

    def steepest(self, inputs: Inputs) -> Inputs:
        return inputs.replace(arrays={**inputs.arrays, "s": np.abs(inputs.arrays["s"])})

    def steep(self, setting: dict, inputs: Inputs, form: str, dtype: str = "float64", rounded: Any = None) -> Output:
        """The gradient of s has the terms of σ; that of x those of σ', which is positive, and right to a few roundings of itself."""
        if inputs.arrays["s"].dtype.kind == "c":
            inputs = inputs.replace(arrays={**inputs.arrays, "x": np.abs(inputs.arrays["x"])})
        return self.reference(setting, inputs, form, dtype, rounded)


def nearly(sigmoid: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """σ errs by what its last operations round: of a token that comes back, in the same way. Where its argument is an embedding, which
    nothing has rounded, the spec's own float32 would give all realisations the same error."""
    return lambda x: numerics.perturbation("float32", roundings=numerics.SIGMOID)(sigmoid(x))


class CRAM(ModelCase):
    name = arch = "cram"
    # σ of the recurrent form, of the parallel one, which gradients and long sequences take, and of a layer; a learned λ
    inexact = (
        *((op, name, nearly(getattr(op, name))) for op in (decayed_sum, weighted_sum) for name in ("sigmoid", "logistic")),
        (layer, "sigmoid", nearly(sigmoid)),
        (selective_scan, "kept", nearly_kept),
    )
    defaults = handed_over = ("fixed", "plus", "adaptive")
    in_full = True
    regimes = (*REGIMES, "faint", "dropout")
    faint = ("faint",)
    laws = MODEL_LAWS
    config_regimes = ("near_one", "forgetting")
    too_narrow: Mapping[str, tuple[str, ...]] = dict.fromkeys(("offset", "saturated", "large"), ("bfloat16",))

    def __init__(self) -> None:
        small: dict[str, Any] = {"d_model": 8, "n_layers": 2, "ffn_mult": 1, "vocab_size": 7}
        wide = {**small, "d_model": 96}
        adaptive: dict[str, Any] = {"scheme": "adaptive", "position_bits": 3}
        plus: dict[str, Any] = adaptive | dict.fromkeys(("input_norm", *DEPARTURES), True)
        self.wide = {"wide": CRAMConfig(**wide, code_bits=5), "wide.adaptive": CRAMConfig(**wide, **adaptive)}
        # a dropout rate in the config must not act in evaluation
        self.variants = {
            "fixed": CRAMConfig(**small, code_bits=5, dropout=0.25),
            "adaptive": CRAMConfig(**small, **adaptive, tie_head=True, dropout=0.25),
            "plus": CRAMConfig(**small, **plus, dropout=0.25),
            **{f"fixed.{i}": CRAMConfig(**{**small, **row}) for i, row in enumerate(pairwise(FIXED, _accepted))},
            **{f"adaptive.{i}": CRAMConfig(**{**small, **row}) for i, row in enumerate(pairwise(ADAPTIVE, _accepted))},
            "cram-plus": CRAMConfig(**{**preset("cram-plus").to_dict(), **small, "position_bits": 3}),
        }

    def setting(self, draw: Draw) -> CRAMConfig:
        config: CRAMConfig = super().setting(draw)
        if config.scheme == "fixed" and draw.regime in ("near_one", "forgetting"):
            return config.replace(decay=NEAR_ONE if draw.regime == "near_one" else FORGETTING)
        return config

    def bend(self, draw: Draw, params: Arrays) -> Arrays:
        out = dict(params)
        for name in params:
            if name.endswith("score.2.bias") and draw.regime == "near_one":
                out[name] = params[name] + 2.0  # everything is kept, with a large weight
            if name.endswith(("score.2.weight", "score.2.bias")) and draw.regime == "forgetting":
                out[name] = params[name] * 0.05  # hardly anything is
            if name.endswith("score.2.bias") and draw.regime == "faint" and self.setting(draw).normalised:
                out[name] = params[name] - 14.0  # sums of weights are as small as ε
            if name.endswith("mixer.decay"):  # λ near 1, and near 0
                out[name] = params[name] + {"near_one": 6.0, "forgetting": -8.0}.get(draw.regime, 0.0)
            if name == "embedding.weight" and draw.regime in ("offset", "saturated", "large"):
                out[name] = _bend(draw, params[name])
            if name.endswith("norm.weight") and draw.regime == "large":
                out[name] = 8.0 * params[name]
        return out

    def tokens(self, draw: Draw, config: CRAMConfig, random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        if config.reads_frames:
            return _bend(draw, random.normal(size=(*shape, config.frame_size)))
        return random.integers(0, config.vocab_size, shape)

    def random_state(self, draw: Draw, inputs: Inputs) -> Arrays:
        random = draw.generator("state")
        state: Arrays = {}
        for name, a in inputs.state.items():
            if name == "position":
                state[name] = far(random.integers(0, 1000, a.shape), draw.generator("far")).astype(a.dtype)
            else:
                state[name] = random.uniform(0, 1, a.shape).astype(a.dtype)
        return state

    def flip(self, setting: CRAMConfig, inputs: Inputs, time: int) -> Inputs:
        tokens = inputs.arrays["tokens"].copy()
        if setting.reads_frames:
            return _push(inputs, time, "tokens")
        tokens[:, time] = (tokens[:, time] + setting.vocab_size // 2) % setting.vocab_size
        return inputs.replace(arrays={"tokens": tokens})

    def reach(self, setting: CRAMConfig, dtype: str, state: str) -> int | None:
        if setting.scheme == "adaptive":
            return None
        # one binary digit moves σ from ½ to 0.73
        return numerics.visible_reach(setting.decay, 0.23, dtype)

    def reads_itself(self, setting: CRAMConfig) -> bool:
        return not setting.exclusive or setting.residual == "before"


FIXED = {
    "codes": ("binary", "frame", "embedding"),
    "decay": (0.5, 0.9),
    "tie_head": (False, True),
    "head_bias": (False, True),
    "n_layers": (0, 1, 2),
    "frame_size": (0, 3),
    "frame_head": ("bernoulli", "gaussian"),
}
DEPARTURES = ("channel_weights", "learned_decay", "normalised", "skip")
ADAPTIVE = {
    "scheme": ("adaptive",),
    "n_layers": (1, 2),
    "tie_head": (False, True),
    "head_bias": (False, True),
    "position_bits": (2, 5),
    "k_scale": (0.0, 1.0),
    "input_norm": (False, True),
    "exclusive": (False, True),
    "residual": ("before", "after"),
    **dict.fromkeys(DEPARTURES, (False, True)),
}


def _accepted(row: dict) -> bool:
    try:
        CRAMConfig(**row)
    except InputError:
        return False
    return True


def _bend(draw: Draw, x: np.ndarray) -> np.ndarray:
    """What goes through σ, under the regime of `draw`."""
    return {"saturated": 12 * x, "offset": x + 4, "large": 3 * x}.get(draw.regime, x)


def _push(inputs: Inputs, time: int, name: str = "x") -> Inputs:
    """Move the input at `time` to the other side of 0, far."""
    x = inputs.arrays[name].copy()
    x[:, time] = np.where(x[:, time] > 0, -6, 6)
    return inputs.replace(arrays={**inputs.arrays, name: x})


CASES = (DecayedSum(), WeightedSum(), CRAM())
