"""P7: the vector-Jacobian product, of outputs and of the final state, with respect to everything real."""

from __future__ import annotations

import numpy as np

from unisono_conformance.adapter import Gradients, NoGradient
from unisono_conformance.cases.inputs import Arrays, Inputs
from unisono_conformance.judging import truth
from unisono_conformance.judging.trial import Trial
from unisono_conformance.properties.base import Property

CHUNKS = 67  # 64 are what the rooms' first levels of carries hold; as tokens, twice that, more than four segments of MARU's backward


def vjp(trial: Trial) -> None:
    """In mid-sequence, with resets, and with NaN or garbage where tokens are not valid."""
    inputs = trial.running
    random, shape = trial.random("marks"), (inputs.batch, inputs.length)
    clean = inputs.replace(reset=random.random(shape) < 0.15, valid=random.random(shape) < 0.75)
    agrees_in_gradients(trial, clean, "coordinate" if trial.subject.many_coordinates else "map")


def agrees_in_gradients(trial: Trial, clean: Inputs, by: str) -> None:
    """Outputs, final state and gradients, with NaN or garbage where tokens are not valid or a state is forgotten, which the truth is
    taken without.

    by: see `truth.slopes`.
    """
    given = clean if clean.valid is None else trial.case.spoil(trial.draw, clean, ~clean.valid)
    do, dstate = trial.cotangents(clean)
    found = trial.subject.vjp(given.forgetting(), do, dstate)
    trial.agrees((found.o, found.last), clean, "while gradients are recorded")
    slopes = truth.slopes(
        trial.case,
        trial.setting,
        clean,
        do.astype(np.float64),
        {n: a.astype(np.float64) for n, a in dstate.items()},
        trial.dtype,
        by,
    )
    for (kind, name), (directions, true, budget) in slopes.items():
        budget = budget * trial.subject.more_rounded(name, clean.length)
        along = _along(trial, found, kind, directions)
        trial.compare(along, true, budget, f"gradient of {kind} {name} along direction")


def _along(trial: Trial, found: Gradients, kind: str, directions: Arrays) -> np.ndarray:
    try:
        return found.along(kind, directions)
    except NoGradient as error:
        return trial.fail(str(error))


def vjp_across_levels(trial: Trial) -> None:
    """Over more chunks than one level of carries holds, and more tokens than a segment, as training does it: with dropout and noise.

    Resets and padding are rare and decays slow, so that gradients flow from one end to the other.
    """
    inputs = trial.running
    random, shape = trial.random("marks"), (inputs.batch, inputs.length)
    reset, valid = random.random(shape) < 0.5 / inputs.length, random.random(shape) < 0.9
    training = trial.subject.training() if trial.target.adapter.capabilities.dropout else {}
    agrees_in_gradients(trial, inputs.replace(reset=reset, valid=valid, **training), "map")


PROPERTIES = (
    Property(
        "P7s", "vjp across levels and segments", vjp_across_levels, shapes=((1, CHUNKS * 2 + 1, 2),), dtypes=("float32",),
        regimes=("near_one",), own_shapes=True, random=False, both_forms=True, rows=True,
        applies=lambda case, can: bool(can.gradient_forms),
        forms=lambda can: can.gradient_forms,
    ),
    Property(
        "P7", "vjp of outputs and of the final state", vjp, rows=True, every_pair=True,
        applies=lambda case, can: bool(can.gradient_forms), forms=lambda can: can.gradient_forms, claims=("gradient",),
    ),
)  # fmt: skip
