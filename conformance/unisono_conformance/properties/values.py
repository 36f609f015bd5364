"""P1–P4: equal to the spec, in every form, at any chunk size, split anywhere, and token by token."""

from __future__ import annotations

import numpy as np

from unisono_conformance.cases.base import Output
from unisono_conformance.cases.inputs import Inputs
from unisono_conformance.judging.trial import Trial
from unisono_conformance.properties.base import Property


def equals_spec(trial: Trial) -> None:
    trial.agrees(trial.subject.forward(trial.inputs), trial.inputs, "from the initial state")
    trial.agrees(trial.subject.forward(trial.running), trial.running, "from a running state")


def forms_agree(trial: Trial) -> None:
    """The truth is the recurrent form of the spec, whatever form and chunk size is judged."""
    sizes = (1, 2, 5, 7, 8, 64, 256) if trial.subject.many_shapes else (1, 256)
    for chunk_size in sizes if trial.target.form == "parallel" else (64,):
        found = trial.subject.forward(trial.running, chunk_size=chunk_size)
        trial.agrees(found, trial.running, f"chunk size {chunk_size}")


def splits_anywhere(trial: Trial) -> None:
    inputs = trial.running
    for at in range(1, inputs.length) if trial.subject.many_shapes else (inputs.length // 2,):
        first, state = trial.subject.forward(inputs.part(0, at))
        second, last = trial.subject.forward(inputs.part(at, inputs.length, state))
        trial.agrees((np.concatenate([first, second], 1), last), inputs, f"split before token {at}")


def step_equals_forward(trial: Trial) -> None:
    random, inputs = trial.random("marks"), trial.running
    shape = (inputs.batch, inputs.length)
    marked = inputs.replace(reset=random.random(shape) < 0.2, valid=random.random(shape) < 0.7)
    trial.agrees(by_steps(trial, marked), marked, "step by step, with reset and valid")


def by_steps(trial: Trial, inputs: Inputs) -> Output:
    state, out = inputs.state, []
    for time in range(inputs.length):
        o, state = trial.subject.step(inputs, time, state)
        out.append(o)
    return np.stack(out, 1), state


PROPERTIES = (
    Property("P1", "equals the spec", equals_spec, rows=True, every_pair=True, dropout=True),
    Property("P2", "forms agree at any chunk size", forms_agree, own_shapes=True, dropout=True, random=False),
    Property("P3", "split anywhere and handed over", splits_anywhere, rows=True, own_shapes=True, dropout=True),
    Property(
        "P4", "step equals forward", step_equals_forward, rows=True, own_shapes=True, each_form=False,
        applies=lambda case, can: can.step, claims=("step",),
    ),
)  # fmt: skip
