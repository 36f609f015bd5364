"""What a property is: a label, a title, which draws it is tried on, and a check that raises Disagreement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from unisono_conformance.adapter import Capabilities, Target
from unisono_conformance.cases.base import Case
from unisono_conformance.judging.trial import Trial

Shape = tuple[int, int, int]  # batch, length, chunk size
BASE = (2, 8, 3)  # shared by all that can: a framework may compile for a second for each shape and config


def _always(case: Case, capabilities: Capabilities) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Property:
    """shapes: the lattice that draws take (B, T, C) from, the first for what is tried once only.

    rows: whether every config is tried, or the defaults only. each_form: for each declared form, or for the first.
    dtypes: None for every declared one. regimes: None for the case's own; a case that has none of them takes its first.
    """

    label: str
    title: str
    check: Callable[[Trial], None]
    shapes: tuple[Shape, ...] = (BASE,)
    rows: bool = False
    each_form: bool = True
    both_forms: bool = False  # in ci, each form in its dtypes, where shapes are not dear
    every_pair: bool = False  # in ci, every dtype with every form; otherwise each dtype with one form, in turn
    dtypes: tuple[str, ...] | None = None
    regimes: tuple[str, ...] | None = None
    endless: bool = False  # for states of constant size only
    own_shapes: bool = False  # calls at shapes that no other property uses: where shapes are dear, in ci for the defaults in one dtype
    dropout: bool = False  # whether dropout masks are among the regimes
    forms: Callable[[Capabilities], tuple[str, ...]] = lambda can: can.forms
    applies: Callable[[Case, Capabilities], bool] = _always
    claims: tuple[str, ...] = ()  # capabilities that one example of it meets
    given: Callable[[Case, Capabilities], tuple[str, ...]] | None = None  # rows of arguments; each is an example
    wide: bool = False  # tried on the case's wide configs instead of the others
    random: bool = True  # whether hypothesis draws more examples

    def judge(self, target: Target, draw) -> Trial:
        trial = Trial(target, draw, self.label, self.title)
        self.check(trial)
        return trial
