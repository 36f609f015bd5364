"""Known gaps: what an implementation's owner says it lacks."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

from unisono_spec.contract.errors import InputError, nearest

from unisono_conformance.plan import Item


@dataclasses.dataclass(frozen=True)
class Gap:
    """One `[[gap]]` of an implementation's known_gaps file: a property that it lacks, where, and why.

    Strict: the session fails once the property holds. Fields that are left out cover everything.
    """

    property: str
    reason: str
    case: str | None = None
    dtype: str | None = None
    form: str | None = None
    implementation: str | None = None
    device: str | None = None

    def covers(self, item: Item) -> bool:
        t = item.target
        found = {"property": item.prop.label, "case": item.case.name, "dtype": t.dtype, "form": t.form}
        found |= {"implementation": t.implementation, "device": t.device}
        return all(getattr(self, name) in (None, value) for name, value in found.items())

    def selectable(self, items: list[Item]) -> bool:
        """Whether the items include the dtype, form, implementation and device that the gap names."""
        names = ("dtype", "form", "implementation", "device")
        return any(all(getattr(self, n) in (None, getattr(i.target, n)) for n in names) for i in items)


def known_gaps(path: Path | None) -> list[Gap]:
    """The gaps in a TOML file; raises InputError on a foreign field or a missing reason."""
    if path is None:
        return []
    gaps, names = [], {f.name for f in dataclasses.fields(Gap)}
    for entry in tomllib.loads(Path(path).read_text("utf-8")).get("gap", []):
        for name in entry:
            if name not in names:
                raise InputError(f"{path}: {name!r} is not a field of a gap; {nearest(name, names)}")
        if not entry.get("property") or not entry.get("reason"):
            raise InputError(f"{path}: a gap without property and reason; give both")
        gaps.append(Gap(**entry))
    return gaps
