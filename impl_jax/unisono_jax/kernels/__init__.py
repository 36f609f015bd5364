"""Which implementation of a sequence op runs."""

from __future__ import annotations

from unisono_spec.contract import InputError, nearest
from unisono_spec.contract.errors import shown

IMPLEMENTATIONS = ("auto", "plain")


def resolve(implementation: str) -> str:
    """ "plain"; raises InputError where `implementation` is unknown."""
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"implementation: {shown(implementation)} is unknown; {nearest(implementation, IMPLEMENTATIONS)}")
    return "plain"
