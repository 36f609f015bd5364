"""Which examples each property is tried on."""

from __future__ import annotations

from unisono_conformance.adapter import Adapter
from unisono_conformance.plan.draws import draws, lattice, regimes, under_every_regime, variants
from unisono_conformance.plan.item import Item, Selection, pairs
from unisono_conformance.plan.profiles import PROFILES, Profile, profile

__all__ = ["PROFILES", "Item", "Profile", "Selection", "draws", "items", "lattice", "profile", "regimes", "variants"]


def items(adapter: Adapter, selection: Selection, profile: Profile, impl: str = "") -> list[Item]:
    """impl: what the adapter was asked for by, for the line that reproduces a failure."""
    return under_every_regime(pairs(adapter, selection, profile, impl), profile)
