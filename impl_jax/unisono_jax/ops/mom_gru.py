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

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from unisono_jax.ops.elementwise import dot, linear, masked, sigmoid, tanh, wide
from unisono_jax.registry import check_implementation

Arrays = Mapping[str, jax.Array]
State = tuple[jax.Array, jax.Array]
X_PARTS = ("router.0", "query", "input")  # products with x, which need no h


class _Token(NamedTuple):
    """What is known of a token before the cell runs: its products with x [B, …], its marks [B] and noise [B, n]."""

    router: jax.Array
    query: jax.Array
    gates: jax.Array
    reset: jax.Array | None
    valid: jax.Array | None
    noise: jax.Array | None


def routing(x: jax.Array, h: jax.Array, p: Arrays, noise: jax.Array | None = None, temperature: float = 1.0) -> jax.Array:
    """ρ, the share of each bank: x, h [..., D] → [..., n]. Its mean over tokens is the load that `balanced` evens out."""
    hidden = linear(jnp.concatenate([x, h], -1), p["router.0.weight"], p["router.0.bias"])
    return _shares(hidden, p, noise, temperature)


def balanced(bias: jax.Array, load_average: jax.Array, load: jax.Array, rate: float = 0.01) -> tuple[jax.Array, jax.Array]:
    """After a training step: b ← b − rate · (EMA₀.₉(load) − 1/n). load [n]: the mean of ρ over the step's valid tokens."""
    load_average = 0.9 * load_average + 0.1 * load
    return bias - rate * (load_average - 1 / len(bias)), load_average


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
    new_h, new_M = _write(gates, h, M, rho, p)
    if valid is not None:
        new_h, new_M = jnp.where(valid[:, None], new_h, h), jnp.where(valid[:, None, None, None], new_M, M)
    return new_h, (new_h, new_M)


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
    """The recurrence has no parallel form. This one takes every product with x out of the loop, as one matmul for all tokens; all
    that is left in it depends on h. For the gradient, the states are kept once in C tokens and computed again between."""
    check_implementation(implementation)
    length = x.shape[1]
    size = min(chunk_size, length)
    p, x, state = _widened(p, x, initial_state)
    (x,) = masked(valid, x)
    noise = None if noise is None else masked(valid, noise)[0]
    d = x.shape[-1]
    from_x = jnp.concatenate([p[f"{name}.weight"][:, :d] for name in X_PARTS])
    bias = jnp.concatenate([p[f"{name}.bias"] for name in X_PARTS])
    widths = [len(p[f"{name}.bias"]) for name in X_PARTS]
    router, query, gates = jnp.split(linear(x, from_x, bias), [widths[0], widths[0] + widths[1]], -1)
    rest = {name: p[f"{name}.weight"][:, d:] for name in X_PARTS}  # of h, h and c

    def token(state: State, at_t: _Token) -> tuple[State, jax.Array]:
        h, M = state
        if at_t.reset is not None:
            h, M = masked(~at_t.reset, h)[0], jnp.where(at_t.reset[:, None, None, None], p["memory"], M)
        rho = _shares(at_t.router + linear(h, rest["router.0"]), p, at_t.noise, temperature)
        c = _read(M, rho, at_t.query + linear(h, rest["query"]))
        new_h, new_M = _write(at_t.gates + linear(c, rest["input"]), h, M, rho, p)
        if at_t.valid is not None:
            new_h = jnp.where(at_t.valid[:, None], new_h, h)
            new_M = jnp.where(at_t.valid[:, None, None, None], new_M, M)
        return (new_h, new_M), new_h

    @jax.checkpoint
    def segment(state: State, tokens: _Token) -> tuple[State, jax.Array]:
        return lax.scan(token, state, tokens)

    tokens = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), _Token(router, query, gates, reset, valid, noise))  # [T, B, …]
    whole = length // size * size
    segments = jax.tree.map(lambda a: a[:whole].reshape(whole // size, size, *a.shape[1:]), tokens)
    state, h = lax.scan(segment, state, segments)
    h = h.reshape(whole, *h.shape[2:])
    if whole < length:
        state, last = segment(state, jax.tree.map(lambda a: a[whole:], tokens))
        h = jnp.concatenate([h, last])
    return jnp.swapaxes(h, 0, 1), state


def _widened(p: Arrays, x: jax.Array, state: State) -> tuple[Arrays, jax.Array, State]:
    dtype = wide(x, *state, *p.values())
    return {name: a.astype(dtype) for name, a in p.items()}, x.astype(dtype), (state[0].astype(dtype), state[1].astype(dtype))


def _shares(hidden: jax.Array, p: Arrays, noise: jax.Array | None, temperature: float) -> jax.Array:
    """The router's hidden values before ReLU [..., 32] → ρ [..., n]."""
    logits = linear(jax.nn.relu(hidden), p["router.1.weight"], p["router.1.bias"])
    return jax.nn.softmax(logits if noise is None else (logits + p["balance_bias"] + noise) / temperature)


def _attention(M: jax.Array, key: jax.Array) -> jax.Array:
    """Shares of the slots of each bank: M [B, n, L, d_m], key [B, d_m] → [B, n, L]."""
    return jax.nn.softmax(dot("bnlm,bm->bnl", M, key * M.shape[-1] ** -0.5))


def _read(M: jax.Array, rho: jax.Array, query: jax.Array) -> jax.Array:
    """c [B, d_m]."""
    return dot("bnl,bnlm->bm", rho[..., None] * _attention(M, query), M)


def _write(gates: jax.Array, h: jax.Array, M: jax.Array, rho: jax.Array, p: Arrays) -> State:
    """h' and M', from W[x;c] + b [B, 3D] (steps 3 to 5)."""
    d = h.shape[-1]
    U = p["hidden.weight"]
    r, z = jnp.split(gates[:, : 2 * d] + linear(h, U[: 2 * d]), 2, -1)
    h = sigmoid(z) * h + sigmoid(-z) * tanh(gates[:, 2 * d :] + linear(sigmoid(r) * h, U[2 * d :]))  # 1 − ζ keeps its digits
    key, v = (linear(h, p[f"{name}.weight"], p[f"{name}.bias"]) for name in ("key", "value"))
    gamma = sigmoid(linear(h, p["gate.weight"], p["gate.bias"]))  # [B, 1]
    e = sigmoid(linear(h, p["erase.weight"], p["erase.bias"]) if "erase.weight" in p else v)
    w = (_attention(M, key) * (rho * gamma)[..., None])[..., None]  # [B, n, L, 1]
    return h, M + w * (tanh(v)[:, None, None] - e[:, None, None] * M)
