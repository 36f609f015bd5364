"""The court as a command: whom it judges, when it fails, and that the documented example works."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from unisono_conformance import plan
from unisono_conformance.adapter import load
from unisono_conformance.cases import cases
from unisono_conformance.plan import Selection
from unisono_conformance.plan.__main__ import written
from unisono_conformance.report.gaps import known_gaps
from unisono_spec.contract.errors import InputError

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PROBE = '''
import dataclasses
import os
from pathlib import Path
from typing import Any
from own_implementation import Adapter, Capabilities

def wrong():
    made = Adapter()
    op = made.op
    made.op = lambda *a: tuple(o * (1 + 1e-3) for o in op(*a))
    return made

def braggart():
    """Claims a compiled form of models that it does not have."""
    made = Adapter()
    made.capabilities = dataclasses.replace(made.capabilities, compiled=True)
    return made

class Quadratic(Adapter):
    """Holds a matrix of every pair of tokens: beyond 60 of them its process is killed."""

    def op(self, name, form, arrays, *more):
        if arrays["x"].shape[1] > 60:
            os._exit(9)
        return super().op(name, form, arrays, *more)

def honest():
    made = Quadratic()
    made.capabilities = dataclasses.replace(made.capabilities, longest=60)
    return made

def gap():
    """Its known gap has been closed."""
    made = Adapter()
    made.known_gaps = Path(__file__).with_name("gaps.toml")
    return made
'''


def court(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    (folder / "probe.py").write_text(PROBE)
    command = [sys.executable, "-m", "pytest", "-p", "unisono_conformance.plugin", "--pyargs", "unisono_conformance", *args]
    path = f"import sys; sys.path[:0] = {[str(EXAMPLES), str(folder)]!r}; import runpy; sys.argv = {command[2:]!r}; "
    return subprocess.run(
        [sys.executable, "-c", path + "runpy.run_module('pytest', run_name='__main__')"],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )


def test_example_in_the_docs(tmp_path: Path) -> None:
    done = court(tmp_path, "--impl", "own_implementation:make", "--report", "report.json")
    assert done.returncode == 0, done.stdout
    lines = json.loads((tmp_path / "report.json").read_text())["lines"]
    assert {line["outcome"] for line in lines} == {"passed"}
    assert {line["property"] for line in lines} >= {"P1", "P2", "P3", "P5", "P6", "P9", "P10", "P11", "P13", "P15", "P16", "P17"}


def test_wrong_implementation_fails_with_a_line_that_reproduces_it(tmp_path: Path) -> None:
    done = court(tmp_path, "--impl", "probe:wrong", "-k", "P1-", "--form", "parallel")
    assert done.returncode == 1
    assert "P1 equals the spec (docs/conformance.md#p1)" in done.stdout
    assert "reproduce: python -m unisono_conformance.replay --impl probe:wrong --property P1 " in done.stdout


def test_to_die_is_a_verdict(tmp_path: Path) -> None:
    args = ("-k", "P10-", "--dtype", "float32", "--report", "report.json")
    assert court(tmp_path, "--impl", "probe:Quadratic", *args).returncode == 9
    (line,) = json.loads((tmp_path / "report.json").read_text())["lines"]
    assert (line["property"], line["outcome"]) == ("P10", "died")
    done = court(tmp_path, "--impl", "probe:honest", *args)
    assert done.returncode == 0, done.stdout


def test_declared_capability_without_an_example_fails(tmp_path: Path) -> None:
    done = court(tmp_path, "--impl", "probe:braggart")
    assert done.returncode == 1
    assert "declared, but no example: claim compiled" in done.stdout


def test_closed_gap_fails(tmp_path: Path) -> None:
    (tmp_path / "gaps.toml").write_text('[[gap]]\nproperty = "P16"\nreason = "once it summed in another order each time"\n')
    done = court(tmp_path, "--impl", "probe:gap")
    assert done.returncode == 1
    assert "XPASS(strict)" in done.stdout


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("--impl", "nunpy"), "did you mean 'numpy'"),
        (("--impl", "no_such_package:make"), "cannot be loaded"),
        (("--impl", "os:path"), "gives a module without name, capabilities"),
        (("--impl", "numpy", "--profile", "cli"), "did you mean 'ci'"),
        (("--impl", "numpy", "--dtype", "bfloat16"), "not declared"),
        ((), "whom to judge"),
    ],
)
def test_bad_calls_are_errors(tmp_path: Path, args: tuple[str, ...], word: str) -> None:
    done = court(tmp_path, *args)
    assert done.returncode not in (0, 5)
    assert word in done.stdout + done.stderr


def test_gaps_need_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "gaps.toml"
    path.write_text('[[gap]]\nproperty = "P1"\n')
    with pytest.raises(InputError, match="give both"):
        known_gaps(path)
    path.write_text('[[gap]]\nproperty = "P1"\nreason = "r"\ndtpye = "float32"\n')
    with pytest.raises(InputError, match="did you mean 'dtype'"):
        known_gaps(path)


@pytest.mark.parametrize("name", ["dev", "ci"])
@pytest.mark.parametrize(
    "declared",
    [{}, {"spec": False}, {"exported": True, "gradient_forms": ()}, {"dear": ("plain",)}],
    ids=["the spec", "another", "graphs", "compiled"],
)
def test_every_regime_is_met_however_little_is_declared(name: str, declared: dict[str, Any]) -> None:
    """With one dtype and one form: by outputs, by gradients, and by resets beside padding."""
    judged, profile = load("numpy"), plan.profile(name)
    ops = tuple(case.name.rpartition("/")[2] for case in cases().values() if case.level == "op")
    judged.capabilities = dataclasses.replace(judged.capabilities, ops=ops, **declared)
    items = plan.items(judged, Selection(dtype="float32", form="parallel"), profile)
    for label in ("P1", "P7", "P15") if judged.capabilities.gradient_forms else ("P1", "P15"):
        for case in cases().values():
            mine = [item for item in items if item.prop.label == label and item.case is case]
            met = {draw.regime for item in mine for draw in plan.draws(item, profile)}
            wanted = {r for r in case.regimes if "float32" not in case.too_narrow.get(r, ()) and (r != "dropout" or label == "P1")}
            assert met >= wanted, (label, case.name)


def test_the_page_has_the_plan_s_table() -> None:
    page = (Path(__file__).parents[2] / "docs/conformance.md").read_text("utf-8")
    assert written(page) == page, "python -m unisono_conformance.plan docs/conformance.md"


def test_selection_names_what_is_declared() -> None:
    with pytest.raises(InputError, match="cpu"):
        Selection(device="cuda").of(load("numpy").capabilities)


def test_a_selection_of_nothing_is_told() -> None:
    judged = load("numpy")
    judged.capabilities = dataclasses.replace(judged.capabilities, models=("lat",), ops=())
    with pytest.raises(InputError, match="arch: 'maru'"):
        plan.items(judged, Selection(arch="maru"), plan.profile("dev"))
