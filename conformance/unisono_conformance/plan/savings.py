"""What is dear, where, and how much of what is declared a property then meets. docs/conformance.md has this table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from unisono_conformance.adapter import Capabilities
from unisono_conformance.cases.base import Case
from unisono_conformance.plan.profiles import Profile
from unisono_conformance.properties import PROPERTIES, Property

PLAIN = "plain"
EACH, NONE, FIRST, LAST, IN_TURN = "each", "none", "the first", "the last", "one, in turn"
SAME_FORM = "one a dtype, the same for all properties"
BY_DTYPE = "each in float32, one in each other dtype"
FLOAT32, FAINT = "float32", "the first and those with faint denominators"


@dataclasses.dataclass(frozen=True)
class Share:
    """How much a property of a case meets."""

    dtypes: str = EACH  # or IN_TURN, FIRST, FLOAT32
    forms: str = EACH  # in each dtype; or IN_TURN, SAME_FORM
    defaults: str = EACH  # of the case's default configs (P5w: wide ones); or FIRST, LAST, BY_DTYPE
    regimes: int = 1  # of each default config
    config_regimes: bool = True  # whether those count that change the config
    regimes_of: str = EACH  # or FAINT: the first, and those with faint denominators
    others: str = "none"  # the configs beside the defaults: "once", "all"
    random: int = 0  # examples that hypothesis adds


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a property is tried."""

    can: Capabilities
    implementation: str
    case: Case

    @property
    def by_shape(self) -> bool:
        return self.implementation in self.can.dear

    @property
    def compiled(self) -> bool:
        return self.by_shape and self.implementation == PLAIN

    @property
    def interpreted(self) -> bool:
        return self.by_shape and self.implementation != PLAIN

    @property
    def fused(self) -> bool:
        """A target of graphs that has operators of its own; else it is as another, which meets all."""
        return self.can.exported and self.implementation in self.can.narrower

    @property
    def model(self) -> bool:
        return self.case.level == "model"


@dataclasses.dataclass(frozen=True)
class Saving:
    """dear: what is. where: in which places, in words, and by `at`. of: which properties. meets: fields of `Share`."""

    dear: str
    where: str
    at: Callable[[Place], bool]
    of: Callable[[Property], bool]
    meets: dict[str, Any]


def _every(prop: Property) -> bool:
    return True


def _labelled(*labels: str) -> Callable[[Property], bool]:
    return lambda prop: prop.label in labels


def _gradient(prop: Property) -> bool:
    return "gradient" in prop.claims


_SHAPE, _BY_SHAPE = "each shape is compiled or interpreted", "what an adapter calls `dear` (JAX; Triton on a CPU)"
_KERNEL, _INTERPRETED = "an interpreter", "`dear` kernels (Triton on a CPU)"
_EXPORT, _GRAPHS = "each draw of parameters is another export", "graphs"
_LOOP, _LOOPS = "the spec itself loops over time", "cases that do (MARU)"

# The later of two that speak of the same counts.
SAVINGS = (
    Saving(_SHAPE, _BY_SHAPE, lambda p: p.by_shape, lambda prop: not prop.both_forms, {"forms": SAME_FORM}),
    Saving(_SHAPE, _BY_SHAPE + ": models", lambda p: p.by_shape and p.model, lambda prop: prop.both_forms, {"forms": SAME_FORM}),
    Saving(_SHAPE, _BY_SHAPE, lambda p: p.by_shape, lambda prop: prop.own_shapes, {"dtypes": IN_TURN}),
    Saving(_SHAPE, _BY_SHAPE, lambda p: p.by_shape, lambda prop: prop.own_shapes and prop.endless, {"dtypes": FLOAT32}),
    Saving(_SHAPE, _BY_SHAPE, lambda p: p.by_shape, lambda prop: not prop.every_pair, {"config_regimes": False}),
    Saving(_SHAPE, _BY_SHAPE, lambda p: p.by_shape, lambda prop: prop.own_shapes or _gradient(prop), {"others": NONE}),
    Saving(_SHAPE, _BY_SHAPE + ": models", lambda p: p.by_shape and p.model, lambda prop: prop.random, {"random": 0}),
    Saving(
        "compilation of gradients",
        "`dear` plain implementations (JAX): models",
        lambda p: p.compiled and p.model,
        _gradient,
        {"defaults": BY_DTYPE},
    ),
    Saving(_KERNEL, _INTERPRETED, lambda p: p.interpreted, _every, {"regimes": 1, "random": 0}),
    Saving(_KERNEL, _INTERPRETED, lambda p: p.interpreted, lambda prop: not prop.every_pair, {"others": NONE}),
    Saving(_EXPORT, _GRAPHS, lambda p: p.can.exported, _every, {"regimes": 1, "random": 0}),
    Saving(_EXPORT, _GRAPHS + " of models but CRAM", lambda p: p.can.exported and not p.case.in_full, _every, {"others": NONE}),
    Saving(_EXPORT, _GRAPHS + " of a target beside the first", lambda p: p.fused, _every, {"regimes_of": FAINT}),
    Saving(
        "the truth would be compared with itself", "the spec (NumPy)", lambda p: p.can.spec, _gradient, {"dtypes": FIRST, "others": NONE}
    ),
    Saving(_LOOP, _LOOPS, lambda p: p.case.loops, _gradient, {"regimes": 1}),
    Saving(_LOOP, _LOOPS, lambda p: p.case.loops, lambda prop: prop.random, {"random": 0}),
    Saving("a compiler unrolls loops", "models", lambda p: True, _labelled("P12"), {"regimes": 1}),
    Saving("a compiler unrolls loops", "models but CRAM", lambda p: not p.case.in_full, _labelled("P12"), {"defaults": FIRST}),
    Saving("as many tokens as the profile says", "models", lambda p: p.model, _labelled("P10"), {"regimes": 1}),
    Saving("gradients over 135 tokens", "all", lambda p: True, _labelled("P7s"), {"defaults": LAST, "others": NONE}),
    Saving("each combination of arguments", "all", lambda p: True, _labelled("P18"), {"defaults": LAST, "others": NONE}),
)


def share(prop: Property, place: Place, profile: Profile) -> Share:
    case = place.case
    pairs = profile.pairs or prop.both_forms or case.level == "op" or (prop.every_pair and case.in_full)
    full = Share(
        forms=EACH if pairs else IN_TURN,
        regimes=profile.regimes,
        others=profile.others if prop.rows else NONE,
        random=profile.random if prop.random else 0,
    )
    for saving in () if profile.exhaustive else SAVINGS:
        if saving.of(prop) and saving.at(place):
            full = dataclasses.replace(full, **saving.meets)
    return full


@dataclasses.dataclass(frozen=True)
class Length:
    """P10's tokens: the fewest of those that apply, and no more than the implementation can hold."""

    tokens: int
    where: str
    at: Callable[[Place, str, str, bool], bool]  # place, dtype, form, whether nothing is too dear


def _folded(place: Place, dtype: str, form: str, exhaustive: bool) -> bool:
    return form != "parallel" or not (place.case.long_in_each_dtype or dtype == "float32" or exhaustive)


LENGTHS = (
    Length(200, "in a form that folds steps, and in other dtypes than float32 (but for CRAM's ops)", _folded),
    Length(1_000, "models that loop over time (MARU)", lambda place, dtype, form, exhaustive: place.case.loops and not exhaustive),
    Length(100, "models that loop, where others meet 200", lambda p, *how: p.case.loops and not how[-1] and _folded(p, *how)),
    Length(300, "kernels in an interpreter", lambda place, dtype, form, exhaustive: place.interpreted and not exhaustive),
)
SHORTER = 1_000  # of a model's other draws than the first of its first default config, and where shapes, gradients or exports are dear


def table() -> str:
    """SAVINGS and LENGTHS, as docs/conformance.md has them."""
    rows = [("what is dear", "where", "properties", "meets"), ("---",) * 4]
    rows += [(s.dear, s.where, _names(s.of), "; ".join(_meets(*pair) for pair in s.meets.items())) for s in SAVINGS]
    lengths = [("P10's tokens at most", "where"), ("---",) * 2, *((f"{row.tokens:,}", row.where) for row in LENGTHS)]
    lengths += [(f"{SHORTER:,}", "models, but for the first default config in its first regime where neither shapes nor exports are dear")]
    return "\n\n".join("\n".join(f"| {' | '.join(row)} |" for row in part) for part in (rows, lengths))


def _names(of: Callable[[Property], bool]) -> str:
    inside, outside = ([p.label for p in PROPERTIES if of(p) is which] for which in (True, False))
    return ("all but " if outside else "all") + ", ".join(outside) if len(outside) < len(inside) else ", ".join(inside)


def _meets(field: str, value: Any) -> str:
    if field == "config_regimes":
        return "regimes: those that leave the config alone"
    names = {"defaults": "default configs", "others": "other configs", "random": "hypothesis adds", "regimes_of": "regimes"}
    name = names.get(field, field)
    return f"{name}: {({0: NONE, 1: IN_TURN} if field == 'regimes' else {0: NONE}).get(value, value)}"
