"""One ONNX graph of a whole model: traced, checked, compared with torch, and only then put in place."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from unisono_spec.contract import Config, InputError, config_to_dict, zero_state

from unisono_torch.onnx.ops import inline

OPSET = 23  # onnxruntime reads up to 26, torch writes up to 25
CONFIG_KEY = "unisono.config"
# (B, T) of the traced example, and of the comparisons: other lengths than the traced one, since a tracer may freeze it unnoticed
TRACED = (2, 5)
COMPARED = ((1, 1), (3, 130))
# A frozen length or a lost state is wrong by about the size of the logits; two float32 programs differ by roundings of 2^−24, which an
# ill-conditioned model can amplify a thousandfold. The limit lies between, relative to the largest logit.
ALLOWED = 2.0**-8
# Protobuf holds at most 2 GiB in one message; larger weights go to a second file beside the graph
MAX_EMBEDDED_BYTES = 2**31 - 2**24


def export(model: Any, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write `model` as one graph with dynamic B ≥ 1 and T ≥ 1 to `path`, whole or not at all.

    Inputs are `tokens`, `reset`, `valid` and each state array under its contract name; outputs are `logits` and each state array
    as `next.<name>`. metadata: further strings to keep in the file, beside the config; a tokenizer, say. Weights lie in the file,
    unless they pass 2 GB: then in `<path>.data` beside it.

    Raises InputError where the model is not float32, the export packages are missing, the file cannot be written, or onnxruntime
    and torch disagree about the graph.
    """
    onnx, ir, runtime = _packages()
    if model.dtype != "float32":
        raise InputError(f"dtype: {model.dtype}; export computes in float32: load the checkpoint again with dtype='float32'")
    for key, value in (metadata or {}).items():
        if not isinstance(value, str):
            raise InputError(f"metadata: {key!r} is a {type(value).__name__}; ONNX metadata are strings, pass json.dumps(...)")
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            draft = Path(folder) / path.name
            graph = _trace(model)
            inline(graph)
            graph.metadata_props.update({CONFIG_KEY: json.dumps(config_to_dict(model.config)), **(metadata or {})})
            ir.save(graph, draft, external_data=_beside(model, draft))
            onnx.checker.check_model(draft, full_check=True)
            _compare(model, draft, runtime)
            # the graph comes last: where it is, its weights are
            for file in sorted(Path(folder).iterdir(), key=lambda file: file == draft):
                os.chmod(file, 0o644)
                os.replace(file, path.parent / file.name)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); free some space or choose another folder") from error


class _Graph(nn.Module):
    """The model as a function of flat tensors, in the order of the graph's inputs and outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(model.config.states())  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]

    def forward(self, tokens: Tensor, reset: Tensor, valid: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        logits, after = self.model(tokens, dict(zip(self.names, state, strict=True)), reset, valid)
        return logits, *(after[name] for name in self.names)


def input_names(config: Config) -> list[str]:
    return ["tokens", "reset", "valid", *config.states()]


def output_names(config: Config) -> list[str]:
    return ["logits", *(f"next.{name}" for name in config.states())]


def _trace(model: Any) -> Any:
    """`model` as an onnx_ir.Model, with nodes of the domain "unisono" for the sequence ops."""
    config = model.config
    inputs = tuple(torch.from_numpy(array).to(model.device) for array in example(config, *TRACED).values())
    sequence, row = {0: "B", 1: "T"}, {0: "B"}
    training = model.training
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _Graph(model).eval(),
                inputs,
                dynamo=True,
                opset_version=OPSET,
                input_names=input_names(config),
                output_names=output_names(config),
                dynamic_shapes=(sequence, sequence, sequence, tuple(row for _ in config.states())),
                verbose=False,
            )
    finally:
        model.train(training)
    assert program is not None
    return program.model


def example(config: Config, batch: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of a graph of `config`, by name: with resets, with tokens that are not valid, and in mid-sequence."""
    rng = np.random.default_rng(seed)
    reset, valid = rng.random((batch, length)) < 0.05, rng.random((batch, length)) < 0.9
    if config.reads_frames:
        tokens = rng.standard_normal((batch, length, config.code_size), np.float32)  # pyright: ignore[reportAttributeAccessIssue]
        tokens[~valid] = np.nan
    else:
        tokens = rng.integers(0, config.vocab_size, (batch, length))  # pyright: ignore[reportAttributeAccessIssue]
    state = {
        name: rng.integers(0, 1000, zeros.shape, np.int32) if zeros.dtype.kind == "i" else rng.random(zeros.shape, np.float32)
        for name, zeros in zero_state(config, batch).items()
    }
    return {"tokens": tokens, "reset": reset, "valid": valid, **state}


def _compare(model: Any, path: Path, runtime: Any) -> None:
    """Raise InputError unless onnxruntime and torch agree on the file at `path`."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for batch, length in COMPARED:
        inputs = example(model.config, batch, length, seed=1)
        tokens, reset, valid, *state = (torch.from_numpy(array).to(model.device) for array in inputs.values())
        with torch.no_grad():
            logits, after = model(tokens, dict(zip(model.config.states(), state, strict=True)), reset, valid)
        expected = {"logits": logits, **{f"next.{name}": value for name, value in after.items()}}
        for name, y in zip(output_names(model.config), session.run(None, inputs), strict=True):
            want = expected[name].cpu().numpy()
            if y.shape != want.shape or y.dtype != want.dtype or not np.abs(y - want).max() <= ALLOWED * np.abs(want).max():
                raise InputError(
                    f"{name}: the exported graph and torch disagree at B={batch}, T={length}, so no file was written; "
                    "check that the weights are finite, and try torch and onnxruntime of the versions in constraints.txt"
                )


def _beside(model: nn.Module, draft: Path) -> str | None:
    """The name of a second file for the weights, if they do not fit into the graph's."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return f"{draft.name}.data" if size > MAX_EMBEDDED_BYTES else None


def _packages() -> tuple[Any, Any, Any]:
    try:
        import onnx
        import onnx_ir
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise InputError(f"export: {error.name} is not installed; pip install 'unisono[onnx-export]'") from error
    return onnx, onnx_ir, onnxruntime


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence three remarks of torch's exporter that say nothing about the model."""
    # it would register torchvision's operators, had they been installed
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # it copies a class of its own that it has deprecated
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            # several inputs share the axes B and T, on purpose
            warnings.filterwarnings("ignore", r"# The axis name: \w+ will not be used", UserWarning)
            yield
    finally:
        logger.setLevel(level)
