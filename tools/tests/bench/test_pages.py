"""Pages to which a hand has added words: every row of their tables is what the numbers beside them make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from unisono_tools.bench import based, decode, gru, head, models, onnx, peers, scan, ssm, stability

RESULTS = Path(__file__).parents[3] / "docs/results"


def _onnx(content: dict[str, Any]) -> str:
    return onnx.markdown(content["run"], [onnx.Row(**row) for row in content["rows"]])


def _peers(content: dict[str, Any]) -> str:
    return peers.markdown(content["run"], {name: [peers.Row(**row) for row in rows] for name, rows in content["cases"].items()})


PAGES: dict[str, Callable[[dict[str, Any]], str]] = {
    "decode-h100": decode.markdown,
    "decode-h200": decode.markdown,
    "kernels-based-h200": based.markdown,
    "kernels-gru-h100": gru.markdown,
    "kernels-head-h200": head.markdown,
    "kernels-scan-h100": scan.markdown,
    "kernels-scan-h200": scan.markdown,
    "kernels-ssm-h200": ssm.markdown,
    "models-h100": models.markdown,
    "models-h200": models.markdown,
    "onnx-cpu": _onnx,
    "onnx-cpu-engines": _onnx,
    "peers-cpu": _peers,
    "trained-ssm-h100": ssm.markdown,
    "trained-ssm-h200": ssm.markdown,
    "training-stability-h100": lambda content: stability.markdown(content["run"], content["rows"]),
}


@pytest.mark.parametrize("name", PAGES)
def test_rows_are_the_numbers(name):
    made = PAGES[name](json.loads((RESULTS / f"{name}.json").read_text("utf-8")))
    rows = [line for line in made.splitlines() if line.startswith("|")]
    kept = [line for line in (RESULTS / f"{name}.md").read_text("utf-8").splitlines() if line.startswith("|")]
    assert len(rows) > 2
    assert rows == kept
