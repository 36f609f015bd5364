"""Single layers: which mixer of which one-layer model each public layer is, with the checks of what it is given.

A layer's parameters and states carry the names that they have inside a model, below the mixer's own.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

import numpy as np

from unisono_spec.contract.base import ANY, MAX_SIZE, Arrays, Config, Param, State
from unisono_spec.contract.checks import Array, check_array, dtype_kind
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.errors import InputError, nearest, shown
from unisono_spec.contract.infinityformer import InfinityFormerConfig
from unisono_spec.contract.initial import initialize
from unisono_spec.contract.lat import LATConfig
from unisono_spec.contract.mamba import MambaConfig
from unisono_spec.contract.maru import MARUConfig
from unisono_spec.contract.ordinary import check_ordinary
from unisono_spec.contract.plain import check_integer
from unisono_spec.contract.s4d import S4DConfig

Positions = Literal["none", "rope"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A mixer by itself: the parameters below `prefix` of a model with this config, and those of its states that it reads."""

    config: Config
    prefix: str
    states_read: tuple[str, ...]  # by their names below `layers.0.`, or those of the whole model

    @property
    def width(self) -> int:
        """Of what it is given, the last axis."""
        return self.config.d_model

    def params(self) -> dict[str, Param]:
        """Every parameter, in order."""
        start = f"{self.prefix}."
        return {name.removeprefix(start): p for name, p in self.config.params().items() if name.startswith(start)}

    def init_params(self, seed: int) -> Arrays:
        """Initial parameters in float64, as in a model of one layer. 0 ≤ seed < 2⁶⁴."""
        check_integer("seed", seed, 0, 2**64 - 1)
        return {name: initialize(p.initial, p.shape, seed, f"{self.prefix}.{name}") for name, p in self.params().items()}

    def states(self, capacity: int | None = None) -> dict[str, State]:
        """Every state array; a learned start is named as `params` names it. capacity: the most tokens that softmax attention caches."""
        declared = self.config.states(capacity)
        out = {name: declared[f"layers.0.{name}"] if f"layers.0.{name}" in declared else declared[name] for name in self.states_read}
        start = f"{self.prefix}."
        return {name: dataclasses.replace(s, initial=s.initial and s.initial.removeprefix(start)) for name, s in out.items()}

    def starting(self, batch: int, capacity: int | None) -> dict[str, State]:
        """The states of `batch` sequences; InputError where a size is missing."""
        check_integer("batch", batch, 0)
        if capacity is not None:
            check_integer("capacity", capacity, 1, MAX_SIZE)
        states = self.states(capacity)
        if any(ANY in s.shape for s in states.values()):
            raise InputError("capacity: softmax attention caches every token; give init_state(batch, capacity) the most that it shall read")
        return states

    def check(
        self,
        x: Any,
        state: Mapping[str, Any] | None,
        reset: Any,
        valid: Any,
        cu_seqlens: Any = None,
        *,
        one: bool = False,
        array: Array = None,
    ) -> None:
        """Raise InputError unless types, shapes and dtypes fit.

        x: [B, T, D] floats; reset, valid: [B, T] booleans or None. one: of one token, without T, and with a state.
        cu_seqlens: integers that rise from 0 to T, with B = 1 and without reset. array: what arrays must be.
        """
        for name, given in (("x", x), ("reset", reset), ("valid", valid)):
            if given is not None or name == "x":
                check_array(name, given, array)
        shape, lead = tuple(x.shape), ("B",) if one else ("B", "T")
        if len(shape) != len(lead) + 1 or shape[-1] != self.width or dtype_kind(x) != "f" or "complex" in str(x.dtype):
            wanted = f"[{', '.join(lead)}, {self.width}] floats"
            raise InputError(f"x: shape {shape} of {x.dtype}, expected {wanted}; reshape or convert it")
        if not one and not shape[1]:
            raise InputError("x: T is 0; give at least one token")
        for name, mask in (("reset", reset), ("valid", valid)):
            if mask is not None and (tuple(mask.shape) != shape[:-1] or dtype_kind(mask) != "b"):
                raise InputError(
                    f"{name}: shape {tuple(mask.shape)} of {mask.dtype}, expected {shape[:-1]} booleans; pass a mask as long as x"
                )
        if cu_seqlens is not None and (reset is not None or shape[0] != 1):
            raise InputError("cu_seqlens: it says where sequences begin in one row; give x as [1, T, D], and no reset beside it")
        if state is None and one:
            raise InputError("state: None; one token needs the state before it, start from init_state(batch)")
        if state is not None:
            self._check_state(state, shape[0], array)

    def _check_state(self, state: Mapping[str, Any], batch: int, array: Array) -> None:
        expected = self.states()
        if not isinstance(state, Mapping):
            raise InputError(f"state: {shown(state)} has type {type(state).__name__}; give arrays by name, a dict")
        if set(state) != set(expected):
            raise InputError(f"state: {sorted(map(str, state))}, expected {sorted(expected)}; start from init_state(batch)")
        for name, s in expected.items():
            check_array(f"state: {name}", state[name], array)
            shape, dtype = tuple(state[name].shape), str(state[name].dtype).removeprefix("torch.")
            fits = len(shape) == len(s.shape) + 1 and all(m in (n, ANY) for n, m in zip(shape[1:], s.shape, strict=True))
            if not fits or shape[0] != batch:
                wanted = (batch, *("capacity" if n == ANY else n for n in s.shape))
                raise InputError(f"state: {name} has shape {shape}, expected {wanted}; start from init_state(batch)")
            if dtype not in (("int32", "int64") if s.integer else ("float32", "float64")):
                wanted = "int32" if s.integer else "float32 or wider"
                raise InputError(f"state: {name} has dtype {dtype}, expected {wanted}; start from init_state(batch)")


def check_options(init: Callable[..., None], given: Iterable[str], known: Collection[str]) -> None:
    """Raise InputError where an option that is given is none of those `known` to all layers. init: what else the layer takes."""
    for name in given:
        if name not in known:  # also where a subclass has it and passes it on: nobody would read it
            names = {*inspect.signature(init).parameters, *known} - {"self", "options"}
            raise InputError(f"{name}: no argument of this layer; {nearest(name, names - {name})}")


def starts(cu_seqlens: Any, length: int) -> np.ndarray:
    """The `reset` [1, T] of sequences that lie one after the other in one row, from where each begins, [n + 1] with T last."""
    check_ordinary("cu_seqlens", cu_seqlens)
    ends = np.asarray(cu_seqlens)
    if ends.ndim != 1 or ends.dtype.kind not in "iu" or len(ends) < 2 or ends[0] != 0 or ends[-1] != length or (np.diff(ends) < 0).any():
        raise InputError(f"cu_seqlens: {shown(ends.tolist())}; give integers that rise from 0 to T={length}, one more than sequences")
    reset = np.zeros((1, length), bool)
    reset[0, ends[:-1][ends[:-1] < length]] = True
    return reset


def attention(kind: str, d_model: int, n_heads: int, positions: Positions, rope_base: float, bias: bool, **more: Any) -> Layer:
    """Heads around linear, window or softmax attention; `more`: fields of LATConfig."""
    check_integer("n_heads", n_heads, 1, MAX_SIZE)
    check_integer("d_model", d_model, 1, MAX_SIZE)
    if d_model % n_heads:
        raise InputError(f"n_heads: {n_heads} must divide d_model={d_model}; each head is d_model / n_heads wide")
    width = d_model // n_heads
    sizes = {"qk_width": width, **{name: value for name, value in more.items() if value is not None}}
    config = LATConfig(
        d_model=d_model, n_layers=1, head_width=width, attention=kind, positions=positions, rope_base=rope_base, bias=bias, **sizes
    )
    return Layer(config, "layers.0.mixer", ("position", *({"linear": ("S", "z")}.get(kind, ("k", "v")))))


def gated_convolution(d_model: int, width: int, mult: int, bias: bool) -> Layer:
    config = LATConfig(d_model=d_model, n_layers=1, head_width=d_model, attention="conv", conv_width=width, conv_mult=mult, bias=bias)
    return Layer(config, "layers.0.mixer", ("conv",))


def multiscale(d_model: int, n_heads: int, **fields: Any) -> Layer:
    """`fields`: of InfinityFormerConfig."""
    return Layer(InfinityFormerConfig(d_model=d_model, n_layers=1, n_heads=n_heads, **fields), "layers.0.mixer", ("position", "S", "z"))


def selective_ssm(d_model: int, **fields: Any) -> Layer:
    """`fields`: of MambaConfig."""
    return Layer(MambaConfig(d_model=d_model, n_layers=1, **fields), "layers.0.mixer", ("conv", "ssm"))


def s4d(d_model: int, d_state: int) -> Layer:
    return Layer(S4DConfig(d_model=d_model, n_layers=1, d_state=d_state), "layers.0.mixer", ("ssm",))


def mom_gru(d_model: int, **fields: Any) -> Layer:
    """`fields`: of MARUConfig."""
    return Layer(MARUConfig(d_model=d_model, **fields), "layers.0.cell", ("h", "memory"))


def retention(d_model: int, **fields: Any) -> Layer:
    """The adaptive scheme's sum; `fields`: of CRAMConfig."""
    return Layer(CRAMConfig(scheme="adaptive", d_model=d_model, n_layers=1, **fields), "layers.0.mixer", ("position", "xi"))


def fixed_retention(d_model: int, decay: float) -> Layer:
    """The fixed scheme's sum, of what is given to it instead of codes."""
    return Layer(CRAMConfig(codes="embedding", d_model=d_model, n_layers=1, decay=decay), "layers.0.mixer", ("xi",))


def short_convolution(d_model: int, width: int, bias: bool) -> Layer:
    """A causal depthwise convolution: that of a Mamba block as wide as the model."""
    config = MambaConfig(d_model=d_model, n_layers=1, expand=1, conv_width=width, conv_bias=bias)
    return Layer(config, "layers.0.mixer.conv1d", ("conv",))
