"""Σ_j λ^(t−j) (q_t·k_j) v_j, which attention's peers compute: in float64, and by jax-linear-attention; and a sum with gates, eagerly."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unisono_tools.bench.measure import kernels_ms, median_ms

Times = tuple[float, float]  # forward, both ways, in ms


def exact(q: Tensor, k: Tensor, v: Tensor, log_decay: float = 0.0, chunk: int = 512) -> Tensor:
    """[B, T, H, ·] → [B, T, H, V], in the dtype given."""
    S, out = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    for begin in range(0, q.shape[1], chunk):
        a, b, c = (x[:, begin : begin + chunk].transpose(1, 2) for x in (q, k, v))  # [B, H, C, ·]
        n = torch.arange(a.shape[2], device=q.device, dtype=q.dtype)
        scores = a @ b.mT * (log_decay * (n[:, None] - n)).exp().tril()
        out.append(scores @ c + (log_decay * (n + 1)).exp()[:, None] * (a @ S))
        last = (log_decay * (len(n) - 1 - n)).exp()[:, None]
        S = torch.e ** (log_decay * len(n)) * S + (b * last).mT @ c
    return torch.cat(out, 2).transpose(1, 2)


def normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of features."""
    found = exact(q, k, torch.cat([v, torch.ones_like(v[..., :1])], -1))
    return found[..., :-1] / found[..., -1:]


def by_jax(sets: Sequence[tuple[Tensor, ...]], log_decay: float) -> tuple[list[Tensor], Callable[[int], Times]]:
    """Of q, k, v, do: o, dq, dk and dv of the first set, and what times all of them."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax, ops = importlib.import_module("jax"), importlib.import_module("jla.ops")
    # an argument, since XLA folds what it does to a constant for minutes
    decay = jax.numpy.full(sets[0][0].shape[:3], log_decay, jax.numpy.float32)

    def run(q: Any, k: Any, v: Any, decay: Any) -> Any:
        return ops.linear_attention("simple_gla", q, k, v, g=decay, scale=1.0)[0]

    def with_gradients(q: Any, k: Any, v: Any, do: Any, decay: Any) -> Any:
        o, pull = jax.vjp(lambda q, k, v: run(q, k, v, decay), q, k, v)
        return o, *pull(do)

    forward, gradient = jax.jit(run), jax.jit(with_gradients)
    arrays = [tuple(jax.dlpack.from_dlpack(a.contiguous()) for a in each) for each in sets]
    jax.block_until_ready(forward(*arrays[0][:3], decay))
    found = [torch.from_dlpack(a) for a in gradient(*arrays[0], decay)]

    def timed(repeats: int) -> Times:
        calls = [lambda a=a: forward(*a[:3], decay) for a in arrays], [lambda a=a: gradient(*a, decay) for a in arrays]
        forward_ms, both_ms = (kernels_ms(each, jax.block_until_ready, repeats) for each in calls)
        return forward_ms, both_ms

    return found, timed


def gated_sum(sets: Sequence[tuple[Tensor, ...]], repeats: int) -> Times:
    """Of q, k, v, do and gates [B, T, S, 1, 1]: what the sum over scales of gates and what they read takes."""
    reads = [torch.randn_like(sets[0][2]) for _ in range(sets[0][4].shape[2])]

    def summed(do: Tensor, gate: Tensor, gradients: bool) -> object:
        leaves = [a.detach().requires_grad_(gradients) for a in (*reads, gate.to(do.dtype))]
        total = leaves[0] * leaves[-1][:, :, 0]
        for i, o in enumerate(leaves[1:-1]):
            total = total + o * leaves[-1][:, :, i + 1]
        return torch.autograd.grad(total, leaves, do) if gradients else total

    forward_ms, both_ms = (median_ms([lambda s=s, g=g: summed(s[3], s[4], g) for s in sets], "cuda", repeats) for g in (False, True))
    return forward_ms, both_ms
