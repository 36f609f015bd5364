"""Tasks: examples of which a model reads every token and is asked for few. Each file of this folder holds one, under its name."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from unisono_spec.contract import InputError, nearest
from unisono_spec.contract.plain import build

from unisono_tools.tasks.base import Examples, Task

__all__ = ["Examples", "Task", "names", "open_task"]


@functools.cache
def names() -> tuple[str, ...]:
    """Every task that there is."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base"))


def open_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task of that name. options: what differs from its published parameters. InputError where either is unknown or does not fit."""
    if name not in names():
        raise InputError(f"data.task: {name!r} is unknown; {nearest(name, names())}")
    kind: type[Task] = importlib.import_module(f"unisono_tools.tasks.{name}").TASK
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"{name}: TASK is no dataclass")
    return build(kind, dict(options or {}), "data.task_options")
