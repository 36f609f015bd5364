"""MARU's cell, MoM-GRU: a GRU that reads n banks of L memory slots by attention, and erases and adds to them.

With [x; h] concatenated, σ logistic, and all weights `[out, in]`:
1. ρ = softmax(W₂ ReLU(W₁[x;h] + b₁) + b₂)                                     which banks
2. q = W_q[x;h] + b_q,  α_i = softmax(M_i q / √d_m),  c = Σ_i ρ_i α_iᵀ M_i         what is read
3. r = σ(W_r[x;c] + U_r h), ζ = σ(W_ζ[x;c] + U_ζ h), h̃ = tanh(W_h[x;c] + U_h (r∘h)), h' = ζ∘h + (1−ζ)∘h̃
4. k = W_k h' + b, v = W_v h' + b, γ = σ(w_g·h' + b),  w_i = softmax(M_i k / √d_m) ρ_i γ
5. M_i' = M_i ∘ (1 − w_i eᵀ) + w_i aᵀ,  a = tanh(v),  e = σ(v), or of a projection of its own (erase="separate")

The reset gate acts before the product. M₀ is learned: a `reset` restores it, and gradients flow to it.

Shapes: x [B, T, D], p the parameters that contract/maru.py names, state (h [B, D], M [B, n, L, d_m]), reset and valid [B, T]
bool or None, noise [B, T, n] or None. Each form returns (h [B, T, D], final state), float32 or wider; h is the unchanged one where
a token is not valid. noise is what training with router="gumbel" draws: with it ρ = softmax((logits + balance bias + noise) / temperature).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from unisono_spec.contract.shapes import shaped

from unisono_jax.kernels.operator import alike
from unisono_jax.ops.carry import chunk_length
from unisono_jax.ops.elementwise import dot, linear, masked, sigmoid, tanh, wide
from unisono_jax.registry import check_implementation

Arrays = Mapping[str, jax.Array]
State = tuple[jax.Array, jax.Array]
X_PARTS = ("router.0", "query", "input")  # products with x, which need no h
H_PARTS = ("key", "value", "gate", "erase")  # products with h'; the last where erase="separate"


class _Token(NamedTuple):
    """What is known of a token before the loop and added to a product in it [B, …], each slope of which is the product's too; its marks
    [B]."""

    router: jax.Array
    query: jax.Array
    gates: jax.Array
    logits: jax.Array  # of the router's second product
    written: jax.Array  # of the products with h' of H_PARTS
    reset: jax.Array | None
    valid: jax.Array | None


class _Weights(NamedTuple):
    """Of the products in the loop: with h and h' (router, query, r and ζ, H_PARTS), with c, with r∘h, and the router's second."""

    h: jax.Array
    c: jax.Array
    candidate: jax.Array
    router: jax.Array


def routing(x: jax.Array, h: jax.Array, p: Arrays, noise: jax.Array | None = None, temperature: float = 1.0) -> jax.Array:
    """ρ, the share of each bank: x, h [..., D] → [..., n]. Its mean over tokens is the load that `balanced` evens out."""
    hidden = linear(jnp.concatenate([x, h], -1), p["router.0.weight"], p["router.0.bias"])
    return _shares(hidden, p, noise, temperature)


def balanced(bias: jax.Array, load_average: jax.Array, load: jax.Array, rate: float = 0.01) -> tuple[jax.Array, jax.Array]:
    """After a training step: b ← b − rate · (EMA₀.₉(load) − 1/n). load [n]: the mean of ρ over the step's valid tokens."""
    load_average = 0.9 * load_average + 0.1 * load
    return bias - rate * (load_average - 1 / len(bias)), load_average


@shaped
def step(
    x: jax.Array,
    p: Arrays,
    state: State,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    noise: jax.Array | None = None,
    temperature: float = 1.0,
) -> tuple[jax.Array, State]:
    """One token: x [B, D], reset and valid [B], noise [B, n]."""
    p, x, (h, M) = _widened(p, x, state)
    if reset is not None:
        h, M = masked(~reset, h)[0], jnp.where(reset[:, None, None, None], p["memory"], M)
    (x,) = masked(valid, x)
    rho = routing(x, h, p, None if noise is None else masked(valid, noise)[0], temperature)  # [B, n]
    both = jnp.concatenate([x, h], -1)
    c = _read(M, rho, linear(both, p["query.weight"], p["query.bias"]))
    gates = linear(jnp.concatenate([x, c], -1), p["input.weight"], p["input.bias"])
    d = x.shape[-1]
    U = p["hidden.weight"]
    new_h = _gated(gates, linear(h, U[: 2 * d]), h, U[2 * d :])
    written = (linear(new_h, p[f"{name}.weight"], p[f"{name}.bias"]) for name in H_PARTS if f"{name}.weight" in p)
    new_M = _remembered(M, rho, *written)
    if valid is not None:
        new_h, new_M = jnp.where(valid[:, None], new_h, h), jnp.where(valid[:, None, None, None], new_M, M)
    return new_h, (new_h, new_M)


@shaped
def recurrent(
    x: jax.Array,
    p: Arrays,
    initial_state: State,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    noise: jax.Array | None = None,
    temperature: float = 1.0,
) -> tuple[jax.Array, State]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    p, x, initial_state = _widened(p, x, initial_state)

    def token(state: State, at_t: tuple) -> tuple[State, jax.Array]:
        x, cut, read, drawn = at_t
        h, state = step(x, p, state, cut, read, drawn, temperature)
        return state, h

    time_major = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (x, reset, valid, noise))
    state, h = lax.scan(token, initial_state, time_major)
    return jnp.swapaxes(h, 0, 1), state


@shaped
def hoisted(
    x: jax.Array,
    p: Arrays,
    initial_state: State,
    reset: jax.Array | None = None,
    valid: jax.Array | None = None,
    chunk_size: int = 64,
    noise: jax.Array | None = None,
    temperature: float = 1.0,
    implementation: str = "auto",
) -> tuple[jax.Array, State]:
    """The recurrence has no parallel form. This one takes every product with x out of the loop, as one matmul for all tokens, and joins
    those with h: what the next token asks of h' and what is written with it are one matmul. For the gradient, the states are kept once
    in C tokens and computed again between, and the gradients of weights are matmuls after the loop."""
    check_implementation(implementation)
    size, d = chunk_length(chunk_size, x.shape[1]), x.shape[-1]
    p, x, initial_state = _widened(p, x, initial_state)
    (x,) = masked(valid, x)
    from_x = jnp.concatenate([p[f"{name}.weight"][:, :d] for name in X_PARTS])
    bias = jnp.concatenate([p[f"{name}.bias"] for name in X_PARTS])
    router, query, gates = _split(linear(x, from_x, bias), [len(p[f"{name}.bias"]) for name in X_PARTS])
    logits = p["router.1.bias"]
    if noise is not None:
        logits = logits + p["balance_bias"] + masked(valid, noise)[0]
    written = [name for name in H_PARTS if f"{name}.weight" in p]
    parts = [*(p[f"{name}.weight"][:, d:] for name in X_PARTS[:2]), p["hidden.weight"][: 2 * d], *(p[f"{name}.weight"] for name in written)]
    weights = _Weights(jnp.concatenate(parts), p["input.weight"][:, d:], p["hidden.weight"][2 * d :], p["router.1.weight"])
    biases = jnp.concatenate([p[f"{name}.bias"] for name in written])
    logits, biases = (jnp.broadcast_to(a, (*x.shape[:2], a.shape[-1])) for a in (logits, biases))
    tokens = _Token(router, query, gates, logits, biases, reset, valid)
    tokens = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tokens)  # [T, B, …]
    given = alike((weights, tokens, p["memory"], initial_state))  # inside a shard_map, as the gradients of weights will vary
    found: Any = _loop((size, 1.0 if noise is None else temperature), *given)
    out, state = found
    return jnp.swapaxes(out, 0, 1), state


def _run(how: tuple[int, float], weights: _Weights, tokens: _Token, memory: jax.Array, initial: State) -> tuple[Any, jax.Array]:
    """(h [T, B, D], the final state), and what was read of the memory, c [T, B, d_m]."""
    size, temperature = how
    length, d, m = len(tokens.query), initial[0].shape[-1], memory.shape[-1]
    widths = [tokens.router.shape[-1], m, 2 * d, tokens.written.shape[-1]]
    each = [m, m, 1, *([m] if widths[-1] > 2 * m + 1 else [])]  # of H_PARTS

    def token(carry: tuple[State, jax.Array], known: _Token) -> tuple[tuple[State, jax.Array], tuple[jax.Array, jax.Array]]:
        (h, M), of_h = carry  # of_h: its products
        if known.reset is not None:
            (h, of_h), M = masked(~known.reset, h, of_h), jnp.where(known.reset[:, None, None, None], memory, M)
        router, query, gates, _ = _split(of_h, widths)
        rho = jax.nn.softmax((linear(jax.nn.relu(known.router + router), weights.router) + known.logits) / temperature)
        c = _read(M, rho, known.query + query)
        new_h = _gated(known.gates + linear(c, weights.c), gates, h, weights.candidate)
        new_of_h = linear(new_h, weights.h)
        new_M = _remembered(M, rho, *_split(known.written + _split(new_of_h, widths)[-1], each))
        if known.valid is not None:
            read = known.valid[:, None]
            new_h, new_of_h = jnp.where(read, new_h, h), jnp.where(read, new_of_h, of_h)
            new_M = jnp.where(known.valid[:, None, None, None], new_M, M)
        return ((new_h, new_M), new_of_h), (new_h, c)

    unroll = 2 if jax.default_backend() == "gpu" else 1  # a turn of a loop costs as much as some launches; compiling, what a turn holds

    @jax.checkpoint
    def segment(carry: tuple[State, jax.Array], tokens: _Token) -> tuple[tuple[State, jax.Array], Any]:
        return lax.scan(token, carry, tokens, unroll=unroll)

    whole = length // size * size
    segments = jax.tree.map(lambda a: a[:whole].reshape(whole // size, size, *a.shape[1:]), tokens)
    carry, out = lax.scan(segment, (initial, linear(initial[0], weights.h)), segments)
    out = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), out)
    if whole < length:
        carry, last = segment(carry, jax.tree.map(lambda a: a[whole:], tokens))
        out = jax.tree.map(lambda *a: jnp.concatenate(a), out, last)
    h, c = out
    return (h, carry[0]), c


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _loop(how: tuple[int, float], weights: _Weights, tokens: _Token, memory: jax.Array, initial: State) -> tuple[jax.Array, State]:
    """The loop. What a weight changes is added to products of tokens before it, so that its gradient is a product over all tokens
    after it, not a sum that every token adds to."""
    return _run(how, weights, tokens, memory, initial)[0]


@_loop.defjvp
def _loop_jvp(how: tuple[int, float], given: Any, changes: Any) -> Any:
    weights, tokens, memory, initial = given
    change, token, *others = changes
    reset, valid = tokens.reset, tokens.valid

    def run(tokens: _Token, *rest: Any) -> tuple[Any, jax.Array]:
        return _run(how, weights, tokens._replace(reset=reset, valid=valid), *rest)

    out, push, c = jax.linearize(run, tokens._replace(reset=None, valid=None), memory, initial, has_aux=True)
    h = jnp.concatenate([initial[0][None], out[0]])
    d, widths = h.shape[-1], [token.router.shape[-1], token.query.shape[-1]]
    routers, asked = widths[0], sum(widths) + 2 * h.shape[-1]
    before, after = h[:-1], h[1:]  # as a token found it, and left it
    if reset is not None:
        (before,) = masked(~reset, before)
    hidden = jax.nn.relu(tokens.router + linear(before, weights.h[:routers]))
    r = sigmoid(tokens.gates[..., :d] + linear(c, weights.c[:d]) + linear(before, weights.h[asked - 2 * d : asked - d]))
    router, query, gates = _split(linear(before, change.h[:asked]), [*widths, 2 * d])
    gates = jnp.concatenate([gates, linear(r * before, change.candidate)], -1)
    token = _Token(
        token.router + router,
        token.query + query,
        token.gates + gates + linear(c, change.c),
        token.logits + linear(hidden, change.router),
        token.written + linear(after, change.h[asked:]),
        None,
        None,
    )
    return out, push(token, *others)


def _split(a: jax.Array, widths: list[int]) -> list[jax.Array]:
    return jnp.split(a, list(itertools.accumulate(widths[:-1])), -1)


def _widened(p: Arrays, x: jax.Array, state: State) -> tuple[Arrays, jax.Array, State]:
    dtype = wide(x, *state, *p.values())
    return {name: a.astype(dtype) for name, a in p.items()}, x.astype(dtype), (state[0].astype(dtype), state[1].astype(dtype))


def _shares(hidden: jax.Array, p: Arrays, noise: jax.Array | None, temperature: float) -> jax.Array:
    """The router's hidden values before ReLU [..., 32] → ρ [..., n]."""
    logits = linear(jax.nn.relu(hidden), p["router.1.weight"], p["router.1.bias"])
    return jax.nn.softmax(logits if noise is None else (logits + p["balance_bias"] + noise) / temperature)


def _attention(M: jax.Array, key: jax.Array) -> jax.Array:
    """Shares of the slots of each bank: M [B, n, L, d_m], key [B, d_m] → [B, n, L]."""
    scores = dot("bnlm,bm->bnl", M, key * M.shape[-1] ** -0.5)
    if M.shape[-1] == 1:  # XLA would subtract the rounded maximum from a product that it does not round: not from itself
        scores = jnp.maximum(scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores)


def _read(M: jax.Array, rho: jax.Array, query: jax.Array) -> jax.Array:
    """c [B, d_m]."""
    return dot("bnl,bnlm->bm", rho[..., None] * _attention(M, query), M)


def _gated(gates: jax.Array, from_h: jax.Array, h: jax.Array, U: jax.Array) -> jax.Array:
    """h' (step 3), from W[x;c] + b [B, 3D] and [U_r h, U_ζ h] [B, 2D]."""
    d = h.shape[-1]
    r, z = jnp.split(gates[:, : 2 * d] + from_h, 2, -1)
    return sigmoid(z) * h + sigmoid(-z) * tanh(gates[:, 2 * d :] + linear(sigmoid(r) * h, U))  # 1 − ζ keeps its digits


def _remembered(M: jax.Array, rho: jax.Array, key: jax.Array, v: jax.Array, gate: jax.Array, erase: jax.Array | None = None) -> jax.Array:
    """M' (steps 4 and 5), from products with h'."""
    e = sigmoid(v if erase is None else erase)
    w = (_attention(M, key) * (rho * sigmoid(gate))[..., None])[..., None]  # [B, n, L, 1]
    return M + w * (tanh(v)[:, None, None] - e[:, None, None] * M)
