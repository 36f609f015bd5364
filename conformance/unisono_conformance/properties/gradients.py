"""P7: the vector-Jacobian product, of outputs and of the final state, with respect to everything real."""

from __future__ import annotations

import numpy as np

from unisono_conformance import truth
from unisono_conformance.cases.inputs import Inputs
from unisono_conformance.properties.base import Property
from unisono_conformance.trial import Trial


def vjp(trial: Trial) -> None:
    inputs = trial.running
    random, shape = trial.random("marks"), (inputs.batch, inputs.length)
    marked = inputs.replace(reset=random.random(shape) < 0.15, valid=random.random(shape) < 0.75)
    garbage = trial.case.spoil(trial.draw, marked, ~marked.valid)  # pyright: ignore[reportOptionalOperand]
    _judge(trial, inputs, inputs, "")
    _judge(trial, marked, garbage, ", with reset, valid and garbage where not valid")


def _judge(trial: Trial, clean: Inputs, given: Inputs, what: str) -> None:
    """The gradients on `given` must be those on `clean`, whose tokens that are not valid are harmless."""
    do, dstate = trial.cotangents(clean)
    found = trial.vjp(given, do, dstate)
    coordinates = trial.is_op or trial.bench.exhaustive
    slopes = truth.slopes(
        trial.case,
        trial.setting,
        clean,
        do.astype(np.float64),
        {n: a.astype(np.float64) for n, a in dstate.items()},
        trial.dtype,
        coordinates,
    )
    for (kind, name), (directions, true, budget) in slopes.items():
        group = getattr(found, kind)
        if name not in group:
            trial.fail(f"gradient of {kind} {name} is missing{what}; found {sorted(group)}")
        g = np.asarray(group[name]).astype(np.float64)
        if g.shape != directions.shape[1:]:
            trial.fail(f"gradient of {kind} {name} has shape {g.shape}, expected {directions.shape[1:]}{what}")
        if not np.isfinite(g).all():
            trial.fail(f"gradient of {kind} {name} is not finite{what}")
        along = directions.reshape(len(directions), -1) @ g.reshape(-1)
        trial.compare(along, true, budget, f"gradient of {kind} {name} along direction{what}")


PROPERTIES = (
    Property(
        "P7", "vjp of outputs and of the final state", vjp, shapes=((2, 6, 4),), rows=True,
        applies=lambda case, can: bool(can.gradient_forms), forms=lambda can: can.gradient_forms, claims=("gradient",),
    ),
)  # fmt: skip
