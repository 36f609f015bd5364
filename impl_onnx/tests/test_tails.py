"""What a graph says where functions fall to 0: each value is held to itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from unisono_conformance import tails
from unisono_onnx.builder import DOMAIN, Builder, inlined, typed
from unisono_onnx.check import example

from .graphs import CONFIGS, reader

WRITTEN = {
    "sigmoid": Builder.sigmoid,
    "softplus": Builder.softplus,
    "silu": Builder.silu,
    "gelu": Builder.gelu,
    "gelu_tanh": Builder.gelu_tanh,
    "tanh": lambda g, x: g("Tanh", x),
    "elu1": lambda g, x: g.features(x, "elu1", ""),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_tails(name: str, tmp_path: Path) -> None:
    """onnxruntime's Sigmoid and 1 + Erf are off by 1e-7, however small their result is."""
    g = Builder(CONFIGS["binary"], {})
    given = g.input("x", np.float32, "N")
    found = typed(WRITTEN[name](g, given), np.float32, "N")
    found.name = "y"
    initializers, opsets = list(g.initializers.values()), {"": 21, DOMAIN: 1}
    model = ir.Model(ir.Graph([given], [found], nodes=g.nodes, initializers=initializers, opset_imports=opsets), ir_version=10)
    inlined(model)
    file, x = tmp_path / "a.onnx", tails.points(name, "float32")
    ir.save(model, file)
    readers: tuple[Any, ...] = onnxruntime.InferenceSession(file), ReferenceEvaluator(str(file))
    for each in readers:
        tails.hold(name, each.run(None, {"x": x})[0], x, "float32")


def test_tail_of_a_sum() -> None:
    """ξ of one token is (1 − λ) σ(x)."""
    config = CONFIGS["gaussian"]
    inputs = example(config, 1, 1)
    x = np.linspace(-40, 5, config.frame_size, dtype=np.float32)
    inputs |= {"tokens": x[None, None], "reset": np.ones((1, 1), bool), "valid": np.ones((1, 1), bool)}
    outputs, first = reader("gaussian", "onnxruntime")(inputs), next(iter(config.states()))
    tails.hold("sigmoid", outputs[f"next.{first}"][0] / (1 - config.decay), x, "float32")
