"""Which implementation of a sequence op runs."""

from __future__ import annotations

from unisono_spec.contract import InputError, nearest

IMPLEMENTATIONS = ("auto", "plain")


def resolve(implementation: str) -> str:
    """ "plain"; raises InputError where `implementation` is unknown."""
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"implementation: {implementation!r} is unknown; {nearest(implementation, IMPLEMENTATIONS)}")
    return "plain"
