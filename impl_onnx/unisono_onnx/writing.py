"""One ONNX graph of a whole model: built, checked, compared with the spec, and only then put in place."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from unisono_spec.contract import Arrays, Config, InputError, config_to_dict, nearest
from unisono_spec.contract.aside import aside, cannot_be_written, check_name
from unisono_spec.contract.checks import check_config
from unisono_spec.contract.errors import shown
from unisono_spec.contract.files import VERSION, check_params

from unisono_onnx.targets import NEEDED, PRECISIONS, TARGETS

DATA = ".data"  # behind the name of a graph: the file of its weights
SUFFIX = ".onnx"  # by which the tools know a graph
CONFIG_KEY = "unisono.config"
OWN_KEYS = (CONFIG_KEY, *(f"unisono.{name}" for name in ("architecture", "contract", "version", "target", "precision")))
# Protobuf holds at most 2 GiB in one message; larger weights go to a second file beside the graph
MAX_EMBEDDED_BYTES = 2**31 - 2**24


def export(
    config: Config,
    params: Arrays,
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    target: str = "portable",
    precision: str = "float32",
) -> None:
    """Write the model of `config` with `params` as one graph with dynamic B ≥ 1 and T ≥ 1 to `path`, whole or not at all.

    Inputs are `tokens`, `reset`, `valid` and each state array under its contract name; outputs are `logits` and each state array
    as `next.<name>`. path: a name that ends in .onnx. metadata: further strings to keep in the file; a tokenizer, say. Weights lie in
    the file, unless they pass 2 GB: then in `<path>.data` beside it. target: "portable" is standard operators only; "ort" takes
    onnxruntime's own LinearAttention for linear attention, InfinityFormer's memory and the selective scan, and its CausalConvWithState;
    "opset27" the standard's operators of these names, which onnxruntime loads from 1.32 on. precision: of matrices and
    embeddings in the file, "float32", "float16", "int8" or "int4"; int8 and int4 in blocks of 32 that share a scale. "int4" needs
    onnxruntime.

    The graph computes in float32, whatever its precision and the dtype of `params`.

    Raises InputError where the export packages are missing, the parameters are not the config's, the file cannot be
    written, or onnxruntime and the spec disagree about the graph.
    """
    onnx, ir, runtime = _packages()
    from unisono_onnx import builder, check
    from unisono_onnx.precision import held as rounded

    config = check_config(config)
    check_params(config, params, array=np.ndarray)
    if config.no_graph:
        raise InputError(f"{config.arch}.{config.no_graph}")
    if target not in TARGETS:
        raise InputError(f"target: {shown(target)} is unknown; {nearest(target, TARGETS)}")
    needed = NEEDED.get(target, (0, 0))
    if tuple(map(int, runtime.__version__.split(".")[:2])) < needed:
        raise InputError(
            f"target: {target!r} needs onnxruntime {needed[0]}.{needed[1]} or later, not {runtime.__version__}; use 'ort', or install that"
        )
    if precision not in PRECISIONS:
        raise InputError(f"precision: {shown(precision)} is unknown; {nearest(precision, PRECISIONS)}")
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"path: {shown(path)} has type {type(path).__name__}; give a name that ends in {SUFFIX}")
    if not isinstance(metadata, (Mapping, type(None))):
        raise InputError(f"metadata: {shown(metadata)} has type {type(metadata).__name__}; give texts by name, a dict")
    path, metadata = Path(path), dict(metadata or {})
    _check_metadata(path, metadata)
    held = rounded(config, params, precision)
    with cannot_be_written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path, folder=True) as folder:
            draft = folder / path.name
            model = builder.build(config, held, target, precision)
            own = json.dumps(config_to_dict(config)), config.arch, VERSION, _version(), target, precision
            model.metadata_props.update({**dict(zip(OWN_KEYS, own, strict=True)), **metadata})
            ir.save(model, draft, external_data=_beside(model, draft))
            del model
            onnx.checker.check_model(draft, full_check=True)
            check.compare(config, held, draft, runtime)
            _put(draft, path)


def input_names(config: Config) -> list[str]:
    return ["tokens", "reset", "valid", *check_config(config).states()]


def output_names(config: Config) -> list[str]:
    return ["logits", *(f"next.{name}" for name in check_config(config).states())]


def _check_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    if path.suffix != SUFFIX:
        raise InputError(f"path: {shown(path.name)} is no name of a graph; let it end in {SUFFIX}")
    check_name(path)
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InputError(f"metadata: {shown(key)} is a {type(value).__name__}; ONNX metadata are strings, pass json.dumps(...)")
        if key in OWN_KEYS:
            raise InputError(f"metadata: {shown(key)} is the graph's own; choose another name")
    for name, text in (("path", str(path)), *(("metadata", f"{key}: {value}") for key, value in metadata.items())):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{name}: {shown(text)} is no Unicode text ({error.reason}), and ONNX knows no other; rename it") from error


def _put(draft: Path, path: Path) -> None:
    """Move a graph and its weights into place. The graph goes first and comes last: where it is, its weights are, and no older ones."""
    beside = [file for file in draft.parent.iterdir() if file != draft]
    old = path.with_name(f"{path.name}{DATA}")
    if beside or old.is_file():
        path.unlink(missing_ok=True)
        old.unlink(missing_ok=True)
    for file in (*beside, draft):
        with file.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(file, path.parent / file.name)


def _beside(model: Any, draft: Path) -> str | None:
    """The name of a second file for the weights, if they do not fit into the graph's."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    return f"{draft.name}{DATA}" if size > MAX_EMBEDDED_BYTES else None


def _version() -> str:
    """Of this distribution; "unknown" where it is not installed as one."""
    try:
        return importlib.metadata.version("unisono")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _packages() -> tuple[Any, Any, Any]:
    try:
        import onnx
        import onnx_ir
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"export: {error.name} is not installed; pip install 'unisono[onnx]'") from error
    return onnx, onnx_ir, onnxruntime
