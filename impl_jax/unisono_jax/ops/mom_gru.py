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

import itertools
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
H_PARTS = ("key", "value", "gate", "erase")  # products with h'; the last where erase="separate"


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
    d = x.shape[-1]
    U = p["hidden.weight"]
    new_h = _gated(gates, linear(h, U[: 2 * d]), h, U[2 * d :])
    written = (linear(new_h, p[f"{name}.weight"], p[f"{name}.bias"]) for name in H_PARTS if f"{name}.weight" in p)
    new_M = _remembered(M, rho, *written)
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
    """The recurrence has no parallel form. This one takes every product with x out of the loop, as one matmul for all tokens, and joins
    those with h: what the next token asks of h' and what is written with it are one matmul. For the gradient, the states are kept once
    in C tokens and computed again between."""
    check_implementation(implementation)
    length, d = x.shape[1], x.shape[-1]
    size = min(chunk_size, length)
    p, x, (h, M) = _widened(p, x, initial_state)
    (x,) = masked(valid, x)
    noise = None if noise is None else masked(valid, noise)[0]
    from_x = jnp.concatenate([p[f"{name}.weight"][:, :d] for name in X_PARTS])
    bias = jnp.concatenate([p[f"{name}.bias"] for name in X_PARTS])
    router, query, gates = _split(linear(x, from_x, bias), [len(p[f"{name}.bias"]) for name in X_PARTS])
    written = [name for name in H_PARTS if f"{name}.weight" in p]
    parts = [*(p[f"{name}.weight"][:, d:] for name in X_PARTS[:2]), p["hidden.weight"][: 2 * d], *(p[f"{name}.weight"] for name in written)]
    from_h, widths = jnp.concatenate(parts), [len(a) for a in parts]
    from_c, U = p["input.weight"][:, d:], p["hidden.weight"][2 * d :]

    def token(carry: tuple[State, jax.Array], at_t: _Token) -> tuple[tuple[State, jax.Array], jax.Array]:
        (h, M), of_h = carry  # of_h: its products, without biases
        if at_t.reset is not None:
            (h, of_h), M = masked(~at_t.reset, h, of_h), jnp.where(at_t.reset[:, None, None, None], p["memory"], M)
        for_router, for_query, for_gates, *_ = _split(of_h, widths)
        rho = _shares(at_t.router + for_router, p, at_t.noise, temperature)
        c = _read(M, rho, at_t.query + for_query)
        new_h = _gated(at_t.gates + linear(c, from_c), for_gates, h, U)
        new_of_h = linear(new_h, from_h)
        new_M = _remembered(M, rho, *(a + p[f"{name}.bias"] for name, a in zip(written, _split(new_of_h, widths)[3:], strict=True)))
        if at_t.valid is not None:
            read = at_t.valid[:, None]
            new_h, new_of_h = jnp.where(read, new_h, h), jnp.where(read, new_of_h, of_h)
            new_M = jnp.where(at_t.valid[:, None, None, None], new_M, M)
        return ((new_h, new_M), new_of_h), new_h

    @jax.checkpoint
    def segment(carry: tuple[State, jax.Array], tokens: _Token) -> tuple[tuple[State, jax.Array], jax.Array]:
        return lax.scan(token, carry, tokens)

    tokens = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), _Token(router, query, gates, reset, valid, noise))  # [T, B, …]
    whole = length // size * size
    segments = jax.tree.map(lambda a: a[:whole].reshape(whole // size, size, *a.shape[1:]), tokens)
    carry, out = lax.scan(segment, ((h, M), linear(h, from_h)), segments)
    out = out.reshape(whole, *out.shape[2:])
    if whole < length:
        carry, last = segment(carry, jax.tree.map(lambda a: a[whole:], tokens))
        out = jnp.concatenate([out, last])
    return jnp.swapaxes(out, 0, 1), carry[0]


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
    return jax.nn.softmax(dot("bnlm,bm->bnl", M, key * M.shape[-1] ** -0.5))


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
