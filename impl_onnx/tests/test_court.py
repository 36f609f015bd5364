"""Mistakes planted into the functions of a target: the court, asked as `nox -s onnx` asks it, must find each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onnx
import pytest
from unisono_conformance import plan
from unisono_conformance.adapter import load
from unisono_conformance.judging.judge import Disagreement
from unisono_conformance.judging.trial import Died
from unisono_conformance.report.ledger import Ledger, judge_one
from unisono_onnx import builder

Function = onnx.FunctionProto
PROFILE, TARGET = plan.PROFILES["dev"], "ort"  # as the session has them


def nodes(part: Any) -> Iterator[onnx.NodeProto]:
    for node in part.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes(attribute.g)


def small(function: Function) -> None:
    """A normaliser with an ε of 1e-9."""
    constants = [a for node in nodes(function) for a in node.attribute if a.name == "value_float" and 0 < a.f < 1e-5]
    assert constants
    for attribute in constants:
        attribute.f = 1e-9


def late(function: Function) -> None:
    """The last token's reset clears the state, not the first one's."""
    read = {node.input[1] for node in nodes(function) if node.op_type == "Gather" and node.input[0] == "reset"}
    constants = [node.attribute[0] for node in nodes(function) if node.op_type == "Constant" and node.output[0] in read]
    assert [attribute.i for attribute in constants] == [0]
    constants[0].i = -1


@pytest.fixture
def adapter() -> Iterator[Any]:
    made: Any = load("onnx")
    yield made
    made.folder.cleanup()


def judge(adapter: Any, arch: str, label: str, regime: str) -> None:
    items = plan.items(adapter, plan.Selection(arch=arch, implementation=TARGET), PROFILE, "onnx")
    for item in (item for item in items if item.prop.label == label):
        for draw in (draw for draw in plan.draws(item, PROFILE) if draw.regime == regime):
            judge_one(item, draw, Ledger())


@pytest.mark.parametrize(
    ("mistake", "name", "arch", "label", "regime"),
    [
        (small, "Divided", "lat", "P1", "empty"),
        (small, "Divided", "infinityformer", "P1", "faint"),
        (small, "FusedMultiscaleApart", "infinityformer", "P1", "faint"),
        (late, "Fresh", "lat", "P18", "tame"),
        (late, "Fresh", "mamba", "P18", "tame"),
        (late, "FusedShortConv", "mamba", "P15r", "tame"),
    ],
)
def test_caught(
    mistake: Callable[[Function], None], name: str, arch: str, label: str, regime: str, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    protos = []
    for proto in builder.definitions():
        (copy := Function()).CopyFrom(proto)
        if copy.name == name:
            mistake(copy)
        protos.append(copy)
    monkeypatch.setattr(builder, "definitions", lambda: tuple(protos))
    with pytest.raises((Disagreement, Died)) as caught:
        judge(adapter, arch, label, regime)
    # to die is to be found by the exporter's own comparison
    assert caught.type is Disagreement or "the graph in onnxruntime and the model disagree" in str(caught.value)
