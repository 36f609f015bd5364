"""Unisono's JAX room before the court. Calls are jitted: one trace a config, dtype, form and shape serves every property.

`implementation`: plain; pallas, jla where they can run (a GPU; pallas in Pallas' interpreter, too).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import unisono_jax
from flax import nnx
from unisono_jax.registry import IMPLEMENTATIONS, interpreted, unavailable
from unisono_spec.contract import Config
from unisono_spec.contract.implementations import PLAIN, choices, dtypes, served

from unisono_conformance.adapter import Arrays, Capabilities, Gradients, flatten, grouped
from unisono_conformance.cases import cases, ops
from unisono_conformance.cases.base import OpCase

KERNELS = tuple(name for name in choices(IMPLEMENTATIONS) if name not in ("auto", PLAIN))


class Model:
    """`eager` runs op by op, as P12 compares; everything else goes through the room's own `compiled()`."""

    def __init__(self, model: Any) -> None:
        self.model, self.call = model, model.compiled()

    def forward(self, tokens, state=None, reset=None, valid=None, form="parallel", chunk_size=64, dropout=None, noise=None):
        with jax.enable_x64(self.model.dtype == "float64"):
            logits, after = self.call.forward(tokens, state, reset, valid, form, chunk_size, dropout, noise)
            return np.asarray(logits), unisono_jax.numpy_state(after)

    def step(self, token, state, reset=None, valid=None):
        with jax.enable_x64(self.model.dtype == "float64"):
            logits, after = self.call.step(token, state, reset, valid)
            return np.asarray(logits), unisono_jax.numpy_state(after)

    def vjp(self, tokens, dlogits, dstate, state=None, reset=None, valid=None, form="parallel", chunk_size=64, dropout=None, noise=None):
        with jax.enable_x64(self.model.dtype == "float64"):
            graph, params = nnx.split(self.model)
            floats = {n: a for n, a in (state or {}).items() if n in dstate}
            rest = {n: a for n, a in (state or {}).items() if n not in dstate}
            frames = tokens.dtype.kind not in "iu"
            drawn = (None if arrays is None else list(arrays) for arrays in (dropout, noise))
            g, dtokens, g_state, logits, after = _vjp(
                graph, form, chunk_size, frames, params, tokens, floats, rest, reset, valid, *drawn, dlogits, dstate
            )
            found = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(g)}
            inputs = {"tokens": np.asarray(dtokens)} if frames else {}
            return Gradients(found, inputs, unisono_jax.numpy_state(g_state), np.asarray(logits), unisono_jax.numpy_state(after))

    def params(self) -> Arrays:
        return unisono_jax.numpy_params(self.model)

    def compiled(self) -> Model:
        return _Eager(self.model)


class _Eager(Model):
    """Not compiled: every other property has judged the compiled model, so P12 compares this one with the same truth."""

    def __init__(self, model: Any) -> None:
        self.model = self.call = model


class Adapter:
    name = "jax"
    known_gaps = None
    warnings = ("ignore:The Pallas Triton backend is deprecated:DeprecationWarning",)  # JAX's own; without it, ops are plain

    def __init__(self) -> None:
        gpu = ("cuda",) if any(d.platform == "gpu" for d in jax.devices()) else ()
        kernels = {name: served(IMPLEMENTATIONS, name) for name in KERNELS}
        self.capabilities = Capabilities(
            ops=ops(IMPLEMENTATIONS),
            dtypes=dtypes(IMPLEMENTATIONS),
            devices=("cpu", *gpu),
            implementations=(PLAIN, *(name for name in KERNELS if not unavailable(name))),
            narrower={
                name: {**by, **{c.arch: by[c.op] for c in cases().values() if isinstance(c, OpCase) and c.op in by}}
                for name, by in kernels.items()
            },
            rounds=("pallas",),
            compiled=True,
            dear=(PLAIN, *(("pallas",) if interpreted() else ())),
        )

    def build(self, config: Config, params: Arrays, dtype: str, device: str, implementation: str) -> Model:
        with jax.enable_x64(dtype == "float64"):
            return Model(unisono_jax.create(config, params, dtype=dtype, device=device, implementation=implementation))

    def op(self, name: str, form: str, arrays: Arrays, settings: Mapping[str, Any], device: str, implementation: str):
        with jax.enable_x64(_wide(arrays)), jax.default_device(jax.devices(device)[0]):
            o, last = _op(name, form, tuple(settings.items()), implementation, arrays)
            return np.asarray(o), tuple(map(np.asarray, flatten(last)))

    def op_vjp(self, name, form, arrays, settings, do, dstate, device, implementation):
        with jax.enable_x64(_wide(arrays)), jax.default_device(jax.devices(device)[0]):
            marks = {n: a for n, a in arrays.items() if a.dtype.kind == "b"}
            floats = {n: a for n, a in arrays.items() if n not in marks}
            (o, last), found = _op_vjp(name, form, tuple(settings.items()), implementation, floats, marks, do, dstate)
            return np.asarray(o), tuple(map(np.asarray, flatten(last))), {n: np.asarray(g) for n, g in found.items()}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _vjp(graph, form, chunk_size, frames, params, tokens, floats, rest, reset, valid, dropout, noise, dlogits, dstate):
    def run(params, tokens, floats):
        read = (tokens, {**floats, **rest} or None, reset, valid, form, chunk_size, dropout, noise)
        logits, after = nnx.merge(graph, params).forward(*read)
        return (logits, {n: after[n] for n in dstate}), (logits, after)

    if frames:
        _, pull, found = jax.vjp(run, params, tokens, floats, has_aux=True)
        return *pull((dlogits, dstate)), *found
    _, pull, found = jax.vjp(lambda p, s: run(p, tokens, s), params, floats, has_aux=True)
    g, g_state = pull((dlogits, dstate))
    return g, tokens, g_state, *found


def _wide(arrays: Arrays) -> bool:
    return any(a.dtype == np.float64 for a in arrays.values())


def _function(name: str, form: str, settings: tuple, implementation: str) -> Any:
    more = {"implementation": implementation} if form == "parallel" else {}
    return functools.partial(getattr(importlib.import_module(f"unisono_jax.ops.{name}"), form), **dict(settings), **more)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _op(name, form, settings, implementation, arrays):
    return _function(name, form, settings, implementation)(**grouped(arrays))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _op_vjp(name, form, settings, implementation, floats, marks, do, dstate):
    f = _function(name, form, settings, implementation)
    found, pull = jax.vjp(lambda a: f(**grouped(a), **marks), floats)
    # where a kernel may round, do was rounded already, and o may come wider than it; to round do here would hide a narrow o
    return found, pull((do.astype(jnp.promote_types(do.dtype, found[0].dtype)), dstate))[0]


def make() -> Adapter:
    return Adapter()
