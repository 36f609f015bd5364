"""What a room's registry of implementations says of each: which op, by what means, where, in which dtypes, widths and settings.

A room's `kernels/registry.py` lists them; its ops (`implementation=`), the court's adapter, the benchmarks and docs/kernels.md read that
list. Data: reading it needs no compiler of kernels and no GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

PLAIN = "plain"


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One implementation of an op.

    dtypes: of its inputs, as the room's framework has them. widths: by axis (K, V), the least and the most. settings: what else it takes,
    by argument; an argument that is not named here may be anything. how: by what means. devices: what it runs on.
    """

    op: str
    name: str
    dtypes: tuple[Any, ...]
    widths: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, tuple[object, ...]] = dataclasses.field(default_factory=dict)
    how: str = ""
    devices: str = "any"

    def why_not(self, dtype: Any, widths: Mapping[str, int], settings: Mapping[str, object]) -> str | None:
        """Why it cannot serve such a call, and what would help; None where it can."""
        if dtype not in self.dtypes:
            return f"{self.name!r} serves {self.op} in {_names(self.dtypes)}, not in {_names((dtype,))}; use 'auto' or 'plain'"
        for axis, (least, most) in self.widths.items():
            if not least <= widths[axis] <= most:
                return f"{self.name!r} serves {self.op} with {axis} from {least} to {most}, not {widths[axis]}; use 'auto' or 'plain'"
        for name, values in self.settings.items():
            if settings[name] not in values:
                return f"{self.name!r} serves {self.op} with {name} of {values}, not {settings[name]!r}; use 'auto' or 'plain'"
        return None


def plain(how: Mapping[str, str], dtypes: tuple[Any, ...]) -> tuple[Implementation, ...]:
    """The implementation that every op has: by op, its means."""
    return tuple(Implementation(op, PLAIN, dtypes, how=means) for op, means in how.items())


def choices(registry: Iterable[Implementation]) -> tuple[str, ...]:
    """What `implementation=` may be."""
    return ("auto", *dict.fromkeys(each.name for each in registry))


def served(registry: Iterable[Implementation], name: str) -> dict[str, tuple[str, ...]]:
    """The ops that have the implementation `name`, with the names of their dtypes."""
    return {each.op: tuple(map(_name, each.dtypes)) for each in registry if each.name == name}


def dtypes(registry: Iterable[Implementation]) -> tuple[str, ...]:
    """The names of all dtypes that an op is served in."""
    return tuple(dict.fromkeys(_name(dtype) for each in registry for dtype in each.dtypes))


def table(registry: Iterable[Implementation]) -> str:
    """In Markdown."""
    lines = ["| op | implementation | by | devices | dtypes | widths | settings |", "|---|---|---|---|---|---|---|"]
    for each in registry:
        widths = ", ".join(f"{axis} {least}–{most}" for axis, (least, most) in each.widths.items()) or "any"
        settings = "; ".join(f"{name}: {', '.join(map(str, values))}" for name, values in each.settings.items()) or "any"
        lines.append(f"| `{each.op}` | {each.name} | {each.how} | {each.devices} | {_names(each.dtypes)} | {widths} | {settings} |")
    return "\n".join(lines)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[Any, ...]) -> str:
    return ", ".join(map(_name, dtypes))
