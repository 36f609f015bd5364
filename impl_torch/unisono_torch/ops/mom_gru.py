"""MARU's cell, MoM-GRU: a GRU that reads n banks of L memory slots by attention, and erases and adds to them.

With [x; h] concatenated, σ logistic, and all weights `[out, in]`:
1. ρ = softmax(W₂ ReLU(W₁[x;h] + b₁) + b₂)                                     which banks
2. q = W_q[x;h] + b_q,  α_i = softmax(M_i q / √d_m),  c = Σ_i ρ_i α_iᵀ M_i         what is read
3. r = σ(W_r[x;c] + U_r h), ζ = σ(W_ζ[x;c] + U_ζ h), h̃ = tanh(W_h[x;c] + U_h (r∘h)), h' = ζ∘h + (1−ζ)∘h̃
4. k = W_k h' + b, v = W_v h' + b, γ = σ(w_g·h' + b),  w_i = softmax(M_i k / √d_m) ρ_i γ
5. M_i' = M_i ∘ (1 − w_i eᵀ) + w_i aᵀ,  a = tanh(v),  e = σ(v), or of a projection of its own (erase="separate")

The reset gate acts before the product. M₀ is learned: a `reset` restores it, and gradients flow to it.

Shapes: x [B, T, D], p the parameters that contract/maru.py names, state (h [B, D], M [B, n, L, d_m]), reset and valid [B, T]
bool or None, noise [B, T, n] or None. Each form returns (h [B, T, D], final state), float32 or wider; h is the unchanged one
where a token is not valid. noise is what training with router="gumbel" draws: with it ρ = softmax((logits + balance bias +
noise) / temperature).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from unisono_spec.contract.shapes import shaped

from unisono_torch.ops.dispatch import use_triton
from unisono_torch.ops.elementwise import linear, sigmoid, tanh, wide
from unisono_torch.ops.fold import check_length, masked
from unisono_torch.ops.mom_gru_loop import Sizes, Weights, loop
from unisono_torch.ops.precision import exact

State = tuple[Tensor, Tensor]
LONGEST = 1 << 21  # tokens of which the kernel knows the way back: it counts barriers in 32 bits
Params = Mapping[str, Tensor]


def routing(x: Tensor, h: Tensor, p: Params, noise: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """ρ, the share of each bank: x, h [..., D] → [..., n]. Its mean over tokens is the load that `balanced` evens out."""
    hidden = linear(torch.cat([x, h], -1), p["router.0.weight"], p["router.0.bias"]).relu()
    logits = linear(hidden, p["router.1.weight"], p["router.1.bias"])
    if noise is not None:
        logits = (logits + p["balance_bias"].to(logits.dtype) + noise.to(logits.dtype)) / temperature
    return logits.softmax(-1)


def balanced(bias: Tensor, load_average: Tensor, load: Tensor, rate: float = 0.01) -> tuple[Tensor, Tensor]:
    """After a training step: b ← b − rate · (EMA₀.₉(load) − 1/n). load [n]: the mean of ρ over the step's valid tokens."""
    load_average = 0.9 * load_average + 0.1 * load
    return bias - rate * (load_average - 1 / len(bias)), load_average


@exact
def step(
    x: Tensor,
    p: Params,
    state: State,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    noise: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, State]:
    """One token: x [B, D], reset and valid [B], noise [B, n]."""
    dtype = wide(x.dtype)
    p = {name: a.to(dtype) for name, a in p.items()}
    h, M = (a.to(dtype) for a in state)
    if reset is not None:
        (h,) = masked(~reset, h)
        M = torch.where(reset[:, None, None, None], p["memory"], M)
    x = masked(valid, x)[0].to(dtype)
    noise = None if noise is None else masked(valid, noise)[0]
    scale = M.shape[-1] ** -0.5

    rho = routing(x, h, p, noise, temperature)  # [B, n]
    q = linear(torch.cat([x, h], -1), p["query.weight"], p["query.bias"])  # [B, d_m]
    alpha = (torch.einsum("bnlm,bm->bnl", M, q) * scale).softmax(-1)
    c = torch.einsum("bnl,bnlm->bm", rho[..., None] * alpha, M)

    xr, xz, xh = linear(torch.cat([x, c], -1), p["input.weight"], p["input.bias"]).chunk(3, -1)
    Ur, Uz, Uh = p["hidden.weight"].chunk(3)
    r, z = sigmoid(xr + linear(h, Ur)), xz + linear(h, Uz)
    new_h = sigmoid(z) * h + sigmoid(-z) * tanh(xh + linear(r * h, Uh))  # 1 − ζ keeps its digits

    k, v = (linear(new_h, p[f"{name}.weight"], p[f"{name}.bias"]) for name in ("key", "value"))
    gamma = sigmoid(linear(new_h, p["gate.weight"], p["gate.bias"]))  # [B, 1]
    w = ((torch.einsum("bnlm,bm->bnl", M, k) * scale).softmax(-1) * (rho * gamma)[..., None])[..., None]
    e = sigmoid(linear(new_h, p["erase.weight"], p["erase.bias"]) if "erase.weight" in p else v)
    new_M = M * (1 - w * e[:, None, None]) + w * tanh(v)[:, None, None]
    if valid is not None:
        new_h, new_M = torch.where(valid[:, None], new_h, h), torch.where(valid[:, None, None, None], new_M, M)
    return new_h, (new_h, new_M)


@shaped
@exact
def recurrent(
    x: Tensor,
    p: Params,
    initial_state: State,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    noise: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, State]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    check_length(x)
    state, out = initial_state, []
    marks = ([None] * x.shape[1] if m is None else m.unbind(1) for m in (reset, valid, noise))
    for x_t, reset_t, valid_t, noise_t in zip(x.unbind(1), *marks, strict=True):
        h, state = step(x_t, p, state, reset_t, valid_t, noise_t, temperature)
        out.append(h)
    return torch.stack(out, 1), state


@shaped
@exact
def hoisted(
    x: Tensor,
    p: Params,
    initial_state: State,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    chunk_size: int = 64,
    noise: Tensor | None = None,
    temperature: float = 1.0,
    implementation: str = "auto",
) -> tuple[Tensor, State]:
    """The recurrence has no parallel form. This one takes every product with x out of the loop, as one matmul over all T; what is
    left in it depends on h. Its gradient is written out, and keeps one memory in 32 (mom_gru_loop.py), whatever the chunk size."""
    check_length(x)
    kernel = by_kernel(implementation, x.device, x.dtype, p) and len(x) > 0
    kernel = kernel and (x.shape[1] <= LONGEST or not torch.is_grad_enabled())
    dtype, (banks, slots) = wide(x.dtype), p["memory"].shape[:2]
    x, weights = prepared(x, p, valid)
    if noise is not None:
        noise = masked(valid, noise)[0].to(dtype) + p["balance_bias"].to(dtype)
    h, M = (a.to(dtype) for a in initial_state)
    out, M = loop(weights, Sizes(banks, slots, temperature), h, M.flatten(1, 2), x, reset, valid, noise, kernel)
    return out, (out[:, -1].clone(), M.unflatten(1, (banks, slots)))


def by_kernel(implementation: str, device: torch.device, dtype: torch.dtype, p: Params) -> bool:
    """Whether kernels/mom_gru serves cells like p."""
    banks, slots, width = p["memory"].shape
    widths = {"n": banks, "L": slots, "d_m": width, "hidden": len(p["router.0.bias"])}
    return use_triton(implementation, "mom_gru", device, dtype, widths)


def prepared(x: Tensor, p: Params, valid: Tensor | None) -> tuple[Tensor, Weights]:
    """x [B, T, D], zero where it is not valid, and the weights as the loop takes them; float32 or wider."""
    dtype = wide(x.dtype)
    return masked(valid, x)[0].to(dtype), packed({name: a.to(dtype) for name, a in p.items()}, x.shape[-1])


def packed(p: Params, d: int) -> Weights:
    """As the loop takes them; x is d wide."""
    router, query, gates, hidden = (p[f"{name}.weight"] for name in ("router.0", "query", "input", "hidden"))
    later = [name for name in ("key", "value", "erase", "gate") if f"{name}.weight" in p]
    return Weights(
        torch.cat([router[:, :d], query[:, :d], gates[:, :d]]),
        torch.cat([p[f"{name}.bias"] for name in ("router.0", "query", "input")]),
        torch.cat([router[:, d:], query[:, d:], hidden[: 2 * d]]),
        gates[:, d:],
        hidden[2 * d :],
        torch.cat([p[f"{name}.weight"] for name in later]),
        torch.cat([p[f"{name}.bias"] for name in later]),
        p["router.1.weight"],
        p["router.1.bias"],
        p["memory"].flatten(0, 1),
    )
