"""What a published config says: values by name, each checked, and the tensors that follow from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from unisono_spec.contract.base import MAX_SIZE, Arrays, Config
from unisono_spec.contract.errors import InputError, nearest, shown

T = TypeVar("T", int, float, bool, str)
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """config: ours. tensors: the shape of each by its published name. make: from them our parameters.

    tied: the names of the embedding and of a head that is the same matrix, where it is; the file may then lack either.
    """

    config: Config
    naming: str
    tensors: Mapping[str, Shape]
    make: Callable[[Arrays], Arrays]
    tied: tuple[str, str] | None = None


class Settings:
    """The values of a config.json. One that is missing or null has its library's default."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def fail(self, name: str, why: str, remedy: str) -> InputError:
        return InputError(f"{self.source}: {name}: {shown(self.values.get(name))}; {why}; {remedy}")

    def integer(self, name: str, default: int | None = None, least: int = 1, most: int = MAX_SIZE) -> int:
        value = self._value(name, default, int)
        if not least <= value <= most:
            raise self.fail(name, f"not from {least} to {most}", "restore the file")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._value(name, default, (int, float))
        if not abs(value) <= MAX_SIZE:
            raise self.fail(name, "out of bounds", "restore the file")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        return self._value(name, default, bool)

    def inner(self, name: str) -> Settings:
        """The mapping `name`; empty where there is none."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.fail(name, "not names with values", "restore the file")
        return Settings(value or {}, f"{self.source}: {name}")

    def must(self, name: str, *allowed: Any, why: str, remedy: str = "train or take one that has it so") -> None:
        """Raise InputError unless `name` is one of `allowed`, or is missing."""
        value = self.values.get(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
            raise self.fail(name, why, remedy)

    def known(self, *names: str) -> None:
        """Raise InputError where there is a name beside `names`: it might change what is computed."""
        for name in self.values:
            if name not in names:
                raise InputError(f"{self.source}: {shown(name)} is not known here; {nearest(name, names)}")

    def _value(self, name: str, default: Any, kind: Any) -> Any:
        value = default if self.values.get(name) is None else self.values[name]
        if value is None:
            raise InputError(f"{self.source}: {name}: missing; restore the file, or give the config.json of a published checkpoint")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.fail(name, f"of type {type(value).__name__}", "restore the file")
        return value
