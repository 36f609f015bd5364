"""What the spec says about some inputs, how far off an implementation may be, and gradients without autodiff."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
from unisono_spec.contract import DTYPES

from unisono_conformance import numerics
from unisono_conformance.cases.base import Case, OpCase
from unisono_conformance.cases.inputs import Arrays, Inputs, stack

# (truth, budget) of outputs, and of each float array of the state; a budget of 0 for integers
Expected = tuple[tuple[np.ndarray, np.ndarray], dict[str, tuple[np.ndarray, np.ndarray]]]
# by (kind, name of one array or of several that move together): the directions [n, *shape] of each array, the derivatives along
# them [n], and their budget
Slopes = dict[tuple[str, str], tuple[Arrays, np.ndarray, np.ndarray]]

_CAPACITY = 2000  # remembered answers; all are tiny but those of one long sequence
_LONG = 1000  # from this length on the spec is asked by its parallel form
_memory: collections.OrderedDict[tuple, Any] = collections.OrderedDict()


def expected(case: Case, setting: Any, inputs: Inputs, dtype: str) -> Expected:
    """y* and budget for outputs and final state, on inputs as the implementation gets them."""
    key = (case.name, repr(setting), dtype, inputs.key())
    if key not in _memory:
        _memory[key] = (
            _expected_op(case, setting, inputs, dtype) if isinstance(case, OpCase) else _expected_model(case, setting, inputs, dtype)
        )
        if len(_memory) > _CAPACITY:
            _memory.popitem(last=False)
    return _memory[key]


def slopes(case: Case, setting: Any, inputs: Inputs, do: np.ndarray, dstate: Arrays, dtype: str, coordinates: bool) -> Slopes:
    """Derivatives of Σ do·o + Σ dstate·state along directions: every coordinate, or two of random signs for what moves together."""
    key = (case.name, repr(setting), dtype, inputs.key(), do.tobytes(), coordinates)
    if key not in _memory:
        _memory[key] = _slopes(case, setting, inputs, do, dstate, dtype, coordinates)
    return _memory[key]


def _form(inputs: Inputs) -> str:
    return "recurrent" if inputs.length < _LONG else "parallel"


def _expected_op(case: OpCase, setting: Any, inputs: Inputs, dtype: str) -> Expected:
    o, last = case.reference(setting, inputs, _form(inputs))
    o_terms, last_terms = case.reference(setting, case.terms(inputs), _form(inputs))
    factor = numerics.formula(dtype, inputs.length)
    return (o, factor * o_terms), {name: (a, factor * last_terms[name]) for name, a in last.items()}


def _expected_model(case: Case, setting: Any, inputs: Inputs, dtype: str) -> Expected:
    o, last = case.reference(setting, inputs, _form(inputs))
    near = _rounded_inputs(inputs, dtype)
    centre, centre_last = (o, last) if near is inputs else case.reference(setting, near, _form(inputs))
    copies = numerics.realisations(inputs.length)
    y, y_last = case.reference(setting, stack([near] * copies), _form(inputs), "float32", numerics.perturbation(dtype))

    moved = [case.reference(setting, near.replace(params=p), _form(inputs)) for p in numerics.moved(near.params, inputs.length)]

    def errors(found: np.ndarray, true: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
        return np.stack([*found.reshape(copies, *true.shape), *others]) - true

    budget = numerics.row_budget(o, errors(y, centre, [o for o, _ in moved]), dtype, inputs.length, sequence=True)
    numerics.check_useful(budget, np.abs(o).max(-1, keepdims=True, initial=0), f"{case.name} logits in {dtype}")
    state = {}

    def found(name: str) -> np.ndarray:
        return errors(y_last[name], centre_last[name], [last[name] for _, last in moved])

    for name, a in last.items():
        exact = a.dtype.kind in "iu"
        # sums stay float32 or wider: what the layers' roundings do to them is in the realisations
        state[name] = (
            a,
            np.zeros(a.shape) if exact else numerics.row_budget(a, found(name), dtype, inputs.length),
        )
    return (o, budget), state


def _rounded_inputs(inputs: Inputs, dtype: str) -> Inputs:
    """Inputs on which float32 arithmetic can be asked what rounding costs: float64's are rounded to float32 first."""
    if dtype != "float64":
        return inputs

    def cast(arrays: Arrays) -> Arrays:
        return {name: a.astype(np.float32) if a.dtype == np.float64 else a for name, a in arrays.items()}

    return inputs.replace(arrays=cast(inputs.arrays), state=cast(inputs.state), params=cast(inputs.params))


def _slopes(case: Case, setting: Any, inputs: Inputs, do: np.ndarray, dstate: Arrays, dtype: str, coordinates: bool) -> Slopes:
    near = _rounded_inputs(inputs, dtype)
    out: Slopes = {}
    for kind, arrays in case.floats(setting, inputs).items():
        groups: dict[str, list[str]] = {}
        for name in arrays:
            groups.setdefault(name if coordinates else case.together(name), []).append(name)
        for name, names in groups.items():
            directions = {n: _directions(arrays[n].shape, n, coordinates) for n in names}
            true = _along(case, setting, inputs, do, dstate, kind, directions, "float64", None)
            if isinstance(case, OpCase):
                flat = _along(case, setting, case.steepest(inputs), np.abs(do), _absolute(dstate), kind, directions, "float64", None)
                narrow = name in case.narrow
                out[kind, name] = (directions, true, numerics.formula(dtype, inputs.length, int(narrow), gradient=True) * np.abs(flat))
                continue
            centre = true if near is inputs else _along(case, setting, near, do, dstate, kind, directions, "float64", None)
            copies = 1 if coordinates else numerics.realisations(inputs.length)
            found = _along(case, setting, near, do, dstate, kind, directions, "float32", numerics.perturbation(dtype), copies)
            moved = [
                _along(case, setting, near.replace(params=p), do, dstate, kind, directions, "float64", None)
                for p in numerics.moved(near.params, inputs.length)
            ]
            errors = np.concatenate([found, moved]) - centre
            budget = numerics.row_budget(true, errors, dtype, inputs.length * inputs.batch, gradient=True)
            out[kind, name] = (directions, true, np.broadcast_to(budget, true.shape))
    return out


def _directions(shape: tuple[int, ...], name: str, coordinates: bool) -> np.ndarray:
    size = int(np.prod(shape))
    if coordinates:
        return np.eye(size).reshape(size, *shape)
    random = np.random.Generator(np.random.Philox(len(name)))
    return random.choice([-1.0, 1.0], (2, *shape))


def _along(
    case: Case, setting: Any, inputs: Inputs, do: np.ndarray, dstate: Arrays, kind: str,
    directions: Arrays, dtype: str, rounded: Any, copies: int = 0,
) -> np.ndarray:  # fmt: skip
    """Derivatives along each direction by the complex step, [n]; with `copies` realisations of the batch, [copies, n]."""
    wide, h = DTYPES[dtype], numerics.STEP
    values = {"params": inputs.params, "inputs": inputs.arrays, "state": inputs.state}[kind]
    out = []
    for i in range(len(next(iter(directions.values())))):
        steps = {name: (1j * h * v[i]).astype(np.result_type(wide, np.complex64)) for name, v in directions.items()}
        moved = {**values, **{name: values[name].astype(wide) + step for name, step in steps.items()}}
        field = {"params": "params", "inputs": "arrays", "state": "state"}[kind]
        o, last = case.reference(setting, stack([inputs.replace(**{field: moved})] * max(copies, 1)), "parallel", dtype, rounded)

        def total(cotangent: np.ndarray, found: np.ndarray) -> np.ndarray:
            """Σ cotangent·(derivative) of each realisation; where there is no cotangent, padding does not count."""
            slope = (np.imag(found).astype(np.float64) / h).reshape(-1, cotangent.size)
            return np.where(cotangent.ravel() != 0, cotangent.ravel() * slope, 0).sum(1)

        out.append(total(do, o) + sum(total(ds, last[s]) for s, ds in dstate.items() if ds.size))
    return np.stack(out, 1) if copies else np.concatenate(out)


def _absolute(arrays: Arrays) -> Arrays:
    return {name: np.abs(a) for name, a in arrays.items()}
