"""An exported graph computes what the model does: any B and T, in pieces, with resets, padding and a state handed over."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from unisono_onnx import export, output_names
from unisono_onnx.check import example
from unisono_spec.contract import ANY, InputError, init_params, initial_state

from .graphs import CONFIGS, check, graph, params, reader, session

SHAPES = ((1, 1), (3, 1), (1, 2), (3, 63), (1, 64), (3, 65), (2, 200))  # B, T
INTERPRETED = SHAPES[:3] + SHAPES[5:6]  # onnx's evaluator reads one node after another
ALL = pytest.mark.parametrize("name", CONFIGS)
READERS = pytest.mark.parametrize("kind", ["onnxruntime", "onnx.reference"])


def part(inputs: dict[str, np.ndarray], start: int, stop: int, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tokens from `start` to `stop`, after the outputs `state` of the tokens before them."""
    sequence = {key: inputs[key][:, start:stop] for key in ("tokens", "reset", "valid")}
    return {key: sequence[key] if key in sequence else state.get(f"next.{key}", value) for key, value in inputs.items()}


@READERS
@ALL
def test_graph_agrees_with_the_spec(name: str, kind: str) -> None:
    for batch, length in SHAPES:
        inputs = example(CONFIGS[name], batch, length, seed=length)
        check(name, inputs, reader(name, kind)(inputs))


@ALL
def test_pieces_with_the_state_handed_over_equal_the_whole(name: str) -> None:
    inputs, run = example(CONFIGS[name], 2, 200, seed=200), reader(name, "onnxruntime")  # as above: one truth
    for cut in (1, 64, 137):
        first = run(part(inputs, 0, cut, {}))
        second = run(part(inputs, cut, 200, first))
        check(name, inputs, {**second, "logits": np.concatenate([first["logits"], second["logits"]], 1)})


@ALL
def test_token_by_token_equals_the_whole(name: str) -> None:
    inputs, run = example(CONFIGS[name], 3, 70), reader(name, "onnxruntime")
    outputs, logits = {}, []
    for t in range(70):
        outputs = run(part(inputs, t, t + 1, outputs))
        logits.append(outputs["logits"])
    check(name, inputs, {**outputs, "logits": np.concatenate(logits, 1)})


@READERS
def test_a_sum_whose_squares_float32_does_not_hold(kind: str) -> None:
    name = "adaptive"
    inputs = example(CONFIGS[name], 2, 5)
    drawn = {key: 1e25 * np.random.default_rng(0).normal(size=a.shape) for key, a in inputs.items() if key.endswith(".xi")}
    inputs |= {key: a.astype(np.float32) for key, a in drawn.items()}
    check(name, inputs, reader(name, kind)(inputs))


@pytest.mark.parametrize("logarithm", [-742, -800])
def test_states_that_never_fade(logarithm: int, tmp_path: Path) -> None:
    """S4D with A = 0, or as good as 0: export holds the graph to the spec, which has (e^{ΔA} − 1) / A = Δ there."""
    still = {key: np.full_like(p, logarithm) if key.endswith("log_A_real") else p for key, p in params("s4d").items()}
    still |= {key: np.zeros_like(p) for key, p in still.items() if key.endswith("A_imag")}
    export(CONFIGS["s4d"], still, tmp_path / "a.onnx")


@ALL
def test_reset_forgets_a_damaged_state(name: str) -> None:
    inputs = example(CONFIGS[name], 2, 70)
    inputs["reset"][:, 0] = True
    damaged = {key: np.full_like(a, np.nan) if key in CONFIGS[name].states() and a.dtype.kind == "f" else a for key, a in inputs.items()}
    for key, y in reader(name, "onnxruntime")(damaged).items():
        assert np.isfinite(y).all(), key


@pytest.mark.parametrize("name", ["binary", "adaptive"])
def test_long_sequence(name: str) -> None:
    inputs = example(CONFIGS[name], 1, 20_000)
    check(name, inputs, reader(name, "onnxruntime")(inputs))


@ALL
def test_memory_grows_no_faster_than_the_sequence(name: str) -> None:
    evaluator, sizes = ReferenceEvaluator(str(graph(name))), []
    for length in (256, 512):
        values = evaluator.run(None, example(CONFIGS[name], 1, length), intermediate=True)
        assert isinstance(values, dict)
        sizes.append(sum(np.asarray(value).size for value in values.values()))
    assert sizes[1] <= 2 * sizes[0]


@ALL
def test_graph_has_the_contract_s_inputs_and_outputs_and_standard_operators(name: str) -> None:
    config, file = CONFIGS[name], onnx.load(graph(name))
    frames = config.reads_frames
    expected = {
        "tokens": ("FLOAT" if frames else "INT64", ["B", "T", config.frame_size] if frames else ["B", "T"]),
        "reset": ("BOOL", ["B", "T"]),
        "valid": ("BOOL", ["B", "T"]),
        **{
            key: ("INT32" if state.integer else "FLOAT", ["B", *("capacity" if size == ANY else size for size in state.shape)])
            for key, state in config.states().items()
        },
    }
    found = {value.name: described(value) for value in file.graph.input}
    assert list(found.items()) == list(expected.items())
    outputs = {value.name: described(value) for value in file.graph.output}
    assert list(outputs) == output_names(config)
    assert outputs["logits"] == ("FLOAT", ["B", "T", config.output_size if config.arch == "cram" else config.vocab_size])
    for key in config.states():
        assert outputs[f"next.{key}"] == expected[key]
    assert {entry.domain: entry.version for entry in file.opset_import} == {"": 21}
    assert file.ir_version == 10  # with opset 21: what onnxruntime reads since 1.18
    assert not file.functions
    for node in file.graph.node:
        # onnxruntime before 1.24 runs no Scan whose body does not say how many axes its outputs have
        for value in next((a.g.output for a in node.attribute if a.name == "body"), ()):
            assert value.type.tensor_type.HasField("shape"), value.name


@pytest.mark.parametrize("target", ["ort", "opset27"])
@pytest.mark.parametrize("name", ["hybrid", "infinity", "numerator", "mamba"])
def test_fused_operators(name: str, target: str, tmp_path: Path) -> None:
    export(CONFIGS[name], params(name), tmp_path / "a.onnx", target=target)
    file = onnx.load(tmp_path / "a.onnx")
    bodies = [attribute.g for node in file.graph.node for attribute in node.attribute if attribute.name == "then_branch"]
    found = {(node.op_type, node.domain) for part in (file.graph, *bodies) for node in part.node}
    domain = {"ort": "com.microsoft", "opset27": ""}[target]
    expected = {"hybrid": (1, 1), "infinity": (1, 0), "numerator": (1, 0), "mamba": (1, 1)}[name]
    for op, there in zip(("LinearAttention", "CausalConvWithState"), expected, strict=True):
        assert ((op, domain) in found) == bool(there)
    assert {entry.domain: entry.version for entry in file.opset_import} == {"": 27} if target == "opset27" else {"": 21, "com.microsoft": 1}
    run = session(tmp_path / "a.onnx", CONFIGS[name])
    for batch, length in ((1, 1), (3, 65), (2, 200)):
        inputs = example(CONFIGS[name], batch, length, seed=length)
        check(name, inputs, run(inputs))
        if length == 65:  # nothing parts the tokens: the convolution takes its short way
            inputs["reset"][:, 1:], inputs["valid"][:] = False, True
            if "tokens" in inputs and inputs["tokens"].dtype.kind == "f":
                inputs["tokens"] = np.nan_to_num(inputs["tokens"])
            check(name, inputs, run(inputs))


def test_a_target_that_onnxruntime_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.1")
    with pytest.raises(InputError, match=r"'opset27' needs onnxruntime 1\.32 or later, not 1\.31\.1"):
        export(CONFIGS["mamba"], params("mamba"), tmp_path / "a.onnx", target="opset27")
    assert not any(tmp_path.iterdir())


def test_a_graph_that_onnxruntime_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def old(*_: object, **__: object) -> None:
        raise RuntimeError("Unsupported model IR version: 10, max supported IR version: 9")

    monkeypatch.setattr(onnxruntime, "InferenceSession", old)
    with pytest.raises(
        InputError, match=rf"onnxruntime {re.escape(onnxruntime.__version__)} does not read .* version: 10.* newer onnxruntime"
    ):
        export(CONFIGS["mamba"], params("mamba"), tmp_path / "a.onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["hybrid", "learned", "transformer"])
def test_queries_that_are_fewer_than_the_keys(name: str) -> None:
    """No optimiser may make an attention of them whose causal mask starts at the first key instead of the last."""
    levels, config = onnxruntime.GraphOptimizationLevel, CONFIGS[name]
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_BASIC, levels.ORT_ENABLE_EXTENDED, levels.ORT_ENABLE_ALL):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        opened = onnxruntime.InferenceSession(graph(name), options, providers=["CPUExecutionProvider"])
        for length in (1, 2, 7):
            inputs = example(config, 2, length, seed=length)
            inputs["reset"][:] = False
            found = opened.run(output_names(config), inputs)
            check(name, inputs, dict(zip(output_names(config), found, strict=True)))  # pyright: ignore[reportArgumentType]


def test_no_operator_of_onnxruntime_s_own(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match="nothing in this s4d"):
            export(CONFIGS["s4d"], params("s4d"), tmp_path / "a.onnx", target="ort")
    with pytest.raises(InputError, match="'otr' is unknown"):
        export(CONFIGS["s4d"], params("s4d"), tmp_path / "a.onnx", target="otr")


def test_memory_compression_is_refused(tmp_path: Path) -> None:
    compressed = CONFIGS["infinity"].replace(compress_every=4, compress_rank=1)
    with pytest.raises(InputError, match=r"infinityformer\.compress_every: 4"):
        export(compressed, init_params(compressed), tmp_path / "a.onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["maru", "stack"])
def test_reset_restores_a_learned_state(name: str) -> None:
    inputs = example(CONFIGS[name], 2, 1)
    inputs |= {"reset": np.ones((2, 1), bool), "valid": np.zeros((2, 1), bool)}
    found, first = reader(name, "onnxruntime")(inputs), initial_state(CONFIGS[name], params(name), 2, None, "float32")
    for key, value in first.items():
        np.testing.assert_array_equal(found[f"next.{key}"], value, key)


def described(value: onnx.ValueInfoProto) -> tuple[str, list[str | int]]:
    tensor = value.type.tensor_type
    return onnx.TensorProto.DataType.Name(tensor.elem_type), [d.dim_param or d.dim_value for d in tensor.shape.dim]
