"""Exported graphs: written without a framework, and read by onnxruntime, which evaluates and generates."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from unisono_spec.contract import ANY, Arrays, Config, InputError, generation, zero_state
from unisono_spec.contract.checks import as_array, check_ids, check_inputs
from unisono_spec.contract.files import VERSION, cast_state, load_params, read_config, write_bytes
from unisono_spec.contract.generation import Generated
from unisono_spec.contract.sampling import Sampling

from unisono_tools.config import TrainConfig
from unisono_tools.data.tokenizers import DEFINITION

REMEDIES = {
    "capacity": "give init_state a larger capacity",
    "max_positions": "reset earlier, or train with positions='rope'",
}


def _seq_len(found: str | None, path: Path) -> int | None:
    if found is None:
        return None
    if not (found.isascii() and found.isdigit() and len(found) < 10 and int(found)):
        raise InputError(f"{path}: unisono.seq_len is {found[:40]!r}, expected a number of tokens; export it again")
    return int(found)


def export(source: Path, out: Path, tokenizer: str | None, seq_len: int | None = None, **options: str) -> None:
    """Write the model file `source` as a graph that says with which tokenizer, and on how many tokens at once, it was trained.

    What defines a tokenizer beside the model is written beside the graph.
    """
    import unisono_onnx

    config, params = load_params(source)
    known = {"unisono.tokenizer": tokenizer, "unisono.seq_len": seq_len}
    beside = source.with_name(DEFINITION)
    definition = beside.read_bytes() if beside.is_file() else None
    if definition is not None:
        known["unisono.tokenizer_sha256"] = hashlib.sha256(definition).hexdigest()
    unisono_onnx.export(config, params, out, {name: str(value) for name, value in known.items() if value is not None}, **options)
    if definition is not None:
        write_bytes(out.with_name(DEFINITION), definition)


class Trainer:
    def __init__(self, train: TrainConfig, config: Config) -> None:
        raise InputError("backend: 'onnx' graphs have no gradients; train with torch or jax")


class Reader:
    """The graph's inputs are tokens, reset, valid and the state by its contract names; outputs logits and next.<state>."""

    backend = "onnx"

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"{path}: no such file; give the path of a .onnx file that `unisono export` wrote")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has no common class for what it raises
            if (opset := re.search(r"Opset (\d+) is under development|support for domain \S+ is till opset (\d+)", str(error))) is not None:
                newest = opset[2] or int(opset[1]) - 1
                raise InputError(
                    f"{path}: a newer opset than onnxruntime {onnxruntime.__version__} reads, {newest}; opset 27 needs onnxruntime 1.32, "
                    "install that, or export again with --target ort or portable"
                ) from error
            # a graph that was renamed alone still names the old file
            lost = re.search(r"External data path does not exist: \"([^\"]+)\"|(\S+\.data)\W.*No such file", str(error))
            if lost is not None:
                name = Path(lost[1] or lost[2]).name
                raise InputError(f"{path}: its weights are not beside it, in {name}; move both files, or export it again") from error
            raise InputError(
                f"{path}: onnxruntime {onnxruntime.__version__} cannot read it ({error}); it may be truncated, or need a newer one"
            ) from error
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        if "unisono.config" not in self.metadata:
            raise InputError(f"{path}: an ONNX graph, but not one of unisono's; write it with `unisono export`")
        self.config: Config = read_config(self.metadata["unisono.config"], str(path))
        self._check_metadata(path)
        self.tokenizer = self.metadata.get("unisono.tokenizer")
        self.seq_len = _seq_len(self.metadata.get("unisono.seq_len"), path)
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.inputs = {i.name for i in self.session.get_inputs()}
        self._check_graph(path)

    def _check_metadata(self, path: Path) -> None:
        """Raise InputError where the graph was written by another contract, or says two things about itself."""
        contract, arch = (self.metadata.get(f"unisono.{name}") for name in ("contract", "architecture"))
        if contract != VERSION:
            by = self.metadata.get("unisono.version", "an older one")[:40]
            raise InputError(
                f"{path}: contract {(contract or 'unnamed')[:40]!r}, written by unisono {by}; this one reads {VERSION!r}: export it again"
            )
        if arch != self.config.arch:
            raise InputError(
                f"{path}: unisono.architecture is {(arch or 'missing')[:40]!r}, its config's is {self.config.arch!r}; export it again"
            )
        digest, beside = self.metadata.get("unisono.tokenizer_sha256"), path.with_name(DEFINITION)
        if digest is not None and beside.is_file() and hashlib.sha256(beside.read_bytes()).hexdigest() != digest:
            raise InputError(
                f"{beside}: not the tokenizer that {path.name} was trained with; move the right one there, or export the graph again"
            )

    def _check_graph(self, path: Path) -> None:
        """Raise InputError unless the graph's inputs and outputs are those of its config's model."""
        expected = _declared(self.config)
        for value in (*self.session.get_inputs(), *self.session.get_outputs()):
            kind, shape = expected.get(value.name, ("nothing", []))
            sizes = len(value.shape) == len(shape) and all(
                not isinstance(a, int) or b is None or a == b for a, b in zip(value.shape, shape, strict=True)
            )
            if value.type != f"tensor({kind})" or not sizes:
                raise InputError(f"{path}: {value.name} is {value.type} {value.shape}, its config says {kind} {shape}; export it again")
        missing = {"tokens", "logits", *(f"next.{name}" for name in self.config.states())} - self.inputs - set(self.outputs)
        if missing:
            raise InputError(f"{path}: its graph has no {', '.join(sorted(missing))}, which its config needs; export it again")

    def init_state(self, batch: int, capacity: int | None = None) -> Arrays:
        state = zero_state(self.config, batch, capacity)
        if not batch or all(s.initial is None for s in self.config.states(capacity).values()):
            return state
        # what a state starts from may be learned: a reset restores it, also at a token that is not read
        once = np.ones((batch, 1), bool)
        return self._run({"tokens": np.zeros((batch, 1), np.int64), "reset": once, "valid": ~once, **state})[1]

    def forward(self, tokens: np.ndarray, state: Arrays, reset: np.ndarray | None = None) -> tuple[np.ndarray, Arrays]:
        tokens = np.asarray(as_array("tokens", tokens))
        check_inputs(self.config, tokens, state, reset)
        _check_rows(tokens)
        self._check_length(tokens.shape[1], state, reset)
        if not self.config.reads_frames:
            check_ids(tokens, self.config.vocab_size)
        tokens = tokens.astype(np.float32 if self.config.reads_frames else np.int64)
        reset = np.zeros(tokens.shape[:2], bool) if reset is None else reset
        return self._run({"tokens": tokens, "reset": reset, "valid": np.ones(tokens.shape[:2], bool), **state})

    def _run(self, inputs: Arrays) -> tuple[np.ndarray, Arrays]:
        results = self.session.run(self.outputs, {name: value for name, value in inputs.items() if name in self.inputs})
        values: dict[str, Any] = dict(zip(self.outputs, results, strict=True))
        return values["logits"], {name: values[f"next.{name}"] for name in self.config.states()}

    def _check_length(self, length: int, state: Arrays, reset: np.ndarray | None) -> None:
        """Raise InputError where a sequence grows past what its cache holds, or past the positions that were learned."""
        caches = [state[name] for name, s in self.config.states().items() if ANY in s.shape]
        limits = {"capacity": caches[0].shape[1]} if caches else {}
        if self.config.longest is not None:
            limits["max_positions"] = self.config.longest
        if not limits:
            return
        time, start = np.arange(length), -state["position"][:, None].astype(np.int64)
        begun = start if reset is None else np.maximum.accumulate(np.where(reset, time, start), 1)
        most = int((time - begun).max()) + 1
        for name, limit in limits.items():
            if most > limit:
                raise InputError(f"{name}: token {most} of a sequence, there is room for {limit}; {REMEDIES[name]}")

    def step(self, token: np.ndarray, state: Arrays) -> tuple[np.ndarray, Arrays]:
        logits, state = self.forward(as_array("tokens", token)[:, None], state)
        return logits[:, 0], state

    def generate(
        self,
        prompt: np.ndarray,
        max_new_tokens: int,
        sampling: Sampling,
        state: Any = None,
        n_generated: int = 0,
        valid: Any = None,
        seen: np.ndarray | None = None,
    ) -> Generated:
        return generation.generate(self.config, self._begin, self._last, prompt, max_new_tokens, sampling, state, n_generated, valid, seen)

    def to_numpy(self, state: Arrays) -> Arrays:
        return state

    def from_numpy(self, arrays: Arrays) -> Arrays:
        return cast_state(self.config, arrays, "float32")

    def _begin(self, state: Arrays | None, batch: int, more: int) -> Arrays:
        if state is None:
            return self.init_state(batch, more)
        return generation.roomy(self.config, state, more, lambda a, axis, n: np.pad(a, [(0, n * (i == axis)) for i in range(a.ndim)]))

    def _last(self, tokens: np.ndarray, state: Arrays, valid: np.ndarray | None) -> tuple[np.ndarray, Arrays]:
        """The logits of each row's last valid token, and the state after all."""
        _check_rows(tokens)
        valid = np.ones(tokens.shape, bool) if valid is None else valid
        self._check_length(int(valid.sum(1).max(initial=0)), state, None)
        logits, state = self._run({"tokens": tokens.astype(np.int64), "reset": np.zeros_like(valid), "valid": valid, **state})
        return logits[np.arange(len(valid)), valid.shape[1] - 1 - valid[:, ::-1].argmax(1)], state


def _check_rows(tokens: np.ndarray) -> None:
    if not len(tokens):
        raise InputError("tokens: B is 0, which no graph reads; give at least one sequence")


def _declared(config: Config) -> dict[str, tuple[str, list[int | None]]]:
    """Type and shape of each input and output of a graph of `config`; None where a size is free."""
    frames = config.reads_frames
    out: dict[str, tuple[str, list[int | None]]] = {
        "tokens": ("float", [None, None, config.frame_size]) if frames else ("int64", [None, None]),
        "reset": ("bool", [None, None]),
        "valid": ("bool", [None, None]),
        "logits": ("float", [None, None, None]),
    }
    for name, s in config.states().items():
        shape = [None, *(None if size == ANY else size for size in s.shape)]
        out[name] = out[f"next.{name}"] = ("int32" if s.integer else "float", shape)
    return out
