"""Four ways to run a model, two of which can train it. Each file imports its own framework and nobody else's."""

from __future__ import annotations

import importlib
from pathlib import Path

from unisono_spec.contract import Config, InputError, nearest
from unisono_spec.contract.files import load_params

from unisono_tools.backends.base import Reader, Trainer
from unisono_tools.config import BACKENDS, TrainConfig, default_backend

PACKAGES = {"torch": "torch", "jax": "jax", "numpy": "numpy", "onnx": "onnxruntime"}
EXTRAS = {"torch": "unisono[torch]", "jax": "unisono[jax]", "onnx": "unisono[run]"}


def backend(name: str):
    """The module of a backend; InputError says what to install where its framework is missing."""
    if name not in BACKENDS:
        raise InputError(f"backend: {name!r} is unknown; {nearest(name, BACKENDS)}")
    try:
        importlib.import_module(PACKAGES[name])
        return importlib.import_module(f"unisono_tools.backends.{name}")
    except ImportError as error:
        if (error.name or "").startswith("unisono_tools"):
            raise  # ours, and no package that could be installed
        raise InputError(f"backend: {name!r} is not installed here ({error}); pip install '{EXTRAS[name]}'") from error


def open_trainer(train: TrainConfig, config: Config) -> Trainer:
    """A trainer of `config` on the backend that `train` names."""
    name = train.backend or default_backend(training=True)
    return backend(name).Trainer(train, config)


def open_reader(path: Path, name: str | None = None, dtype: str = "float32", device: str | None = None) -> Reader:
    """A model that reads and predicts, from a .safetensors file (a .onnx file with backend onnx). The default is what is installed."""
    name = name or ("onnx" if path.suffix == ".onnx" else default_backend())
    if (path.suffix == ".onnx") != (name == "onnx"):
        remedy = "make a graph with `unisono export` and give that" if name == "onnx" else "use --backend onnx"
        raise InputError(f"{path}: backend {name} does not read {path.suffix or 'such'} files; {remedy}")
    if name == "onnx":
        return backend(name).Reader(path)
    config, params = load_params(path)
    return backend(name).Reader(config, params, dtype, device)
