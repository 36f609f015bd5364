"""One example of one property: the implementation under judgement, its inputs, and the comparisons that can fail."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from unisono_spec.contract import DTYPES, state_dtype

from unisono_conformance import numerics, truth
from unisono_conformance.adapter import Adapter, Gradients, Model, OpState, parts
from unisono_conformance.cases import case as find_case
from unisono_conformance.cases.base import Case, OpCase, Output
from unisono_conformance.cases.draw import Draw
from unisono_conformance.cases.inputs import Arrays, Inputs


class Disagreement(AssertionError):
    """The implementation lacks a property."""


class Died(AssertionError):
    """The implementation raised an exception where it owed an answer."""


@dataclasses.dataclass(frozen=True)
class Bench:
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


class Trial:
    """`inputs` are those of the draw, from the state before the first token and unmarked."""

    def __init__(self, bench: Bench, draw: Draw, label: str, title: str) -> None:
        self.bench, self.draw, self.label, self.title = bench, draw, label, title
        self.case: Case = find_case(draw.case)
        self.setting = self.case.setting(draw)
        self.dtype = bench.dtype
        self.worst = 0.0  # share of the budget
        self._models: dict[int, tuple[Arrays, Model]] = {}

    @functools.cached_property
    def inputs(self) -> Inputs:
        return self.case.inputs(self.draw, self.dtype)

    @functools.cached_property
    def running(self) -> Inputs:
        """The inputs, from a state that a running sequence could have."""
        return self.inputs.replace(state=self.case.random_state(self.draw, self.inputs))

    @property
    def many_shapes(self) -> bool:
        """Whether shapes cost little, or time is no matter: ops then meet every length, split and chunk size."""
        return self.bench.exhaustive or (self.is_op and not self.bench.dear)

    @property
    def is_op(self) -> bool:
        return self.case.level == "op"

    def random(self, purpose: str) -> np.random.Generator:
        return self.draw.generator(purpose)

    # the implementation

    def model(self, params: Arrays) -> Model:
        """Built once for each set of parameters."""
        if id(params) not in self._models:
            self._models[id(params)] = (params, self.build(params))
        return self._models[id(params)][1]

    def build(self, params: Arrays) -> Model:
        b = self.bench
        held = {n: p.copy() for n, p in params.items()}
        return self.ask(b.adapter.build, self.setting, held, b.dtype, b.device, b.implementation)

    def forward(self, inputs: Inputs, form: str | None = None, chunk_size: int | None = None, model: Model | None = None) -> Output:
        form, chunk = form or self.bench.form, chunk_size or self.draw.chunk_size
        if self.is_op:
            more = {"chunk_size": chunk} if form == "parallel" else {}
            o, last = self._op(form, self._arguments(inputs), more)
            return o, self._named(last)
        model = model or self.model(inputs.params)
        read = (inputs.arrays["tokens"], self._state(inputs), inputs.reset, inputs.valid)
        return self.ask(model.forward, *read, form=form, chunk_size=chunk, **_drawn(inputs))

    def forward_rows(self, inputs: Inputs) -> Output:
        """`forward` of any number of rows, as many at a time as the draw has: the shape that everything else uses."""
        size, parts = self.draw.batch, []
        for start in range(0, inputs.batch, size):
            rows = [min(row, inputs.batch - 1) for row in range(start, start + size)]
            o, last = self.forward(inputs.rows(rows))
            keep = min(size, inputs.batch - start)
            parts.append((o[:keep], {name: a[:keep] for name, a in last.items()}))
        return np.concatenate([o for o, _ in parts]), {n: np.concatenate([last[n] for _, last in parts]) for n in parts[0][1]}

    def step(self, inputs: Inputs, time: int, state: Arrays) -> Output:
        marks = {n: None if m is None else m[:, time] for n, m in (("reset", inputs.reset), ("valid", inputs.valid))}
        token = {name: a[:, time] for name, a in inputs.arrays.items()}
        if self.is_op:
            # `step` calls it `state`
            given = {name.removeprefix("initial_"): a for name, a in state.items()}
            o, last = self._op("step", {**token, **inputs.params, **given, **_present(marks)}, {})
            return o, self._named(last)
        return self.ask(self.model(inputs.params).step, token["tokens"], state, marks["reset"], marks["valid"])

    def vjp(self, inputs: Inputs, do: np.ndarray, dstate: Arrays) -> Gradients:
        b, form, chunk = self.bench, self.bench.form, self.draw.chunk_size
        if not self.is_op:
            read = (self._state(inputs), inputs.reset, inputs.valid)
            more = {"form": form, "chunk_size": chunk, **_drawn(inputs)}
            return self.ask(self.model(inputs.params).vjp, inputs.arrays["tokens"], do, dstate, *read, **more)
        settings = {**self.setting, **({"chunk_size": chunk} if form == "parallel" else {})}
        arrays = self._arguments(inputs)
        last = [dstate[name] for name in self.case.states]  # pyright: ignore[reportAttributeAccessIssue]
        cotangents = do, tuple(last) if len(last) > 1 else last[0]
        op = self.case.op  # pyright: ignore[reportAttributeAccessIssue]
        o, last, g = self.ask(b.adapter.op_vjp, op, form, arrays, settings, *cotangents, b.device, b.implementation)
        groups = inputs.params, inputs.arrays, inputs.state
        of_params, of_inputs, of_state = ({n: a for n, a in g.items() if n in group} for group in groups)
        return Gradients(of_params, of_inputs, of_state, o, self._named(last))

    def _state(self, inputs: Inputs) -> Arrays | None:
        return inputs.state if inputs.state_given else None

    def _arguments(self, inputs: Inputs) -> Arrays:
        return {**inputs.arrays, **inputs.params, **inputs.state, **_present({"reset": inputs.reset, "valid": inputs.valid})}

    def _named(self, last: OpState) -> Arrays:
        return dict(zip(self.case.states, parts(last), strict=True))  # pyright: ignore[reportAttributeAccessIssue]

    def _op(self, form: str, arrays: Arrays, more: dict[str, Any]) -> tuple[np.ndarray, OpState]:
        b = self.bench
        op = self.case.op  # pyright: ignore[reportAttributeAccessIssue]
        return self.ask(b.adapter.op, op, form, arrays, {**self.setting, **more}, b.device, b.implementation)

    def ask(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the implementation answers; to die is an answer too."""
        try:
            return call(*args, **kwargs)
        except Exception as error:
            raise Died(self._told(f"it died of {type(error).__name__}: {error}")) from error

    # comparisons

    def expected(self, inputs: Inputs) -> truth.Expected:
        return self._widened(truth.expected(self.case, self.setting, inputs, self.dtype), inputs)

    def expected_each(self, parts: list[Inputs]) -> list[truth.Expected]:
        return [
            self._widened(e, part) for e, part in zip(truth.expected_each(self.case, self.setting, parts, self.dtype), parts, strict=True)
        ]

    @property
    def rounds(self) -> Mapping[str, int]:
        """How often the implementation may round a term of an op's o and gradients; nothing where it does not round before products."""
        adapter = self.bench.adapter  # none where a trial asks the spec alone
        allowed = adapter is not None and self.bench.implementation in adapter.capabilities.rounds
        return self.case.rounds if allowed and isinstance(self.case, OpCase) else {}

    def more_rounded(self, argument: str, length: int) -> float:
        """What that multiplies the budget of an argument's gradient by."""
        if argument not in self.rounds or not isinstance(self.case, OpCase):
            return 1.0
        return numerics.widened(self.dtype, length, self.rounds[argument], int(argument in self.case.narrow), gradient=True)

    def _widened(self, expected: truth.Expected, inputs: Inputs) -> truth.Expected:
        (o, budget), state = expected
        return (o, budget * numerics.widened(self.dtype, inputs.length, self.rounds.get("o", 0))), state

    def agrees(self, found: Output, inputs: Inputs, what: str) -> None:
        """Outputs (of a model: where valid) and final state equal the spec's."""
        o, state = self.expected(inputs)
        where = None if self.is_op else inputs.valid
        self.compare(found[0], *o, f"{what}: {'o' if self.is_op else 'logits'}", where)
        self.agrees_state(found[1], state, what)

    def agrees_state(self, found: Arrays, state: dict[str, tuple[np.ndarray, np.ndarray]], what: str) -> None:
        if set(found) != set(state):
            self.fail(f"{what}: the state has the names {sorted(found)}, expected {sorted(state)}")
        for name, (true, budget) in state.items():
            self.compare(found[name], true, budget, f"{what}: final state {name}")

    def compare(self, found: np.ndarray, true: np.ndarray, budget: np.ndarray, what: str, where: np.ndarray | None = None) -> None:
        """Elementwise within the budget; `where` [B, T] picks the tokens that count."""
        found = np.asarray(found)
        if found.shape != true.shape:
            self.fail(f"{what} has shape {found.shape}, expected {true.shape}")
        ratio = numerics.share(found, true, budget)
        if where is not None:
            ratio = np.where(where.reshape(where.shape + (1,) * (ratio.ndim - 2)), ratio, 0)
        if ratio.size == 0:
            return
        self.worst = max(self.worst, float(ratio.max()))
        if not ratio.max() <= 1:
            at = tuple(int(i) for i in np.unravel_index(ratio.argmax(), ratio.shape))
            limit = np.broadcast_to(budget, true.shape)[at]
            bad = int((ratio > 1).sum())
            self.fail(
                f"{what} at {list(at)} is {float(found[at]):.9g}, the spec says {float(true[at]):.9g}: off by {ratio.max():.3g} times the "
                f"budget of {float(limit):.3g}; {bad} of {ratio.size} elements are out"
            )

    def same_bits(self, a: np.ndarray, b: np.ndarray, what: str) -> None:
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape or a.dtype != b.dtype or a.tobytes() != b.tobytes():
            self.fail(f"{what} differ in their bits (shapes {a.shape}, {b.shape}; dtypes {a.dtype}, {b.dtype})")

    def fail(self, message: str) -> None:
        raise Disagreement(self._told(message))

    def _told(self, message: str) -> str:
        b, impl = self.bench, self.bench.impl or self.bench.adapter.name
        command = f"python -m unisono_conformance.replay --impl {impl} --property {self.label} --dtype {b.dtype} --form {b.form}"
        if b.device != "cpu" or b.implementation != "plain":
            command += f" --device {b.device} --implementation {b.implementation}"
        if b.exhaustive:
            command += " --profile deep"
        return (
            f"{self.label} {self.title} (docs/conformance.md#{self.label.lower()})\n"
            f"  {b.adapter.name}, {self.draw.case}, {self.draw.variant}: {self.setting}\n  {message}\n"
            f"  reproduce: {command} --draw '{self.draw.to_json()}'"
        )

    # cotangents

    def cotangents(self, inputs: Inputs) -> tuple[np.ndarray, Arrays]:
        """Random cotangents that dtype represents, 0 where a model's output is not valid."""
        (o, _), state = self.expected(inputs)
        do = self.random("do").normal(size=o.shape)
        if self.is_op and self.draw.regime == "offset":
            do = do + 4
        do = do.astype(DTYPES[state_dtype(self.dtype)] if self.is_op and not self.rounds else DTYPES[self.dtype])
        if inputs.valid is not None and not self.is_op:
            do = np.where(inputs.valid.reshape(inputs.valid.shape + (1,) * (do.ndim - 2)), do, np.zeros((), do.dtype))
        dstate = {
            name: self.random(f"d {name}").normal(size=a.shape).astype(DTYPES[state_dtype(self.dtype)])
            for name, (a, _) in state.items()
            if a.dtype.kind == "f"
        }
        return do, dstate


def _drawn(inputs: Inputs) -> dict[str, Any]:
    """What training draws. Models without a noisy router take no noise."""
    return {"dropout": inputs.dropout, **({} if inputs.noise is None else {"noise": inputs.noise})}


def _present(arrays: dict[str, np.ndarray | None]) -> Arrays:
    return {name: a for name, a in arrays.items() if a is not None}
