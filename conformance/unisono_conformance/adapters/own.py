"""Somebody's own function in the place of one op: `unisono_conformance.judge_op` makes this adapter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from unisono_spec.contract import Config
from unisono_spec.contract.errors import InputError, nearest

from unisono_conformance.adapter import Arrays, Capabilities, OpState, flatten, grouped


class NumPy:
    """Arrays as they are; no gradients."""

    differentiates = False

    def run(self, call: Callable[..., Any], arrays: Arrays) -> tuple[np.ndarray, OpState]:
        o, last = call(**grouped(arrays))
        return np.asarray(o), tuple(map(np.asarray, flatten(last)))


class Torch:
    """Tensors on the CPU, gradients by autograd."""

    differentiates = True

    def __init__(self) -> None:
        import torch
        from unisono_torch.arrays import from_numpy, to_numpy

        from unisono_conformance.adapters.torch import widened

        self.torch, self.to_numpy, self.widened = torch, to_numpy, widened
        self.tensor = lambda a: from_numpy(np.ascontiguousarray(a), "cpu")

    def run(self, call: Callable[..., Any], arrays: Arrays) -> tuple[np.ndarray, OpState]:
        with self.torch.no_grad():
            o, last = call(**grouped({n: self.tensor(a) for n, a in arrays.items()}))
        return self.to_numpy(o), tuple(map(self.to_numpy, flatten(last)))

    def vjp(self, call: Callable[..., Any], arrays: Arrays, cotangents: tuple[np.ndarray, ...]) -> tuple[np.ndarray, OpState, Arrays]:
        tensors = {n: self.tensor(a) for n, a in arrays.items()}
        leaves = {n: t.requires_grad_() for n, t in tensors.items() if t.is_floating_point()}
        o, last = call(**grouped(tensors))
        outputs = (o, *flatten(last))
        pairs = [(a, self.widened(self.tensor(c), a)) for a, c in zip(outputs, cotangents, strict=True) if a.requires_grad]
        found = self.torch.autograd.grad([a for a, _ in pairs], list(leaves.values()), [c for _, c in pairs], allow_unused=True)
        # what no output depends on has a gradient of zero
        gradients = {n: self.torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), found, strict=True)}
        o, *last = (self.to_numpy(a.detach()) for a in outputs)
        return o, tuple(last), {n: self.to_numpy(g) for n, g in gradients.items()}


class JAX:
    """Arrays of JAX, gradients by jax.vjp; not compiled, so that a function need not be pure of Python's branches."""

    differentiates = True

    def __init__(self) -> None:
        import jax

        self.jax = jax

    def run(self, call: Callable[..., Any], arrays: Arrays) -> tuple[np.ndarray, OpState]:
        with self.jax.enable_x64(_wide(arrays)):
            o, last = call(**grouped(self.jax.tree.map(self.jax.numpy.asarray, arrays)))
            return np.asarray(o), tuple(map(np.asarray, flatten(last)))

    def vjp(self, call: Callable[..., Any], arrays: Arrays, cotangents: tuple[np.ndarray, ...]) -> tuple[np.ndarray, OpState, Arrays]:
        with self.jax.enable_x64(_wide(arrays)):
            given = self.jax.tree.map(self.jax.numpy.asarray, arrays)
            fixed = {n: given.pop(n) for n, a in arrays.items() if a.dtype.kind in "bi"}  # marks and counters
            (o, last), pull = self.jax.vjp(lambda given: _flat(call(**grouped({**given, **fixed}))), given)
            upstream, *of_last = map(self._upstream, cotangents, (o, *last))
            (found,) = pull((upstream, tuple(of_last)))
            return np.asarray(o), tuple(map(np.asarray, last)), {n: np.asarray(g) for n, g in found.items()}

    def _upstream(self, c: np.ndarray, o: Any) -> np.ndarray:
        """A cotangent of o, which may come wider than c was rounded, and is nothing where o counts."""
        if c.dtype.kind == "i":
            return np.zeros(c.shape, self.jax.dtypes.float0)
        return c.astype(self.jax.numpy.promote_types(c.dtype, o.dtype))


FRAMEWORKS: dict[str, Callable[[], Any]] = {"numpy": NumPy, "torch": Torch, "jax": JAX}


def _wide(arrays: Arrays) -> bool:
    return any(a.dtype == np.float64 for a in arrays.values())


def _flat(answer: Any) -> Any:
    return answer[0], tuple(flatten(answer[1]))


class Adapter:
    known_gaps: Path | None = None
    warnings: tuple[str, ...] = ()

    def __init__(self, function: Callable[..., Any], op: str, framework: str, form: str, dtypes: tuple[str, ...]) -> None:
        """Raises InputError where the framework is unknown or not installed, or the function cannot be called."""
        if framework not in FRAMEWORKS:
            raise InputError(f"framework: {framework!r} is unknown; {nearest(framework, FRAMEWORKS)}")
        if not callable(function):
            raise InputError(f"function: {function!r} cannot be called; give the function that computes the op")
        try:
            self.framework = FRAMEWORKS[framework]()
        except ImportError as error:
            raise InputError(f"framework: {framework} is not installed here ({error}); pip install 'unisono[{framework}]'") from error
        self.name, self.function = getattr(function, "__name__", repr(function)), function
        taken = inspect.signature(function).parameters
        self.takes = None if any(p.kind == p.VAR_KEYWORD for p in taken.values()) else set(taken)
        self.capabilities = Capabilities(
            models=(), ops=(op,), dtypes=dtypes, forms=(form,), step=False, gradient_forms=(form,) if self.framework.differentiates else ()
        )

    def op(self, name: str, form: str, arrays: Arrays, settings: Mapping[str, Any], device: str, implementation: str):
        return self.framework.run(self._call(settings), arrays)

    def op_vjp(self, name, form, arrays, settings, do, dstate, device, implementation):
        return self.framework.vjp(self._call(settings), arrays, (do, *flatten(dstate)))

    def build(self, config: Config, params: Arrays, dtype: str, device: str, implementation: str) -> Any:
        raise NotImplementedError("declared: no models")

    def _call(self, settings: Mapping[str, Any]) -> Callable[..., Any]:
        """The function with the op's settings; it need not know chunks."""
        given = {n: v for n, v in settings.items() if n != "chunk_size" or self.takes is None or n in self.takes}
        return lambda **arrays: self.function(**arrays, **given)
