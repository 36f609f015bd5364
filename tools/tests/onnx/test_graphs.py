"""A checkpoint as an ONNX graph: exported by the command, then evaluated and generated from by onnxruntime."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from unisono_conformance import numerics
from unisono_conformance.adapters.onnx import open_graph
from unisono_spec.contract import ANY, InputError, init_params
from unisono_spec.contract.files import save_params
from unisono_spec.contract.sampling import Sampling
from unisono_tools.backends import open_reader
from unisono_tools.backends.numpy import Reader
from unisono_tools.evaluation import evaluate
from unisono_tools.train import checkpoint

WARM = Sampling(temperature=0.8, seed=3)
MODELS = {
    "fixed": ("cram-demo", {}),
    "adaptive": ("cram-1m", {}),
    "maru": ("maru-1m", {"n_layers": 1, "head_hidden": 8, "n_banks": 2, "n_slots": 4, "d_memory": 4}),
    "transformer": ("transformer-1m", {"n_layers": 1, "head_width": 4}),
}


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
    assert abs(bits["onnx"] - bits["numpy"]) <= numerics.printed(6) + numerics.formula("float32", 2**8) * bits["numpy"]
    for temperature in (0, 0.8):
        written = [
            command("generate", what, "--backend", backend, "--temperature", temperature, "--max_new_tokens", 20)[1]
            for what, backend in ((path, "onnx"), (model, "numpy"))
        ]
        assert written[0] == written[1]


def test_generates_in_one_call_or_many_ragged_or_not(graph):
    model, path = graph
    made = checkpoint.load(model)
    reader, truth = open_reader(path, "onnx"), Reader(made.config, made.params, "float64")
    prompt = np.random.default_rng(0).integers(0, 256, (2, 9))
    valid = np.arange(9) >= np.array([[3], [0]])
    hows: tuple[dict[str, Any], ...] = ({}, {"valid": valid})
    for how in hows:
        whole = reader.generate(prompt, 6, WARM, **how)
        assert np.array_equal(whole.tokens, truth.generate(prompt, 6, WARM, **how).tokens)
        found, tokens = reader.generate(prompt, 1, WARM, **how), []
        tokens.append(found.tokens)
        for n in (1, 1, 3):
            found = reader.generate(found.tokens[:, -1:], n, WARM, found.state, found.n_generated)
            tokens.append(found.tokens)
        assert np.array_equal(np.concatenate(tokens, 1), whole.tokens)
        assert found.n_generated == 6


def test_the_state_starts_where_the_model_s_does(graph):
    model, path = graph
    found, made = open_reader(path, "onnx").init_state(3, 5), checkpoint.load(model)
    for name, value in Reader(made.config, made.params).init_state(3, 5).items():
        np.testing.assert_array_equal(found[name], value, name)


def test_a_full_cache_is_refused(graph):
    _, path = graph
    reader = open_reader(path, "onnx")
    state, tokens = reader.init_state(1, 4), np.zeros((1, 5), np.int64)
    if all(ANY not in s.shape for s in reader.config.states().values()):
        reader.forward(tokens, state)
        return
    with pytest.raises(InputError, match="capacity: token 5 of a sequence, there is room for 4"):
        reader.forward(tokens, state)
    _, after = reader.forward(tokens, state, np.array([[False, False, True, False, False]]))
    assert after["position"] == [3]


def test_nothing_to_read_is_refused(graph):
    _, path = graph
    reader = open_reader(path, "onnx")
    for batch, length, what in ((0, 1, "B is 0"), (1, 0, "T is 0")):
        with pytest.raises(InputError, match=f"tokens: {what}.*; give at least one"):
            reader.forward(np.zeros((batch, length), np.int64), reader.init_state(batch, 4))
        with pytest.raises(InputError, match=r"tokens: shape .*; give at least one"):
            open_graph(path).forward(np.zeros((batch, length), np.int64), reader.init_state(batch, 4))


def test_a_graph_for_onnxruntime_alone(command, refused, made, tiny, tmp_path):
    model = checkpoint.save(tmp_path, made(tiny("mamba-1m", {"n_layers": 1, "d_state": 4})))
    code, _, err = command("export", model, "--out", tmp_path / "model.onnx", "--target", "ort")
    assert code == 0, err
    written = [
        command("generate", what, "--backend", backend, "--temperature", 0, "--max_new_tokens", 20)[1]
        for what, backend in ((tmp_path / "model.onnx", "onnx"), (model, "numpy"))
    ]
    assert written[0] == written[1]
    model = checkpoint.save(tmp_path, made(tiny()))
    assert "maps onto the operators that it adds" in refused("export", model, "--out", tmp_path / "b.onnx", "--target", "ort")


def test_bad_graphs(graph, refused, tmp_path):
    _, path = graph
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(path.read_bytes()[:1000])
    assert "cannot read it" in refused("generate", truncated, "--backend", "onnx")
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


@pytest.mark.parametrize("graph", ["adaptive"], indirect=True)
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("contract", "2", "contract '2', written by unisono"),
        ("contract", None, "contract 'unnamed'"),
        ("architecture", "lat", "unisono.architecture is 'lat', its config's is 'cram'"),
        ("architecture", None, "unisono.architecture is 'missing'"),
        ("tokenizer_sha256", "0" * 64, "not the tokenizer that model.onnx was trained with"),
    ],
)
def test_what_a_graph_says_of_itself_is_checked(graph, refused, tmp_path, key, value, words):
    import onnx

    model = onnx.load(graph[1])
    for entry in [p for p in model.metadata_props if p.key == f"unisono.{key}"]:
        model.metadata_props.remove(entry)
    if value is not None:
        model.metadata_props.add(key=f"unisono.{key}", value=value)
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "tokenizer.json").write_text("{}")
    for verb in ("generate", "eval"):
        assert words in refused(verb, tmp_path / "model.onnx")


@pytest.mark.parametrize("graph", ["adaptive"], indirect=True)
def test_a_newer_opset_than_onnxruntime_s(graph, refused, tmp_path):
    import onnx
    import onnxruntime

    model = onnx.load(graph[1])
    model.opset_import[0].version = onnx.defs.onnx_opset_version() + 1
    onnx.save(model, tmp_path / "model.onnx")
    said = refused("generate", tmp_path / "model.onnx")
    assert f"a newer opset than onnxruntime {onnxruntime.__version__} reads" in said
    assert "opset 27 needs onnxruntime 1.32" in said


@pytest.mark.parametrize("graph", ["adaptive"], indirect=True)
def test_weights_that_were_left_behind(graph, refused, tmp_path):
    import onnx

    onnx.save(onnx.load(graph[1]), tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=4096)
    reader = open_reader(tmp_path / "model.onnx")
    assert np.isfinite(reader.forward(np.zeros((1, 3), np.int64), reader.init_state(1))[0]).all()
    (tmp_path / "model.onnx.data").unlink()
    for verb in ("generate", "eval"):
        assert "its weights are not beside it, in model.onnx.data; move both files" in refused(verb, tmp_path / "model.onnx")


@pytest.mark.parametrize("graph", ["adaptive"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"d_model": 16}, "its config says"),
        ({"n_layers": 3}, "which its config needs"),
        ({"scheme": "fixed", "code_bits": 4}, "config says"),
        ({"n_layers": 10**9}, "n_layers: 1000000000"),
        ({"arch": "lat"}, "lat."),
    ],
)
def test_a_graph_of_another_config(graph, refused, tmp_path, changes, word):
    """A config in the metadata that is not the graph's would place states wrongly."""
    import onnx

    model = onnx.load(graph[1])
    entry = next(p for p in model.metadata_props if p.key == "unisono.config")
    entry.value = json.dumps({**json.loads(entry.value), **changes})
    onnx.save(model, tmp_path / "model.onnx")
    assert word in refused("generate", tmp_path / "model.onnx", "--backend", "onnx")
