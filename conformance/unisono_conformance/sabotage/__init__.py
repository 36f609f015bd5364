"""Implementations with one planted mistake each. A suite that lets one pass proves nothing: `conformance/tests/test_meta.py`.

Each is the NumPy adapter with a few functions of the spec replaced while the adapter runs; the truth is computed outside.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from unisono_spec.contract import ARCHITECTURES

from unisono_conformance.adapter import Arrays, Gradients
from unisono_conformance.adapters import numpy as house
from unisono_conformance.judging.judge import Disagreement
from unisono_conformance.judging.patches import Patch, patched
from unisono_conformance.judging.trial import Died
from unisono_conformance.plan import PROFILES, Item, Selection, items
from unisono_conformance.report.ledger import Ledger, judge


@dataclasses.dataclass(frozen=True)
class Sabotage:
    """A mistake in one architecture, which `sabotages` fills in.

    aimed: the property that exists to find it, and must. patches: replaced whenever the adapter runs.
    """

    name: str
    aimed: str
    patches: tuple[Patch, ...] = ()
    dtype: str = "float32"
    form: str = "parallel"
    model: Callable[[Any], Any] | None = None  # wraps the adapter's models
    adapter: Callable[[Adapter], Any] | None = None  # changes the adapter itself
    arch: str = ""
    dies: type[Exception] | None = None  # of which the implementation dies, where that is the mistake

    def make(self) -> Adapter:
        made = Adapter(self)
        if self.adapter is not None:
            self.adapter(made)
        return made

    def at_work(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` with the mistake inside."""

        def run(*args: Any, **kwargs: Any) -> Any:
            # wrong numbers are to be seen, not NumPy's warning of them
            with patched(self.patches), np.errstate(all="ignore"):
                return call(*args, **kwargs)

        return run


class Adapter(house.Adapter):
    """The NumPy adapter with `sabotage` at work inside."""

    def __init__(self, sabotage: Sabotage) -> None:
        self.sabotage, self.name = sabotage, f"sabotaged: {sabotage.name}"

    def build(self, config, params, dtype, device, implementation):
        model = super().build(config, params, dtype, device, implementation)
        if self.sabotage.model is not None:
            model = self.sabotage.model(model)
        return _Patched(model, self.sabotage)

    def op(self, *args, **kwargs):
        return self.sabotage.at_work(super().op)(*args, **kwargs)

    def op_vjp(self, *args, **kwargs):
        o, last, slopes = self.sabotage.at_work(super().op_vjp)(*args, **kwargs)
        return o, last, self.sabotage.at_work(slopes)


class _Patched:
    def __init__(self, model: Any, sabotage: Sabotage) -> None:
        self._model, self._sabotage = model, sabotage

    def __getattr__(self, name: str) -> Any:
        return self._sabotage.at_work(getattr(self._model, name))

    def vjp(self, *args, **kwargs):
        found = self._sabotage.at_work(self._model.vjp)(*args, **kwargs)
        return dataclasses.replace(found, slopes=self._sabotage.at_work(found.slopes))


def without(g: Gradients, cut: Callable[[str, str], bool]) -> Gradients:
    """`g` where those of the arrays (kind, name) that are `cut` are missing."""

    def along(kind: str, directions: Arrays) -> np.ndarray:
        return g.along(kind, {n: np.zeros_like(v) if cut(kind, n) else v for n, v in directions.items()})

    return dataclasses.replace(g, slopes=along)


def sabotages() -> list[Sabotage]:
    """Every mistake of every architecture: SABOTAGES of the module of its name, and those of wiring."""
    wiring = importlib.import_module("unisono_conformance.sabotage.wiring")
    modules = ((arch, importlib.import_module(f"unisono_conformance.sabotage.{arch}")) for arch in ARCHITECTURES)
    return [dataclasses.replace(s, arch=arch) for arch, module in modules for s in (*module.SABOTAGES, *wiring.sabotages(arch))]


@dataclasses.dataclass
class Verdict:
    """By property: examples, how many it took to catch the mistake; messages, what it said; died, what the mistake undeclared died of."""

    sabotage: Sabotage
    examples: dict[str, int] = dataclasses.field(default_factory=dict)
    messages: dict[str, str] = dataclasses.field(default_factory=dict)
    died: dict[str, str] = dataclasses.field(default_factory=dict)


def verdict(sabotage: Sabotage, every: bool = False) -> Verdict:
    """The property aimed at the mistake (or with `every`, each) judges the sabotaged implementation, up to the first example it fails."""
    out, profile = Verdict(sabotage), PROFILES["meta"]
    selection = Selection(arch=sabotage.arch, dtype=sabotage.dtype, form=sabotage.form)
    everything = items(sabotage.make(), selection, profile)  # pyright: ignore[reportArgumentType]
    for label in dict.fromkeys(item.prop.label for item in everything):
        if label != sabotage.aimed and not every:
            continue
        ledger = Ledger()
        try:
            for item in everything:
                if item.prop.label == label:
                    judge(item, profile, ledger)
        except (Disagreement, Died) as error:
            # a mistake that dies of something else was not planted as it was meant, and has shown nothing
            if isinstance(error, Died) and not (sabotage.dies and isinstance(error.__cause__, sabotage.dies)):
                out.died[label] = str(error)
                continue
            out.examples[label] = sum(result.examples for result in ledger.results.values())
            out.messages[label] = str(error)
    return out


def control(arch: str) -> list[Item]:
    """The items by which mistakes in `arch` are to be found; the honest implementation must pass them all. Raises Disagreement."""
    profile, faced = PROFILES["meta"], {}
    for sabotage in sabotages():
        if sabotage.arch == arch:
            selection = Selection(arch=arch, dtype=sabotage.dtype, form=sabotage.form)
            every = items(house.make(), selection, profile)  # pyright: ignore[reportArgumentType]
            faced |= {item.id: item for item in every if item.prop.label == sabotage.aimed}
    for item in faced.values():
        judge(item, profile, Ledger())
    return list(faced.values())


def table(verdicts: list[Verdict]) -> list[str]:
    """The mistakes, the property aimed at each with the examples it took, and the others that caught it."""
    out = [f"{'in':<15} {'mistake':<52} {'aimed at by':>12} {'examples':>9}   also caught by"]
    for v in verdicts:
        also = ", ".join(f"{label} ({n})" for label, n in v.examples.items() if label != v.sabotage.aimed)
        examples = v.examples.get(v.sabotage.aimed, "-")
        out.append(f"{v.sabotage.arch:<15} {v.sabotage.name:<52} {v.sabotage.aimed:>12} {examples:>9}   {also}")
    return out
