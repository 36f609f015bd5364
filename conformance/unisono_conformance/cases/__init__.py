"""What is judged: one module an architecture, which lists its CASES. A new architecture is one file here."""

from __future__ import annotations

import functools
import importlib

from unisono_spec.contract import ARCHITECTURES
from unisono_spec.contract.errors import InputError, nearest

from unisono_conformance.cases.base import Case


@functools.cache
def cases() -> dict[str, Case]:
    """Every case of every architecture, by name."""
    return {case.name: case for arch in ARCHITECTURES for case in importlib.import_module(f"unisono_conformance.cases.{arch}").CASES}


def case(name: str) -> Case:
    if name not in cases():
        raise InputError(f"case: {name!r} is unknown; {nearest(name, cases())}")
    return cases()[name]
