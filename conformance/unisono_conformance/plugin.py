"""The court as a pytest plugin: `python -m pytest -p unisono_conformance.plugin --pyargs unisono_conformance --impl NAME`.

It is loaded by name and is no entry point, so that an installed unisono changes nobody's pytest.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest
from unisono_spec.contract.errors import InputError

from unisono_conformance import adapter, plan
from unisono_conformance.judging import truth
from unisono_conformance.report import summary
from unisono_conformance.report.gaps import Gap, known_gaps
from unisono_conformance.report.ledger import Ledger, Result

NARROWING = ("keyword", "markexpr", "deselect", "lf", "failedfirst", "collectonly", "maxfail")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("unisono", "the court of unisono")
    group.addoption("--impl", help="numpy, jax, torch, onnx, or package.module:factory")
    group.addoption("--arch", help="judge this architecture only")
    group.addoption("--device", help="where models are built; the first that the implementation declares")
    group.addoption("--dtype", help="judge this compute dtype only")
    group.addoption("--form", help="judge this form only")
    group.addoption("--implementation", help="which kernels; the first that the implementation declares")
    group.addoption("--profile", default="dev", help=f"how much is tried: {', '.join(plan.PROFILES)}")
    group.addoption("--truth", type=Path, help="folder that keeps what the spec says, for later runs: most of the time is the spec's")
    group.addoption("--report", type=Path, help="write the judgement as JSON")


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if option.impl is None:
        return  # `pytest -p … --help` and plain runs; the suite itself asks for --impl
    try:
        judged = adapter.load(option.impl)
        profile = plan.profile(option.profile)
        selection = plan.Selection(option.arch, option.device, option.dtype, option.form, option.implementation)
        items = plan.items(judged, selection, profile, option.impl)
        gaps = known_gaps(judged.known_gaps)
        truth.keep_in(option.truth)
    except InputError as error:
        raise pytest.UsageError(str(error)) from error
    for line in ("error", *judged.warnings):
        config.addinivalue_line("filterwarnings", line)
    config.pluginmanager.register(Judgement(judged, profile, items, gaps), "unisono-judgement")


def pytest_unconfigure(config: pytest.Config) -> None:
    truth.keep_in(None)


class Judgement:
    """One session's judgement of one implementation."""

    def __init__(self, judged: adapter.Adapter, profile: plan.Profile, items: list[plan.Item], gaps: list[Gap]) -> None:
        self.judged, self.profile, self.items, self.gaps = judged, profile, items, gaps
        self.ledger, self.unmet, self.start = Ledger(), [], time.perf_counter()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "item" in metafunc.fixturenames:
            metafunc.parametrize("item", [self._parameter(item) for item in self.items])
            metafunc.parametrize("profile", [pytest.param(self.profile, id=self.profile.name)])
            metafunc.parametrize("ledger", [pytest.param(self.ledger, id="")])

    def pytest_collection_finish(self) -> None:
        """Frameworks' own objects live as long as the process: to look through them again and again takes a twentieth of it."""
        gc.freeze()
        gc.set_threshold(10_000, 20, 50)

    def _parameter(self, item: plan.Item):
        reasons = [gap.reason for gap in self.gaps if gap.covers(item)]
        marks = [pytest.mark.xfail(strict=True, reason=reasons[0], raises=AssertionError)] if reasons else []
        return pytest.param(item, id=item.id, marks=marks)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """To die is a verdict: the report says so of the item in hand, until that is judged."""
        result = self._result(item)
        if result is not None:
            result.outcome, result.message = "died", "the process ended while this was judged"
            self._write(item.config)

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> None:
        result = self._result(item)
        if result is None or call.when != "call":
            return
        result.seconds, result.outcome, result.message = call.duration, "passed", ""
        if call.excinfo is not None:
            result.outcome = "known gap" if any(gap.covers(result.item) for gap in self.gaps) else "failed"
            result.message = str(call.excinfo.value)

    def _result(self, item: pytest.Item) -> Result | None:
        judged = getattr(item, "callspec", None) and item.callspec.params.get("item")  # pyright: ignore[reportAttributeAccessIssue]
        return None if judged is None else self.ledger.result(judged)

    def _write(self, config: pytest.Config) -> None:
        if config.option.report is not None:
            summary.write(config.option.report, self.judged, self.profile, self.ledger, self.unmet, time.perf_counter() - self.start)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        option = session.config.option
        narrowed = any(getattr(option, name, None) for name in NARROWING) or any("::" in str(a) for a in session.config.args)
        if narrowed or session.shouldstop or exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return
        stale = [gap for gap in self.gaps if not any(gap.covers(item) for item in self.items)]
        self.unmet = self.ledger.unmet(self.items, whole=not (option.dtype or option.form), arch=option.arch) + [
            f"known gap that covers nothing: {gap}" for gap in stale if gap.selectable(self.items)
        ]
        if self.unmet:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        seconds = time.perf_counter() - self.start
        terminalreporter.section(f"judgement of {self.judged.name} ({self.profile.name}, {seconds:.0f} s)")
        for line in summary.table(self.ledger):
            terminalreporter.line(line)
        for what in self.ledger.regimes_not_met():
            terminalreporter.line(f"regimes not met: {what}")
        for what in self.unmet:
            terminalreporter.line(f"ERROR: declared, but no example: {what}", red=True)
        self._write(config)
