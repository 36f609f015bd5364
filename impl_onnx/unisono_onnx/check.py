"""Before a graph is put in place: onnxruntime must agree with the NumPy spec on it.

This module alone in the room may call the reference: nothing is computed by it that a graph could then repeat.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from unisono_spec.contract import ANY, Arrays, Config, InputError, zero_state
from unisono_spec.models import create

# (B, T): one token, and a length with a remainder
COMPARED = ((1, 1), (3, 70))
# A wrong wiring or a lost state is wrong by about the size of the logits, two float32 programs differ by roundings. What those cost the
# model says itself: no more than parameters that err by as many roundings as follow upon one another in a layer or two.
ROUNDINGS = 2.0**8 * 2.0**-24


def example(config: Config, batch: int, length: int, seed: int = 0) -> Arrays:
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


def compare(config: Config, params: Arrays, path: Path, runtime: Any) -> None:
    """Raise InputError unless onnxruntime, reading the file at `path`, and the spec, with `params`, agree."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors only
    try:
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common class for what it raises
        raise InputError(
            f"{path.name}: onnxruntime {runtime.__version__} does not read this graph ({str(error).strip()}), so no "
            "file was written; install a newer onnxruntime, or give another target or precision"
        ) from error
    asked = [example(config, batch, length, seed=1) for batch, length in COMPARED]
    # one after the other, for a model may be as large as half the memory
    expected, moved = _answers(config, params, asked), _answers(config, _erring(params), asked)
    for (batch, length), inputs, true, others in zip(COMPARED, asked, expected, moved, strict=True):
        for (name, want), y in zip(true.items(), session.run(list(true), inputs), strict=True):
            other = others[name]
            if name == "logits":  # those of tokens that are not read say nothing
                want, other, y = (a[inputs["valid"]] for a in (want, other, y))
            allowed = np.abs(other - want).max(initial=0) + ROUNDINGS * np.abs(want).max(initial=0)
            if y.shape != want.shape or y.dtype != want.dtype or not np.abs(y - want).max(initial=0) <= allowed:
                raise InputError(
                    f"{name}: the graph in onnxruntime and the model disagree at B={batch}, T={length}, so no file was written; "
                    "check that the weights are finite, and try onnxruntime of the version in constraints.txt"
                )


def _answers(config: Config, params: Arrays, asked: list[Arrays]) -> list[Arrays]:
    """The outputs of a graph, from the spec."""
    model, out = create(config, params, dtype="float32"), []
    for inputs in asked:
        tokens, reset, valid, *_ = inputs.values()
        with np.errstate(all="ignore"):  # NaN in padding
            logits, after = model.forward(tokens, {name: inputs[name] for name in config.states()}, reset, valid)
        out.append({"logits": logits, **{f"next.{name}": a for name, a in after.items()}})
    return out


def _erring(params: Arrays) -> Arrays:
    """Parameters that err by ROUNDINGS of themselves, each way."""
    rng = np.random.default_rng(0)
    return {name: p * (1 + np.float32(ROUNDINGS) * rng.choice(np.array([-1, 1], np.float32), p.shape)) for name, p in params.items()}
