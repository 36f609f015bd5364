"""What was tried, and how close it came: filled by `judge`, read by the report."""

from __future__ import annotations

import dataclasses
import time

from unisono_conformance.cases import cases
from unisono_conformance.cases.draw import Draw
from unisono_conformance.judging import numerics
from unisono_conformance.judging.trial import Trial
from unisono_conformance.plan import Item, Profile, draws, regimes

SEEDS = 4  # that a draw may take until its inputs say enough


@dataclasses.dataclass
class Result:
    """One item's outcome. worst: the largest share of a budget that an error took, over its examples. redrawn: how many inputs said too
    little, so that others were drawn."""

    item: Item
    examples: int = 0
    redrawn: int = 0
    worst: float = 0.0
    seconds: float = 0.0
    outcome: str = "passed"
    message: str = ""
    line: tuple = ()  # the report's, after what it tells of


class Ledger:
    def __init__(self) -> None:
        self.results: dict[str, Result] = {}
        self.met: set[tuple[str, str]] = set()  # capabilities that an example met
        self.regimes: dict[tuple[str, str], set[str]] = {}  # by property and case, those that an example met

    def result(self, item: Item) -> Result:
        return self.results.setdefault(item.id, Result(item))

    def record(self, item: Item, draw: Draw, worst: float) -> None:
        result, t = self.result(item), item.target
        result.examples += 1
        result.worst = max(result.worst, worst)
        self.regimes.setdefault((item.prop.label, item.case.name), set()).add(draw.regime)
        self.met |= {("dtype", t.dtype), ("form", t.form), ("device", t.device), ("implementation", t.implementation)}
        self.met |= {(item.case.level, item.case.name.rpartition("/")[2])}
        self.met |= {("claim", claim) for claim in item.prop.claims}

    def regimes_not_met(self) -> list[str]:
        """Of the properties that are to meet every regime, and did not."""
        items = {(i.prop.label, i.case.name): i for i in (result.item for result in self.results.values()) if i.prop.every_pair}
        left = {key: [r for r in regimes(i) if r not in self.regimes.get(key, set())] for key, i in items.items()}
        return [f"{label} of {case}: {', '.join(names)}" for (label, case), names in left.items() if names]

    def unmet(self, items: list[Item], whole: bool = True, arch: str | None = None) -> list[str]:
        """Capabilities that the items' implementation declares, within what was selected, and that no example met.

        whole: all dtypes and forms were selected; claims are met under some of them only. arch: the only one selected.
        """
        if not items:
            return ["nothing: no property was collected"]
        can = items[0].target.adapter.capabilities
        claims = [name for name in ("step", "compiled", "exported", "empty_batch") if getattr(can, name)]
        claims += ["gradient"] if any(i.target.form in can.gradient_forms for i in items) else []
        wanted = {("claim", name) for name in claims if whole}
        of = {case.name.rpartition("/")[2]: case.arch for case in cases().values()}
        served = can.narrower.get(items[0].target.implementation, (*can.models, *can.ops))
        wanted |= {("model", m) for m in can.models if arch in (None, m) and m in served}
        wanted |= {("op", o) for o in can.ops if arch in (None, of.get(o)) and o in served}
        wanted |= {(k, getattr(i.target, k)) for i in items for k in ("dtype", "form", "device", "implementation")}
        return sorted(f"{kind} {name}" for kind, name in wanted - self.met)


def judge(item: Item, profile: Profile, ledger: Ledger) -> None:
    """Try the item's planned draws; raises Disagreement at the first that fails."""
    start = time.perf_counter()
    try:
        for draw in draws(item, profile):
            judge_one(item, draw, ledger)
    finally:
        ledger.result(item).seconds += time.perf_counter() - start


def judge_one(item: Item, draw: Draw, ledger: Ledger) -> None:
    result = ledger.result(item)
    try:
        trial = _judged(item, draw, result)
    except BaseException:
        result.examples += 1
        raise
    ledger.record(item, draw, trial.worst)


def _judged(item: Item, draw: Draw, result: Result) -> Trial:
    """Inputs that say too little in their dtype are drawn anew. The spec alone decides that, not the implementation."""
    for seed in range(draw.seed, draw.seed + SEEDS - 1):
        try:
            return item.prop.judge(item.target, dataclasses.replace(draw, seed=seed))
        except numerics.BudgetError:
            result.redrawn += 1
    return item.prop.judge(item.target, dataclasses.replace(draw, seed=draw.seed + SEEDS - 1))
