"""CRAM's two scans by several means. Each contestant maps prepared inputs to ξ and is differentiated by its own framework."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from unisono_torch.kernels import available
from unisono_torch.ops import decayed_sum, weighted_sum

from unisono_tools.bench.cases import Case
from unisono_tools.bench.measure import median_ms, peak_bytes, throughput_ms

SETS = 3
CHECKED = 32  # channels of the first sequence held against float64


@dataclasses.dataclass
class Row:
    """One contestant's figures: ms, relative errors ‖a − exact‖ / ‖exact‖, bytes."""

    contestant: str
    forward_ms: float
    backward_ms: float
    error_xi: float
    error_dx: float
    peak_bytes: int | None = None
    note: str = ""


def exact(case: Case, x: np.ndarray, s: np.ndarray, dxi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ξ and ∂x in float64, token by token: x, dxi [T, d], s [T]."""
    decay, gain = (case.decay, np.full(len(x), 1 - case.decay)) if case.op == "decayed_sum" else (1.0, s)
    e = np.exp(-np.abs(x))
    u, slope = np.where(x < 0, e, 1) / (1 + e), e / (1 + e) ** 2
    xi, dx, state, g = np.empty_like(x), np.empty_like(x), 0.0, 0.0
    for t in range(len(x)):
        xi[t] = state = decay * state + gain[t] * u[t]
    for t in reversed(range(len(x))):
        g = dxi[t] + decay * g
        dx[t] = gain[t] * slope[t] * g
    return xi, dx


def make_inputs(case: Case, device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Input sets (x, s, ∂ξ) of a fixed seed."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.batch, case.length, case.width)

    def draw(shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype))

    return [(draw(shape, case.dtype), draw(shape[:2], "float32").sigmoid(), draw(shape, case.out_dtype)) for _ in range(SETS)]


def _relative(value: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(value - truth) / np.linalg.norm(truth))


def _plain(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    out = getattr(torch, case.out_dtype)

    def run(x: Tensor, s: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], x.shape[2], dtype=torch.float32)
        if case.op == "decayed_sum":
            return decayed_sum.parallel(x, case.decay, state, implementation="plain")[0].to(out)
        return weighted_sum.parallel(x, s, state, implementation="plain")[0].to(out)

    return run


def _kernel(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    from unisono_torch.kernels.decayed_sum import decayed_sum
    from unisono_torch.kernels.weighted_sum import weighted_sum

    out = getattr(torch, case.out_dtype)
    if case.op == "decayed_sum":
        return lambda x, s: decayed_sum(x, case.decay, out_dtype=out)[0]
    return lambda x, s: weighted_sum(x, s, out_dtype=out)[0]


def _cumsum(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, s: (s[..., None] * torch.sigmoid(x.float())).cumsum(1).to(getattr(torch, case.out_dtype))


def _time_torch(name: str, case: Case, run: Callable[[Tensor, Tensor], Tensor], sets: list, device: str, repeats: int) -> Row:
    leaves = [(x.detach().requires_grad_(), s.detach().requires_grad_(case.op == "weighted_sum"), dxi) for x, s, dxi in sets]

    def backward(out: Tensor, x: Tensor, s: Tensor, dxi: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, [x, s] if s.requires_grad else [x], dxi, retain_graph=True)

    outputs = [run(x, s) for x, s, _ in leaves]
    x, s, dxi = leaves[0]
    found = outputs[0][0, :, :CHECKED], backward(outputs[0], x, s, dxi)[0][0, :, :CHECKED]
    part = (a.detach().double().cpu().numpy() for a in (x[0, :, :CHECKED], s[0], dxi[0, :, :CHECKED]))
    errors = [_relative(a.detach().double().cpu().numpy(), truth) for a, truth in zip(found, exact(case, *part), strict=True)]
    backward_ms = median_ms([lambda o=o, leaf=leaf: backward(o, *leaf) for o, leaf in zip(outputs, leaves, strict=True)], device, repeats)
    del outputs, found
    forward_ms = median_ms([lambda leaf=leaf: run(*leaf[:2]) for leaf in leaves], device, repeats)
    peak = peak_bytes(lambda: backward(run(x, s), x, s, dxi), device)
    return Row(name, forward_ms, backward_ms, *errors, peak)


def _time_accelerated(case: Case, sets: list, device: str, repeats: int, copy_rate: float) -> Row:
    """accelerated-scan on gates and terms laid out as it wants them, [B, D, T]; σ is charged as one pass at copy speed each way."""
    from accelerated_scan.warp import scan

    gate, gain = (case.decay, 1 - case.decay) if case.op == "decayed_sum" else (1.0, None)

    def prepare(x: Tensor, s: Tensor, dxi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        terms = (gain if gain is not None else s[..., None]) * torch.sigmoid(x.float())
        terms = terms.to(x.dtype).transpose(1, 2).contiguous().requires_grad_()
        return torch.full_like(terms, gate), terms, dxi.to(x.dtype).transpose(1, 2).contiguous()

    leaves = [prepare(*each) for each in sets]
    outputs = [scan(gates, terms) for gates, terms, _ in leaves]

    def backward(out: Tensor, gates: Tensor, terms: Tensor, dxi: Tensor) -> Tensor:
        return torch.autograd.grad(out, terms, dxi, retain_graph=True)[0]

    x, s, dxi = (a[0, :, :CHECKED].double().cpu().numpy() if a.ndim == 3 else a[0].double().cpu().numpy() for a in sets[0])
    truth_xi, truth_dx = exact(case, x, s, dxi)
    slope = np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))) ** 2 * (gain if gain is not None else s[:, None])
    found = outputs[0][0, :CHECKED], backward(outputs[0], *leaves[0])[0, :CHECKED]
    xi, dterms = (a.detach().double().cpu().numpy().T for a in found)
    backward_ms = median_ms([lambda o=o, leaf=leaf: backward(o, *leaf) for o, leaf in zip(outputs, leaves, strict=True)], device, repeats)
    forward_ms = median_ms([lambda leaf=leaf: scan(*leaf[:2]) for leaf in leaves], device, repeats)
    bytes_x = sets[0][0].nbytes
    forward_ms += 2 * bytes_x / copy_rate * 1e3
    backward_ms += 3 * bytes_x / copy_rate * 1e3
    peak = peak_bytes(lambda: backward(scan(*leaves[0][:2]), *leaves[0]), device)
    note = "σ added as a pass at copy speed; its backward also finds the gates' gradient"
    return Row("accelerated-scan warp", forward_ms, backward_ms, _relative(xi, truth_xi), _relative(dterms * slope, truth_dx), peak, note)


def _time_jax(case: Case, sets: list, repeats: int) -> list[Row]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp

    def combine(first: tuple, second: tuple) -> tuple:
        return first[0] * second[0], second[0] * first[1] + second[1]

    def terms(x: Any, s: Any) -> Any:
        return (1 - case.decay if case.op == "decayed_sum" else s[..., None]) * jax.nn.sigmoid(x.astype(jnp.float32))

    def associative_scan(x: Any, s: Any) -> Any:
        decay = case.decay if case.op == "decayed_sum" else 1.0
        b = terms(x, s)
        return jax.lax.associative_scan(combine, (jnp.full_like(b, decay), b), axis=1)[1].astype(case.out_dtype)

    def cumsum(x: Any, s: Any) -> Any:
        return jnp.cumsum(terms(x, s), 1).astype(case.out_dtype)

    def to_jax(a: Tensor) -> Any:
        return jnp.asarray(a.float().cpu().numpy()).astype(str(a.dtype)[6:])

    arrays = [tuple(to_jax(a) for a in each) for each in sets]
    x, s, dxi = (np.asarray(a[0].astype("float32"), np.float64) for a in arrays[0])
    truths = exact(case, x[:, :CHECKED], s, dxi[:, :CHECKED])
    rows = []
    for name, function in {
        "jax associative_scan": associative_scan,
        **({"jax cumsum": cumsum} if case.op == "weighted_sum" else {}),
    }.items():
        forward = jax.jit(function)

        # XLA drops what only ξ needs, so this is the backward alone where the forward saves nothing
        @jax.jit
        def backward(x: Any, s: Any, dxi: Any, function: Callable = function) -> Any:
            return jax.vjp(function, x, s)[1](dxi)[: 2 if case.op == "weighted_sum" else 1]

        found = forward(*arrays[0][:2]), backward(*arrays[0])[0]
        errors = [
            _relative(np.asarray(a[0, :, :CHECKED].astype("float32"), np.float64), truth) for a, truth in zip(found, truths, strict=True)
        ]
        forward_ms = throughput_ms([lambda a=a, f=forward: f(*a[:2]) for a in arrays], jax.block_until_ready, repeats)
        backward_ms = throughput_ms([lambda a=a, b=backward: b(*a) for a in arrays], jax.block_until_ready, repeats)
        rows.append(Row(name, forward_ms, backward_ms, *errors))
    return rows


def run_case(case: Case, device: str, repeats: int, copy_rate: float, peers: set[str]) -> list[Row]:
    """Ours first. A peer that is not installed is left out; one that fails here is listed with its error."""
    sets = make_inputs(case, device)
    timers: dict[str, Callable[[], list[Row]]] = {}

    def add(name: str, run: Callable) -> None:
        timers[name] = lambda: [_time_torch(name, case, run, sets, device, repeats)]

    if available(device):
        add("unisono", _kernel(case))
    if "eager" in peers:
        add("torch eager", _plain(case))
        if case.op == "weighted_sum":
            add("torch eager cumsum", _cumsum(case))
    if "compile" in peers:
        torch.compiler.reset()
        add("torch.compile", torch.compile(_plain(case)))
    if "accelerated-scan" in peers and device == "cuda" and importlib.util.find_spec("accelerated_scan"):
        timers["accelerated-scan warp"] = lambda: [_time_accelerated(case, sets, device, repeats, copy_rate)]
    if "jax" in peers and importlib.util.find_spec("jax"):
        timers["jax"] = lambda: _time_jax(case, sets, repeats)
    rows = []
    for name, timer in timers.items():
        try:
            rows += timer()
        except (RuntimeError, AssertionError, ImportError, ValueError) as error:
            rows.append(
                Row(name, float("nan"), float("nan"), float("nan"), float("nan"), note=f"failed: {str(error).splitlines()[0][:120]}")
            )
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows
