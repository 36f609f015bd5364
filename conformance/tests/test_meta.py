"""The suite judges itself: every sabotaged implementation must be caught, by the property that is aimed at it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from unisono_conformance.sabotage import Sabotage, control, sabotages, table, verdict
from unisono_spec.contract import ARCHITECTURES
from unisono_spec.contract.files import write_bytes
from unisono_spec.ops import decayed_sum

SABOTAGES, VERDICTS = sabotages(), []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_honest_implementation_passes(arch: str) -> None:
    assert control(arch)


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda s: f"{s.arch}: {s.name}")
def test_caught(sabotage, every_property: bool) -> None:
    found = verdict(sabotage, every_property)
    VERDICTS.append(found)
    assert sabotage.aimed not in found.died, found.died[sabotage.aimed]
    assert sabotage.aimed in found.examples, f"{sabotage.aimed} let it pass; caught by {sorted(found.examples) or 'nothing'}"


def test_a_mistake_that_dies_of_another_is_not_caught() -> None:
    """Unless it declares so: an argument that was renamed shows nothing about a mistake."""
    found = verdict(renamed := Sabotage("takes no chunk_size", "P1", ((decayed_sum, "parallel", lambda x: (x, x)),), arch="cram"))
    assert not found.examples
    assert "it died of TypeError" in found.died["P1"]
    assert verdict(dataclasses.replace(renamed, dies=TypeError)).examples == {"P1": 1}


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Which property caught which mistake, and after how many examples: in the terminal, and beside the other reports as JSON."""
    assert len(VERDICTS) == len(SABOTAGES)
    with capsys.disabled():
        print("\n" + "\n".join(table(VERDICTS)))
    content = [
        {"architecture": v.sabotage.arch, "mistake": v.sabotage.name, "aimed": v.sabotage.aimed, "caught by": v.examples} for v in VERDICTS
    ]
    write_bytes(Path("build/reports/meta.json"), json.dumps(content, indent=1, ensure_ascii=False).encode())
