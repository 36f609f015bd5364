"""One example of one property: what it is drawn from, whom it is tried on, and the comparisons that can fail."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from unisono_conformance.adapter import Target
from unisono_conformance.cases import case as find_case
from unisono_conformance.cases.base import Case, Output
from unisono_conformance.cases.draw import Draw
from unisono_conformance.cases.inputs import Arrays, Inputs
from unisono_conformance.judging import numerics, truth
from unisono_conformance.judging.judge import Disagreement, within


class Died(AssertionError):
    """The implementation raised an exception where it owed an answer."""


class Trial:
    """`inputs` are those of the draw, from the state before the first token and unmarked; `subject` is the implementation."""

    def __init__(self, target: Target, draw: Draw, label: str, title: str) -> None:
        self.target, self.draw, self.label, self.title = target, draw, label, title
        self.case: Case = find_case(draw.case)
        self.setting = self.case.setting(draw)
        self.dtype = target.dtype
        self.subject = self.case.subject(target, self.case, draw, self.setting, self.ask)
        self.worst = 0.0  # share of the budget

    @functools.cached_property
    def inputs(self) -> Inputs:
        return self.subject.given(self.case.inputs(self.draw, self.dtype))

    @functools.cached_property
    def running(self) -> Inputs:
        """The inputs, from a state that a running sequence could have."""
        return self.inputs.replace(state=self.case.random_state(self.draw, self.inputs))

    def random(self, purpose: str) -> np.random.Generator:
        return self.draw.generator(purpose)

    def cotangents(self, inputs: Inputs) -> tuple[np.ndarray, Arrays]:
        """Random cotangents of outputs and of the float arrays of the state."""
        (o, _), state = self.expected(inputs)
        do = self.subject.cotangent(self.random("do").normal(size=o.shape), inputs)
        floats = {name: a for name, (a, _) in state.items() if a.dtype.kind == "f"}
        return do, {name: self.random(f"d {name}").normal(size=a.shape).astype(self.subject.wide) for name, a in floats.items()}

    def expected(self, inputs: Inputs) -> truth.Expected:
        return self._widened(truth.expected(self.case, self.setting, inputs, self.dtype), inputs)

    def expected_each(self, several: list[Inputs]) -> list[truth.Expected]:
        found = truth.expected_each(self.case, self.setting, several, self.dtype)
        return [self._widened(e, inputs) for e, inputs in zip(found, several, strict=True)]

    def _widened(self, expected: truth.Expected, inputs: Inputs) -> truth.Expected:
        (o, budget), state = expected
        rounds = self.subject.rounds
        state = {
            name: (true, limit * numerics.widened(self.dtype, inputs.length, rounds.get(f"final {name}", 0)))
            for name, (true, limit) in state.items()
        }
        return (o, budget * numerics.widened(self.dtype, inputs.length, rounds.get("o", 0))), state

    def agrees(self, found: Output, inputs: Inputs, what: str) -> None:
        """Outputs (of a model: where valid) and final state equal the spec's."""
        o, state = self.expected(inputs)
        self.compare(found[0], *o, f"{what}: {self.subject.output}", self.subject.counts(inputs))
        self.agrees_state(found[1], state, what)

    def agrees_state(self, found: Arrays, state: dict[str, tuple[np.ndarray, np.ndarray]], what: str) -> None:
        if set(found) != set(state):
            self.fail(f"{what}: the state has the names {sorted(found)}, expected {sorted(state)}")
        for name, (true, budget) in state.items():
            self.compare(found[name], true, budget, f"{what}: final state {name}")

    def compare(self, found: np.ndarray, true: np.ndarray, budget: np.ndarray, what: str, where: np.ndarray | None = None) -> None:
        """Elementwise within the budget; `where` [B, T] picks the tokens that count."""
        try:
            self.worst = max(self.worst, within(found, true, budget, what, where))
        except Disagreement as error:
            self.fail(str(error))

    def same_bits(self, a: np.ndarray, b: np.ndarray, what: str) -> None:
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape or a.dtype != b.dtype or a.tobytes() != b.tobytes():
            self.fail(f"{what} differ in their bits (shapes {a.shape}, {b.shape}; dtypes {a.dtype}, {b.dtype})")

    def ask(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the implementation answers; to die is an answer too."""
        try:
            return call(*args, **kwargs)
        except Exception as error:
            raise Died(self._told(f"it died of {type(error).__name__}: {error}")) from error

    def fail(self, message: str) -> NoReturn:
        raise Disagreement(self._told(message)) from None

    def _told(self, message: str) -> str:
        t, impl = self.target, self.target.impl or self.target.adapter.name
        command = f"python -m unisono_conformance.replay --impl {impl} --property {self.label} --dtype {t.dtype} --form {t.form}"
        if t.device != "cpu" or t.implementation != "plain":
            command += f" --device {t.device} --implementation {t.implementation}"
        if t.exhaustive:
            command += " --profile deep"
        return (
            f"{self.label} {self.title} (docs/conformance.md#{self.label.lower()})\n"
            f"  {t.adapter.name}, {self.draw.case}, {self.draw.variant}: {self.setting}\n  {message}\n"
            f"  reproduce: {command} --draw '{self.draw.to_json()}'"
        )
