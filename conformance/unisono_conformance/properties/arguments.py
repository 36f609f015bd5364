"""P18: each argument given, absent, true everywhere and true nowhere, beside each of the others."""

from __future__ import annotations

import functools

import numpy as np

from unisono_conformance.adapter import Capabilities
from unisono_conformance.cases.base import Case
from unisono_conformance.cases.inputs import Inputs
from unisono_conformance.cases.pairwise import pairwise
from unisono_conformance.judging.trial import Trial
from unisono_conformance.properties.base import BASE, Property
from unisono_conformance.properties.gradients import agrees_in_gradients
from unisono_conformance.properties.values import by_steps

MARKS = ("given", "absent", "all", "none")
LEVELS = {"reset": MARKS, "valid": MARKS, "state": ("given", "absent"), "dropout": ("absent", "given", "all", "none")}
NOISE = {"noise": ("absent", "given")}


def rows(case: Case, can: Capabilities) -> tuple[str, ...]:
    """Arguments in which every level of each occurs beside every level of each other. An op's state is always given: absent is zeros."""
    levels = LEVELS if case.level == "model" and can.dropout else {n: LEVELS[n] for n in ("reset", "valid", "state")}
    return _rows(
        tuple({**levels, **(NOISE if _noisy(case, _variant(case)) and can.dropout else {})}.items()), bool(can.dear) and case.loops
    )


@functools.cache
def _rows(levels: tuple[tuple[str, tuple[str, ...]], ...], slow: bool) -> tuple[str, ...]:
    """With as few combinations of what is there at all as meet in pairs: a framework compiles for each, and where that is slow noise
    comes with dropout."""
    presence = {n: sorted({v != "absent" for v in of}, reverse=True) for n, of in levels}
    there = [tuple(row.values()) for row in pairwise(presence, lambda row: not slow or row.get("noise") in (None, row["dropout"]))]
    found = pairwise(dict(levels), lambda row: tuple(value != "absent" for value in row.values()) in there)
    return tuple(" ".join(f"{name}={value}" for name, value in row.items()) for row in found)


def _variant(case: Case) -> str:
    return case.defaults[-1]


def _noisy(case: Case, variant: str) -> bool:
    return case.level == "model" and bool(case.variants[variant].noise_widths)


def arranged(trial: Trial) -> Inputs:
    """The inputs of the draw with the arguments that it names."""
    level = dict(pair.split("=") for pair in trial.draw.given.split())
    absent = level["state"] == "absent"
    inputs = trial.subject.fresh(trial.inputs) if absent else trial.running
    random, shape = trial.random("marks"), (inputs.batch, inputs.length)
    marks = {"reset": random.random(shape) < 0.3, "valid": random.random(shape) < 0.7}
    # at either end of a sequence, whatever chance says; and a token that reads the state before a reset at the end
    marks["reset"][0, -1] = marks["reset"][-1, 0] = marks["valid"][0, 1] = True
    marks["valid"][0, 0] = marks["valid"][-1, -1] = marks["reset"][0, 0] = marks["reset"][0, 1] = False
    full = {"all": np.ones_like, "none": np.zeros_like, "given": lambda a: a}
    found = {name: full[level[name]](a) for name, a in marks.items() if level[name] != "absent"}
    training = trial.subject.training()
    if level.get("dropout", "absent") != "absent":
        found["dropout"] = tuple(full[level["dropout"]](mask) for mask in training["dropout"])
    if level.get("noise", "absent") != "absent":
        found["noise"] = training["noise"]
    return inputs.replace(**found)


def each_argument(trial: Trial) -> None:
    inputs, can = arranged(trial), trial.target.adapter.capabilities
    elementary = trial.subject.elementary
    differentiated = trial.target.form in can.gradient_forms
    if differentiated:
        agrees_in_gradients(trial, inputs, "coordinate" if elementary else "map" if trial.target.exhaustive else "kind")
    given = inputs if inputs.valid is None else trial.case.spoil(trial.draw, inputs, ~inputs.valid)
    if not (differentiated and trial.target.dear):
        trial.agrees(trial.subject.forward(given), inputs, "without gradients")
    # where each of them is compiled, steps and the form that folds them are called with one mark alone
    compiled = trial.target.dear and not elementary
    alone = trial.draw.given.startswith(("reset=given valid=absent", "reset=absent valid=given"))
    if inputs.dropout is None and inputs.noise is None and (alone or not compiled):
        given, inputs = given.replace(state_given=True), inputs.replace(state_given=True)
        if compiled and "recurrent" in can.forms:
            trial.agrees(trial.subject.forward(given, form="recurrent"), inputs, "recurrent form")
        if can.step:
            trial.agrees(by_steps(trial, given), inputs, "step by step")


PROPERTIES = (
    Property(
        "P18", "each argument given, absent, all, none", each_argument, shapes=(BASE,), dtypes=("float32",), regimes=("tame",),
        both_forms=True, random=False, rows=True, given=rows,
    ),
)  # fmt: skip
