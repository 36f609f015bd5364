"""What a judgement says: known gaps in, a JSON report and a table out."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

from unisono_spec.contract.errors import InputError, nearest
from unisono_spec.contract.files import write_bytes

from unisono_conformance.adapter import Adapter
from unisono_conformance.ledger import Ledger, Line
from unisono_conformance.plan import Item, Profile


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
        b = item.bench
        found = {"property": item.prop.label, "case": item.case.name, "dtype": b.dtype, "form": b.form}
        found |= {"implementation": b.implementation, "device": b.device}
        return all(getattr(self, name) in (None, value) for name, value in found.items())

    def selectable(self, items: list[Item]) -> bool:
        """Whether the items include the dtype, form, implementation and device that the gap names."""
        names = ("dtype", "form", "implementation", "device")
        return any(all(getattr(self, n) in (None, getattr(i.bench, n)) for n in names) for i in items)


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


def table(ledger: Ledger) -> list[str]:
    """Property × case, with the worst share of a budget over dtypes and forms, and the number of examples."""
    lines = list(ledger.lines.values())
    cases = list(dict.fromkeys(line.item.case.name for line in lines))
    out = [f"{'':<42}" + "".join(f"{name.rpartition('/')[2]:>22}" for name in cases)]
    for prop in dict.fromkeys(line.item.prop for line in lines):
        row = f"{prop.label:<5} {prop.title:<36}"
        for name in cases:
            row += f"{_cell([line for line in lines if line.item.prop is prop and line.item.case.name == name]):>22}"
        out.append(row)
    examples, failed = sum(line.examples for line in lines), sum(line.outcome in ("failed", "died") for line in lines)
    redrawn = sum(line.redrawn for line in lines)
    again = f", {redrawn} inputs drawn anew" if redrawn else ""
    out.append(f"{examples} examples, {len(lines)} items, {failed} failed{again}; each cell: examples, worst share of the error budget")
    return out


def _cell(lines: list[Line]) -> str:
    if not lines:
        return "·"
    failed = [line for line in lines if line.outcome in ("failed", "died")]
    gaps = [line for line in lines if line.outcome == "known gap"]
    text = f"{sum(line.examples for line in lines)}  {max(line.worst for line in lines):.0%}"
    if failed:
        return f"{len(failed)} FAILED of {len(lines)}"
    return f"{text} ({len(gaps)} gaps)" if gaps else text


def write(path: Path, judged: Adapter, profile: Profile, ledger: Ledger, unmet: list[str], seconds: float) -> None:
    lines = [_line(line) for line in ledger.lines.values()]
    content = {
        "implementation": judged.name,
        "profile": profile.name,
        "capabilities": dataclasses.asdict(judged.capabilities),
        "seconds": round(seconds, 1),
        "unmet": unmet,
        "regimes not met": ledger.regimes_not_met(),
        "lines": lines,
    }
    write_bytes(path, json.dumps(content, indent=1, ensure_ascii=False).encode())


def _line(line: Line) -> dict[str, Any]:
    b = line.item.bench
    where = {"property": line.item.prop.label, "title": line.item.prop.title, "arch": line.item.case.arch, "case": line.item.case.name}
    how = {"dtype": b.dtype, "form": b.form, "implementation": b.implementation, "device": b.device}
    found = {
        "outcome": line.outcome,
        "examples": line.examples,
        "redrawn": line.redrawn,
        "worst": round(line.worst, 4),
        "seconds": round(line.seconds, 2),
    }
    return {**where, **how, **found, **({"message": line.message} if line.message else {})}
