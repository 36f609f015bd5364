"""All ids after the first in one compiled loop: a step of the model and the choice of the next id, with nothing on the host between them.

One trace serves every count of ids and every prompt; it is of a config, a batch, a capacity and a kind of choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from unisono_spec.contract import Config, InputError
from unisono_spec.contract.base import MAX_SIZE
from unisono_spec.contract.sampling import NEAR_TIE, Sampling, trouble, uniform

BLOCK = 128  # ids a call of the compiled loop makes at most
FEWEST = 8  # ids for which another trace than that of one step is worth making
TEMPERATURES = 1e-3, 1e3  # beyond them, float32 has no room for logits over the temperature

Chosen = tuple[jax.Array, jax.Array, jax.Array]  # ids [B], near-ties [B], trouble [B]: 1 for a NaN, 2 for a row of −inf alone


def follow(
    graph: Any, params: Any, config: Config, first: np.ndarray, state: Mapping[str, Any], sampling: Sampling, number: int, count: int,
    seen: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, Any] | None:  # fmt: skip
    """Read first [B] and all ids chosen after it but the last: `count` ids and near-ties [B, count], and the state.

    number: how many ids were generated before the first of them. seen: ids that a repetition penalty asks for. None where a step at a
    time is better, says where it ends, or knows that penalty.
    """
    if seen is not None:
        return None
    drawn, low, high = sampling.temperature > 0, *TEMPERATURES
    if count < FEWEST or (drawn and not low <= sampling.temperature <= high):
        return None
    if "position" in state and int(np.max(state["position"], initial=0)) + count > (config.longest or MAX_SIZE):
        return None
    ids, ties = np.empty((len(first), count), np.int64), np.empty((len(first), count), bool)
    token = jnp.asarray(first, jnp.int32)
    law = jnp.float32(sampling.temperature), jnp.float32(sampling.top_p), jnp.int32(min(sampling.top_k, MAX_SIZE))
    for start in range(0, count, BLOCK):
        n = min(BLOCK, count - start)
        u = np.zeros((BLOCK, len(first)))
        if drawn:
            u[:n] = uniform(sampling.seed, len(first), number + start, n)
        found, near, bad, token, state = _run(graph, drawn, params, token, state, u.astype(_wide()), law, n)
        some = slice(start, start + n)
        ids[:, some], ties[:, some] = np.asarray(found)[:n].T, np.asarray(near)[:n].T
        wrong = np.asarray(bad)[:n]
        if wrong.any():
            at = int(wrong.any(1).argmax())
            raise InputError(trouble(1 if 1 in wrong[at] else 2, number + start + at))
    return ids, ties, state


@partial(jax.jit, static_argnums=(0, 1))
def _run(graph: Any, drawn: bool, params: Any, token: jax.Array, state: Any, u: jax.Array, law: tuple[jax.Array, ...], n: Any) -> Any:
    """`n` ids at most as many as u [BLOCK, B] has rows: ids, near-ties, trouble [BLOCK, B], the last id, the state before it."""
    model = nnx.merge(graph, params)
    empty = (jnp.zeros(u.shape, jnp.int32), jnp.zeros(u.shape, bool), jnp.zeros(u.shape, jnp.int32))

    def step(carry: Any) -> Any:
        i, token, state, rows = carry
        logits, state = model._one(token, state, None, None, None)
        chosen = sample(logits, u[i], *law) if drawn else greedy(logits)
        rows = tuple(row.at[i].set(a) for row, a in zip(rows, chosen, strict=True))
        return i + 1, chosen[0], state, rows

    _, token, state, rows = lax.while_loop(lambda carry: carry[0] < n, step, (jnp.int32(0), token, model._state(state), empty))
    return *rows, token, state


def _wide() -> Any:
    return jax.dtypes.canonicalize_dtype(np.float64)


def greedy(logits: jax.Array) -> Chosen:
    """logits [B, V] → the best id of each row, the lowest of several (contract/sampling.py)."""
    z, wrong = _numbers(logits)
    half = z / 2  # so that no difference overflows
    ids = jnp.argmax(half, -1)
    best = jnp.take_along_axis(half, ids[:, None], 1)[:, 0]
    second = jnp.where(jnp.arange(z.shape[-1]) == ids[:, None], -jnp.inf, half).max(-1)
    least = jnp.where(half > -jnp.inf, half, jnp.inf).min(-1)
    return ids.astype(jnp.int32), best - second <= NEAR_TIE * (best - least), wrong


def sample(logits: jax.Array, u: jax.Array, temperature: jax.Array, top_p: jax.Array, top_k: jax.Array) -> Chosen:
    """logits [B, V], u [B] in [0, 1) → ids by the inverse of the CDF, best first. Near-ties: `_turns`."""
    z, wrong = _numbers(logits)
    order = jnp.argsort(-z, axis=-1, stable=True)  # best first, the lowest id on ties
    z = jnp.take_along_axis(z, order, 1)
    place = jnp.arange(z.shape[-1])
    p = jnp.exp((z - z[:, :1]) / temperature)
    p = p / p.sum(-1, keepdims=True)
    p = jnp.where((place >= top_k) & (top_k > 0), 0, p)
    before, enough = jnp.cumsum(p, -1) - p, top_p * p.sum(-1, keepdims=True)
    cut = (place > 0) & (top_p < 1)  # the best stays
    few, p, many = (jnp.where(cut & (before >= enough + by), 0, p) for by in (-NEAR_TIE, 0, NEAR_TIE))
    cdf = jnp.cumsum(p, -1)
    rank = jnp.minimum((cdf <= u[:, None] * cdf[:, -1:]).sum(-1, keepdims=True), (p != 0).sum(-1, keepdims=True) - 1)
    rank = jnp.clip(rank, 0)
    return jnp.take_along_axis(order, rank, 1)[:, 0].astype(jnp.int32), _turns(z, rank, u[:, None], few, many), wrong


def _turns(z: jax.Array, rank: jax.Array, u: jax.Array, few: jax.Array, many: jax.Array) -> jax.Array:
    """Near-ties [B] of draws from sorted logits z [B, V]; few and many: what top_p keeps at least and at most, as the contract's."""
    edges, place = jnp.cumsum(many, -1), jnp.arange(z.shape[-1])
    low, high = (u * kept.sum(-1, keepdims=True) for kept in (few, many))
    near = (edges >= low - NEAR_TIE) & (edges <= high + NEAR_TIE) & (place < (many != 0).sum(-1, keepdims=True) - 1)
    half = z / 2  # so that no difference overflows
    margin = NEAR_TIE * (half[:, :1] - jnp.where(half > -jnp.inf, half, jnp.inf).min(-1, keepdims=True))
    swaps = jnp.pad(half[:, :-1] - half[:, 1:] <= margin, ((0, 0), (1, 1)))  # of each with the one before it
    return near.any(-1) | jnp.take_along_axis(swaps, jnp.concatenate([rank, rank + 1], 1), 1).any(-1)


def _numbers(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As wide as there is, where +inf, better than any number, is 0 among −inf; and what is wrong with each row."""
    z = logits.astype(_wide())
    best = z.max(-1, keepdims=True)
    wrong = jnp.where(jnp.isnan(z).any(-1), 1, jnp.where(best[:, 0] == -jnp.inf, 2, 0)).astype(jnp.int32)
    return jnp.where(best == jnp.inf, jnp.where(z == jnp.inf, 0.0, -jnp.inf), z), wrong
