"""One function of your own before the court, from Python: `judge_op`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from unisono_spec.contract import check_dtype
from unisono_spec.contract.errors import InputError, nearest

from unisono_conformance import plan
from unisono_conformance.adapters.own import Adapter
from unisono_conformance.cases import cases
from unisono_conformance.cases.base import OpCase
from unisono_conformance.properties import PROPERTIES
from unisono_conformance.report.ledger import Ledger, Result, judge

FORMS = ("parallel", "recurrent")


@dataclasses.dataclass(frozen=True, repr=False)
class Verdict:
    """lines: what was asked, each a property in one dtype: how many examples, the worst share of the error budget that one of them took,
    the message of the first that failed."""

    name: str
    op: str
    lines: tuple[Result, ...]

    @property
    def holds(self) -> bool:
        """Whether every property that was asked for does."""
        return not self.failed

    @property
    def failed(self) -> dict[str, str]:
        """By property, what its first failure says: what was asked, what differs and by how much, and the draw that shows it."""
        found: dict[str, str] = {}
        for line in self.lines:
            if line.outcome == "failed":
                found.setdefault(line.item.prop.label, line.message.partition("\n  reproduce:")[0])
        return found

    def __repr__(self) -> str:
        cells = [(f"{prop:<5} {title}", *row) for prop, title, row in self._rows()]
        head = [f"{self.name} as {self.op}", *self._dtypes()]
        width = max(len(cell[0]) for cell in [head, *cells])
        lines = ["  ".join((row[0].ljust(width), *(f"{c:>16}" for c in row[1:]))) for row in [head, *cells]]
        return "\n".join([*lines, self._summary()])

    def _repr_markdown_(self) -> str:
        head = ["", "property", *self._dtypes()]
        rows = [[prop, title, *row] for prop, title, row in self._rows()]
        table = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
        return "\n".join([*table, "", self._summary()])

    def _summary(self) -> str:
        examples = sum(line.examples for line in self.lines)
        said = "every property holds" if self.holds else f"violated: {', '.join(self.failed)}"
        return f"{examples} examples; each cell: how many, and the worst share of the error budget. {said[0].upper()}{said[1:]}."

    def _dtypes(self) -> list[str]:
        return list(dict.fromkeys(line.item.target.dtype for line in self.lines))

    def _rows(self) -> list[tuple[str, str, list[str]]]:
        rows = []
        for prop in dict.fromkeys(line.item.prop for line in self.lines):
            mine = {line.item.target.dtype: line for line in self.lines if line.item.prop is prop}
            rows.append((prop.label, prop.title, [_cell(mine.get(dtype)) for dtype in self._dtypes()]))
        return rows


def _cell(line: Result | None) -> str:
    if line is None:
        return "·"
    return "FAILED" if line.outcome == "failed" else f"{line.examples}, {line.worst:.0%}"


def judge_op(
    function: Callable[..., Any],
    op: str,
    framework: str = "numpy",
    form: str = "parallel",
    dtypes: Sequence[str] = ("float64", "float32"),
    properties: Sequence[str] | None = None,
    profile: str = "dev",
) -> Verdict:
    """Ask of `function` what the court asks of an op, and say which properties hold.

    function: called with the op's arguments by name (those of `unisono_spec.ops.<op>.<form>`; of mom_gru, those of `hoisted`): its
    arrays, initial_state, reset and valid where the example has them, and chunk_size if it takes one; returns (o, final_state). Arrays
    are of `framework`: numpy, torch or jax; with the last two, gradients are judged, too, by automatic differentiation.
    op: decayed_sum, weighted_sum, linear_attention, selective_scan, …; form: parallel or recurrent.
    properties: labels such as P1, P7, P15r (docs/conformance.md); all that apply unless given. profile: dev, ci or deep.

    Raises InputError where an argument is none of these. What `function` does wrong, dying included, is in the verdict.
    """
    known = {case.op: case.arch for case in cases().values() if isinstance(case, OpCase)}
    if op not in known:
        raise InputError(f"op: {op!r} is not judged by itself; {nearest(op, known)}")
    if form not in FORMS:
        raise InputError(f"form: {form!r} is unknown; {nearest(form, FORMS)}")
    labels = [prop.label for prop in PROPERTIES]
    for label in properties or ():
        if label not in labels:
            raise InputError(f"properties: {label!r} is unknown; {nearest(label, labels)}")
    if not dtypes:
        raise InputError("dtypes: none given; name at least one of float64, float32, bfloat16, float16")
    for dtype in dtypes:
        check_dtype(dtype)
    adapter, much = Adapter(function, op, framework, form, tuple(dtypes)), plan.profile(profile)
    ledger = Ledger()
    for item in plan.items(adapter, plan.Selection(arch=known[op]), much, adapter.name):
        if properties is not None and item.prop.label not in properties:
            continue
        result = ledger.result(item)
        try:
            judge(item, much, ledger)
        except AssertionError as error:
            result.outcome, result.message = "failed", str(error)
    if not ledger.results:
        raise InputError(f"properties: none of {', '.join(properties or ())} applies to {op} in {framework}; leave it out, or name others")
    return Verdict(adapter.name, op, tuple(ledger.results.values()))
