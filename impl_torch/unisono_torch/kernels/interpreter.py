"""Triton's interpreter, quicker: by itself it scans one element at a time, replaces the language's functions anew at each call of a
device function, and computes sums of integers twice, for a check of overflow that it makes in its debug mode alone."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_whole: list[tuple[Any, str, Any]] = []  # of the language's parts, by name: what stands there while a kernel runs
_kinds: dict[str, np.dtype] = {}
_blocks: dict[tuple[int, ...], tuple[Any, int]] = {}
_shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}


def _scan_by_rows(self, input):
    rows = [np.moveaxis(tensor.handle.data, self.axis, 0) for tensor in input]
    out = [np.empty_like(row) for row in rows]
    previous = None
    for index in range(len(rows[0])):
        current = tuple(self.to_tensor(row[index], tensor.dtype) for row, tensor in zip(rows, input, strict=True))
        if previous is not None:
            current = self.combine_fn.fn(*previous, *current)
        previous = current if isinstance(current, tuple) else (current,)
        for o, value in zip(out, previous, strict=True):
            o[index] = value.handle.data
    return [self.to_tensor(np.moveaxis(o, 0, self.axis), tensor.dtype) for o, tensor in zip(out, input, strict=True)]


class _Nothing:
    def restore(self) -> None:
        pass


class _Scope:
    """The language's functions are the interpreter's until `restore`; calls of device functions meanwhile change nothing."""

    now: _Scope | None = None

    def __init__(self) -> None:
        self.before = [(place, name, vars(place).get(name, interpreter._MISSING)) for place, name, _ in _whole]
        for place, name, value in _whole:
            setattr(place, name, value)
        _Scope.now = self

    def restore(self) -> None:
        for place, name, value in self.before:
            if value is interpreter._MISSING:
                delattr(place, name)
            else:
                setattr(place, name, value)
        _Scope.now = None


def _patched(fn: Any) -> Any:
    return _Scope() if _Scope.now is None else _Nothing()


def _replacements(patch: Any) -> list[tuple[Any, str, Any]]:
    """What the interpreter sets for kernels that see both `tl` and `tl.core`, as those do that call functions of Triton's own."""
    scope = patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    found = {(id(place), name): (place, name, _direct(vars(place)[name])) for place, name, _ in scope._changes}
    scope.restore()
    return list(found.values())


def _direct(value: Any) -> Any:
    """Of a builtin function: itself, given the semantics without a look at what else it is given."""
    if not getattr(value, "__qualname__", "").startswith("_patch_attr."):
        return value
    member = value.__kwdefaults__["member"]
    function, semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

    def call(*arguments: Any, **named: Any) -> Any:
        named["_semantic"] = semantic
        return function(*arguments, **named)

    return call


def _kind_of(original: Any) -> Any:
    def kind(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in _kinds:
            _kinds[name] = original(dtype)
        return _kinds[name]

    return kind


def _block_of(original: Any) -> Any:
    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(getattr(size, "value", size) for size in shape)
        if sizes not in _blocks:
            original(self, element_ty, shape)
            _blocks[sizes] = self.shape, self.numel
        self.element_ty = element_ty
        self.shape, self.numel = _blocks[sizes]
        self.name = f"<{sizes}, {element_ty}>"

    return init


def _tensor_of(original: Any) -> Any:
    def init(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in _shapes:
            original(self, handle, type)
            _shapes[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = _shapes[sizes]

    return init


def _broadcast_of(original: Any) -> Any:
    def broadcast(lhs: Any, rhs: Any) -> Any:
        if lhs.shape is rhs.shape:  # those of one shape have it in common
            return lhs, rhs
        return original(lhs, rhs)

    return broadcast


def install() -> None:
    """Once a process; where Triton's interpreter is built in another way, scans alone are quicker."""
    interpreter.ScanOps.generic_scan = _scan_by_rows
    if _whole or not hasattr(interpreter, "_LangPatchScope"):
        return
    _whole.extend(_replacements(interpreter._patch_lang))
    interpreter._patch_lang = _patched
    interpreter._get_np_dtype = _kind_of(interpreter._get_np_dtype)
    builder, semantic = interpreter.interpreter_builder, interpreter.interpreter_semantic
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    tl.block_type.__init__, tl.tensor.__init__ = _block_of(tl.block_type.__init__), _tensor_of(tl.tensor.__init__)
    semantic.broadcast_impl_value = _broadcast_of(semantic.broadcast_impl_value)
