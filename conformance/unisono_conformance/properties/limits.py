"""P10, P11, P13: extremes, edges, and the laws that a case declares."""

from __future__ import annotations

from unisono_conformance.judging.trial import Trial
from unisono_conformance.properties.base import Property


def finite_and_right_when_long(trial: Trial) -> None:
    """As many tokens as the profile says (10⁵ in ci), judged like any other sequence: finite, and as the spec says."""
    trial.agrees(trial.subject.forward(trial.inputs, chunk_size=256), trial.inputs, f"{trial.inputs.length} tokens")


def edges(trial: Trial) -> None:
    """T = 1, T below, at and beside C, B = 1. (The base shape's T is no multiple of C.)"""
    chunk = trial.draw.chunk_size
    for length in (1, chunk - 1, chunk, chunk + 1, 2 * chunk) if trial.subject.many_shapes else (1, chunk, chunk + 1):
        inputs = trial.running.part(0, length)
        trial.agrees(trial.subject.forward(inputs), inputs, f"T = {length}, C = {trial.draw.chunk_size}")
    alone = trial.running.rows([1])
    trial.agrees(trial.subject.forward(alone), alone, "B = 1")


def empty_batch(trial: Trial) -> None:
    nobody = trial.running.rows([])
    trial.agrees(trial.subject.forward(nobody), nobody, "B = 0")


def laws(trial: Trial) -> None:
    for law in trial.case.laws:
        law.check(trial)


def _shape(length: int, chunk: int):
    return ((1, length, chunk),)


PROPERTIES = (
    Property(
        "P10", "finite and right at any length", finite_and_right_when_long, shapes=((1, 0, 256),),
        regimes=("tame", "large"), own_shapes=True, random=False, endless=True,
    ),
    Property("P11", "edges of shape", edges, own_shapes=True, random=False),
    Property(
        "P11e", "empty batch", empty_batch, own_shapes=True, random=False, regimes=("tame",),
        applies=lambda case, can: can.empty_batch, claims=("empty_batch",),
    ),
    Property("P13", "declared laws", laws, applies=lambda case, can: bool(case.laws)),
)  # fmt: skip
