"""What every architecture of the spec is held to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from unisono_conformance import judge, numerics
from unisono_spec.models.base import Model

CHUNKS = (1, 2, 3, 5, 8, 64)


def leaves(x: Any) -> list[np.ndarray]:
    """The arrays of a nested tuple, list or dict, in order."""
    if isinstance(x, np.ndarray):
        return [x]
    parts = [x[key] for key in sorted(x)] if isinstance(x, dict) else x
    return list(itertools.chain.from_iterable(leaves(part) for part in parts))


def rebuilt(x: Any, arrays: Sequence[np.ndarray]) -> Any:
    """`x` with its arrays replaced by `arrays`, in the order of `leaves`."""
    source = iter(arrays)

    def build(part: Any) -> Any:
        if isinstance(part, np.ndarray):
            return next(source)
        if isinstance(part, dict):
            new = {key: build(part[key]) for key in sorted(part)}
            return {key: new[key] for key in part}
        return type(part)(build(p) for p in part)

    return build(x)


same = judge.same


def marks(rng: np.random.Generator, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """reset and valid at random; the first row also begins with a gap that a reset falls into."""
    reset, valid = rng.random((batch, length)) < 0.2, rng.random((batch, length)) < 0.7
    if length > 2:
        reset[0, :3], valid[0, :3] = [False, True, False], [False, False, True]
    return reset, valid


def poisoned(inputs: Sequence[np.ndarray], valid: np.ndarray) -> list[np.ndarray]:
    """`inputs` [B, T, …] with NaN where a token is not valid."""
    return [np.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)), x, np.nan) for x in inputs]


def op_forms(
    recurrent: Callable[..., tuple[np.ndarray, Any]],
    parallel: Callable[..., tuple[np.ndarray, Any]],
    inputs: Sequence[np.ndarray],
    state: Any,
    rng: np.random.Generator,
) -> None:
    """`parallel(*inputs, state, reset, valid, chunk_size)` is `recurrent(*inputs, state, reset, valid)`, with NaN in what is
    not read, whole or handed over at every place, in every mixture of the two."""
    batch, length = inputs[0].shape[:2]
    reset, valid = marks(rng, batch, length)
    for r, v in ((None, None), (reset, None), (None, valid), (reset, valid)):
        read = inputs if v is None else poisoned(inputs, v)
        truth = recurrent(*read, state, r, v)
        for chunk_size in CHUNKS:
            same(parallel(*read, state, r, v, chunk_size), truth)
        for split in range(1, length):
            cut = [[None if m is None else m[:, part] for m in (r, v)] for part in (slice(0, split), slice(split, None))]
            for first, second in ((recurrent, parallel), (parallel, recurrent), (parallel, parallel)):
                o1, middle = first(*(x[:, :split] for x in read), state, *cut[0])
                o2, last = second(*(x[:, split:] for x in read), middle, *cut[1])
                same((np.concatenate([o1, o2], 1), last), truth)
        if r is not None and v is not None:
            assert not np.array_equal(truth[0], recurrent(*read, state, None, v)[0])


def complex_step(function: Callable[..., Any], arguments: Any, rng: np.random.Generator) -> None:
    """The derivative of `function(arguments)` along a random direction by the complex step is that by central differences."""
    arrays = leaves(arguments)
    direction = [rng.normal(size=x.shape) if x.dtype.kind == "f" else None for x in arrays]

    def at(h: complex) -> list[np.ndarray]:
        moved = [x if d is None else x + h * d for x, d in zip(arrays, direction, strict=True)]
        return [y for y in leaves(function(rebuilt(arguments, moved))) if y.dtype.kind in "fc"]

    analytic = [np.imag(y) / 1e-30 for y in at(1e-30j)]
    h = numerics.DIFFERENCE_STEP
    finite = [(hi - lo) / (2 * h) for hi, lo in zip(at(h), at(-h), strict=True)]
    assert any(np.abs(y).max(initial=0) > numerics.difference() for y in analytic)
    same(analytic, finite, numerics.difference())


def model_forms(model: Model, tokens: np.ndarray, rng: np.random.Generator, **extra: Any) -> None:
    """Forms agree at every chunk size with resets and gaps, and a state can be handed over at every place."""
    batch, length = tokens.shape
    reset, valid = marks(rng, batch, length)
    truth = model.forward(tokens, None, reset, valid, form="recurrent", **extra)
    for chunk_size in CHUNKS:
        same(model.forward(tokens, None, reset, valid, chunk_size=chunk_size, **extra), truth)
    forms = ("recurrent", "parallel")
    for split in range(1, length):
        state, outputs = model.init_state(batch, length), []
        for part, form in zip((slice(0, split), slice(split, None)), (forms[split % 2], forms[1 - split % 2]), strict=True):
            cut = {name: [a[:, part] for a in arrays] for name, arrays in extra.items()}
            logits, state = model.forward(tokens[:, part], state, reset[:, part], valid[:, part], form=form, chunk_size=3, **cut)
            outputs.append(logits)
        same((np.concatenate(outputs, 1), state), truth)


def model_marks(model: Model, tokens: np.ndarray) -> None:
    """A reset is a new sequence; what is not valid is as if it were not there."""
    length = tokens.shape[1]
    plain, end = model.forward(tokens, model.init_state(len(tokens), length))
    for at in range(length):
        reset = np.zeros(tokens.shape, bool)
        reset[:, at] = True
        logits, state = model.forward(tokens, model.init_state(len(tokens), length), reset, chunk_size=4)
        alone, last = model.forward(tokens[:, at:], model.init_state(len(tokens), length))
        same((logits[:, :at], logits[:, at:], state), (plain[:, :at], alone, last))
    for before, gap, after in ((3, 0, 0), (0, 3, 0), (0, 0, 3), (2, 1, 2)):
        middle = length // 2
        place = np.r_[before : before + middle, before + middle + gap : before + gap + length]
        total = before + gap + after + length
        wide, valid = np.zeros((len(tokens), total), tokens.dtype), np.zeros((len(tokens), total), bool)
        wide[:, place], valid[:, place] = tokens, True
        for form in ("recurrent", "parallel"):
            logits, state = model.forward(wide, model.init_state(len(tokens), length), None, valid, form=form, chunk_size=4)
            same((logits[:, place], state), (plain, end))


def model_derivative(make: Callable[..., Model], params: dict[str, np.ndarray], tokens: np.ndarray, rng: np.random.Generator) -> None:
    """Derivatives of logits and final state by parameters and initial state, in both forms."""
    state = make(params).forward(tokens, make(params).init_state(len(tokens), 2 * tokens.shape[1]))[1]
    reset, valid = marks(rng, *tokens.shape)
    for form in ("recurrent", "parallel"):

        def run(values: Any, form: Any = form) -> Any:
            weights, start = values
            return make(weights).forward(tokens, start, reset, valid, form=form, chunk_size=3)

        complex_step(run, (params, state), rng)
