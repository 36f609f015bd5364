"""The spec itself before the court: what it says of itself must hold too. Its gradients are the complex step's, by coordinate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from unisono_spec import create
from unisono_spec.contract import Config
from unisono_spec.models.base import Model as SpecModel

from unisono_conformance.adapter import OPS, Arrays, Capabilities, Gradients, grouped, parts
from unisono_conformance.cases import cases
from unisono_conformance.judging import numerics


class Model:
    def __init__(self, config: Config, params: Arrays, dtype: str) -> None:
        self.config, self.dtype, self.spec = config, dtype, create(config, params, dtype=dtype)

    def forward(self, tokens, state=None, reset=None, valid=None, form="parallel", chunk_size=64, dropout=None, noise=None):
        with np.errstate(invalid="ignore"):  # NaN in padding
            return self.spec.forward(tokens, state, reset, valid, form, chunk_size, dropout, noise)  # pyright: ignore[reportArgumentType]

    def step(self, token, state, reset=None, valid=None):
        with np.errstate(invalid="ignore"):
            return self.spec.step(token, state, reset, valid)

    def vjp(self, tokens, dlogits, dstate, state=None, reset=None, valid=None, form="parallel", chunk_size=64, dropout=None, noise=None):
        more = (reset, valid, form, chunk_size, dropout, noise)

        def loss(params: Arrays, tokens: np.ndarray, state: Arrays | None) -> float:
            model: SpecModel = create(self.config, params, dtype=self.dtype)
            with np.errstate(invalid="ignore"):
                o, last = model.forward(tokens, state, *more)  # pyright: ignore[reportArgumentType]
            # where there is no cotangent a NaN of padding does not count
            return np.sum(dlogits * np.imag(o), where=dlogits != 0) + sum(np.sum(d * np.imag(last[n])) for n, d in dstate.items())

        params = self.spec.params
        frames = {} if tokens.dtype.kind in "iu" else {"tokens": tokens}
        return Gradients(
            {n: _gradient(lambda a, n=n: loss({**params, n: a}, tokens, state), p) for n, p in params.items()},
            {n: _gradient(lambda a: loss(params, a, state), a) for n, a in frames.items()},
            {n: _gradient(lambda a, n=n: loss(params, tokens, {**(state or {}), n: a}), state[n]) for n in dstate if state is not None},
            *self.forward(tokens, state, *more),
        )

    def params(self) -> Arrays:
        return dict(self.spec.params)


class Adapter:
    name = "numpy"
    # one form is enough: what it differentiates is the truth itself, a coordinate at a time
    capabilities = Capabilities(ops=OPS, gradient_forms=("parallel",), gradients_by_coordinate=True)
    known_gaps = None
    warnings: tuple[str, ...] = ()

    def build(self, config: Config, params: Arrays, dtype: str, device: str, implementation: str) -> Model:
        return Model(config, params, dtype)

    def op(self, name: str, form: str, arrays: Arrays, settings: Mapping[str, Any], device: str, implementation: str):
        with np.errstate(invalid="ignore"):
            return getattr(_module(name), form)(**grouped(arrays), **settings)

    def op_vjp(self, name, form, arrays, settings, do, dstate, device, implementation):
        def loss(arrays: Arrays) -> float:
            o, last = self.op(name, form, arrays, settings, device, implementation)
            return np.sum(do * o.imag) + sum(np.sum(d * a.imag) for d, a in zip(parts(dstate), parts(last), strict=True))

        floats = {n: a for n, a in arrays.items() if a.dtype.kind == "f"}
        found = {n: _gradient(lambda a, n=n: loss({**arrays, n: a}), a) for n, a in floats.items()}
        return *self.op(name, form, arrays, settings, device, implementation), found


def _module(name: str) -> Any:
    return next(case.module for case in cases().values() if case.name.endswith(f"/{name}"))  # pyright: ignore[reportAttributeAccessIssue]


def _gradient(f, a: np.ndarray) -> np.ndarray:
    """∂f/∂a, coordinate by coordinate; f returns the imaginary part."""
    h, out = numerics.STEP, np.zeros(a.shape, a.dtype)
    moved = a.astype(np.result_type(a.dtype, np.complex64))
    for i in np.ndindex(a.shape):
        moved[i] += 1j * h
        out[i] = f(moved) / h
        moved[i] = a[i]
    return out


def make() -> Adapter:
    return Adapter()
