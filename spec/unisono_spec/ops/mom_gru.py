"""MARU's cell, MoM-GRU: a GRU that reads n banks of L memory slots by attention, and erases and adds to them.

With [x; h] concatenated, σ logistic, and all weights `[out, in]`:
1. ρ = softmax(W₂ ReLU(W₁[x;h] + b₁) + b₂)                                     which banks
2. q = W_q[x;h] + b_q,  α_i = softmax(M_i q / √d_m),  c = Σ_i ρ_i α_iᵀ M_i         what is read
3. r = σ(W_r[x;c] + U_r h), ζ = σ(W_ζ[x;c] + U_ζ h), h̃ = tanh(W_h[x;c] + U_h (r∘h)), h' = ζ∘h + (1−ζ)∘h̃
4. k = W_k h' + b, v = W_v h' + b, γ = σ(w_g·h' + b),  w_i = softmax(M_i k / √d_m) ρ_i γ
5. M_i' = M_i ∘ (1 − w_i eᵀ) + w_i aᵀ,  a = tanh(v),  e = σ(v), or of a projection of its own (erase="separate")

The reset gate acts before the product. M₀ is learned: a `reset` restores it, and gradients flow to it.

Shapes: x [B, T, D], p the parameters that contract/maru.py names, state (h [B, D], M [B, n, L, d_m]), reset and valid [B, T]
bool or None, noise [B, T, n] or None. Each form returns (h [B, T, D], final state); h is the unchanged one where a token is not
valid. noise is what training with router="gumbel" draws: with it ρ = softmax((logits + balance bias + noise) / temperature).
"""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.base import Arrays
from unisono_spec.contract.shapes import shaped
from unisono_spec.ops.elementwise import linear, sigmoid, softmax

State = tuple[np.ndarray, np.ndarray]


def routing(x: np.ndarray, h: np.ndarray, p: Arrays, noise: np.ndarray | None = None, temperature: float = 1.0) -> np.ndarray:
    """ρ, the share of each bank: x, h [..., D] → [..., n]. Its mean over tokens is the load that `balanced` evens out."""
    hidden = linear(np.concatenate([x, h], -1), p["router.0.weight"], p["router.0.bias"])
    logits = linear(np.where(np.real(hidden) > 0, hidden, 0), p["router.1.weight"], p["router.1.bias"])
    return softmax(logits if noise is None else (logits + p["balance_bias"] + noise) / temperature)


def balanced(bias: np.ndarray, load_average: np.ndarray, load: np.ndarray, rate: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """After a training step: b ← b − rate · (EMA₀.₉(load) − 1/n). load [n]: the mean of ρ over the step's valid tokens."""
    load_average = 0.9 * load_average + 0.1 * load
    return bias - rate * (load_average - 1 / len(bias)), load_average


def step(
    x: np.ndarray,
    p: Arrays,
    state: State,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    noise: np.ndarray | None = None,
    temperature: float = 1.0,
) -> tuple[np.ndarray, State]:
    """One token: x [B, D], reset and valid [B], noise [B, n]."""
    h, M = state
    if reset is not None:
        h, M = np.where(reset[:, None], 0, h), np.where(reset[:, None, None, None], p["memory"], M)
    if valid is not None:
        x = np.where(valid[:, None], x, 0)
        noise = None if noise is None else np.where(valid[:, None], noise, 0)
    scale = M.shape[-1] ** -0.5

    rho = routing(x, h, p, noise, temperature)  # [B, n]
    q = linear(np.concatenate([x, h], -1), p["query.weight"], p["query.bias"])  # [B, d_m]
    alpha = softmax(np.einsum("bnlm,bm->bnl", M, q) * scale)
    c = np.einsum("bn,bnl,bnlm->bm", rho, alpha, M)

    from_x = linear(np.concatenate([x, c], -1), p["input.weight"], p["input.bias"])
    (xr, xz, xh), (Ur, Uz, Uh) = np.split(from_x, 3, -1), np.split(p["hidden.weight"], 3)
    r, z = sigmoid(xr + linear(h, Ur)), xz + linear(h, Uz)
    new_h = sigmoid(z) * h + sigmoid(-z) * np.tanh(xh + linear(r * h, Uh))  # 1 − ζ keeps its digits

    k, v = (linear(new_h, p[f"{name}.weight"], p[f"{name}.bias"]) for name in ("key", "value"))
    gamma = sigmoid(linear(new_h, p["gate.weight"], p["gate.bias"]))  # [B, 1]
    w = softmax(np.einsum("bnlm,bm->bnl", M, k) * scale) * (rho * gamma)[..., None]
    e = sigmoid(linear(new_h, p["erase.weight"], p["erase.bias"]) if "erase.weight" in p else v)
    new_M = M * (1 - w[..., None] * e[:, None, None]) + w[..., None] * np.tanh(v)[:, None, None]
    if valid is not None:
        new_h, new_M = np.where(valid[:, None], new_h, h), np.where(valid[:, None, None, None], new_M, M)
    return new_h, (new_h, new_M)


@shaped
def recurrent(
    x: np.ndarray,
    p: Arrays,
    initial_state: State,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    noise: np.ndarray | None = None,
    temperature: float = 1.0,
) -> tuple[np.ndarray, State]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    state, out = initial_state, []
    for t in range(x.shape[1]):
        cut, read, drawn = (None if m is None else m[:, t] for m in (reset, valid, noise))
        h, state = step(x[:, t], p, state, cut, read, drawn, temperature)
        out.append(h)
    return np.stack(out, 1), state


@shaped
def hoisted(
    x: np.ndarray,
    p: Arrays,
    initial_state: State,
    reset: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    chunk_size: int = 64,
    noise: np.ndarray | None = None,
    temperature: float = 1.0,
) -> tuple[np.ndarray, State]:
    """The recurrence has no parallel form. This one takes every product with x out of the loop, for C tokens at a time; all
    that is left in it depends on h. The banks lie behind one another, as one memory of n·L slots."""
    batch, length, d = x.shape
    banks, slots, width = p["memory"].shape
    h, M = initial_state[0], initial_state[1].reshape(batch, banks * slots, width)
    fresh, bank = p["memory"].reshape(banks * slots, width), np.repeat(np.arange(banks), slots)

    def logistic(a: np.ndarray) -> np.ndarray:
        low, high = (np.exp(np.where(np.real(b) < 0, b, 0)) for b in (a, -a))
        return low / (low + high)

    def shares(a: np.ndarray) -> np.ndarray:
        """Softmax over the last axis."""
        e = np.exp(a - np.max(np.real(a), -1)[..., None])
        return e / np.sum(e, -1)[..., None]

    def attention(key: np.ndarray) -> np.ndarray:
        """[B, d_m] → [B, n·L], a softmax in each bank."""
        scores = (M @ key[:, :, None])[..., 0] / np.sqrt(width).astype(np.real(x).dtype)
        return shares(scores.reshape(batch, banks, slots)).reshape(batch, banks * slots)

    W = p["input.weight"]
    out = []
    for start in range(0, length, chunk_size):
        part = x[:, start : start + chunk_size]
        if valid is not None:
            part = np.where(valid[:, start : start + chunk_size, None], part, 0)
        route_x = part @ p["router.0.weight"][:, :d].T + p["router.0.bias"]
        query_x = part @ p["query.weight"][:, :d].T + p["query.bias"]
        gates_x = part @ W[:, :d].T + p["input.bias"]
        for i in range(part.shape[1]):
            t = start + i
            if reset is not None:
                h, M = np.where(reset[:, t, None], 0, h), np.where(reset[:, t, None, None], fresh, M)
            before = h, M
            hidden = route_x[:, i] + h @ p["router.0.weight"][:, d:].T
            logits = (hidden * (np.real(hidden) > 0)) @ p["router.1.weight"].T + p["router.1.bias"]
            if noise is not None:
                drawn = noise[:, t] if valid is None else np.where(valid[:, t, None], noise[:, t], 0)
                logits = (logits + drawn + p["balance_bias"]) / temperature
            rho = shares(logits)[:, bank]  # [B, n·L]
            c = ((rho * attention(query_x[:, i] + h @ p["query.weight"][:, d:].T))[:, None] @ M)[:, 0]
            gates = gates_x[:, i] + c @ W[:, d:].T
            r, zeta = np.split(gates[:, : 2 * d] + h @ p["hidden.weight"][: 2 * d].T, 2, -1)
            candidate = np.tanh(gates[:, 2 * d :] + (logistic(r) * h) @ p["hidden.weight"][2 * d :].T)
            h = logistic(zeta) * h + candidate * logistic(-zeta)
            v = h @ p["value.weight"].T + p["value.bias"]
            e = h @ p["erase.weight"].T + p["erase.bias"] if "erase.weight" in p else v
            gamma = logistic(h @ p["gate.weight"].T + p["gate.bias"])
            w = (attention(h @ p["key.weight"].T + p["key.bias"]) * rho * gamma)[..., None]
            M = M + w * (np.tanh(v)[:, None] - logistic(e)[:, None] * M)
            if valid is not None:
                h, M = np.where(valid[:, t, None], h, before[0]), np.where(valid[:, t, None, None], M, before[1])
            out.append(h)
    return np.stack(out, 1), (h, M.reshape(batch, banks, slots, width))
