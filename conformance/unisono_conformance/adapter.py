"""What an implementation answers to, so that the court can judge it. The boundary is NumPy arrays (bfloat16 through ml_dtypes).

An adapter answers on two levels. `op`: pure functions, where every input has a gradient and any values can be asked for.
`build`: whole models. Parameters always flow from the court to the implementation, so nobody's random numbers are compared.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from unisono_spec.contract import ARCHITECTURES, Config
from unisono_spec.contract.errors import InputError, nearest

Arrays = dict[str, np.ndarray]
OpState = np.ndarray | tuple[np.ndarray, ...]

# The adapters that live here; anybody else's is named `package.module:factory`.
HOUSE = ("numpy", "jax", "torch", "onnx")


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What an implementation claims. Each claim must be met by at least one example, or the session fails.

    models, ops: names, as in `unisono_spec`; forms: of `forward` and of ops; implementations: kernels that can run here.
    narrower: of an implementation that serves less than all, which models and ops, and each one's dtypes.
    rounds: implementations whose ops round to the dtype, before a product, what `OpCase.rounds` lists, and may give o in it.
    """

    models: tuple[str, ...] = ARCHITECTURES
    ops: tuple[str, ...] = ("decayed_sum", "weighted_sum")
    dtypes: tuple[str, ...] = ("float64", "float32")
    forms: tuple[str, ...] = ("recurrent", "parallel")
    devices: tuple[str, ...] = ("cpu",)
    implementations: tuple[str, ...] = ("plain",)
    step: bool = True
    gradient_forms: tuple[str, ...] = ("recurrent", "parallel")
    dropout: bool = True
    compiled: bool = False
    exported: bool = False  # models are exported graphs, with `others` to compare them with
    empty_batch: bool = True
    longest: int | None = None  # tokens of one sequence that it can read; None: as many as the profile asks for
    narrower: Mapping[str, Mapping[str, tuple[str, ...]]] = dataclasses.field(default_factory=dict)
    rounds: tuple[str, ...] = ()
    spec: bool = False  # whether it is the spec itself, which what it says is held to
    dear: tuple[str, ...] = ()  # implementations that compile for each shape, or are interpreted: ci tries fewer shapes

    @property
    def levels(self) -> tuple[str, ...]:
        return (*(("model",) if self.models else ()), *(("op",) if self.ops else ()))


# Derivatives [n] along n directions: "params", "inputs" or "state", and the directions [n, …] of those of its arrays that move together.
Slopes = Callable[[str, Arrays], np.ndarray]


class NoGradient(Exception):
    """An array that must have a gradient has none, or one of another shape, or one that is not finite."""


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Gradients by name: of parameters, of float inputs (frames; an op's x, s), of the float arrays of the initial state.

    o, last: the outputs and the final state that were computed on the way, while gradients were recorded. slopes: in place of the arrays,
    where each derivative costs a forward pass.
    """

    params: Arrays
    inputs: Arrays
    state: Arrays
    o: np.ndarray
    last: Arrays
    slopes: Slopes | None = None

    def along(self, kind: str, directions: Arrays) -> np.ndarray:
        """See `Slopes`. Raises NoGradient."""
        if self.slopes is not None:
            return self.slopes(kind, directions)
        total, group = np.zeros(len(next(iter(directions.values())))), getattr(self, kind)
        for name, v in directions.items():
            if name not in group:
                raise NoGradient(f"gradient of {kind} {name} is missing; found {sorted(group)}")
            g = np.asarray(group[name]).astype(np.float64)
            if g.shape != v.shape[1:]:
                raise NoGradient(f"gradient of {kind} {name} has shape {g.shape}, expected {v.shape[1:]}")
            if not np.isfinite(g).all():
                raise NoGradient(f"gradient of {kind} {name} is not finite")
            total += v.reshape(len(v), -1) @ g.reshape(-1)
        return total


class Model(Protocol):
    """A model that holds its parameters. All arrays are NumPy's."""

    def forward(
        self,
        tokens: np.ndarray,
        state: Arrays | None = None,
        reset: np.ndarray | None = None,
        valid: np.ndarray | None = None,
        form: str = "parallel",
        chunk_size: int = 64,
        dropout: Sequence[np.ndarray] | None = None,
        noise: Sequence[np.ndarray] | None = None,
    ) -> tuple[np.ndarray, Arrays]:
        """tokens [B, T] (frames [B, T, F]) → logits [B, T, V] in the compute dtype, the state after the last token.

        `noise` is passed to models with a noisy router only.
        """
        ...

    def step(
        self, token: np.ndarray, state: Arrays, reset: np.ndarray | None = None, valid: np.ndarray | None = None
    ) -> tuple[np.ndarray, Arrays]:
        """token [B] → logits [B, V], the state after it."""
        ...

    def vjp(
        self,
        tokens: np.ndarray,
        dlogits: np.ndarray,
        dstate: Arrays,
        state: Arrays | None = None,
        reset: np.ndarray | None = None,
        valid: np.ndarray | None = None,
        form: str = "parallel",
        chunk_size: int = 64,
        dropout: Sequence[np.ndarray] | None = None,
        noise: Sequence[np.ndarray] | None = None,
    ) -> Gradients:
        """Gradients of Σ dlogits·logits + Σ dstate·(final state). Frames have a gradient under the name `tokens`, ids none;
        a state that is not given has none either."""
        ...

    def params(self) -> Arrays:
        """The parameters that the model holds, by their contract names, in the contract's layout."""
        ...

    def compiled(self) -> Model:
        """The same model with its forward pass compiled (declared as `compiled`)."""
        ...

    def others(self) -> Mapping[str, Model]:
        """What must equal this graph: the model that it was exported from, other readers of its file (declared as `exported`)."""
        ...


class Adapter(Protocol):
    """An implementation before the court. `warnings`: pytest filter lines for warnings that its framework, not it, emits.

    One that holds parameters in fewer bits than their dtype's has `held(config, params, implementation) → params`, what it computes with:
    it is judged on these.
    """

    name: str
    capabilities: Capabilities
    known_gaps: Path | None  # a TOML file that the implementation owns; see `report.gaps`
    warnings: tuple[str, ...]

    def build(self, config: Config, params: Arrays, dtype: str, device: str, implementation: str) -> Model:
        """A model that computes in `dtype`. `params` are float64 for float64, else float32."""
        ...

    def op(
        self, name: str, form: str, arrays: Arrays, settings: Mapping[str, Any], device: str, implementation: str
    ) -> tuple[np.ndarray, OpState]:
        """Call `form` of op `name` with its own argument names: arrays (x, s, initial_state or state, reset, valid), settings.

        Arrays called `initial_state.S`, `initial_state.z` are the parts of one argument, a tuple, and `p.hidden.weight` is a parameter of
        the mapping `p`: see `grouped`. "parallel" of `mom_gru` is what rooms call `hoisted`.
        Returns (o, final_state). The compute dtype is that of x, or q, k and v; s and states are float32, or float64 when x is.
        """
        ...

    def op_vjp(
        self,
        name: str,
        form: str,
        arrays: Arrays,
        settings: Mapping[str, Any],
        do: np.ndarray,
        dstate: OpState,
        device: str,
        implementation: str,
    ) -> tuple[np.ndarray, OpState, Arrays | Slopes]:
        """(o, final_state, gradients): gradients of Σ do·o + Σ dstate·final_state by argument name: x, s where the op has it,
        initial_state (or its parts); or what gives derivatives along directions of them."""
        ...


@dataclasses.dataclass(frozen=True)
class Target:
    """What is judged: an implementation, and how it is asked to run."""

    adapter: Adapter
    dtype: str
    form: str
    device: str = "cpu"
    implementation: str = "plain"
    long_length: int = 2000  # of P10
    exhaustive: bool = False  # every coordinate of every gradient
    impl: str = ""  # what the adapter was asked for by

    @property
    def dear(self) -> bool:
        return not self.exhaustive and self.implementation in self.adapter.capabilities.dear


def grouped(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, in which all that are called `name.part` are one tuple, in their order, and all `p.name` a cell's parameters."""
    out: dict[str, Any] = {}
    for name, a in arrays.items():
        whole, _, part = name.partition(".")
        if whole == "p":
            out.setdefault(whole, {})[part] = a
        else:
            out[whole] = (*out.get(whole, ()), a) if part else a
    return out


def flatten(state: Any) -> tuple:
    """The arrays of an op's state, which is one or a tuple."""
    return state if isinstance(state, tuple) else (state,)


def load(name: str) -> Adapter:
    """The adapter `name`: one of HOUSE, or `package.module:factory`, a callable without arguments.

    Raises InputError where the name is unknown or its module, or the framework behind it, cannot be imported.
    """
    if ":" not in name and name not in HOUSE:
        raise InputError(f"impl: {name!r} is unknown; {nearest(name, HOUSE)}, or package.module:factory")
    module, _, factory = (f"unisono_conformance.adapters.{name}:make" if name in HOUSE else name).partition(":")
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise InputError(f"impl: {name!r} cannot be loaded ({error}); install what it needs, or correct the name") from error
    made: Any = make() if callable(make) else make
    missing = [part for part in ("name", "capabilities", "known_gaps", "warnings", "build", "op", "op_vjp") if not hasattr(made, part)]
    if missing:
        raise InputError(f"impl: {name!r} gives a {type(made).__name__} without {', '.join(missing)}; give what makes an Adapter")
    return made
