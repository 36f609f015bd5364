"""Which examples a property is tried on. A plan is a list of draws, the same every time; hypothesis adds others like them."""

from __future__ import annotations

import dataclasses

from unisono_spec.contract.errors import InputError, nearest

from unisono_conformance.adapter import Adapter, Capabilities, Target
from unisono_conformance.cases import cases
from unisono_conformance.cases.base import Case
from unisono_conformance.cases.draw import Draw
from unisono_conformance.properties import PROPERTIES, Property


@dataclasses.dataclass(frozen=True)
class Profile:
    """How much is tried.

    pairs: every dtype with every form, for every property. rows: how often each config beside the defaults is tried by each
    property: under no dtype and form, under one of each, or under all.
    """

    name: str
    pairs: bool
    rows: str  # "none", "once", "all"
    regimes: int  # regimes a default config is tried under, in turn; the others get one
    random: int  # examples that hypothesis adds
    long_length: int
    exhaustive: bool = False
    derandomize: bool = True


# dev: while writing. ci: sized for the time budget of `nox -s tests`. deep: as long as it likes. meta: what sabotages must not survive.
PROFILES = {
    "dev": Profile("dev", pairs=False, rows="none", regimes=2, random=0, long_length=2_000),
    "ci": Profile("ci", pairs=False, rows="once", regimes=2, random=1, long_length=100_000),
    "deep": Profile("deep", pairs=True, rows="all", regimes=99, random=60, long_length=1_000_000, exhaustive=True, derandomize=False),
    "meta": Profile("meta", pairs=True, rows="none", regimes=99, random=0, long_length=300),
}

PLAIN = "plain"
SHORTER = 1_000  # of P10 for a model in ci, but for its first default config in its first regime
FOLDED_LENGTH = 200  # of P10 where a form or the truth is a fold of steps
INTERPRETED_LENGTH = 300  # of P10, for kernels in an interpreter
LOOP_LENGTH = 1_000  # of P10, for models that have no form but loops over time

# Draws that once failed. They are tried first, under every dtype and form that the property covers.
REMEMBERED: dict[str, tuple[Draw, ...]] = {}


def profile(name: str) -> Profile:
    if name not in PROFILES:
        raise InputError(f"profile: {name!r} is unknown; {nearest(name, PROFILES)}")
    return PROFILES[name]


@dataclasses.dataclass(frozen=True)
class Item:
    """One line of the judgement: a property of a case, in one dtype and form."""

    prop: Property
    case: Case
    target: Target
    turn: int  # which of the pairs of dtype and form it is
    turns: int
    forms: int
    more: tuple[Draw, ...] = ()  # under regimes that no other item of this property and case has

    @property
    def id(self) -> str:
        t = self.target
        return "-".join((self.prop.label, self.case.name.replace("/", "."), t.dtype, t.form, t.implementation, t.device))


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


def items(adapter: Adapter, selection: Selection, profile: Profile, impl: str = "") -> list[Item]:
    """impl: what the adapter was asked for by, for the line that reproduces a failure."""
    can, out = adapter.capabilities, []
    chosen = selection.of(can)
    grid = [(dtype, form) for dtype in chosen["dtype"] for form in chosen["form"]]
    for p, prop in enumerate(PROPERTIES):
        for case in cases().values():
            subject = case.name.rpartition("/")[2]
            known = subject in (can.models if case.level == "model" else can.ops)
            served = can.narrower.get(chosen["implementation"][0])  # of an implementation that serves less than all
            if served is not None and subject not in served:
                continue
            if case.arch not in chosen["arch"] or not known or not prop.applies(case, can) or not defaults(prop, case):
                continue
            forms = [f for f in chosen["form"] if f in prop.forms(can)][: None if prop.each_form else 1]
            # where each config is compiled, all properties take it in the same form: its shapes are compiled already
            dear = not profile.exhaustive and chosen["implementation"][0] in can.dear
            full = profile.pairs or (not dear and (_every_pair(prop, case) or prop.both_forms or case.level == "op"))
            full = full or (prop.both_forms and case.level == "op")
            possible = chosen["dtype"] if served is None else served[subject]
            allowed = [dtype for dtype in chosen["dtype"] if dtype in possible and (prop.dtypes is None or dtype in prop.dtypes)]
            if dear and prop.own_shapes and not profile.pairs and allowed:
                # each shape is another compilation: one dtype in turn; a long sequence takes whole its turn in float32
                allowed = ["float32"] if prop.endless and "float32" in allowed else [allowed[p % len(allowed)]]
            if "gradient" in prop.claims and can.gradients_by_coordinate and not profile.exhaustive:
                allowed = allowed[:1]  # what is compared there is the truth with itself, a coordinate at a time
            for turn, (dtype, form) in enumerate(grid):
                mine = forms if full else [forms[(chosen["dtype"].index(dtype) + (0 if dear else p)) % len(forms)]] if forms else []
                if form not in mine or dtype not in allowed:
                    continue
                place = chosen["device"][0], chosen["implementation"][0]
                target = Target(adapter, dtype, form, *place, profile.long_length, profile.exhaustive, impl)
                out.append(Item(prop, case, target, turn, len(grid), len(chosen["form"])))
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in out:
        groups.setdefault((item.prop.label, item.case.name), []).append(item)
    return [item for group in groups.values() for item in _under_every_regime(group, profile)]


def _under_every_regime(group: list[Item], profile: Profile) -> list[Item]:
    """The items of one property and case. However few they are, each regime is met by those that all configs take in all forms."""
    prop, case, can = group[0].prop, group[0].case, group[0].target.adapter.capabilities
    # a coordinate at a time, or an export for each: these take some regimes, and the report says which they did not
    if not prop.every_pair or (case.level == "model" and (can.exported or (can.gradients_by_coordinate and "gradient" in prop.claims))):
        return group
    met = {draw.regime for item in group for draw in draws(item, profile)}
    missing = [r for r in case.regimes if r not in met and any(r in regimes(item) for item in group)]
    for k, regime in enumerate(missing):
        able = [i for i, item in enumerate(group) if regime in regimes(item)]
        at, variants = able[k % len(able)], defaults(prop, case)
        draw = Draw(case.name, variants[k % len(variants)], regime, *lattice(group[at], profile)[0])
        group[at] = dataclasses.replace(group[at], more=(*group[at].more, draw))
    return group


def defaults(prop: Property, case: Case) -> tuple[str, ...]:
    return tuple(v for v in case.defaults if not prop.endless or case.endless(case.setting(Draw(case.name, v))))


def _every_pair(prop: Property, case: Case) -> bool:
    """Whether ci tries every dtype with every form, rather than each dtype with one form in turn."""
    return prop.every_pair and case.in_full and not _costly(prop, case)


def _costly(prop: Property, case: Case) -> bool:
    """Gradients of a spec that loops over time."""
    return case.loops and "gradient" in prop.claims


def variants(item: Item) -> tuple[str, ...]:
    """The configs that the implementation is judged on, or the settings of an op."""
    case = item.case
    return tuple(case.variants) if case.level == "op" or case.name in item.target.adapter.capabilities.rows else case.defaults


def regimes(item: Item) -> tuple[str, ...]:
    prop, case, can = item.prop, item.case, item.target.adapter.capabilities
    names = [r for r in case.regimes if prop.regimes is None or r in prop.regimes]
    if not (prop.dropout and can.dropout):
        names = [r for r in names if r != "dropout"]
    if item.target.dear and not prop.every_pair:
        names = [r for r in names if r not in case.config_regimes]
    return tuple(r for r in names if item.target.dtype not in case.too_narrow.get(r, ()))


def draws(item: Item, profile: Profile) -> list[Draw]:
    """The draws that are always tried: each default config under some regimes, and the share of the other configs."""
    case, shapes, names = item.case, lattice(item, profile), regimes(item)
    out = [*(d for d in REMEMBERED.get(item.prop.label, ()) if d.case == case.name), *item.more]
    gradient, can = "gradient" in item.prop.claims, item.target.adapter.capabilities
    if item.prop.given is not None:
        tried = (item.prop.variant,) if item.prop.variant else variants(item) if profile.exhaustive else case.defaults[-1:]
        return out + [Draw(case.name, v, names[0], *shapes[0], given=given) for v in tried for given in item.prop.given(case, can)]
    # the truth of a gradient takes hundreds of evaluations of the spec, and a compiler unrolls loops
    by_coordinate = gradient and can.gradients_by_coordinate and not profile.exhaustive and case.level == "model"
    costly = by_coordinate or _costly(item.prop, case) or "compiled" in item.prop.claims
    long = item.prop.endless and case.level == "model"
    kernels = item.target.dear and item.target.implementation != PLAIN  # in an interpreter
    # each regime has parameters of its own, and so a graph of its own
    few = 1 if (costly or long or kernels or can.exported) and not profile.exhaustive else profile.regimes
    compiled = "compiled" in item.prop.claims and not profile.exhaustive
    mine = defaults(item.prop, case)[: 1 if compiled and not case.in_full else None]
    compiles = gradient and case.level == "model" and item.target.dear and item.target.implementation == PLAIN and not profile.pairs
    if compiles and item.target.dtype != "float32":
        # each is a compilation, and the dearest: all in float32, one in each other dtype, so that each meets both forms
        mine = (mine[(can.dtypes.index(item.target.dtype) // len(can.forms) + 1) % len(mine)],)
    for i, variant in enumerate(mine):
        for j in range(min(few, len(names))):
            batch, length, chunk = shapes[j % len(shapes)]
            # elsewhere the spec would be compared with itself, or its answer take longer than all else
            whole = i + j == 0 and not can.gradients_by_coordinate and not item.target.dear and not can.exported
            if long and not whole and not profile.exhaustive:
                length = min(length, SHORTER)
            # the tame regime always, the others in turn; or each in turn
            regime = names[0] if j == 0 else names[1 + (j - 1 + i + 2 * item.turn) % (len(names) - 1)]
            if few == 1 and length <= SHORTER:
                regime = names[(i + item.turn) % len(names)]
            out.append(Draw(case.name, variant, regime, batch, length, chunk))
    dearest = (item.target.dear and (item.prop.own_shapes or gradient)) or (kernels and not item.prop.every_pair)
    if item.prop.rows and profile.rows != "none" and not by_coordinate and not dearest:
        others = [v for v in variants(item) if v not in case.defaults]
        # "once": each config under one pair of dtype and form, the same for every property that tries all pairs
        by_pair = _every_pair(item.prop, case) and not item.target.dear
        of, at = (item.turns, item.turn) if by_pair else (item.turns // item.forms, item.turn // item.forms)
        for i, variant in enumerate(others):
            if profile.rows == "all" or i % of == at % of:
                batch, length, chunk = shapes[0]
                out.append(Draw(case.name, variant, names[i % len(names)], batch, length, chunk))
    return out


def lattice(item: Item, profile: Profile) -> tuple[tuple[int, int, int], ...]:
    """The property's shapes; a length of 0 stands for the profile's long one, which loops over time do not get."""
    whole = item.target.form == "parallel" and (item.case.long_in_each_dtype or item.target.dtype == "float32" or profile.exhaustive)
    long = profile.long_length if whole else min(profile.long_length, FOLDED_LENGTH)
    if item.case.loops and not profile.exhaustive:
        long = min(long, LOOP_LENGTH if whole else LOOP_LENGTH // 10)
    if item.target.dear and item.target.implementation != PLAIN:
        long = min(long, INTERPRETED_LENGTH)
    longest = item.target.adapter.capabilities.longest
    return tuple((batch, min(length or long, longest or length or long), chunk) for batch, length, chunk in item.prop.shapes)
