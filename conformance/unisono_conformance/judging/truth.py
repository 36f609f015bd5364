"""What the spec says about some inputs, how far off an implementation may be, and gradients without autodiff."""

from __future__ import annotations

import collections
import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from unisono_spec.contract import DTYPES, state_dtype
from unisono_spec.layers.params import exact as unrounded

from unisono_conformance.cases.base import Case, OpCase, Output
from unisono_conformance.cases.inputs import Arrays, Inputs, stack
from unisono_conformance.judging import numerics
from unisono_conformance.judging.store import Store

# (truth, budget) of outputs, and of each float array of the state; a budget of 0 for integers
Expected = tuple[tuple[np.ndarray, np.ndarray], dict[str, tuple[np.ndarray, np.ndarray]]]
# by (kind, name of one array or of several that move together): the directions [n, *shape] of each array, the derivatives along
# them [n], and their budget
Slopes = dict[tuple[str, str], tuple[Arrays, np.ndarray, np.ndarray]]

_CAPACITY = 2000  # remembered answers; all are tiny but those of one long sequence
_TOKENS = 4096  # of moved inputs, that are asked about at once
_LONG = 1000  # from this length on the spec is asked by its parallel form
_memory: collections.OrderedDict[tuple, Arrays] = collections.OrderedDict()
_store: Store | None = None


def expected(case: Case, setting: Any, inputs: Inputs, dtype: str) -> Expected:
    """y* and budget for outputs and final state, on inputs as the implementation gets them."""

    def answer() -> Arrays:
        if case.realised:  # an op rounds nothing to a dtype narrower than its state's
            o, state = _realised(case, setting, inputs, state_dtype(dtype) if isinstance(case, OpCase) else dtype)
        else:
            assert isinstance(case, OpCase)
            o, state = _expected_op(case, setting, inputs, dtype)
        named = {"o": o, **{f"state {name}": pair for name, pair in state.items()}}
        return {f"{what} {name}": a for name, pair in named.items() for what, a in zip(("truth", "budget"), pair, strict=True)}

    found = _remembered((case.name, repr(setting), dtype, inputs.key()), answer)
    # in one order, whether they were asked for or kept: who goes on with them shall ask the same
    pairs = {
        name.removeprefix("truth "): (found[name], found["budget" + name.removeprefix("truth")])
        for name in sorted(found)
        if name.startswith("truth ")
    }
    return pairs.pop("o"), {name.removeprefix("state "): pair for name, pair in pairs.items()}


def _remembered(key: tuple, answer: Callable[[], Arrays]) -> Arrays:
    if key not in _memory:
        _memory[key] = answer() if _store is None else _store.ask(hashlib.sha256(repr(key).encode()).digest(), answer)
        if len(_memory) > _CAPACITY:
            _memory.popitem(last=False)
    return _memory[key]


def keep_in(folder: Path | None) -> None:
    """Keep what the spec says in `folder`, for later runs and for others beside this one; None: in memory only."""
    global _store
    if _store is not None:
        _store.close()
    _store = None if folder is None else Store(folder)


def expected_each(case: Case, setting: Any, several: list[Inputs], dtype: str) -> list[Expected]:
    """`expected` of several inputs of one row each, with the same parameters: those of one length in one batch."""
    out: dict[int, Expected] = {}
    for length in sorted({inputs.length for inputs in several}):
        same = [i for i, inputs in enumerate(several) if inputs.length == length]
        (o, budget), state = expected(case, setting, stack([several[i] for i in same]), dtype)
        for row, i in enumerate(same):
            at = slice(row, row + 1)
            out[i] = (o[at], budget[at]), {name: (a[at], limit[at]) for name, (a, limit) in state.items()}
    return [out[i] for i in range(len(several))]


def slopes(case: Case, setting: Any, inputs: Inputs, do: np.ndarray, dstate: Arrays, dtype: str, by: str) -> Slopes:
    """Derivatives of Σ do·o + Σ dstate·state along directions. by: "coordinate", each; "map", a random one for what the case moves
    together; "kind", one for all parameters, one for all inputs, one for the whole state."""
    directions = _all_directions(case, setting, inputs, do, by)

    def answer() -> Arrays:
        out: Arrays = {}
        for (kind, name), moves in directions.items():
            true, budget = _slope(case, setting, inputs, do, dstate, dtype, kind, name, moves, by)
            out |= {f"truth {kind} {name}": true, f"budget {kind} {name}": budget}
        return out

    marks = b"".join(a.tobytes() for a in (do, *(dstate[name] for name in sorted(dstate))))
    found = _remembered((case.name, repr(setting), dtype, inputs.key(), hashlib.sha256(marks).digest(), by), answer)
    return {
        (kind, name): (moves, found[f"truth {kind} {name}"], found[f"budget {kind} {name}"]) for (kind, name), moves in directions.items()
    }


def _form(inputs: Inputs) -> str:
    return "recurrent" if inputs.length < _LONG else "parallel"


def _expected_op(case: OpCase, setting: Any, inputs: Inputs, dtype: str) -> Expected:
    o, last = case.reference(setting, inputs, _form(inputs))
    o_terms, last_terms = case.absolute(setting, inputs, _form(inputs))
    factor = numerics.formula(dtype, inputs.length)
    return (o, factor * o_terms), {name: (a, factor * last_terms[name]) for name, a in last.items()}


def _realised(case: Case, setting: Any, inputs: Inputs, dtype: str) -> Expected:
    o, last = case.reference(setting, inputs, _form(inputs))
    near = _rounded_inputs(inputs, dtype)
    centre, centre_last = (o, last) if near is inputs else case.reference(setting, near, _form(inputs))
    copies = numerics.realisations(inputs.length)
    y, y_last = case.reference(
        setting, stack([near] * copies), _form(inputs), "float32", numerics.perturbation(dtype, roundings=case.roundings)
    )

    moves = [near.replace(params=p) for p in numerics.moved(near.params, inputs.length)]
    moved = [case.reference(setting, move, _form(inputs), rounded=unrounded) for move in moves]

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


def _all_directions(case: Case, setting: Any, inputs: Inputs, do: np.ndarray, by: str) -> dict[tuple[str, str], Arrays]:
    """By kind and name of what moves: the directions [n, *shape] of each array. Other examples get other signs."""
    random = np.random.Generator(np.random.Philox(zlib.crc32(do.tobytes())))
    out: dict[tuple[str, str], Arrays] = {}
    for kind, arrays in case.floats(setting, inputs).items():
        for name, a in arrays.items():
            together = {"coordinate": name, "map": case.together(name), "kind": "all"}[by]
            out.setdefault((kind, together), {})[name] = _directions(a.shape, None if by == "coordinate" else random)
    return out


def _slope(
    case: Case, setting: Any, inputs: Inputs, do: np.ndarray, dstate: Arrays, dtype: str,
    kind: str, name: str, directions: Arrays, by: str,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Derivatives along the directions of one group, [n], and their budget."""
    true = _along(case, setting, inputs, do, dstate, kind, directions, "float64", None)
    narrow = isinstance(case, OpCase) and any(name in case.narrow for name in directions)
    if isinstance(case, OpCase) and not case.realised:
        steep, weights = case.steepest(inputs), (np.abs(do), _absolute(dstate))
        sizes = {name: np.abs(v) for name, v in directions.items()}
        flat = _along(case, setting, steep, *weights, kind, sizes, "float64", None, ask=case.steep)
        lost = numerics.TINY[dtype if narrow else state_dtype(dtype)] * sum(v.reshape(len(v), -1).sum(1) for v in sizes.values())
        summed = inputs.length * (inputs.batch if kind == "params" else 1)
        return true, numerics.formula(dtype, summed, int(narrow), gradient=True) * np.abs(flat) + lost
    handed = dtype
    dtype = state_dtype(dtype) if isinstance(case, OpCase) else dtype
    near = _rounded_inputs(inputs, dtype)
    centre = true if near is inputs else _along(case, setting, near, do, dstate, kind, directions, "float64", None)
    # the coordinates of one array have a budget in common: those of a large one are realisations enough
    number = len(next(iter(directions.values())))
    copies = -(-numerics.realisations(inputs.length) // max(number, 1)) if by == "coordinate" else numerics.realisations(inputs.length)
    found = _along(
        case, setting, near, do, dstate, kind, directions, "float32", numerics.perturbation(dtype, roundings=case.roundings), copies
    )
    moved = [
        _along(case, setting, near.replace(params=p), do, dstate, kind, directions, "float64", unrounded)
        for p in numerics.moved(near.params, inputs.length)
    ]
    errors = np.concatenate([found, moved]) - centre
    budget = numerics.row_budget(true, errors, dtype, inputs.length * inputs.batch, gradient=True)
    if narrow and handed != dtype:  # each element of the gradient is rounded once more
        each = {n: _directions(v.shape[1:], None) for n, v in directions.items()}
        slopes = _along(case, setting, inputs, do, dstate, kind, each, "float64", None)
        sizes = np.concatenate([v.reshape(len(v), -1) for v in directions.values()], 1)
        budget = budget + numerics.GRADIENT * numerics.C1 * numerics.U[handed] * np.abs(sizes * slopes).sum(1)
    return true, np.broadcast_to(budget, true.shape)


def _directions(shape: tuple[int, ...], random: np.random.Generator | None) -> np.ndarray:
    """Every coordinate, or a random one of signs and sizes: along equal steps a softmax, for one, does not change at all."""
    size = int(np.prod(shape))
    if random is None:
        return np.eye(size).reshape(size, *shape)
    return random.choice([-1.0, 1.0], (1, *shape)) * random.uniform(0.5, 1.5, (1, *shape))


def _along(
    case: Case, setting: Any, inputs: Inputs, do: np.ndarray, dstate: Arrays, kind: str,
    directions: Arrays, dtype: str, rounded: Any, copies: int = 0, ask: Callable[..., Output] | None = None,
) -> np.ndarray:  # fmt: skip
    """Derivatives along each direction by the complex step, [n]; with `copies` realisations of the batch, [copies, n].

    Of the spec, or of `ask`.
    """
    wide, h = DTYPES[dtype], numerics.STEP
    values = {"params": inputs.params, "inputs": inputs.arrays, "state": inputs.state}[kind]
    field = {"params": "params", "inputs": "arrays", "state": "state"}[kind]

    def moved(i: int) -> Inputs:
        steps = {name: (1j * h * v[i]).astype(np.result_type(wide, np.complex64)) for name, v in directions.items()}
        return inputs.replace(**{field: {**values, **{name: values[name].astype(wide) + step for name, step in steps.items()}}})

    number, out = len(next(iter(directions.values()))), []
    # rows have parameters in common, and all else of their own
    together = 1 if kind == "params" else max(1, _TOKENS // (inputs.batch * inputs.length * max(copies, 1)))
    for start in range(0, number, together):
        some = [moved(i) for i in range(start, min(start + together, number))]
        batch = stack([each for each in some for _ in range(max(copies, 1))])
        o, last = (ask or case.reference)(setting, batch, "parallel", dtype, rounded)

        def total(cotangent: np.ndarray, found: np.ndarray) -> np.ndarray:
            """Σ cotangent·(derivative) of each realisation; where there is no cotangent, padding does not count."""
            slope = (np.imag(found).astype(np.float64) / h).reshape(-1, cotangent.size)
            return np.where(cotangent.ravel() != 0, cotangent.ravel() * slope, 0).sum(1)

        slopes = total(do, o) + sum(total(ds, last[s]) for s, ds in dstate.items() if ds.size)
        out.append(slopes.reshape(len(some), max(copies, 1)))
    along = np.concatenate(out)
    return along.T if copies else along[:, 0]


def _absolute(arrays: Arrays) -> Arrays:
    return {name: np.abs(a) for name, a in arrays.items()}
