"""The properties P1 … P18 of docs/conformance.md. P13's laws stand with their case."""

from __future__ import annotations

from unisono_spec.contract.errors import InputError, nearest

from unisono_conformance.properties import arguments, contract, dependence, gradients, limits, marks, values
from unisono_conformance.properties.base import Property

__all__ = ["PROPERTIES", "Property", "find"]


def _order(p: Property) -> tuple[int, str]:
    return int("".join(c for c in p.label if c.isdigit())), p.label


PROPERTIES: tuple[Property, ...] = tuple(
    sorted((p for module in (arguments, contract, dependence, gradients, limits, marks, values) for p in module.PROPERTIES), key=_order)
)


def find(label: str) -> Property:
    for p in PROPERTIES:
        if p.label == label:
            return p
    raise InputError(f"property: {label!r} is unknown; {nearest(label, [p.label for p in PROPERTIES])}")
