"""Which examples each property is tried on."""

from __future__ import annotations

import dataclasses

from unisono_spec.contract.errors import InputError, shown

from unisono_conformance.adapter import Adapter
from unisono_conformance.plan.draws import draws, lattice, regimes, under_every_regime, variants
from unisono_conformance.plan.item import Item, Selection, pairs
from unisono_conformance.plan.profiles import PROFILES, Profile, profile

__all__ = ["PROFILES", "Item", "Profile", "Selection", "draws", "items", "lattice", "profile", "regimes", "variants"]


def items(adapter: Adapter, selection: Selection, profile: Profile, impl: str = "") -> list[Item]:
    """impl: what the adapter was asked for by, for the line that reproduces a failure. Raises InputError where nothing is left."""
    found = under_every_regime(pairs(adapter, selection, profile, impl), profile)
    if not found:
        asked = ", ".join(f"{name}: {shown(value)}" for name, value in dataclasses.asdict(selection).items() if value is not None)
        raise InputError(f"{asked}: together they leave nothing to judge of {adapter.name}; ask for fewer of them")
    return found
