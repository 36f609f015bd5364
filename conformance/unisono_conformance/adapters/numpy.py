"""The spec itself before the court: what it says of itself must hold too. Its derivatives are the complex step's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from unisono_spec import create
from unisono_spec.contract import Config
from unisono_spec.models.base import Model as SpecModel

from unisono_conformance.adapter import Arrays, Capabilities, Gradients, Slopes, flatten, grouped
from unisono_conformance.cases import cases, ops
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

        def loss(params: Arrays, inputs: Arrays, state: Arrays) -> float:
            model: SpecModel = create(self.config, params, dtype=self.dtype)
            with np.errstate(invalid="ignore"):
                o, last = model.forward(inputs["tokens"], state if given else None, *more)  # pyright: ignore[reportArgumentType]
            # where there is no cotangent a NaN of padding does not count
            return np.sum(dlogits * np.imag(o), where=dlogits != 0) + sum(np.sum(d * np.imag(last[n])) for n, d in dstate.items())

        given = state is not None
        at = {"params": self.spec.params, "inputs": {"tokens": tokens}, "state": state or {}}
        slopes = _slopes(lambda moved: loss(**{**at, **moved}), at)
        return Gradients({}, {}, {}, *self.forward(tokens, state, *more), slopes)

    def params(self) -> Arrays:
        return dict(self.spec.params)


class Adapter:
    name = "numpy"
    # one form is enough: what it differentiates is the truth itself
    capabilities = Capabilities(ops=ops(), gradient_forms=("parallel",), spec=True)
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
            return np.sum(do * o.imag) + sum(np.sum(d * a.imag) for d, a in zip(flatten(dstate), flatten(last), strict=True))

        kinds = ("params", "inputs", "state")  # all are arguments
        slopes = _slopes(lambda moved: loss(*moved.values()), dict.fromkeys(kinds, arrays))
        return *self.op(name, form, arrays, settings, device, implementation), slopes


def _module(name: str) -> Any:
    return next(case.module for case in cases().values() if case.name.endswith(f"/{name}"))  # pyright: ignore[reportAttributeAccessIssue]


def _slopes(loss: Callable[[dict[str, Arrays]], float], at: Mapping[str, Arrays]) -> Slopes:
    """`loss` gives the imaginary part, where the arrays of one kind are moved."""

    def along(kind: str, directions: Arrays) -> np.ndarray:
        h, out = numerics.STEP, []
        for i in range(len(next(iter(directions.values())))):
            steps = {n: (1j * h * v[i]).astype(np.result_type(at[kind][n], np.complex64)) for n, v in directions.items()}
            out.append(loss({kind: {**at[kind], **{n: at[kind][n] + step for n, step in steps.items()}}}) / h)
        return np.array(out)

    return along


def make() -> Adapter:
    return Adapter()
