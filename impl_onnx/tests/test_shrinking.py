"""Graphs in fewer bits: our own precisions, and what onnxruntime's tools make of fresh exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization import quant_pre_process, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16
from unisono_conformance import numerics
from unisono_onnx import PRECISIONS, export
from unisono_onnx.check import example
from unisono_onnx.precision import dequantised, held, quantised
from unisono_spec.contract import InputError, init_params, preset

from .graphs import CONFIGS, graph, params

ALL = pytest.mark.parametrize("name", CONFIGS)


def read(path: Path, name: str, floats: Any = np.float32) -> np.ndarray:
    """Logits of valid tokens, in onnxruntime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = example(CONFIGS[name], 2, 70)
    given = {i.name: inputs[i.name] for i in session.get_inputs()}
    found = session.run(["logits"], {key: a.astype(floats) if a.dtype == np.float32 else a for key, a in given.items()})
    return np.asarray(found[0])[inputs["valid"]].astype(np.float64)


def all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    bodies = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [*graph.node, *(node for body in bodies for node in all_nodes(body))]


@ALL
def test_matrices_are_initializers_and_names_are_unique(name: str) -> None:
    file = onnx.load(graph(name)).graph
    nodes, known = all_nodes(file), {i.name for i in file.initializer}
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names)
    made = [output for node in nodes for output in node.output]
    assert len(set(made)) == len(made)
    assert not [node.name for node in nodes if node.op_type == "Transpose" and node.input[0] in known]
    read_by = {node.input[1] for node in nodes if node.op_type == "MatMul"}
    assert {i for i in known if i.endswith(".T") and "conv" not in i} <= read_by


@ALL
def test_onnxruntime_s_tools_read_a_fresh_export(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # they leave files where they run
    true = read(graph(name), name)
    prepared, dynamic, half = (tmp_path / f"{how}.onnx" for how in ("prepared", "dynamic", "half"))
    quant_pre_process(graph(name), prepared)
    assert np.array_equal(read(prepared, name), true)
    quantize_dynamic(prepared, dynamic)
    assert "MatMulInteger" in {node.op_type for node in onnx.load(dynamic).graph.node}
    assert np.isfinite(read(dynamic, name)).all()  # how far it is off is in the docs
    onnx.save(convert_float_to_float16(onnx.load(graph(name))), half)
    onnx.checker.check_model(half)
    assert np.abs(read(half, name, np.float16) - true).max() <= numerics.LIMIT * np.abs(true).max()
    onnx.save(convert_float_to_float16(onnx.load(graph(name)), keep_io_types=True), half)
    assert np.abs(read(half, name) - true).max() <= numerics.LIMIT * np.abs(true).max()


@pytest.mark.parametrize("bits", [4, 8])
def test_what_was_rounded_is_rounded_to_itself(bits: int) -> None:
    weight = np.random.default_rng(bits).standard_normal((7, 70)).astype(np.float32) * 10.0 ** np.arange(-3, 4)[:, None].astype(np.float32)
    weight[3], weight[4, :40] = 0, 0
    once = dequantised(*quantised(weight, bits))[:, :70]
    assert np.array_equal(dequantised(*quantised(once, bits))[:, :70], once)
    blocks = np.pad(weight, ((0, 0), (0, 26))).reshape(7, 3, 32)
    step = np.abs(blocks).max(-1, keepdims=True) / 2 ** (bits - 1)
    # half a step; a whole one for what has the other sign than the largest, and nearly its size
    assert (np.abs(np.pad(once, ((0, 0), (0, 26))).reshape(7, 3, 32) - blocks) <= step).all()


@pytest.mark.parametrize("name", ["cram-1m", "mamba-1m", "maru-1m", "infinityformer-1m"])
def test_sizes(name: str, tmp_path: Path) -> None:
    """Of a model whose weights are nearly all matrices; tied ones are stored once."""
    config = preset(name, n_layers=1)
    weights, sizes = init_params(config), {}
    for precision in PRECISIONS:
        export(config, weights, tmp_path / "a.onnx", precision=precision)
        file = onnx.load(tmp_path / "a.onnx").graph
        sizes[precision] = sum(len(i.raw_data) for i in file.initializer)
    changed = [n for n, p in held(config, weights, "int4").items() if not np.array_equal(p, weights[n])]
    shrunk = sum(weights[n].size for n in changed)
    assert sizes["float32"] - sizes["float16"] >= 2 * shrunk - 2**12
    assert sizes["float32"] - sizes["int8"] >= 2.7 * shrunk
    assert sizes["float32"] - sizes["int4"] >= 3.2 * shrunk
    assert shrunk >= 0.7 * sum(p.size for p in weights.values())


def test_an_unknown_precision(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'int5' is unknown"):
        export(CONFIGS["s4d"], params("s4d"), tmp_path / "a.onnx", precision="int5")
