"""Exported graphs before the court, in onnxruntime; onnx's own NumPy evaluator and the model of the source beside them (P14).

A graph comes from a model of the framework that is installed, PyTorch or JAX. `open_graph` reads a file where neither is, nor onnx.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from unisono_onnx.targets import PRECISIONS, TARGETS
from unisono_spec.contract import Config, InputError, config_from_dict, init_params, zero_state

from unisono_conformance.adapter import Arrays, Capabilities
from unisono_conformance.cases import cases

SOURCES = ("torch", "jax")  # the first that is installed

# by the name of an implementation, a target or a precision: how its graphs are exported
VARIANTS: dict[str, dict[str, str]] = {
    **{name: {"target": name} for name in TARGETS},
    **{name: {"precision": name} for name in PRECISIONS[1:]},
}

Run = Callable[[dict[str, np.ndarray]], dict[str, Any]]


class Graph:
    """A model that is one graph: inputs tokens, reset, valid and the state by name; outputs logits and next.<name>."""

    def __init__(self, config: Config, run: Run, params: Arrays | None = None, others: Mapping[str, Any] | None = None) -> None:
        self.config, self.run, self._params, self._others = config, run, params, others or {}

    def forward(self, tokens, state=None, reset=None, valid=None, form="parallel", chunk_size=64, dropout=None, noise=None):
        shape = tokens.shape[:2]
        if 0 in shape:
            raise InputError(f"tokens: shape {tokens.shape}, which no graph reads; give at least one sequence of one token")
        state = self.init_state(*shape) if state is None else state
        marks = {
            "reset": np.zeros(shape, bool) if reset is None else reset,
            "valid": np.ones(shape, bool) if valid is None else valid,
        }
        found = self.run({"tokens": tokens, **marks, **state})
        return found["logits"], {name: found[f"next.{name}"] for name in state}

    def init_state(self, batch: int, capacity: int | None = None) -> Arrays:
        """The state before the first of `capacity` tokens. A reset makes it of zeros, also where its token is not read."""
        state, marks = zero_state(self.config, batch, capacity), {"reset": np.ones((batch, 1), bool), "valid": np.zeros((batch, 1), bool)}
        if all(s.initial is None for s in self.config.states().values()):
            return state
        found = self.run({"tokens": np.zeros((batch, 1), np.int64), **marks, **state})
        return {name: found[f"next.{name}"] for name in state}

    def step(self, token, state, reset=None, valid=None):
        reset, valid = (None if m is None else m[:, None] for m in (reset, valid))
        logits, after = self.forward(token[:, None], state, reset, valid)
        return logits[:, 0], after

    def params(self) -> Arrays:
        assert self._params is not None
        return self._params

    def others(self) -> Mapping[str, Any]:
        return self._others


def open_graph(path: str | Path) -> Graph:
    """The graph in a file, with its config from its metadata, in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    config = config_from_dict(json.loads(session.get_modelmeta().custom_metadata_map["unisono.config"]))
    taken = {i.name for i in session.get_inputs()}

    def run(inputs: Arrays) -> dict[str, Any]:
        return dict(zip(names, session.run(names, {n: a for n, a in inputs.items() if n in taken}), strict=True))

    return Graph(config, run)


def evaluator(path: str | Path, config: Config) -> Graph:
    """The same file in onnx's NumPy evaluator."""
    from onnx.reference import ReferenceEvaluator

    reader = ReferenceEvaluator(str(path))
    names = [str(name) for name in reader.output_names]
    taken = set(reader.input_names)

    def run(inputs: Arrays) -> dict[str, Any]:
        with np.errstate(all="ignore"):  # NaN in padding
            return dict(zip(names, reader.run(None, {n: a for n, a in inputs.items() if n in taken}), strict=True))

    return Graph(config, run)


def standard(path: str | Path) -> bool:
    """Whether a graph has the standard's operators only, which onnx's own evaluator knows."""
    import onnx

    return {entry.domain for entry in onnx.load(path, load_external_data=False).opset_import} == {""}


class Adapter:
    name = "onnx"
    known_gaps = None
    warnings = ()

    def __init__(self) -> None:
        self.capabilities = Capabilities(
            ops=(), dtypes=("float32",), forms=("parallel",), implementations=tuple(VARIANTS), gradient_forms=(), dropout=False,
            exported=True, empty_batch=False, narrower=dict.fromkeys(TARGETS[1:], dict.fromkeys(_fused(), ("float32",))),
        )  # fmt: skip
        self.folder = tempfile.TemporaryDirectory(prefix="unisono-onnx-")
        self.built: dict[str, Graph] = {}
        name = next(name for name in SOURCES if importlib.util.find_spec(name))
        self.source: Any = importlib.import_module(f"unisono_conformance.adapters.{name}").make()

    def build(self, config: Config, params: Arrays, dtype: str, device: str, implementation: str) -> Graph:
        """Each config with each set of parameters is exported once."""
        what = repr((config, implementation)).encode(), *(params[name].tobytes() for name in sorted(params))
        digest = hashlib.sha256(b"".join(what)).hexdigest()[:16]
        if digest not in self.built:
            source, path = self.source.build(config, params, dtype, device, "auto"), Path(self.folder.name) / f"{digest}.onnx"
            export = importlib.import_module(f"unisono_{self.source.name}.onnx").export
            export(source.model, path, **VARIANTS[implementation])
            graph = open_graph(path)
            # the parameters lie in the graph, folded and transposed: those of the source stand for them
            others: dict[str, Any] = {"its source": source}
            if standard(path):
                others["onnx's own evaluator"] = evaluator(path, config)
            self.built[digest] = Graph(graph.config, graph.run, source.params(), others)
        return self.built[digest]

    def op(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a graph is a whole model")

    op_vjp = op

    def held(self, config: Config, params: Arrays, implementation: str) -> Arrays:
        from unisono_onnx.precision import held

        return held(config, params, VARIANTS[implementation].get("precision", PRECISIONS[0]))


def _fused() -> tuple[str, ...]:
    """The architectures that the operators of a target other than the first are used in."""
    from unisono_onnx.builder import fuses

    models = {case.arch: [case.variants[name] for name in case.defaults] for case in cases().values() if case.level == "model"}
    return tuple(arch for arch, configs in models.items() if all(fuses(config, init_params(config)) for config in configs))


def make() -> Adapter:
    return Adapter()
