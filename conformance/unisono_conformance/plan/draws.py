"""Which examples an item is tried on: a list of draws, the same every time."""

from __future__ import annotations

import dataclasses

from unisono_conformance.cases.draw import Draw
from unisono_conformance.plan.item import Item, defaults
from unisono_conformance.plan.profiles import Profile
from unisono_conformance.plan.savings import BY_DTYPE, EACH, FAINT, FIRST, LAST, LENGTHS, NONE, SHORTER


def draws(item: Item, profile: Profile) -> list[Draw]:
    """Each default config under some regimes, and the share of the others; with each row of arguments, where the property has some."""
    case, prop, shapes, names = item.case, item.prop, lattice(item, profile), regimes(item)
    rows = ("",) if prop.given is None else prop.given(case, item.target.adapter.capabilities)
    out = list(item.more)
    for i, variant in enumerate(_defaults(item)):
        for j in range(min(item.share.regimes, len(names))):
            batch, length, chunk = shapes[j % len(shapes)]
            if prop.endless and item.place.model and not profile.exhaustive and not (i + j == 0 and _cheap(item)):
                length = min(length, SHORTER)
            # the tame regime always, the others in turn; or each in turn
            regime = names[0] if j == 0 else names[1 + (j - 1 + i + 2 * item.pair) % (len(names) - 1)]
            if item.share.regimes == 1 and length <= SHORTER:
                regime = names[(i + item.pair) % len(names)]
            out += [Draw(case.name, variant, regime, batch, length, chunk, given=given) for given in rows]
    return out + [Draw(case.name, v, names[i % len(names)], *shapes[0], given=given) for i, v in _others(item) for given in rows]


def _cheap(item: Item) -> bool:
    """Whether a long sequence takes seconds, and says something that the truth is not."""
    can = item.target.adapter.capabilities
    return not (can.spec or item.place.by_shape or can.exported)


def _defaults(item: Item) -> tuple[str, ...]:
    names, which, can = defaults(item.prop, item.case), item.share.defaults, item.target.adapter.capabilities
    if which == FIRST:
        return names[:1]
    if which == LAST:
        return names[-1:]
    if which == BY_DTYPE and item.target.dtype != "float32":
        return (names[(can.dtypes.index(item.target.dtype) // len(can.forms) + 1) % len(names)],)
    return names


def _others(item: Item) -> list[tuple[int, str]]:
    """The item's share of the configs beside the defaults, each with its number."""
    if item.share.others == NONE:
        return []
    names = list(enumerate(v for v in variants(item) if v not in item.case.defaults))
    if item.share.others == "all":
        return names
    # "once": each config under one pair of dtype and form, the same for every property that tries all pairs; else under one dtype
    by_pair = item.prop.every_pair and item.case.in_full and item.share.forms == EACH
    at, of = (item.pair, item.dtypes * item.forms) if by_pair else (item.pair // item.forms, item.dtypes)
    return names[at % of :: of]


def variants(item: Item) -> tuple[str, ...]:
    """The configs that the implementation is judged on, or the settings of an op."""
    case, graphs = item.case, item.target.adapter.capabilities.exported
    return tuple(name for name, setting in case.variants.items() if not (graphs and case.level == "model" and setting.no_graph))


def regimes(item: Item) -> tuple[str, ...]:
    prop, case, can = item.prop, item.case, item.target.adapter.capabilities
    left_out = {r for r, dtypes in case.too_narrow.items() if item.target.dtype in dtypes}
    left_out |= set() if prop.dropout and can.dropout else {"dropout"}
    left_out |= set() if item.share.config_regimes else set(case.config_regimes)
    left_out |= set(case.regimes[1:]) - set(case.faint) if item.share.regimes_of == FAINT else set()
    return tuple(r for r in case.regimes if r not in left_out and (prop.regimes is None or r in prop.regimes)) or case.regimes[:1]


def lattice(item: Item, profile: Profile) -> tuple[tuple[int, int, int], ...]:
    """The property's shapes; a length of 0 stands for the profile's long one, or what of it is not too dear."""
    t = item.target
    fewer = [row.tokens for row in LENGTHS if row.at(item.place, t.dtype, t.form, profile.exhaustive)]
    long, longest = min([profile.long_length, *fewer]), t.adapter.capabilities.longest
    return tuple((batch, min(length or long, longest or length or long), chunk) for batch, length, chunk in item.prop.shapes)


def under_every_regime(items: list[Item], profile: Profile) -> list[Item]:
    """However few items a property and a case have, each default config meets each regime by the properties that take every pair."""
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        groups.setdefault((item.prop.label, item.case.name), []).append(item)
    return [item for group in groups.values() for item in _complete(group, profile)]


def _complete(group: list[Item], profile: Profile) -> list[Item]:
    prop, case = group[0].prop, group[0].case
    if not prop.every_pair:
        return group
    met = {(draw.variant, draw.regime) for item in group for draw in draws(item, profile)}
    missing = [(v, r) for v in defaults(prop, case) for r in case.regimes if (v, r) not in met]
    for k, (variant, regime) in enumerate(missing):
        able = [i for i, item in enumerate(group) if regime in regimes(item)]
        if able:
            at = able[k % len(able)]
            draw = Draw(case.name, variant, regime, *lattice(group[at], profile)[0])
            group[at] = dataclasses.replace(group[at], more=(*group[at].more, draw))
    return group
