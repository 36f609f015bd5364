"""One ONNX graph of a whole model: traced, checked, compared with torch, and only then put in place."""

from __future__ import annotations

import json
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from unisono_spec.contract import ANY, Config, InputError, config_to_dict, nearest, zero_state
from unisono_spec.contract.aside import aside, cannot_be_written
from unisono_spec.contract.errors import shown

from unisono_torch.layers.reading import Training
from unisono_torch.onnx.ops import TARGETS, GraphReading, inline, translations

OPSET = 23  # onnxruntime reads up to 26, torch writes up to 25
CONFIG_KEY = "unisono.config"
MICROSOFT = "com.microsoft"  # the domain of onnxruntime's own operators
PREFIX = "model."  # of parameters, in _Graph
# (B, T) of the traced example, and of the comparisons: other lengths than the traced one, since a tracer may freeze it unnoticed
TRACED = (2, 5)
COMPARED = ((1, 1), (3, 130))
# A frozen length or a lost state is wrong by about the size of the logits, two float32 programs differ by roundings. What those cost the
# model says itself: no more than parameters that err by as many roundings as follow upon one another in a layer or two.
ROUNDINGS = 2.0**8 * 2.0**-24
# Protobuf holds at most 2 GiB in one message; larger weights go to a second file beside the graph
MAX_EMBEDDED_BYTES = 2**31 - 2**24


def export(model: Any, path: str | Path, metadata: Mapping[str, str] | None = None, target: str = "portable") -> None:
    """Write `model` as one graph with dynamic B ≥ 1 and T ≥ 1 to `path`, whole or not at all.

    Inputs are `tokens`, `reset`, `valid` and each state array under its contract name; outputs are `logits` and each state array
    as `next.<name>`. metadata: further strings to keep in the file, beside the config; a tokenizer, say. Weights lie in the file,
    unless they pass 2 GB: then in `<path>.data` beside it. target: "portable" is standard operators only; "ort" takes onnxruntime's
    own LinearAttention for linear attention, InfinityFormer's memory and the selective scan.

    Raises InputError where the model is not float32, the export packages are missing, the file cannot be written, or onnxruntime
    and torch disagree about the graph.
    """
    onnx, ir, runtime = _packages()
    if model.dtype != "float32":
        raise InputError(f"dtype: {model.dtype}; export computes in float32: load the checkpoint again with dtype='float32'")
    if model.config.no_graph:
        raise InputError(f"{model.config.arch}.{model.config.no_graph}")
    if target not in TARGETS:
        raise InputError(f"target: {shown(target)} is unknown; {nearest(target, TARGETS)}")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InputError(f"metadata: {shown(key)} is a {type(value).__name__}; ONNX metadata are strings, pass json.dumps(...)")
        if key == CONFIG_KEY:
            raise InputError(f"metadata: {shown(key)} is the model's own config; choose another name")
    path = Path(path)
    for name, text in (("path", str(path)), *(("metadata", f"{key}: {value}") for key, value in (metadata or {}).items())):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{name}: {shown(text)} is no Unicode text ({error.reason}), and ONNX knows no other; rename it") from error
    # torch's exporter and what it traces with are one a process: threads take turns
    with _exporting, cannot_be_written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path, folder=True) as folder:
            draft = folder / path.name
            graph = _filled(model, target)
            graph.metadata_props.update({CONFIG_KEY: json.dumps(config_to_dict(model.config)), **(metadata or {})})
            ir.save(graph, draft, external_data=_beside(model, draft))
            onnx.checker.check_model(draft, full_check=True)
            _compare(model, draft, runtime)
            _put(draft, path)


_exporting = threading.Lock()


def _put(draft: Path, path: Path) -> None:
    """Move a graph and its weights into place. The graph goes first and comes last: where it is, its weights are."""
    beside = [file for file in draft.parent.iterdir() if file != draft]
    if beside:
        path.unlink(missing_ok=True)
    for file in (*beside, draft):
        with file.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(file, path.parent / file.name)


class _Graph(nn.Module):
    """The model as a function of flat tensors, in the order of the graph's inputs and outputs."""

    def __init__(self, model: Any, target: str) -> None:
        super().__init__()
        self.model, self.target = model, target
        self.names = tuple(model.config.states())

    def forward(self, tokens: Tensor, reset: Tensor, valid: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        # past the checks of `forward`, which read values and compare lengths
        read = GraphReading(reset, valid, self.target)
        x, after = self.model._read(tokens, dict(zip(self.names, state, strict=True)), read, Training())
        return self.model._head(x), *(after[name] for name in self.names)


def input_names(config: Config) -> list[str]:
    return ["tokens", "reset", "valid", *config.states()]


def output_names(config: Config) -> list[str]:
    return ["logits", *(f"next.{name}" for name in config.states())]


def _filled(model: Any, target: str) -> Any:
    """`model` as an onnx_ir.Model whose initializers are the parameters, under their contract names."""
    from onnx_ir.tensor_adapters import TorchTensor

    # tracing takes seconds and reads no values: what it finds is kept
    key = model.config, next(model.parameters()).dtype, target
    if key not in _traced:
        _traced[key] = _trace(model, target)
    graph = _traced[key].clone()
    if target == "ort" and MICROSOFT not in graph.opset_imports:
        raise InputError(f"target: 'ort'; nothing in this {model.config.arch} maps onto onnxruntime's own operators: use 'portable'")
    for name, tensor in model.state_dict().items():
        if name in graph.graph.initializers:
            graph.graph.initializers[name].const_value = TorchTensor(tensor.cpu().contiguous(), name)
    return graph


_traced: dict[tuple[Config, torch.dtype, str], Any] = {}


def _trace(model: Any, target: str) -> Any:
    """`model` without the values of its parameters."""
    from onnxscript import optimizer

    config = model.config
    inputs = tuple(torch.from_numpy(array).to(model.device) for array in example(config, *TRACED).values())
    sequence = {0: "B", 1: "T"}
    rows = tuple({0: "B", **{1 + axis: "capacity" for axis, size in enumerate(s.shape) if size == ANY}} for s in config.states().values())
    training = model.training
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _Graph(model, target).eval(),
                inputs,
                dynamo=True,
                opset_version=OPSET,
                input_names=input_names(config),
                output_names=output_names(config),
                custom_translation_table=translations(),
                dynamic_shapes=(sequence, sequence, sequence, rows),
                verbose=False,
                optimize=False,
            )
    finally:
        model.train(training)
    assert program is not None
    graph = program.model
    for name, value in list(graph.graph.initializers.items()):
        if name.startswith(PREFIX):
            value.const_value = None
            value.name = name.removeprefix(PREFIX)
    with _quiet():
        optimizer.optimize(graph)
    inline(graph)
    return graph


def example(config: Config, batch: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs of a graph of `config`, by name: with resets, with tokens that are not valid, and in mid-sequence."""
    rng = np.random.default_rng(seed)
    reset, valid = rng.random((batch, length)) < 0.05, rng.random((batch, length)) < 0.9
    if config.reads_frames:
        tokens = rng.standard_normal((batch, length, config.frame_size), np.float32)
        tokens[~valid] = np.nan
    else:
        tokens = rng.integers(0, config.vocab_size, (batch, length))
    limit = config.longest
    started = 1000 if limit is None else limit // 2
    capacity = None
    if any(ANY in s.shape for s in config.states().values()):
        started = min(started, 40)
        limit = capacity = min(length + started, limit or length + started)
    state = {
        name: rng.integers(0, started + 1, zeros.shape, np.int32) if zeros.dtype.kind == "i" else rng.random(zeros.shape, np.float32)
        for name, zeros in zero_state(config, batch, capacity).items()
    }
    if limit is not None:  # of more tokens nothing can be said
        valid &= state["position"][:, None] + valid.cumsum(1) <= limit
    return {"tokens": tokens, "reset": reset, "valid": valid, **state}


def _compare(model: Any, path: Path, runtime: Any) -> None:
    """Raise InputError unless onnxruntime and torch agree on the file at `path`."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for batch, length in COMPARED:
        inputs = example(model.config, batch, length, seed=1)
        tokens, reset, valid, *state = (torch.from_numpy(array).to(model.device) for array in inputs.values())
        given = tokens, dict(zip(model.config.states(), state, strict=True)), reset, valid
        with torch.no_grad():
            logits, after = model(*given)
            moved_logits, moved = functional_call(model, _erring(model), given)
        expected = {"logits": (logits, moved_logits), **{f"next.{name}": (value, moved[name]) for name, value in after.items()}}
        for name, y in zip(output_names(model.config), session.run(None, inputs), strict=True):
            want, other = (tensor.cpu().numpy() for tensor in expected[name])
            allowed = np.abs(other - want).max(initial=0) + ROUNDINGS * np.abs(want).max(initial=0)
            if y.shape != want.shape or y.dtype != want.dtype or not np.abs(y - want).max(initial=0) <= allowed:
                raise InputError(
                    f"{name}: the exported graph and torch disagree at B={batch}, T={length}, so no file was written; "
                    "check that the weights are finite, and try torch and onnxruntime of the versions in constraints.txt"
                )


def _erring(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that err by ROUNDINGS of themselves, each way."""
    draw = torch.Generator().manual_seed(0)
    signs = {name: torch.randint(0, 2, p.shape, generator=draw).to(p.device) * 2 - 1 for name, p in model.named_parameters()}
    return {name: p.float() * (1 + ROUNDINGS * signs[name]) for name, p in model.named_parameters()}


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
    """Silence remarks of the exporter and its optimizer that say nothing about the model."""
    loggers = [
        logging.getLogger("torch.onnx._internal.exporter._registration"),  # it would register torchvision's operators
        logging.getLogger("onnx_ir.passes.common.initializer_deduplication"),  # parameters have no values yet
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # it copies a class of its own that it has deprecated
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            # several inputs share the axes B and T, on purpose
            warnings.filterwarnings("ignore", r"# The axis name: \w+ will not be used", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
