"""An implementation as one case asks it: what models and ops are called by, and what their answers are held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from unisono_spec.contract import DTYPES, state_dtype

from unisono_conformance.adapter import Gradients, Model, OpState, Target, flatten
from unisono_conformance.cases.inputs import Arrays, Inputs
from unisono_conformance.judging import numerics

if TYPE_CHECKING:
    from unisono_conformance.cases.base import ModelCase, OpCase, Output
    from unisono_conformance.cases.draw import Draw

# calls the implementation; to die is an answer too
Ask = Callable[..., Any]


class Subject:
    """What a draw is tried on. output: its name; elementary: so cheap that every length, split and coordinate is tried."""

    output: str
    elementary: bool

    def __init__(self, target: Target, draw: Draw, setting: Any, ask: Ask) -> None:
        self.target, self.draw, self.setting, self.ask = target, draw, setting, ask
        self.wide = DTYPES[state_dtype(target.dtype)]

    def model(self, params: Arrays) -> Model:
        """Of a model: one that holds `params`."""
        raise NotImplementedError

    @property
    def many_shapes(self) -> bool:
        """Whether shapes cost little, or time is no matter."""
        return self.target.exhaustive or (self.elementary and not self.target.dear)

    @property
    def many_coordinates(self) -> bool:
        return self.target.exhaustive or self.elementary

    def given(self, inputs: Inputs) -> Inputs:
        """`inputs` as the implementation gets them."""
        return inputs

    def forward(self, inputs: Inputs, form: str | None = None, chunk_size: int | None = None, model: Model | None = None) -> Output:
        """By the target's form and the draw's chunk size, where none is named."""
        raise NotImplementedError

    def step(self, inputs: Inputs, time: int, state: Arrays) -> Output:
        raise NotImplementedError

    def vjp(self, inputs: Inputs, do: np.ndarray, dstate: Arrays) -> Gradients:
        raise NotImplementedError

    def again(self, inputs: Inputs) -> dict[str, Output]:
        """What must have the bits of `forward(inputs)`, by what it is."""
        return {"the same call twice": self.forward(inputs)}

    def forward_rows(self, inputs: Inputs) -> Output:
        """`forward` of any number of rows, as many at a time as the draw has: the shape that everything else uses."""
        size, found = self.draw.batch, []
        for start in range(0, inputs.batch, size):
            rows = [min(row, inputs.batch - 1) for row in range(start, start + size)]
            o, last = self.forward(inputs.rows(rows))
            keep = min(size, inputs.batch - start)
            found.append((o[:keep], {name: a[:keep] for name, a in last.items()}))
        return np.concatenate([o for o, _ in found]), {n: np.concatenate([last[n] for _, last in found]) for n in found[0][1]}

    def fresh(self, inputs: Inputs) -> Inputs:
        """`inputs` without a state, where there may be none."""
        raise NotImplementedError

    def training(self) -> dict[str, Any]:
        """What training draws, in the fields of `Inputs`."""
        raise NotImplementedError

    def counts(self, inputs: Inputs) -> np.ndarray | None:
        """Of which tokens [B, T] an output is judged; None: of all."""
        raise NotImplementedError

    def output_dtypes(self) -> tuple[Any, ...]:
        """What an output may have, the first above all."""
        raise NotImplementedError

    def cotangent(self, do: np.ndarray, inputs: Inputs) -> np.ndarray:
        """A cotangent of outputs made of `do`: one that the implementation's dtype represents, and that asks of nothing but what counts."""
        raise NotImplementedError

    @property
    def rounds(self) -> Mapping[str, int]:
        """How often a term of the output ("o") and of gradients may be rounded before a product."""
        return {}

    def more_rounded(self, argument: str, length: int) -> float:
        """What that multiplies the budget of an argument's gradient by."""
        return 1.0


class ModelSubject(Subject):
    output, elementary = "logits", False

    def __init__(self, target: Target, case: ModelCase, draw: Draw, setting: Any, ask: Ask) -> None:
        super().__init__(target, draw, setting, ask)
        self.case = case
        self._models: dict[int, tuple[Arrays, Model]] = {}

    def model(self, params: Arrays) -> Model:
        """Built once for each set of parameters."""
        if id(params) not in self._models:
            self._models[id(params)] = (params, self.build(params))
        return self._models[id(params)][1]

    def given(self, inputs: Inputs) -> Inputs:
        held = getattr(self.target.adapter, "held", None)
        return inputs if held is None else inputs.replace(params=held(self.setting, inputs.params, self.target.implementation))

    def build(self, params: Arrays) -> Model:
        t = self.target
        held = {n: p.copy() for n, p in params.items()}
        return self.ask(t.adapter.build, self.setting, held, t.dtype, t.device, t.implementation)

    def forward(self, inputs: Inputs, form: str | None = None, chunk_size: int | None = None, model: Model | None = None) -> Output:
        model = model or self.model(inputs.params)
        more = _extras(inputs)
        return self.ask(
            model.forward, inputs.arrays["tokens"], *_read(inputs),
            form=form or self.target.form, chunk_size=chunk_size or self.draw.chunk_size, **more,
        )  # fmt: skip

    def step(self, inputs: Inputs, time: int, state: Arrays) -> Output:
        return self.ask(self.model(inputs.params).step, inputs.arrays["tokens"][:, time], state, *_marks(inputs, time).values())

    def vjp(self, inputs: Inputs, do: np.ndarray, dstate: Arrays) -> Gradients:
        more = {"form": self.target.form, "chunk_size": self.draw.chunk_size, **_extras(inputs)}
        return self.ask(self.model(inputs.params).vjp, inputs.arrays["tokens"], do, dstate, *_read(inputs), **more)

    def again(self, inputs: Inputs) -> dict[str, Output]:
        return {**super().again(inputs), "two models of the same parameters": self.forward(inputs, model=self.build(inputs.params))}

    def fresh(self, inputs: Inputs) -> Inputs:
        return inputs.replace(state_given=False)

    def training(self) -> dict[str, Any]:
        return self.case.training(self.draw, self.setting, self.target.dtype)

    def counts(self, inputs: Inputs) -> np.ndarray | None:
        return inputs.valid

    def output_dtypes(self) -> tuple[Any, ...]:
        return (DTYPES[self.target.dtype],)

    def cotangent(self, do: np.ndarray, inputs: Inputs) -> np.ndarray:
        do = do.astype(DTYPES[self.target.dtype])
        if inputs.valid is None:
            return do
        return np.where(inputs.valid.reshape(inputs.valid.shape + (1,) * (do.ndim - 2)), do, np.zeros((), do.dtype))


class OpSubject(Subject):
    output, elementary = "o", True

    def __init__(self, target: Target, case: OpCase, draw: Draw, setting: Any, ask: Ask) -> None:
        super().__init__(target, draw, setting, ask)
        self.case = case

    def forward(self, inputs: Inputs, form: str | None = None, chunk_size: int | None = None, model: Model | None = None) -> Output:
        form = form or self.target.form
        return self._call(form, self._arguments(inputs), self._chunks(form, chunk_size))

    def step(self, inputs: Inputs, time: int, state: Arrays) -> Output:
        token = {name: a[:, time] for name, a in inputs.arrays.items()}
        given = {name.removeprefix("initial_"): a for name, a in state.items()}  # `step` calls it `state`
        return self._call("step", {**token, **inputs.params, **given, **_present(_marks(inputs, time))}, {})

    def vjp(self, inputs: Inputs, do: np.ndarray, dstate: Arrays) -> Gradients:
        t, form = self.target, self.target.form
        last = [dstate.get(name, np.zeros_like(inputs.state[name])) for name in self.case.states]  # counters have none
        cotangents = do, tuple(last) if len(last) > 1 else last[0]
        settings = {**self.setting, **self._chunks(form, None)}
        arrays = self._arguments(inputs)
        o, final, g = self.ask(t.adapter.op_vjp, self.case.op, form, arrays, settings, *cotangents, t.device, t.implementation)
        if not isinstance(g, dict):
            return Gradients({}, {}, {}, o, self._named(final), g)
        groups = inputs.params, inputs.arrays, inputs.state
        of_params, of_inputs, of_state = ({n: a for n, a in g.items() if n in group} for group in groups)
        return Gradients(of_params, of_inputs, of_state, o, self._named(final))

    def _call(self, form: str, arrays: Arrays, more: dict[str, Any]) -> Output:
        t = self.target
        o, last = self.ask(t.adapter.op, self.case.op, form, arrays, {**self.setting, **more}, t.device, t.implementation)
        return o, self._named(last)

    def _chunks(self, form: str, chunk_size: int | None) -> dict[str, int]:
        return {"chunk_size": chunk_size or self.draw.chunk_size} if form == "parallel" else {}

    def _arguments(self, inputs: Inputs) -> Arrays:
        return {**inputs.arrays, **inputs.params, **inputs.state, **_present({"reset": inputs.reset, "valid": inputs.valid})}

    def _named(self, last: OpState) -> Arrays:
        return dict(zip(self.case.states, flatten(last), strict=True))

    def fresh(self, inputs: Inputs) -> Inputs:
        return inputs

    def training(self) -> dict[str, Any]:
        return {}

    def counts(self, inputs: Inputs) -> np.ndarray | None:
        return None

    def output_dtypes(self) -> tuple[Any, ...]:
        return (self.wide, DTYPES[self.target.dtype]) if self.rounds else (self.wide,)

    def cotangent(self, do: np.ndarray, inputs: Inputs) -> np.ndarray:
        do = do + 4 if self.draw.regime == "offset" else do
        return do.astype(DTYPES[self.target.dtype] if self.rounds else self.wide)

    @property
    def rounds(self) -> Mapping[str, int]:
        adapter = self.target.adapter  # none where a trial asks the spec alone
        may = adapter is not None and (self.case.always_rounds or self.target.implementation in adapter.capabilities.rounds)
        return self.case.rounding(self.draw) if may else {}

    def more_rounded(self, argument: str, length: int) -> float:
        if argument not in self.rounds:
            return 1.0
        own = int(argument in self.case.narrow)
        return numerics.widened(self.target.dtype, length, self.rounds[argument], own, gradient=True)


def _read(inputs: Inputs) -> tuple[Arrays | None, np.ndarray | None, np.ndarray | None]:
    return inputs.state if inputs.state_given else None, inputs.reset, inputs.valid


def _marks(inputs: Inputs, time: int) -> dict[str, np.ndarray | None]:
    return {n: None if m is None else m[:, time] for n, m in (("reset", inputs.reset), ("valid", inputs.valid))}


def _extras(inputs: Inputs) -> dict[str, Any]:
    """Of training. Models without a noisy router take no noise."""
    return {"dropout": inputs.dropout, **({} if inputs.noise is None else {"noise": inputs.noise})}


def _present(arrays: dict[str, np.ndarray | None]) -> Arrays:
    return {name: a for name, a in arrays.items() if a is not None}
