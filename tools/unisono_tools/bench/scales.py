"""Multi-scale attention for bench.attention: fixed decays and a gate for each token, beside as many recurrences of a peer and their sum.

What a peer without gates takes is the time of its recurrence, once a scale, and of PyTorch's own sum with the gates.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from unisono_torch.ops import multiscale

from unisono_tools.bench.contestants import serving
from unisono_tools.bench.measure import median_ms, peak_bytes, throughput_ms

SETS = 3
OURS, PLAIN, FLA, JLA = "unisono", "plain", "fla chunk_simple_gla", "jax-linear-attention"
Numbers = tuple[float, float, float | None, float | None, int | None]  # forward, both in ms; errors of o, worst gradient; bytes


def decays(scales: int, device: str) -> Tensor:
    """log λ [1, 1, S]: one that forgets nothing, and others four times as fast each; of one alone, 1/32."""
    values = [-1 / 32] if scales == 1 else [0.0, *(-(4.0 ** (i - scales)) for i in range(1, scales))]
    return torch.tensor(values, device=device)[None, None]


def random_inputs(
    batch: int, length: int, heads: int, width: int, scales: int, dtype: torch.dtype, device: str, seed: int
) -> tuple[Tensor, ...]:
    """q, k (features), v, do, gates [B, T, S, 1, 1]."""
    made = torch.Generator(device).manual_seed(seed)
    q, k, v, do = (torch.randn(batch, length, heads, width, generator=made, device=device) for _ in range(4))
    gate = torch.rand(batch, length, scales, 1, 1, generator=made, device=device) + 0.1
    features = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    return *(x.to(dtype) for x in (*features, v, do)), gate


def run(implementation: str, log_decay: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    batch, _, heads, width = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    S = torch.zeros(batch, gate.shape[2], heads, width, v.shape[-1], dtype=wide, device=q.device)
    return multiscale.parallel(q, k, v, q, k, log_decay, gate, (S, S[..., 0].clone()), implementation=implementation)[0]


def both(implementation: str, log_decay: Tensor, q: Tensor, k: Tensor, v: Tensor, do: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    """o and its gradients; those of the decays where there are several, which models learn."""
    learned = log_decay.shape[-1] > 1
    log_decay = log_decay.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    q, k, v, gate, log_decay = (a.detach().requires_grad_(i < 4 or learned) for i, a in enumerate((q, k, v, gate, log_decay)))
    o = run(implementation, log_decay, q, k, v, gate)
    return o.detach(), *torch.autograd.grad(o, (q, k, v, gate, log_decay)[: 4 + learned], do.to(o.dtype))


def measure(batch: int, length: int, heads: int, width: int, scales: int, dtype: str, device: str, repeats: int) -> dict[str, Numbers]:
    """By contestant."""
    sets = [random_inputs(batch, length, heads, width, scales, getattr(torch, dtype), device, seed) for seed in range(SETS)]
    log_decay = decays(scales, device)
    exact = both(PLAIN, log_decay, *(a[:1, :, :1].double() if a.ndim == 4 else a[:1].double() for a in sets[0]))
    best, *_ = serving("torch", "multiscale", device, dtype, {"K": width, "V": width, "scales": scales})
    found: dict[str, Numbers] = {}
    for name, how in {OURS: best, PLAIN: PLAIN}.items():
        values = both(how, log_decay, *(a[:1, :, :1].contiguous() if a.ndim == 4 else a[:1].contiguous() for a in sets[0]))
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(values, exact, strict=True)]
        try:
            with torch.no_grad():
                forward = median_ms([lambda s=s, how=how: run(how, log_decay, *s[:3], gate=s[4]) for s in sets], device, repeats)
            whole = median_ms([lambda s=s, how=how: both(how, log_decay, *s) for s in sets], device, repeats)
            peak = peak_bytes(lambda how=how: both(how, log_decay, *sets[0]), device)
        except torch.OutOfMemoryError:
            if name == OURS:
                raise
            print(f"{name}: out of memory", flush=True)
            continue
        found[name] = forward, whole, errors[0], max(errors[1:]), peak
    if device != "cuda":
        return found
    torch.cuda.empty_cache()
    gated = _gated_sum(sets, repeats) if scales > 1 else (0.0, 0.0)
    suffix = f", {scales} recurrences without normalisers and an eager sum" if scales > 1 else ", no normaliser"
    recurrences: dict[str, Callable] = {}
    if importlib.util.find_spec("fla") and scales == 1:
        recurrences[FLA] = _time_fla
    if importlib.util.find_spec("jla"):
        recurrences[JLA] = time_jax
    for name, timed in recurrences.items():
        forward, whole = timed([s[:4] for s in sets], float(log_decay[0, 0, -1]), repeats)
        found[name + suffix] = scales * forward + gated[0], scales * whole + gated[1], None, None, None
    return found


def _gated_sum(sets: list[tuple[Tensor, ...]], repeats: int) -> tuple[float, float]:
    """What the sum over scales of gates and what they read takes, eagerly: forward, both ways."""
    reads = [torch.randn_like(sets[0][2]) for _ in range(sets[0][4].shape[2])]

    def summed(do: Tensor, gate: Tensor, gradients: bool) -> object:
        leaves = [a.detach().requires_grad_(gradients) for a in (*reads, gate.to(do.dtype))]
        total = leaves[0] * leaves[-1][:, :, 0]
        for i, o in enumerate(leaves[1:-1]):
            total = total + o * leaves[-1][:, :, i + 1]
        return torch.autograd.grad(total, leaves, do) if gradients else total

    forward, whole = (median_ms([lambda s=s, g=g: summed(s[3], s[4], g) for s in sets], "cuda", repeats) for g in (False, True))
    return forward, whole


def _time_fla(sets: list[tuple[Tensor, ...]], log_decay: float, repeats: int) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    decay = torch.full(sets[0][0].shape[:3], log_decay, device="cuda")

    def with_gradients(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> object:
        q, k, v = (a.detach().requires_grad_() for a in (q, k, v))
        return torch.autograd.grad(gla(q, k, v, g=decay, scale=1.0)[0], (q, k, v), do)

    forward = median_ms([lambda s=s: gla(*s[:3], g=decay, scale=1.0) for s in sets], "cuda", repeats)
    return forward, median_ms([lambda s=s: with_gradients(*s) for s in sets], "cuda", repeats)


def time_jax(sets: list[tuple[Tensor, ...]], log_decay: float, repeats: int) -> tuple[float, float]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax, ops = importlib.import_module("jax"), importlib.import_module("jla.ops")
    # an argument, since XLA folds what it does to a constant for minutes
    decay = jax.numpy.full(sets[0][0].shape[:3], log_decay, jax.numpy.float32)

    def run(q: Any, k: Any, v: Any, decay: Any) -> Any:
        return ops.linear_attention("simple_gla", q, k, v, g=decay, scale=1.0)[0]

    def with_gradients(q: Any, k: Any, v: Any, do: Any, decay: Any) -> Any:
        o, pull = jax.vjp(lambda q, k, v: run(q, k, v, decay), q, k, v)
        return o, pull(do)

    arrays = [tuple(jax.dlpack.from_dlpack(a.contiguous()) for a in each) for each in sets]
    forward, gradient = jax.jit(run), jax.jit(with_gradients)
    ms = throughput_ms([lambda a=a: forward(*a[:3], decay) for a in arrays], jax.block_until_ready, repeats)
    return ms, throughput_ms([lambda a=a: gradient(*a, decay) for a in arrays], jax.block_until_ready, repeats)
