"""CRAM's two scans by several means. Each contestant maps prepared inputs to ξ and is differentiated by its own framework."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._functorch import config as functorch
from unisono_torch.ops import decayed_sum, weighted_sum

from unisono_tools.bench.cases import Case
from unisono_tools.bench.contestants import serving
from unisono_tools.bench.measure import median_ms, peak_bytes, throughput_ms

SETS = 3
ACCELERATED = "accelerated-scan warp"
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

    def normal(shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype))

    return [(normal(shape, case.dtype), normal(shape[:2], "float32").sigmoid(), normal(shape, case.out_dtype)) for _ in range(SETS)]


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
    return Row(name, forward_ms, backward_ms, errors[0], errors[1], peak)


def time_accelerated(case: Case, device: str, repeats: int, copy_rate: float) -> Row:
    """accelerated-scan on gates and terms laid out as it wants them, [B, D, T]; σ is charged as one pass at copy speed each way.

    Its kernels are called directly, on buffers that are not 16-byte aligned in half precision: with aligned ones, 0.3.1 pads each
    four elements (8 bytes) to 16 and so reads and writes past the ends.
    """
    from accelerated_scan import warp  # pyright: ignore[reportMissingImports]

    gate, gain = (case.decay, 1 - case.decay) if case.op == "decayed_sum" else (1.0, None)
    shape = (case.batch, case.width, case.length)
    dtype = getattr(torch, case.dtype)

    def room() -> Tensor:
        return torch.zeros(case.elements + 4, dtype=dtype, device=device)[0 if dtype == torch.float32 else 4 :][: case.elements].view(shape)

    sets = make_inputs(case, device)
    x, s, dxi = (a[0].double().cpu().numpy() for a in sets[0])
    x, dxi = x[:, :CHECKED], dxi[:, :CHECKED]
    leaves = []
    for x_, s_, dxi_ in sets:
        terms = (gain if gain is not None else s_[..., None]) * torch.sigmoid(x_.float())
        leaves.append((room().fill_(gate), room().copy_(terms.transpose(1, 2)), room().copy_(dxi_.transpose(1, 2))))
    del sets
    out, dgates, dterms = room(), room(), room()

    def forward(gates: Tensor, terms: Tensor, _: Tensor) -> None:
        warp.warpscan_forward(gates, terms, out, False)

    def backward(gates: Tensor, _: Tensor, dxi: Tensor) -> None:
        warp.warpscan_backward(gates, out, dxi, dgates, dterms)

    forward(*leaves[0])
    backward(*leaves[0])
    xi, found = (a[0, :CHECKED].double().cpu().numpy().T for a in (out, dterms))
    slope = np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))) ** 2 * (gain if gain is not None else s[:, None])
    errors = [_relative(a, truth) for a, truth in zip((xi, found * slope), exact(case, x, s, dxi), strict=True)]
    pass_ms = out.nbytes / copy_rate * 1e3
    forward_ms = median_ms([lambda leaf=leaf: forward(*leaf) for leaf in leaves], device, repeats) + 2 * pass_ms
    backward_ms = median_ms([lambda leaf=leaf: backward(*leaf) for leaf in leaves], device, repeats) + 3 * pass_ms
    note = "gates and terms given in [B, D, T]; σ added as a pass at copy speed; its backward also finds the gates' gradient"
    return Row(ACCELERATED, forward_ms, backward_ms, errors[0], errors[1], note=note)


def _time_jax(case: Case, sets: list, device: str, repeats: int) -> list[Row]:
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

    ops = importlib.import_module(f"unisono_jax.ops.{case.op}")

    def ours(x: Any, s: Any, implementation: str) -> Any:
        state, given = jnp.zeros((case.batch, case.width)), case.decay if case.op == "decayed_sum" else s
        return ops.parallel(x, given, state, implementation=implementation)[0].astype(case.out_dtype)

    arrays = [tuple(jax.dlpack.from_dlpack(a) for a in each) for each in sets]
    x, s, dxi = (np.asarray(a[0].astype("float32"), np.float64) for a in arrays[0])
    truths = exact(case, x[:, :CHECKED], s, dxi[:, :CHECKED])
    rows = []
    for name, function in {
        "jax associative_scan": associative_scan,
        **({"jax cumsum": cumsum} if case.op == "weighted_sum" else {}),
        **{f"unisono, JAX {how}": functools.partial(ours, implementation=how) for how in serving("jax", case.op, device, case.dtype)},
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
        rows.append(Row(name, forward_ms, backward_ms, errors[0], errors[1]))
    return rows


def run_case(case: Case, device: str, repeats: int, peers: set[str]) -> list[Row]:
    """Ours first. A peer that is not installed is left out; one that fails here is listed with its error."""
    sets = make_inputs(case, device)
    timers: dict[str, Callable[[], list[Row]]] = {}

    def add(name: str, run: Callable) -> None:
        timers[name] = lambda: [_time_torch(name, case, run, sets, device, repeats)]

    if "triton" in serving("torch", case.op, device, case.dtype):
        add("unisono", _kernel(case))
    if "eager" in peers:
        add("torch eager", _plain(case))
        if case.op == "weighted_sum":
            add("torch eager cumsum", _cumsum(case))
    if "compile" in peers:
        torch.compiler.reset()
        functorch.donated_buffer = False  # the backward is timed on a graph that is kept
        add("torch.compile", torch.compile(_plain(case)))
    if "jax" in peers and serving("jax", case.op, device, case.dtype):
        timers["jax"] = lambda: _time_jax(case, sets, device, repeats)
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
