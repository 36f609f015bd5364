"""`unisono run`, and the example of docs/onnx.md, as they stand in the documents."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from unisono_spec.contract import init_params, preset
from unisono_spec.contract.files import save_params
from unisono_tools.backends.onnx import export
from unisono_tools.train import checkpoint

DOCS = Path(__file__).parents[3] / "docs/onnx.md"
# packages that `unisono run` must not import, also by way of another
HEAVY = ("torch", "jax", "flax", "onnx", "rich", "yaml", "matplotlib", "tensorboardX", "filelock", "platformdirs", "unisono_conformance")


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """(checkpoint, graph)"""
    folder = tmp_path_factory.mktemp("run")
    config = preset("lat-1m", d_model=8, n_layers=1, head_width=4, qk_width=4)
    save_params(folder / "model.safetensors", config, init_params(config, 1))
    export(folder / "model.safetensors", folder / "model.onnx", "bytes")
    return folder / "model.safetensors", folder / "model.onnx"


def test_it_writes_what_generate_writes(graph, command, tmp_path):
    model, path = graph
    how = ("--prompt", "My fellow", "--temperature", 1.2, "--top_k", 99, "--top_p", 0.95, "--seed", 5)
    code, whole, err = command("run", path, *how, "--max_new_tokens", 20)
    assert code == 0, err
    for backend in ("numpy", "torch"):
        assert command("generate", model, "--backend", backend, *how, "--max_new_tokens", 20)[1] == whole
    # handed from one backend to the next, each in the middle of the text
    text = command("run", path, *how, "--max_new_tokens", 6, "--save_state", tmp_path / "a")[1].removesuffix("\n")
    for backend in ("torch", "numpy"):
        argv = ("generate", model, "--backend", backend, "--state", tmp_path / "a", "--max_new_tokens", 4)
        text += command(*argv, "--save_state", tmp_path / "a")[1].removesuffix("\n")
    assert text + command("run", path, "--state", tmp_path / "a", "--max_new_tokens", 6)[1] == whole


def test_it_imports_nothing_heavy(graph):
    code = (
        "import sys; from unisono_tools import cli; "
        f"code = cli.main(['run', {str(graph[1])!r}, '--max_new_tokens', '2', '--stop', '[\"zz\"]']); "
        f"found = [n for n in {HEAVY} if n in sys.modules]; assert not code and not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_tokenizer_that_is_not_beside_the_graph(graph, refused, tmp_path):
    import onnx

    model = onnx.load(graph[1])
    next(p for p in model.metadata_props if p.key == "unisono.tokenizer").value = "chars"
    onnx.save(model, tmp_path / "model.onnx")
    message = refused("run", tmp_path / "model.onnx")
    assert "trained with 'chars', and there is no tokenizer.json beside it; move that with the model" in message


def test_the_example_in_the_documents(graph, command, tmp_path):
    """As pasted, in a folder that holds the graph and nothing else; what it writes is greedy text."""
    example = re.search(r"## With onnxruntime alone\n\n```python\n(.+?)```", DOCS.read_text("utf-8"), re.DOTALL)
    assert example is not None
    assert len([line for line in example[1].splitlines() if line.strip()]) <= 20
    (tmp_path / "model.onnx").write_bytes(graph[1].read_bytes())
    done = subprocess.run([sys.executable, "-X", "utf8", "-c", example[1]], capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    expected = command("run", graph[1], "--prompt", "My fellow", "--temperature", 0, "--max_new_tokens", 100)[1]
    assert done.stdout.decode() == expected


def test_memory_does_not_grow_with_the_text(graph, command):
    import tracemalloc

    peaks = []
    for number in (20, 20, 200):
        tracemalloc.start()
        command("run", graph[1], "--max_new_tokens", number, "--prompt", "a" * number)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # ten times the text, and the same arrays; what differs is the text itself, which the test captures
    assert peaks[2] < 2 * peaks[1]


def test_checkpoints_are_not_graphs(refused, made, tiny, tmp_path):
    model = checkpoint.save(tmp_path, made(tiny()))
    assert "is not a .onnx file" in refused("run", model / "model.safetensors")
    assert "no such file" in refused("run", tmp_path / "none.onnx")
