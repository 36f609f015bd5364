"""Whatever a new architecture or op needs in every room is there: a place that lacks one is named. CONTRIBUTING.md walks through them."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
from unisono_spec.contract import ARCHITECTURES

ROOT = Path(__file__).parents[2]
MODULES = (  # one of its own in each
    "spec/unisono_spec/contract",
    "spec/unisono_spec/models",
    "impl_jax/unisono_jax/models",
    "impl_torch/unisono_torch/models",
    "impl_onnx/unisono_onnx/models",
    "conformance/unisono_conformance/cases",
    "conformance/unisono_conformance/sabotage",
)
LISTS = (  # which name its config or one of its presets
    "spec/tests/test_wiring.py",
    "impl_onnx/tests/graphs.py",
    "tools/unisono_tools/bench/linear.py",
    "impl_torch/tests/kernels/test_decoding.py",
    "spec/tests/bad_arguments.py",
    "tools/tests/training/",
    "tools/tests/training/test_datamodules.py",
    "tools/unisono_tools/bench/decode.py",
    "tools/unisono_tools/experiments/match.py",
    "tools/tests/handover/relay.py",
)
KEYED = ("spec/tests/test_architectures.py",)  # by its own name
HF = "impl_torch/unisono_torch/hf"
OPS = [path.stem for path in sorted((ROOT / "spec/unisono_spec/ops").glob("*.py")) if "\ndef step(" in path.read_text("utf-8")]


def read(name: str) -> str:
    """A file, or all modules of a folder."""
    paths = sorted((ROOT / name).glob("*.py")) if name.endswith("/") else [ROOT / name]
    return "\n".join(path.read_text("utf-8") for path in paths)


def offered(room: str) -> set[str]:
    """The names in the `__all__` of a room, whose framework need not be here."""
    tree = ast.parse(read(f"{room}/__init__.py"))
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    return set(ast.literal_eval(assigned["__all__"]))


def test_rooms_offer_the_same_names() -> None:
    names = offered("spec/unisono_spec")
    assert "Sampling" in names
    assert offered("impl_torch/unisono_torch") == names
    assert offered("impl_jax/unisono_jax") - {"Compiled"} == names  # what jax.jit compiled


def behind_transformers(arch: str) -> list[str]:
    """What an architecture lacks there: a configuration, a class of it, and that class among those that are tested."""
    config = re.search(rf'class (\w+)\(UnisonoConfig\):\n.+\n    arch: ClassVar\[str\] = "{arch}"', read(f"{HF}/configuration.py"))
    if config is None:
        return [f"{HF}/configuration.py: {arch}"]
    made = re.search(rf'class (\w+)\(\w+\):\n    """.+"""\n\n    config_class = {config[1]}\n', read(f"{HF}/modeling.py"))
    if made is None:
        return [f"{HF}/modeling.py: a class of {config[1]}"]
    places = (f"{HF}/__init__.py", "impl_torch/tests/hf/test_models.py")
    return [f"{name}: {made[1]}" for name in places if not re.search(rf"\b{made[1]}\b", read(name))]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architecture(arch: str) -> None:
    contract = importlib.import_module(f"unisono_spec.contract.{arch}")
    missing = [f"{folder}/{arch}.py" for folder in MODULES if not (ROOT / folder / f"{arch}.py").is_file()]
    missing += [f"spec/tests/test_{arch}.py"] if not (ROOT / f"spec/tests/test_{arch}.py").is_file() else []
    known = (contract.CONFIG.__name__, *(f'"{name}"' for name in contract.PRESETS))
    missing += [f"{name}: {arch}" for name in LISTS if not any(word in read(name) for word in known)]
    missing += [f"{name}: {arch}" for name in KEYED if f'"{arch}"' not in read(name)]
    missing += behind_transformers(arch)
    pages = {path.name: path.read_text("utf-8") for path in (ROOT / "docs/architectures").glob("*.md")}
    mine = [name for name, text in pages.items() if f"unisono_spec/models/{arch}.py)" in text]
    missing += [] if mine else [f"docs/architectures: a page that links the sources of {arch}"]
    missing += [f"docs/architectures: {preset}" for preset in contract.PRESETS if preset not in "".join(pages.values())]
    missing += [f"README.md: a row that links {page}" for page in mine if f"docs/architectures/{page})" not in read("README.md")]
    assert not missing, "\n".join(missing)


def test_the_house_is_drawn_as_it_stands() -> None:
    """docs/architecture.md names every folder of every package."""
    packages = [package for room in ("spec", "impl_*", "conformance", "tools") for package in ROOT.glob(f"{room}/unisono_*")]
    folders = {folder.name for package in packages for folder in package.iterdir() if any(folder.glob("*.py"))}
    page = read("docs/architecture.md")
    assert len(folders) > 20
    assert not [name for name in sorted(folders) if not re.search(rf"\b{name}\b", page)]


@pytest.mark.parametrize("op", OPS)
def test_op(op: str) -> None:
    names = [f"{folder}/ops/{op}.py" for folder in ("impl_jax/unisono_jax", "impl_torch/unisono_torch")]
    missing = [name for name in names if not (ROOT / name).is_file()]
    for name, registry in zip(names, ("impl_jax/unisono_jax/registry.py", "impl_torch/unisono_torch/kernels/registry.py"), strict=True):
        chosen = name not in missing and "implementation: str" in read(name)
        missing += [f"{registry}: {op}"] if chosen and f'"{op}": "' not in read(registry) else []
    functions = "impl_onnx/unisono_onnx/ops/"
    missing += [] if f"\ndef {op.replace('_', '')}(" in read(functions).lower() else [f"{functions}: {op}"]
    assert not missing, "\n".join(missing)
