"""Arguments that no caller means, for every verb of every room: each is an InputError, or as good as the right one."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from unisono_spec.contract import Config, InputError, init_params, preset
from unisono_spec.contract.sampling import Sampling

B, T = 2, 3
MODELS: dict[str, Config] = {
    "fixed": preset("cram-demo", d_model=4, n_layers=2),
    "embedding": preset("cram-demo", d_model=4, n_layers=1, codes="embedding"),
    "adaptive": preset("cram-1m", d_model=4, n_layers=2),
    "frames": preset("cram-video", d_model=4, n_layers=1, frame_size=3),
    "hybrid": preset("lat-1m", d_model=8, n_layers=3, head_width=4, qk_width=4, attention=("linear", "window", "softmax"), window=2),
    "learned": preset("lat-1m", d_model=8, n_layers=1, head_width=4, qk_width=4, positions="learned", max_positions=9),
    "infinityformer": preset("infinityformer-1m", d_model=8, n_layers=1, n_heads=2, d_ffn=4),
    "maru": preset("maru-1m", d_model=4, n_layers=1, head_hidden=4, n_slots=2, d_memory=2, router="gumbel"),
    "transformer": preset("transformer-1m", d_model=8, n_layers=1, head_width=4),
    "mamba": preset("mamba-1m", d_model=4, n_layers=1, d_state=2),
    "s4d": preset("s4d-1m", d_model=4, n_layers=1, d_state=4),
}


class Odd:
    """Neither an array nor a number."""


def plain() -> dict[str, Any]:
    """Values of every kind that Python has."""
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]
    return {
        "None": None, "True": True, "0": 0, "-1": -1, "1": 1, "2**31": 2**31, "2**63": 2**63, "2**64": 2**64, "10**400": 10**400,
        "1.5": 1.5, "nan": math.nan, "inf": math.inf, "text": "x", "empty text": "", "NUL": "\0", "surrogate": "\ud800", "bytes": b"x",
        "[]": [], "[[]]": [[]], "ragged": [[1], [1, 2]], "nested": nested, "{}": {}, "{1: 2}": {1: 2}, "()": (), "set": {1},
        "object": Odd(),
        "type": Odd, "function": plain, "complex": 1j, "range": range(3), "slice": slice(3), "ellipsis": ..., "generator": iter(()),
        "np.int64(-1)": np.int64(-1), "np.float32(nan)": np.float32("nan"), "np.bool_": np.bool_(True), "dtype": np.dtype("f4"),
    }  # fmt: skip


def arrays() -> dict[str, np.ndarray]:
    """Arrays of every kind that NumPy has and the frameworks know, none of which fits where it is put."""
    out: dict[str, np.ndarray] = {f"0-d {dtype}": np.zeros((), dtype) for dtype in ("int64", "float32", "bool")}
    for dtype in ("int8", "uint8", "int32", "int64", "float16", "float32", "float64", "complex64", "bool"):
        for shape in ((0,), (1,), (B,), (B, 0), (0, T), (B, T), (B, T, 1), (T, B), (B + 1, T), (B, T + 1), (1, 1, 1, 1), (B, T, 3)):
            out[f"{dtype} {shape}"] = np.zeros(shape, dtype)
    out["negative"], out["large"] = np.full((B, T), -1), np.full((B, T), 2**40)
    return out


@dataclasses.dataclass(frozen=True)
class Room:
    """One implementation. array: from NumPy to its own arrays."""

    name: str
    package: Any
    array: Callable[[np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """One verb with all arguments right; `bad` puts another value in the place of one of them."""

    verb: str
    run: Callable[..., Any]
    right: dict[str, Any]
    fits: Callable[[str, Any], bool]


def calls(room: Room, config: Config) -> Iterator[Call]:
    rng = np.random.default_rng(0)
    package, array = room.package, room.array
    model = package.create(config)
    frames = config.reads_frames
    shape = (B, T, config.code_size) if frames else (B, T)
    tokens = rng.random(shape, np.float32) if frames else rng.integers(0, 256, shape)
    state, marks = model.init_state(B, 8), np.zeros((B, T), bool)
    width = config.d_model
    dropout = [array(np.ones((B, T, width), np.float32)) for _ in range(config.n_updates)]
    noise = [array(np.zeros((B, T, n), np.float32)) for n in config.noise_widths] or None
    given = {"tokens": array(tokens), "state": state, "reset": array(marks), "valid": array(~marks)}
    settings = {"form": "parallel", "chunk_size": 2, "dropout": dropout, "noise": noise}
    yield Call("forward", model.forward, {**given, **settings}, _fits_forward(config))
    one = {"token": array(tokens[:, 0]), "state": state, "reset": array(marks[:, 0]), "valid": array(~marks[:, 0])}
    yield Call("step", model.step, one, _fits_step(config))
    yield Call("init_state", model.init_state, {"batch": B, "capacity": 4}, _fits_init_state(config))
    if not frames:
        more = {
            "prompt": array(tokens),
            "max_new_tokens": 2,
            "sampling": Sampling(),
            "state": state,
            "n_generated": 1,
            "valid": array(~marks),
        }
        yield Call("generate", model.generate, more, _fits_generate)
    made = {"config": config, "params": init_params(config), "seed": 0, "dtype": "float32"}
    if room.name != "spec":
        made |= {"param_dtype": "float32", "device": "cpu", "implementation": "auto"}
    yield Call("create", package.create, made, _fits_create)


def _is(value: Any, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> bool:
    return hasattr(value, "dtype") and str(value.dtype).removeprefix("torch.") in dtypes and tuple(value.shape) == shape


INTEGERS = ("int8", "uint8", "int32", "int64")
REALS = ("float16", "float32", "float64")


def _fits_forward(config: Config) -> Callable[[str, Any], bool]:
    masks: Any = dataclasses.asdict(config).get("d_model")

    def fits(name: str, value: Any) -> bool:
        if name == "tokens":
            shape = (B, T, config.code_size) if config.reads_frames else (B, T)
            return _is(value, REALS if config.reads_frames else INTEGERS, shape) and int(value.min()) >= 0 and int(value.max()) < 256
        if name in ("reset", "valid"):
            return value is None or _is(value, ("bool",), (B, T))
        if name == "chunk_size":
            return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31
        if name == "dropout":
            return value is None or (isinstance(value, list) and len(value) == config.n_updates and _is(value[0], REALS, (B, T, masks)))
        return value is None and name in ("state", "noise")

    return fits


def _fits_step(config: Config) -> Callable[[str, Any], bool]:
    def fits(name: str, value: Any) -> bool:
        if name == "token":
            shape = (B, config.code_size) if config.reads_frames else (B,)
            return _is(value, REALS if config.reads_frames else INTEGERS, shape)
        return name in ("reset", "valid") and (value is None or _is(value, ("bool",), (B,)))

    return fits


def _fits_init_state(config: Config) -> Callable[[str, Any], bool]:
    def fits(name: str, value: Any) -> bool:
        if value is None:
            return name == "capacity" and all(-1 not in s.shape for s in config.states().values())
        number = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_)) and value >= 0
        return bool(number and (value < 2 if name == "batch" else 1 <= value < 2**31))

    return fits


def _fits_generate(name: str, value: Any) -> bool:
    if name in ("max_new_tokens", "n_generated"):
        number = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_)) and value >= 0
        return bool(number and value < (3 if name == "max_new_tokens" else 2**32 - 2))
    if name == "prompt":
        return _is(value, INTEGERS, (B, T)) and int(value.min()) >= 0 and int(value.max()) < 256
    return name in ("state", "valid") and value is None


def _fits_create(name: str, value: Any) -> bool:
    if name == "seed":
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64
    if name in ("dtype", "param_dtype") and isinstance(value, np.dtype):
        return value.name in ("float32", "float64")
    return value is None and name in ("params", "param_dtype", "device")


def check(room: Room, config: Config) -> int:
    """Put everything where it does not belong. → how many inputs were refused."""
    refused = 0
    converted: dict[str, Any] = {}
    for name, value in arrays().items():
        if room.name == "spec" and name.startswith("complex"):  # the complex step's
            continue
        with contextlib.suppress(TypeError):  # a dtype that the framework does not have
            converted[name] = room.array(value)
    for call in calls(room, config):
        call.run(**call.right)
        for name in call.right:
            for what, value in {**plain(), **converted, **_broken(call.right[name], room)}.items():
                if name == "max_new_tokens" and what == "2**31":
                    continue  # it would do it
                right = call.fits(name, value)
                said, where = _said(call.run, {**call.right, name: value}), f"{room.name}: {call.verb}({name}={what})"
                assert right == (said is None), f"{where}: {said or 'was accepted'}"
                refused += said is not None
    return refused


def _said(run: Callable[..., Any], arguments: dict[str, Any]) -> str | None:
    """What the InputError says, in one line; None where there is none."""
    try:
        run(**arguments)
    except InputError as error:
        return str(error) if "\n" not in str(error) and len(str(error)) < 1000 else f"not one line: {error}"
    return None


def _broken(right: Any, room: Room) -> dict[str, Any]:
    """A dict or a list with one entry missing, more, None, of another kind, of another shape."""
    if isinstance(right, list) and right:
        odd = room.array(np.zeros((B, T, 7), np.float32))
        return {
            "too few": right[:-1],
            "too many": [*right, right[0]],
            "None inside": [None, *right[1:]],
            "a number inside": [1.0, *right[1:]],
            "wider": [odd, *right[1:]],
            "whole numbers": [room.array(np.ones(tuple(right[0].shape), np.int32)), *right[1:]],
        }
    if not isinstance(right, dict):
        return {}
    first, *others = right
    rest, lists = {name: right[name] for name in others}, np.asarray(right[first]).tolist()
    kinds = {"None": None, "a list": lists, "a number": 1.0, "text": "x", "a dict": {}, "object": Odd()}
    return {
        "missing": rest,
        "unknown": {**right, "unknown": right[first]},
        "named by a number": {**right, 1: right[first]},
        **{f"{what} inside": {**right, first: value} for what, value in kinds.items()},
        **{f"{what} inside": {**right, first: room.array(value)} for what, value in arrays().items() if what.startswith("complex64 (B")},
        "deeper": {**right, first: right[first][None]},
    }


def files(room: Room, folder: Path) -> None:
    """`load` of what is no path, and of paths to nothing."""
    for what, value in {**plain(), "a folder": folder, "nothing": folder / "x", "long": "x" * 5000}.items():
        assert _said(room.package.load, {"path": value}), f"load({what}) was accepted"
