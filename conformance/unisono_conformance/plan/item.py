"""What is judged: properties of cases, each in one dtype and form."""

from __future__ import annotations

import dataclasses

from unisono_spec.contract.errors import InputError, nearest

from unisono_conformance.adapter import Adapter, Capabilities, Target
from unisono_conformance.cases import cases
from unisono_conformance.cases.base import Case
from unisono_conformance.cases.draw import Draw
from unisono_conformance.plan.profiles import Profile
from unisono_conformance.plan.savings import EACH, FIRST, FLOAT32, IN_TURN, Place, Share, share
from unisono_conformance.properties import PROPERTIES, Property


@dataclasses.dataclass(frozen=True)
class Item:
    """One line of the judgement: a property of a case, in one dtype and form."""

    prop: Property
    case: Case
    target: Target
    share: Share
    pair: int  # which of the chosen pairs of dtype and form it is
    dtypes: int  # how many of each were chosen
    forms: int
    more: tuple[Draw, ...] = ()  # under regimes that no other item of this property and case has

    @property
    def id(self) -> str:
        t = self.target
        return "-".join((self.prop.label, self.case.name.replace("/", "."), t.dtype, t.form, t.implementation, t.device))

    @property
    def place(self) -> Place:
        return Place(self.target.adapter.capabilities, self.target.implementation, self.case)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What of an implementation's capabilities is judged; None is all of it."""

    arch: str | None = None
    device: str | None = None
    dtype: str | None = None
    form: str | None = None
    implementation: str | None = None

    def of(self, can: Capabilities) -> dict[str, tuple[str, ...]]:
        """The chosen values; raises InputError for what is not declared. Device and implementation default to the first."""
        declared = {"dtype": can.dtypes, "form": can.forms, "device": can.devices, "implementation": can.implementations}
        chosen = {}
        for name, values in declared.items():
            wanted = getattr(self, name)
            if wanted is not None and wanted not in values:
                raise InputError(f"{name}: {wanted!r} is not declared by this implementation; {nearest(wanted, values)}")
            chosen[name] = values if wanted is None and name in ("dtype", "form") else (wanted or values[0],)
        archs = tuple(dict.fromkeys(case.arch for case in cases().values()))
        if self.arch is not None and self.arch not in archs:
            raise InputError(f"arch: {self.arch!r} is unknown; {nearest(self.arch, archs)}")
        return {**chosen, "arch": archs if self.arch is None else (self.arch,)}


def pairs(adapter: Adapter, selection: Selection, profile: Profile, impl: str) -> list[Item]:
    """Of each property and case those pairs of dtype and form in which it is tried."""
    chosen, can = selection.of(adapter.capabilities), adapter.capabilities
    device, implementation = chosen["device"][0], chosen["implementation"][0]
    out = []
    for prop in PROPERTIES:
        for case in cases().values():
            if case.arch not in chosen["arch"] or not prop.applies(case, can) or not defaults(prop, case):
                continue
            met = share(prop, Place(can, implementation, case), profile)
            dtypes = _dtypes(met, prop, _served(case, can, implementation, chosen["dtype"]))
            for d, dtype in enumerate(chosen["dtype"]):
                forms = _forms(met, prop, [f for f in chosen["form"] if f in prop.forms(can)], d) if dtype in dtypes else []
                for f, form in enumerate(chosen["form"]):
                    if form in forms:
                        target = Target(adapter, dtype, form, device, implementation, profile.long_length, profile.exhaustive, impl)
                        pair = d * len(chosen["form"]) + f
                        out.append(Item(prop, case, target, met, pair, len(chosen["dtype"]), len(chosen["form"])))
    return out


def _served(case: Case, can: Capabilities, implementation: str, chosen: tuple[str, ...]) -> list[str]:
    """The chosen dtypes in which the implementation has what the case judges."""
    subject, narrower = case.name.rpartition("/")[2], can.narrower.get(implementation)
    if subject not in (can.models if case.level == "model" else can.ops):
        return []
    return [dtype for dtype in chosen if narrower is None or dtype in narrower.get(subject, ())]


def _dtypes(met: Share, prop: Property, served: list[str]) -> list[str]:
    able = [dtype for dtype in served if prop.dtypes is None or dtype in prop.dtypes]
    if met.dtypes == EACH or not able:
        return able
    if met.dtypes == FLOAT32 and FLOAT32 in able:
        return [FLOAT32]
    return [able[0 if met.dtypes == FIRST else PROPERTIES.index(prop) % len(able)]]


def _forms(met: Share, prop: Property, able: list[str], dtype: int) -> list[str]:
    """Those in which the chosen dtype of that number is tried."""
    able = able if prop.each_form else able[:1]
    if met.forms == EACH or not able:
        return able
    return [able[(dtype + (PROPERTIES.index(prop) if met.forms == IN_TURN else 0)) % len(able)]]


def defaults(prop: Property, case: Case) -> tuple[str, ...]:
    return tuple(
        v
        for v in (getattr(case, "wide", ()) if prop.wide else case.defaults)
        if not prop.endless or case.endless(case.setting(Draw(case.name, v)))
    )
