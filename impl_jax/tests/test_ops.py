"""Both sums against the equations as printed, term by term; masks, gradients, length, memory."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from unisono_conformance import judge, numerics
from unisono_jax import InputError
from unisono_jax.ops import decayed_sum, position, short_conv, weighted_sum
from unisono_jax.registry import IMPLEMENTATIONS
from unisono_spec.contract.implementations import table

B, T, D = 2, 13, 3
DECAY = 0.75
CHUNKS = (1, 4, 64)


def inputs(rng) -> Any:
    x, s, state = rng.normal(size=(B, T, D)), rng.normal(size=(B, T)), rng.normal(size=(B, D))
    return x, s, state, rng.random((B, T)) < 0.2, rng.random((B, T)) < 0.7


def terms(x, weights, decay, state, reset, valid, exclusive=False):
    """Σ_j weight_j λ^(valid tokens after j) σ(x_j) over the tokens j of t's own sequence, term by term in NumPy."""
    out = np.zeros(x.shape)
    for b, t in np.ndindex(x.shape[:2]):
        kept, factor = 1.0, 1.0  # kept: whether the initial state is; factor: λ to the valid tokens since j
        for j in range(t, -1, -1):
            if valid is None or valid[b, j]:
                if not (exclusive and j == t):
                    out[b, t] += weights[b, j] * factor / (1 + np.exp(-x[b, j]))
                factor *= decay
            if reset is not None and reset[b, j]:
                kept = 0.0
                break
        out[b, t] += kept * factor * state[b]
    return out


def decayed(form, chunk=64):
    run = decayed_sum.recurrent if form == "recurrent" else partial(decayed_sum.parallel, chunk_size=chunk)
    return jax.jit(lambda x, s, *rest: run(x, DECAY, *rest))


def weighted(form, chunk=64, exclusive=False):
    run = weighted_sum.recurrent if form == "recurrent" else partial(weighted_sum.parallel, chunk_size=chunk)
    return jax.jit(partial(run, exclusive=exclusive))


def all_sums(form, chunk=64):
    """One trace for the three sums: x, s, state, reset, valid → (ξ, final state) of each."""
    runs = decayed(form, chunk), weighted(form, chunk), weighted(form, chunk, True)
    return jax.jit(lambda x, s, state, reset, valid: tuple(run(x, s, state, reset, valid) for run in runs))


def check(close, found, x, s, state, reset, valid):
    (fixed, fixed_last), (xi, last), (exclusive, exclusive_last) = found
    close(fixed, terms(x, np.full((B, T), 1 - DECAY), DECAY, state, reset, valid))
    close(fixed_last, fixed[:, -1], 0)
    close(xi, terms(x, s, 1.0, state, reset, valid))
    close(last, xi[:, -1], 0)
    close(exclusive, terms(x, s, 1.0, state, reset, valid, exclusive=True))
    close(exclusive_last, last)


@pytest.mark.parametrize("form", [("recurrent", 64), *(("parallel", c) for c in CHUNKS)], ids=str)
def test_each_form_is_the_printed_sum(close, rng, form):
    with jax.enable_x64(True):
        check(close, all_sums(*form)(*inputs(rng)), *inputs(np.random.default_rng(0)))


@pytest.mark.parametrize("masks", ["none", "reset", "valid"])
def test_fewer_masks(close, rng, masks):
    x, s, state, reset, valid = inputs(rng)
    given = x, s, state, reset if masks == "reset" else None, valid if masks == "valid" else None
    with jax.enable_x64(True):
        check(close, all_sums("parallel", 4)(*given), *given)


@pytest.mark.parametrize("form", [("recurrent", 64), ("parallel", 4)], ids=str)
def test_what_is_not_read_may_be_nan(rng, form):
    x, s, state, reset, valid = inputs(rng)
    with jax.enable_x64(True):

        @jax.jit
        def run(x, s, state):
            def loss(x, s, state):
                xi = [xi for xi, _ in all_sums(*form)(x, s, state, reset, valid)]
                return sum(jnp.sum(jnp.sin(a)) for a in xi), xi

            return jax.grad(loss, (0, 1, 2), has_aux=True)(x, s, state)

        clean = run(np.where(valid[..., None], x, 0), np.where(valid, s, 0), state)
        damaged = run(np.where(valid[..., None], x, np.nan), np.where(valid, s, np.nan), state)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(damaged), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (np.asarray(damaged[0][0])[~valid] == 0).all()


@pytest.mark.parametrize("how", ["parallel", "recurrent"])
def test_a_nan_in_the_last_token_reaches_the_last_tap_alone(how):
    x = np.ones((1, 7, 3), np.float32)
    x[0, 4, 1] = np.nan
    valid = np.arange(7)[None] < 5
    run = jax.jit(lambda weight: jnp.sum(getattr(short_conv, how)(x, weight, None, jnp.ones((1, 3, 3)), None, valid)[0]))
    spread = np.zeros((3, 1, 4), bool)
    spread[1, 0, 3] = True
    np.testing.assert_array_equal(np.isnan(jax.grad(run)(jnp.ones((3, 1, 4)))), spread)


@pytest.mark.parametrize("op", [decayed, weighted])
def test_gradients_to_second_order(rng, op):
    x, s, state, reset, valid = inputs(rng)
    with jax.enable_x64(True):
        run = jax.jit(lambda x, s, state: op("parallel", 4)(x, s, state, reset, valid))
        check_grads(run, (x, s, state), order=2, modes=("rev",))


@pytest.mark.parametrize("op", [decayed, weighted])
def test_forms_have_the_same_gradients(close, rng, op):
    x, s, state, reset, valid = inputs(rng)
    with jax.enable_x64(True):

        def gradients(form):
            loss = lambda x, s, state: sum(jnp.sum(jnp.sin(a)) for a in op(form)(x, s, state, reset, valid))  # noqa: E731
            return jax.jit(jax.grad(loss, (0, 1, 2)))(x, s, state)

        jax.tree.map(close, gradients("parallel"), gradients("recurrent"))


@pytest.mark.parametrize("op", [decayed, weighted])
def test_a_reset_leaves_nothing_behind(close, rng, op):
    x, s, state, _, _ = inputs(rng)
    s[:, :6], state[:] = 1e30, 1e30
    reset = np.arange(T) == np.full((B, 1), 6)
    xi, _ = op("parallel", 4)(x.astype(np.float32), s.astype(np.float32), state.astype(np.float32), reset)
    alone, _ = op("recurrent")(x[:, 6:].astype(np.float32), s[:, 6:].astype(np.float32), np.zeros((B, D), np.float32), None)
    close(xi[:, 6:], alone, numerics.rounding("float32", 2 * T))


@pytest.mark.parametrize(("form", "dtype"), [("recurrent", "float32"), ("parallel", "float32"), ("parallel", "bfloat16")])
def test_sums_stay_within_the_random_walk_of_float32_roundings(rng, form, dtype):
    length = 100_000
    x = np.asarray(rng.normal(size=(1, length, 2)), jnp.dtype(dtype))
    s = np.asarray(rng.normal(size=(1, length)), jnp.dtype(dtype))
    reset = np.arange(length)[None] == 60_000
    u = 1 / (1 + np.exp(-x.astype(np.float64)))
    added = s.astype(np.float64)[..., None] * u
    truth, size = (
        np.concatenate([np.cumsum(f(added)[:, :60_000], 1), np.cumsum(f(added)[:, 60_000:], 1)], 1) for f in (np.asarray, np.abs)
    )
    bound = numerics.formula("float32", length)
    xi, _ = weighted(form)(x, s, np.zeros((1, 2), np.float32), reset, np.ones((1, length), bool))
    assert xi.dtype == jnp.float32
    judge.within(xi, truth, bound * size)
    xi, _ = decayed(form)(x, s, np.zeros((1, 2), np.float32), reset, np.ones((1, length), bool))
    assert xi.dtype == jnp.float32
    powers = (1 - DECAY) * DECAY ** np.arange(200)  # λ^200 is below float64's u
    for t in (50, 40_000, 60_010, length - 1):
        window = u[:, (60_000 if t >= 60_000 else 0) : t + 1][:, -200:]
        truth = (powers[: window.shape[1]][::-1, None] * window[0]).sum(0)
        judge.within(xi[0, t], truth, bound * truth)


def test_a_slow_decay_keeps_its_fixed_point(close):
    """λ = 0.9999 rounded to float32 would move ξ = σ by u / (1 − λ), 6e-4 of it."""
    length = 65_536
    x = np.zeros((1, length, 1), np.float32)
    for run in (decayed_sum.recurrent, decayed_sum.parallel):
        xi, _ = jax.jit(lambda x, state, run=run: run(x, 0.9999, state))(x, np.full((1, 1), 0.5, np.float32))
        # as many tokens as a term is remembered
        close(xi, np.full((1, length, 1), 0.5), numerics.formula("float32", 10_000))


def largest(jaxpr) -> int:
    """Most elements of any intermediate."""
    inner = [largest(getattr(p, "jaxpr", p)) for e in jaxpr.eqns for p in e.params.values() if hasattr(p, "eqns")]
    return max([math.prod(v.aval.shape) for e in jaxpr.eqns for v in e.outvars] + inner)


@pytest.mark.parametrize("masks", [False, True])
def test_memory_is_linear_in_length(masks):
    def most(length):
        x, s, state = jnp.zeros((1, length, D)), jnp.zeros((1, length)), jnp.zeros((1, D))
        marks: Any = (jnp.zeros((1, length), bool),) * 2 if masks else (None, None)
        both = []
        for run in (lambda x, s, *rest: decayed_sum.parallel(x, DECAY, *rest), weighted_sum.parallel):
            loss = lambda x, s, run=run: jnp.sum(run(x, s, state, *marks)[0] ** 2)  # noqa: E731
            both.append(largest(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, s).jaxpr))
        return max(both)

    assert most(4096) <= 2 * most(2048)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("form", ["recurrent", "parallel"])
def test_sums_are_float32_or_wider(rng, dtype, form):
    with jax.enable_x64(True):
        x, s, state, reset, valid = inputs(rng)
        x, s, state = np.asarray(x, jnp.dtype(dtype)), np.asarray(s, jnp.dtype(dtype)), np.asarray(state, np.float32)
        for xi, last in jax.eval_shape(all_sums(form), x, s, state, reset, valid):
            assert xi.dtype == last.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)


def test_batching(close, rng):
    x, s, state, reset, valid = inputs(rng)
    with jax.enable_x64(True):
        rows = jax.jit(jax.vmap(lambda *row: weighted_sum.parallel(*(a[None] for a in row), chunk_size=4)[0][0]))
        close(rows(x, s, state, reset, valid), weighted("parallel", 4)(x, s, state, reset, valid)[0])
        for form in ("parallel", "recurrent"):
            for xi, last in all_sums(form)(x[:0], s[:0], state[:0], reset[:0], valid[:0]):
                assert (xi.shape, last.shape) == ((0, T, D), (0, D))


def test_positions(rng):
    *_, reset, valid = inputs(rng)
    start = np.array([5, 70], np.int32)
    for marks in ((reset, valid), (reset, None), (None, valid), (None, None)):
        found, last = position.parallel(jnp.asarray(start), T, *marks)
        state = jnp.asarray(start)
        for t in range(T):
            at, state = position.step(state, *(None if m is None else jnp.asarray(m[:, t]) for m in marks))
            np.testing.assert_array_equal(found[:, t], at)
        np.testing.assert_array_equal(last, state)
        assert found.dtype == last.dtype == state.dtype == jnp.int32


def test_an_unknown_implementation_is_named(rng):
    x, s, state, *_ = inputs(rng)
    with pytest.raises(InputError, match=r"implementation: 'triton'.*plain"):
        decayed_sum.parallel(x, DECAY, state, implementation="triton")
    with pytest.raises(InputError, match="implementation: 'plane'"):
        weighted_sum.parallel(x, s, state, implementation="plane")


def test_the_page_of_kernels_has_the_registry():
    page = Path(__file__).parents[2] / "docs" / "kernels.md"
    assert table(IMPLEMENTATIONS) in page.read_text("utf-8")
