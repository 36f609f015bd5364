"""A checkpoint as an ONNX graph: exported by the command, then evaluated and generated from by onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
from unisono_spec.contract import init_params
from unisono_spec.contract.files import save_params
from unisono_tools.backends import open_reader
from unisono_tools.backends.numpy import Reader
from unisono_tools.evaluation import evaluate
from unisono_tools.train import checkpoint

MODELS = {"fixed": ("cram-demo", {}), "adaptive": ("cram-1m", {})}


@pytest.fixture(scope="session")
def exported():
    """Graphs that are made already, by model; an export takes seconds."""
    return {}


@pytest.fixture(params=MODELS)
def graph(request, exported, tiny, made, command, tmp_path_factory):
    """(model's checkpoint, its graph)"""
    if request.param not in exported:
        preset, overrides = MODELS[request.param]
        folder = tmp_path_factory.mktemp(request.param)
        model = checkpoint.save(folder, made(tiny(preset, overrides), seed=1))
        code, out, err = command("export", folder, "--out", folder / "model.onnx")
        assert code == 0, err
        assert str(folder / "model.onnx") in out
        exported[request.param] = model, folder / "model.onnx"
    return exported[request.param]


def test_evaluates_as_numpy_does(graph, close):
    model, path = graph
    reader = open_reader(path, "onnx")
    config, params = checkpoint.load(model).config, checkpoint.load(model).params
    ids = np.random.default_rng(0).integers(0, 256, 300)
    for window in (0, 50):
        close(evaluate(reader, ids, window=window).loss, evaluate(Reader(config, params), ids, window=window).loss, "float32")
    assert reader.config == config
    assert reader.tokenizer == "bytes"


def test_the_commands_agree(graph, command, text):
    model, path = graph
    bits = {}
    for what, backend in ((path, "onnx"), (model, "numpy")):
        code, out, err = command("eval", what, "--backend", backend, "--corpus", text)
        assert code == 0, err
        bits[backend] = float(out.split("bits per token")[1].split()[0])
    assert abs(bits["onnx"] - bits["numpy"]) <= 2e-6  # one unit of the last printed digit, either way
    for temperature in (0, 0.8):
        written = [
            command("generate", what, "--backend", backend, "--temperature", temperature, "--max_new_tokens", 20)[1]
            for what, backend in ((path, "onnx"), (model, "numpy"))
        ]
        assert written[0] == written[1]


def test_bad_graphs(graph, refused, tmp_path):
    _, path = graph
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(path.read_bytes()[:1000])
    assert "onnxruntime cannot read it" in refused("generate", truncated, "--backend", "onnx")
    truncated.write_bytes(b"")
    assert "onnx" in refused("generate", truncated, "--backend", "onnx")
    assert "use --backend onnx" in refused("generate", path, "--backend", "numpy")
    assert "no such file" in refused("generate", tmp_path / "nothing.onnx", "--backend", "onnx")
    assert "outside the vocabulary" not in refused("generate", path, "--backend", "onnx", "--prompt", "")


def test_a_foreign_graph(refused, tmp_path):
    from onnx import TensorProto, helper, save

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    other = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "foreign", [value], [other])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "foreign.onnx")
    assert "not one of unisono's" in refused("generate", tmp_path / "foreign.onnx", "--backend", "onnx")


def test_an_export_of_what_is_not_a_model(refused, tmp_path, tiny):
    config = tiny().validate()
    path = tmp_path / "model.safetensors"
    save_params(path, config, init_params(config))
    path.write_bytes(path.read_bytes()[:-8])
    assert "truncated" in refused("export", path, "--out", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
