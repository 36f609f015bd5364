"""What is judged: one module an architecture, which lists its CASES. A new architecture is one file here."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable

from unisono_spec.contract import ARCHITECTURES
from unisono_spec.contract.errors import InputError, nearest
from unisono_spec.contract.implementations import PLAIN, Implementation

from unisono_conformance.cases.base import Case, OpCase


@functools.cache
def cases() -> dict[str, Case]:
    """Every case of every architecture, by name."""
    return {case.name: case for arch in ARCHITECTURES for case in importlib.import_module(f"unisono_conformance.cases.{arch}").CASES}


def case(name: str) -> Case:
    if name not in cases():
        raise InputError(f"case: {name!r} is unknown; {nearest(name, cases())}")
    return cases()[name]


def ops(registry: Iterable[Implementation] = ()) -> tuple[str, ...]:
    """The ops that are judged by themselves, too; of those `for_kernels`, where a room's registry has one."""
    kernels = {each.op for each in registry if each.name != PLAIN}
    return tuple(case.op for case in cases().values() if isinstance(case, OpCase) and (case.op in kernels or not case.for_kernels))
