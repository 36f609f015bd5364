"""A case is one thing to judge: an op, or the models of one architecture. Each architecture registers its cases in its own file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from unisono_spec import create
from unisono_spec.contract import DTYPES, Config, init_params, initial_state, state_dtype

from unisono_conformance.cases.draw import Draw
from unisono_conformance.cases.inputs import Arrays, Inputs
from unisono_conformance.cases.subject import ModelSubject, OpSubject, Subject
from unisono_conformance.judging import numerics
from unisono_conformance.judging.patches import Patch, patched

Output = tuple[np.ndarray, Arrays]  # (o or logits, the state after)


@dataclasses.dataclass(frozen=True)
class Law:
    """An algebraic law that a case declares (P13). `check(trial)` raises Disagreement."""

    name: str
    check: Callable[[Any], None]


class Case:
    """name: `arch` or `arch/op`. variants: a config, or an op's settings, by name; `defaults` are judged by every property."""

    name: str
    arch: str
    level: str  # "model" or "op"
    subject: Callable[..., Subject]  # what runs it
    variants: Mapping[str, Any]
    defaults: tuple[str, ...]
    regimes: tuple[str, ...]
    laws: tuple[Law, ...] = ()
    # regimes that change the config, which a framework may compile anew
    config_regimes: tuple[str, ...] = ()
    # regimes in which denominators are as small as their ε
    faint: tuple[str, ...] = ()
    # regimes that some formats cannot hold, and which: their budget would exceed numerics.LIMIT
    too_narrow: Mapping[str, tuple[str, ...]] = {}
    # whether P10 is at its longest in each dtype; else in float32 alone, since the spec itself takes seconds
    long_in_each_dtype = False
    # whether P1, P7 and P15 judge every dtype with every form, P12 every default config, and each config of a model is a vector
    in_full = False
    # whether budgets are those of realisations, which rounding is asked for, and how often each value that they hand on is rounded
    realised, roundings = True, 1.0
    # whether every form is a loop over time, in the spec too: P10 is shorter then
    loops: bool = False

    def setting(self, draw: Draw) -> Any:
        """The config or settings of `draw`: its variant under its regime."""
        raise NotImplementedError

    def inputs(self, draw: Draw, dtype: str) -> Inputs:
        """Sequences from the state before the first token, unmarked, on numbers that `dtype` can represent."""
        raise NotImplementedError

    def random_state(self, draw: Draw, inputs: Inputs) -> Arrays:
        """A state that a running sequence could have."""
        raise NotImplementedError

    def fresh_state(self, setting: Any, params: Arrays, batch: int, length: int, dtype: str) -> Arrays:
        """The state before the first of `length` tokens."""
        raise NotImplementedError

    def spoil(self, draw: Draw, inputs: Inputs, where: np.ndarray) -> Inputs:
        """The worst content (NaN where it can be) at the tokens `where` [B, T], which nothing may depend on."""
        raise NotImplementedError

    def flip(self, setting: Any, inputs: Inputs, time: int) -> Inputs:
        """`inputs` with the token at `time` changed as far as it can be."""
        raise NotImplementedError

    def reach(self, setting: Any, dtype: str, state: str) -> int | None:
        """How many tokens back the array `state` of the state must visibly depend on one token; None: any number."""
        raise NotImplementedError

    def endless(self, setting: Any) -> bool:
        """Whether the state's size is constant, so that a sequence may be of any length."""
        return True

    def reads_itself(self, setting: Any) -> bool:
        """Whether output t depends on token t."""
        return True

    def together(self, name: str) -> str:
        """One name for all arrays that P7 moves along one direction where it does not try each coordinate."""
        return name

    def reference(self, setting: Any, inputs: Inputs, form: str, dtype: str = "float64", rounded: Any = None) -> Output:
        """What the spec says, in float64 or float32; complex inputs and parameters are let through."""
        raise NotImplementedError

    def floats(self, setting: Any, inputs: Inputs) -> dict[str, Arrays]:
        """What has a gradient: {"params": …, "inputs": …, "state": …}."""
        return {
            "params": inputs.params,
            "inputs": {n: a for n, a in inputs.arrays.items() if a.dtype.kind not in "iub"},
            "state": {n: a for n, a in inputs.state.items() if a.dtype.kind not in "iub" and inputs.state_given},
        }


class ModelCase(Case):
    """The models of one architecture."""

    level, subject = "model", ModelSubject
    handed_over: tuple[str, ...] = ()  # configs of the relay between environments; the last of the defaults where none is named
    chunk_size = 64  # of the spec's parallel form, which is asked about long sequences
    # what realisations put in place of functions inside the spec's ops, whose errors are those of no layer
    inexact: tuple[Patch, ...] = ()
    # configs so wide that what narrow formats hide, they hide in all channels only by mistake; of P5w alone
    wide: Mapping[str, Any]

    def together(self, name: str) -> str:
        """The same map in every layer, weight and bias; all norms; the maps of a FFN."""
        kind = re.sub(r"layers\.\d+\.", "", name).removesuffix(".weight").removesuffix(".bias")
        return "norm" if kind.endswith("norm") else "ffn" if kind.startswith("ffn.") else kind

    def inputs(self, draw: Draw, dtype: str) -> Inputs:
        config = self.setting(draw)
        params = init_params(config, draw.seed, "float64")
        # the same for every shape, so that an implementation may keep what it built
        noise = dataclasses.replace(draw, batch=0, length=0, chunk_size=0).generator("params")
        # initial biases and shifts are all 0 and scales all 1, which would hide a swapped or forgotten one
        params = {name: p + 0.1 * noise.normal(size=p.shape) for name, p in params.items()}
        params = {name: numerics.representable(p, dtype) for name, p in self.bend(draw, params).items()}
        tokens = self.tokens(draw, config, draw.generator("tokens"), (draw.batch, draw.length))
        if tokens.dtype.kind == "f":
            tokens = tokens.astype(DTYPES[dtype])
        state = self.fresh_state(config, params, draw.batch, draw.length, dtype)
        return Inputs({"tokens": tokens}, state, params=params, **(self.training(draw, config, dtype) if draw.regime == "dropout" else {}))

    def training(self, draw: Draw, config: Any, dtype: str) -> dict[str, Any]:
        """What training draws: dropout masks, and noise where a router takes it."""
        random, shape = draw.generator("dropout"), (draw.batch, draw.length)
        masks = random.choice([0.0, 2.0], (config.n_updates, *shape, config.d_model))
        noise = tuple(numerics.representable(random.gumbel(size=(*shape, width)), dtype) for width in config.noise_widths)
        return {"dropout": tuple(numerics.representable(masks, dtype)), "noise": noise or None}

    def floats(self, setting: Config, inputs: Inputs) -> dict[str, Arrays]:
        declared, found = setting.params(), super().floats(setting, inputs)
        return {**found, "params": {name: p for name, p in found["params"].items() if declared[name].trainable}}

    def bend(self, draw: Draw, params: Arrays) -> Arrays:
        """Parameters under the regime of `draw`."""
        raise NotImplementedError

    def setting(self, draw: Draw) -> Any:
        return {**self.variants, **self.wide}[draw.variant]

    def tokens(self, draw: Draw, config: Any, random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        return random.integers(0, config.vocab_size, shape)

    def random_state(self, draw: Draw, inputs: Inputs) -> Arrays:
        random = draw.generator("state")
        return {name: random.normal(size=a.shape).astype(a.dtype) for name, a in inputs.state.items()}

    def flip(self, setting: Any, inputs: Inputs, time: int) -> Inputs:
        tokens = inputs.arrays["tokens"].copy()
        tokens[:, time] = (tokens[:, time] + setting.vocab_size // 2) % setting.vocab_size
        return inputs.replace(arrays={"tokens": tokens})

    def fresh_state(self, setting: Config, params: Arrays, batch: int, length: int, dtype: str) -> Arrays:
        return initial_state(setting, params, batch, length, dtype)

    def spoil(self, draw: Draw, inputs: Inputs, where: np.ndarray) -> Inputs:
        tokens = inputs.arrays["tokens"]
        if tokens.dtype.kind not in "iu":
            return inputs.replace(arrays={"tokens": np.where(where[..., None], np.asarray(np.nan, tokens.dtype), tokens)})
        other = self.tokens(draw, self.setting(draw), draw.generator("garbage"), where.shape)
        return inputs.replace(arrays={"tokens": np.where(where, other, tokens)})

    def reference(self, setting: Config, inputs: Inputs, form: str, dtype: str = "float64", rounded: Any = None) -> Output:
        complex_step = any(a.dtype.kind == "c" for group in self.floats(setting, inputs).values() for a in group.values())
        model = create(setting, inputs.params, dtype=dtype)
        if rounded is not None:
            model.rounded = rounded
        state = {n: a if a.dtype.kind in "ic" else a.astype(DTYPES[dtype]) for n, a in inputs.state.items()}
        dropout, noise = (None if drawn is None else [a.astype(DTYPES[dtype]) for a in drawn] for drawn in (inputs.dropout, inputs.noise))
        tokens = inputs.arrays["tokens"]
        if tokens.dtype.kind not in "iuc":
            tokens = tokens.astype(DTYPES[dtype])
        read = (tokens, state if inputs.state_given else None, inputs.reset, inputs.valid)
        # NaN in a padded frame never reaches a result, but NumPy says that it met one
        with np.errstate(invalid="ignore" if complex_step else None), patched(() if rounded is None else self.inexact):
            return model.forward(*read, form=form, chunk_size=self.chunk_size, dropout=dropout, noise=noise)  # pyright: ignore[reportArgumentType]


class OpCase(Case):
    """One op. Its arrays are its own arguments, [B, T, …]; those that all tokens share are its params; the state is `initial_state`, or its
    parts `initial_state.name`."""

    level, subject, realised = "op", OpSubject, False
    op: str
    module: Any  # the spec's
    for_kernels = False  # judged by itself only where it may have a kernel; elsewhere inside its models
    narrow: tuple[str, ...] = ("x",)  # arguments in the compute dtype; the others are in the state dtype
    states: tuple[str, ...] = ("initial_state",)
    # For implementations that round before products: how often a term of o, of a state's gradient or of an argument's meets a rounding,
    # or one of a final state, "final " and its name.
    rounds: Mapping[str, int] = {}
    always_rounds = False  # so do plain operations, by a framework's own fused attention

    def rounding(self, draw: Draw) -> Mapping[str, int]:
        """`rounds` of the variant of `draw`."""
        return self.rounds

    def setting(self, draw: Draw) -> dict[str, Any]:
        return dict(self.variants[draw.variant])

    def fresh_state(self, setting: Any, params: Arrays, batch: int, length: int, dtype: str) -> Arrays:
        return {"initial_state": np.zeros((batch, self.width), DTYPES[state_dtype(dtype)])}

    width = 5

    def random_state(self, draw: Draw, inputs: Inputs) -> Arrays:
        old = inputs.state["initial_state"]
        return {"initial_state": draw.generator("state").normal(size=old.shape).astype(old.dtype)}

    def cast(self, arrays: Arrays, dtype: str) -> Arrays:
        """Arguments as an implementation gets them."""
        return {
            name: a.astype(DTYPES[dtype]) if name in self.narrow else numerics.representable(a, state_dtype(dtype))
            for name, a in arrays.items()
        }

    def spoil(self, draw: Draw, inputs: Inputs, where: np.ndarray) -> Inputs:
        nan = {
            name: np.where(where.reshape(where.shape + (1,) * (a.ndim - 2)), np.asarray(np.nan, a.dtype), a)
            for name, a in inputs.arrays.items()
        }
        return inputs.replace(arrays=nan)

    def reference(self, setting: dict[str, Any], inputs: Inputs, form: str, dtype: str = "float64", rounded: Any = None) -> Output:
        def wide(a: np.ndarray) -> np.ndarray:
            return a if a.dtype.kind in "ci" else a.astype(DTYPES[dtype])

        arrays = {name: wide(a) for name, a in {**inputs.arrays, **inputs.params, **inputs.state}.items()}
        state = [arrays.pop(name) for name in self.states]
        with np.errstate(invalid="ignore"):  # NaN where a token is not valid
            o, last = getattr(self.module, form)(
                **arrays, initial_state=tuple(state) if len(state) > 1 else state[0], reset=inputs.reset, valid=inputs.valid, **setting
            )
        return o, dict(zip(self.states, last if len(state) > 1 else (last,), strict=True))

    def terms(self, inputs: Inputs) -> Inputs:
        """Inputs on which the op yields the sum of the absolute values of its terms."""
        raise NotImplementedError

    def absolute(self, setting: dict[str, Any], inputs: Inputs, form: str) -> Output:
        """The sums of the absolute values of the terms of each output and state."""
        return self.reference(setting, self.terms(inputs), form)

    def steepest(self, inputs: Inputs) -> Inputs:
        """Inputs on which the Jacobian of `steep` bounds, up to a factor of two, the terms of the op's gradients."""
        raise NotImplementedError

    def steep(self, setting: dict[str, Any], inputs: Inputs, form: str, dtype: str = "float64", rounded: Any = None) -> Output:
        """The op itself, or, where terms of its gradients cancel, something else in which they add up."""
        return self.reference(setting, inputs, form, dtype, rounded)
