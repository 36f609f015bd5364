"""What every architecture's contract is made of: configs, parameters, states, and the legend of shapes.

Legend: B batch, T time, D model width, C chunk, F frame width, V vocabulary. Activations are `[B, T, …]`, weights `[out, in]`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_type_hints

import ml_dtypes
import numpy as np

from unisono_spec.contract.errors import InputError, nearest, shown
from unisono_spec.contract.initial import Initial
from unisono_spec.contract.memory import check_fits
from unisono_spec.contract.plain import check_integer, typed

DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

Arrays = dict[str, np.ndarray]


def state_dtype(dtype: str) -> str:
    """Dtype of float states and accumulators under compute dtype `dtype`: float32 or wider."""
    return "float64" if check_dtype(dtype) == "float64" else "float32"


def check_dtype(dtype: object) -> str:
    """The name of a dtype that models compute in or hold: a name, or what NumPy, JAX or torch call it."""
    dtype = _name(dtype)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"dtype: {shown(dtype)} is not supported; {nearest(dtype, DTYPES)}")
    return dtype


def _name(dtype: object) -> object:
    """Of what a framework calls a dtype; anything else as it is."""
    if type(dtype).__module__ == "torch":
        return str(dtype).removeprefix("torch.")
    if isinstance(dtype, (np.dtype, type)):  # JAX's are types
        with contextlib.suppress(TypeError, ValueError):
            return np.dtype(dtype).name
    return dtype


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter: its shape (torch layout), how it is drawn, whether AdamW decays it, and whether gradients train it at all.

    What is not `trainable` is a buffer that training updates by a rule of its own: saved with the parameters, not counted.
    """

    shape: tuple[int, ...]
    initial: Initial
    weight_decay: bool = False
    trainable: bool = True


ANY = -1  # the size of a capacity axis before a capacity is known


@dataclasses.dataclass(frozen=True)
class State:
    """One named state array. `shape` follows the leading batch axis. Floats are float32 or wider, integers int32.

    It starts at zero, or as a copy of the parameter named `initial` in each row.
    """

    shape: tuple[int, ...]
    integer: bool = False
    initial: str | None = None


MAX_SIZE = 2**31 - 1  # of any integer in a config
_TINY, _HUGE = (float(n) for n in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))  # beyond, rooms in float32 read 0 and ∞
# what `params()`, `states()` and the configs themselves count up to: beyond any model, and listed in a moment
_MOST = {"n_layers": 4096, "d_state": 65536, "n_scales": 4096}


_hints = functools.cache(get_type_hints)  # which evaluates texts, and takes a millisecond


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of all model configs: frozen, typed, validated when made, plain JSON values only."""

    arch: ClassVar[str]
    # what of the weights a training's log follows: the end of a parameter's name → "decay", "gate" (both logits) or "load"
    gauges: ClassVar[Mapping[str, str]] = {}

    if TYPE_CHECKING:  # fields of every config, each with a default of its own
        d_model: int = 1  # D
        n_layers: int = 1
        vocab_size: int = 1  # V
        dropout: float = 0.0  # of each residual update, in training only

    # what holds unless a config has a field of that name
    frame_size = 0  # F, where inputs are frames
    norm_eps = 1e-6  # ε of every RMSNorm
    balance_rate = 0.0  # how fast a noisy router's balance bias follows the banks' load
    tie_head = False  # whether the head's weight is the embedding's

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            name = f"{self.arch}.{field.name}"
            value = typed(getattr(self, field.name), hints[field.name], name)
            if isinstance(value, float) and value and not _TINY <= abs(value) <= _HUGE:
                what = "beyond float32's range" if math.isfinite(value) else "not finite"
                raise InputError(f"{name}: {value} is {what}; give a number of size {_TINY:.2g} to {_HUGE:.2g}")
            if isinstance(value, int) and abs(value) > (most := _MOST.get(field.name, MAX_SIZE)):
                raise InputError(f"{name}: {value} is out of bounds; use an integer ≤ {most}")
            object.__setattr__(self, field.name, value)
        self.at_least(1, "d_model", "vocab_size")
        self.at_least(0, "n_layers")
        if not 0 <= self.dropout < 1:
            self.fail("dropout", "use a number in [0, 1)")
        self.validate()

    def validate(self) -> None:
        """Raise InputError where two fields contradict each other or a number is out of range."""

    def params(self) -> dict[str, Param]:
        """Every parameter, in order."""
        raise NotImplementedError

    def states(self, capacity: int | None = None) -> dict[str, State]:
        """Every state array. Only softmax attention needs `capacity`, the most tokens its cache can hold; without it, that axis is ANY."""
        raise NotImplementedError

    @property
    def n_updates(self) -> int:
        """How many residual updates dropout multiplies: the length of `forward`'s `dropout`."""
        return self.n_layers

    @property
    def noise_widths(self) -> tuple[int, ...]:
        """Widths of what training draws for a noisy router, one a layer: the arrays [B, T, width] of `forward`'s `noise`."""
        return ()

    @property
    def routers(self) -> tuple[str, ...]:
        """Names that each noisy router's `balance_bias` and `balance_load` begin with, in the order of `forward`'s `loads`."""
        return ()

    @property
    def reads_frames(self) -> bool:
        """Whether inputs are real frames `[B, T, F]` instead of token ids `[B, T]`."""
        return False

    @property
    def predicts(self) -> Literal["categorical", "bernoulli", "gaussian"]:
        """The distribution of the next input whose parameters the outputs are; gaussian: F means, then F log variances."""
        return "categorical"

    @property
    def output_size(self) -> int:
        """Width of the outputs: V logits, F Bernoulli logits, or F means and F log variances."""
        return {"categorical": self.vocab_size, "bernoulli": self.frame_size, "gaussian": 2 * self.frame_size}[self.predicts]

    @property
    def code_size(self) -> int:
        """Width of the code that the verbs `code` and `readout` know; 0 where a model has none."""
        return 0

    @property
    def longest(self) -> int | None:
        """The most tokens that a sequence can have, where positions are learned."""
        return None

    @property
    def starts(self) -> int:
        """At how many positions, from 0, training may begin a sequence."""
        return 1

    @property
    def precomputable(self) -> bool:
        """Whether all that is read over time is a function of the data alone, and can be computed once for all epochs."""
        return False

    @property
    def no_graph(self) -> str:
        """Why no ONNX graph has this config, field first and remedy last; empty where one has."""
        return ""

    def fail(self, field: str, remedy: str) -> None:
        raise InputError(f"{self.arch}.{field}: {shown(getattr(self, field))} is not valid here; {remedy}")

    def at_least(self, minimum: int, *fields: str) -> None:
        for field in fields:
            if getattr(self, field) < minimum:
                self.fail(field, f"use an integer ≥ {minimum}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values; an unknown field is an error that names the nearest valid one."""
        if not isinstance(values, Mapping):
            raise InputError(f"{cls.arch}: {shown(values)} has type {type(values).__name__}; give names with values")
        names = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in names:
                raise InputError(f"{cls.arch}.{shown(name).strip(chr(39))}: no such field; {nearest(name, names)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> Self:
        return type(self).from_dict({**self.to_dict(), **changes})


def declared_states(config: Config, batch: int, capacity: int | None = None, dtype: str = "float32") -> dict[str, State]:
    """The states that `batch` sequences need under compute dtype `dtype`; InputError where there is no room for them."""
    check_integer("batch", batch, 0)
    if capacity is not None:
        check_integer("capacity", capacity, 1, MAX_SIZE)
    states = config.states(capacity)
    if any(ANY in s.shape for s in states.values()):
        raise InputError("capacity: softmax attention caches every token; give init_state(batch, capacity) the most tokens it shall read")
    numbers = batch * sum(math.prod(s.shape) for s in states.values())
    check_fits(numbers * DTYPES[state_dtype(dtype)].itemsize, f"state of {batch} sequences", "use a smaller batch, capacity or model")
    return states


def zero_state(config: Config, batch: int, capacity: int | None = None, dtype: str = "float32") -> Arrays:
    """The state before the first token of `batch` sequences, under compute dtype `dtype`."""
    states, floats = declared_states(config, batch, capacity, dtype), DTYPES[state_dtype(dtype)]
    return {name: np.zeros((batch, *s.shape), np.int32 if s.integer else floats) for name, s in states.items()}


def initial_state(
    config: Config, params: Mapping[str, np.ndarray], batch: int, capacity: int | None = None, dtype: str = "float32"
) -> Arrays:
    """`zero_state`, with learned initial states copied from `params`."""
    state = zero_state(config, batch, capacity, dtype)
    for name, s in config.states(capacity).items():
        if s.initial is not None:
            p = params[s.initial]
            state[name] = np.repeat(p[None] if p.dtype.kind == "c" else p[None].astype(state[name].dtype), batch, 0)
    return state
