"""The judgement as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path
from typing import Any

from unisono_spec.contract.files import write_bytes

from unisono_conformance.adapter import Adapter
from unisono_conformance.plan import Profile
from unisono_conformance.report.ledger import Ledger, Result


def table(ledger: Ledger) -> list[str]:
    """Property × case, with the worst share of a budget over dtypes and forms, and the number of examples."""
    results = list(ledger.results.values())
    cases = list(dict.fromkeys(r.item.case.name for r in results))
    out = [f"{'':<42}" + "".join(f"{name.rpartition('/')[2]:>22}" for name in cases)]
    for prop in dict.fromkeys(r.item.prop for r in results):
        row = f"{prop.label:<5} {prop.title:<36}"
        for name in cases:
            row += f"{_cell([r for r in results if r.item.prop is prop and r.item.case.name == name]):>22}"
        out.append(row)
    examples, failed = sum(r.examples for r in results), sum(r.outcome in ("failed", "died") for r in results)
    redrawn = sum(r.redrawn for r in results)
    again = f", {redrawn} inputs drawn anew" if redrawn else ""
    out.append(f"{examples} examples, {len(results)} items, {failed} failed{again}; each cell: examples, worst share of the error budget")
    return out


def _cell(results: list[Result]) -> str:
    if not results:
        return "·"
    failed = [r for r in results if r.outcome in ("failed", "died")]
    gaps = [r for r in results if r.outcome == "known gap"]
    text = f"{sum(r.examples for r in results)}  {max(r.worst for r in results):.0%}"
    if failed:
        return f"{len(failed)} FAILED of {len(results)}"
    return f"{text} ({len(gaps)} gaps)" if gaps else text


def write(path: Path, judged: Adapter, profile: Profile, ledger: Ledger, unmet: list[str], seconds: float) -> None:
    content = {
        "implementation": judged.name,
        "profile": profile.name,
        "capabilities": dataclasses.asdict(judged.capabilities),
        "seconds": round(seconds, 1),
        "unmet": unmet,
        "regimes not met": ledger.regimes_not_met(),
    }
    head = _json(content).removesuffix("\n}")
    lines = ",\n".join(_line(result) for result in ledger.results.values())
    write_bytes(path, f'{head},\n "lines": [\n{lines}\n ]\n}}'.encode())


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False)


def _line(result: Result) -> str:
    """Made once a change: a report is written before each item."""
    state = (result.outcome, result.examples, result.redrawn, result.worst, result.seconds, result.message)
    if result.line[:1] != (state,):
        result.line = state, textwrap.indent(_json(_entry(result)), "  ")
    return result.line[1]


def _entry(result: Result) -> dict[str, Any]:
    item, t = result.item, result.item.target
    where = {"property": item.prop.label, "title": item.prop.title, "arch": item.case.arch, "case": item.case.name}
    how = {"dtype": t.dtype, "form": t.form, "implementation": t.implementation, "device": t.device}
    found = {
        "outcome": result.outcome,
        "examples": result.examples,
        "redrawn": result.redrawn,
        "worst": round(result.worst, 4),
        "seconds": round(result.seconds, 2),
    }
    return {**where, **how, **found, **({"message": result.message} if result.message else {})}
