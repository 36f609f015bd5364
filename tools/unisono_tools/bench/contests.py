"""What bench.attention times: shapes as data, our operators and their peers, and how one of them is measured."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from unisono_torch.ops import mapped_attention, multiscale
from unisono_torch.ops.features import elu1

from unisono_tools.bench import recurrences
from unisono_tools.bench.contestants import serving
from unisono_tools.bench.measure import graphed, kernels_ms, median_ms, peak_bytes, throughput_ms
from unisono_tools.bench.workers import Turn, compile_at_once

SETS = 3
QUADRATIC = 8192  # tokens up to which softmax attention is made in float64
OURS, PLAIN, COMPILED, SDPA = "unisono", "plain", "torch.compile of plain", "causal SDPA (softmax, quadratic)"
JLA = "jax-linear-attention"
Function = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of one call. values: their width, where it is not the keys'. scales: of multi-scale attention; one is retention. tabled: it
    has a table of its own, with every peer; the others make the plot."""

    batch: int
    length: int
    heads: int
    width: int
    dtype: str = "bfloat16"
    tabled: bool = True
    scales: int = 0
    values: int = 0
    feature_map: str = "elu1"

    @property
    def V(self) -> int:
        return self.values or self.width

    @property
    def op(self) -> str:
        return "multiscale" if self.scales else "linear_attention"

    @property
    def name(self) -> str:
        kind = "one decay, " if self.scales == 1 else f"{self.scales} scales with gates, " if self.scales else ""
        kind += f"{self.feature_map}, " if self.feature_map != "elu1" else ""
        widths = f"K={self.width} V={self.values}" if self.values else f"K=V={self.width}"
        return f"B{self.batch} T{self.length} H{self.heads} {widths}, {kind}{self.dtype}"

    def array_bytes(self) -> tuple[int, int]:
        """Of q (or k), and of v (or o)."""
        tokens, size = self.batch * self.length * self.heads, torch.finfo(getattr(torch, self.dtype)).bits // 8
        return tokens * self.width * size, tokens * self.V * size

    def floor_bytes(self) -> tuple[int, int]:
        """Forward reads q, k, v and writes o; backward reads those of them that are inputs, and do, and writes three gradients."""
        keys, values = self.array_bytes()
        return 2 * keys + 2 * values, 4 * keys + 3 * values

    def held_bytes(self) -> int:
        """Inputs and outputs of both ways: q, k, v, do, o and three gradients."""
        keys, values = self.array_bytes()
        return 4 * keys + 4 * values


@dataclasses.dataclass
class Row:
    """forward and both ways in ms, device time; host_: with what a host takes to launch them; kernels_: the sum of kernels' times.
    Errors ‖a − exact‖ / ‖exact‖ of o and the worst gradient, of one head; bytes beyond the inputs. None: not measured."""

    contestant: str
    forward_ms: float
    both_ms: float
    error_o: float | None = None
    error_gradient: float | None = None
    peak_bytes: int | None = None
    host_forward_ms: float | None = None
    host_both_ms: float | None = None
    kernels_forward_ms: float | None = None
    kernels_both_ms: float | None = None


class Entry(NamedTuple):
    """run: of what it is differentiated by. inputs: those for a seed. exact: the same in float64, if that is made."""

    run: Function
    inputs: Callable[[int], tuple[Tensor, ...]]
    exact: Function | None


def names(case: Case, device: str) -> list[str]:
    """Of the contestants that there are here; ours is the first."""
    if not case.tabled:
        return [OURS, SDPA] if device == "cuda" else [OURS]
    found = [OURS, PLAIN]
    if device != "cuda":
        return found
    found += [COMPILED] * (not case.scales)
    if importlib.util.find_spec("fla"):
        found += fla(case)
    found += [SDPA] * (not case.scales and case.feature_map == "elu1")
    if importlib.util.find_spec("jla") and case.feature_map == "elu1":
        several = f", {case.scales} recurrences without normalisers and an eager sum"
        found.append(JLA + (several if case.scales > 1 else ", no normaliser"))
    return found


def fla(case: Case) -> dict[str, str]:
    """Operators of flash-linear-attention for a case, by the names they have here."""
    if case.feature_map == "taylor2":
        return {f"fla {name}": f"based.{name}" for name in ("parallel_based", "fused_chunk_based")}
    if case.scales:
        return {f"fla {name}": f"simple_gla.{name}" for name in ("chunk_simple_gla", "fused_chunk_simple_gla")} if case.scales == 1 else {}
    return {f"fla {name}": f"linear_attn.{name}_linear_attn" for name in ("chunk", "fused_chunk")}


def decays(scales: int, device: str) -> Tensor:
    """log λ [1, 1, S]: one that forgets nothing, and others four times as fast each; of one alone, 1/32."""
    values = [-1 / 32] if scales == 1 else [0.0, *(-(4.0 ** (i - scales)) for i in range(1, scales))]
    return torch.tensor(values, device=device)[None, None]


def entry(case: Case, name: str, device: str) -> Entry:
    def drawn(seed: int) -> tuple[Tensor, ...]:  # q, k, v
        made = torch.Generator(device).manual_seed(seed)
        shape = case.batch, case.length, case.heads
        raw = [torch.randn(*shape, n, generator=made, device=device) for n in (case.width, case.width, case.V)]
        if case.scales or name.startswith((JLA, *(() if case.feature_map == "taylor2" else ("fla",)))):
            raw[:2] = map(elu1, raw[:2])  # given features
        return tuple(a.to(getattr(torch, case.dtype)) for a in raw)

    decay = decays(case.scales, device) if case.scales else None
    if name.startswith("fla"):
        return Entry(_fla(case, name, decay), drawn, _exact(case, decay))
    if name == SDPA:
        return Entry(_sdpa, drawn, _sdpa if case.length <= QUADRATIC else None)
    how = PLAIN
    if name == OURS:
        widths = {"K": case.width, "V": case.V} | ({"scales": case.scales} if case.scales else {})
        settings = {} if case.scales else {"feature_map": case.feature_map, "one_dtype": True}
        how, *_ = serving("torch", case.op, device, case.dtype, widths, settings)
    if decay is None:
        run = _linear(how, case.feature_map)
        return Entry(torch.compile(run, dynamic=False) if name == COMPILED else run, drawn, _linear(PLAIN, case.feature_map))
    if case.scales == 1:  # fixed, and read as it is
        return Entry(_scales(how, decay), drawn, _scales(PLAIN, decay))

    def gated(seed: int) -> tuple[Tensor, ...]:
        return *drawn(seed), gates(case, device, seed), decay.clone()

    return Entry(_scales(how), gated, _scales(PLAIN))


def gates(case: Case, device: str, seed: int) -> Tensor:
    """[B, T, S, 1, 1], one for each token and scale."""
    made = torch.Generator(device).manual_seed(1000 + seed)
    return torch.rand(case.batch, case.length, case.scales, 1, 1, generator=made, device=device) + 0.1


def filled(value: float, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An input that is one value throughout: made once, since other inputs are no part of a call's time, either."""
    return torch.full(shape, value, dtype=dtype, device=device) if torch.compiler.is_compiling() else _kept(value, shape, dtype, device)


@functools.cache
def _kept(value: float, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, value, dtype=dtype, device=device)


def _linear(implementation: str, feature_map: str) -> Function:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (batch, _, heads, K), V = q.shape, v.shape[-1]
        rows = 1 + K + K**2 if feature_map == "taylor2" else K
        wide = torch.promote_types(q.dtype, torch.float32)
        S, z = (filled(0.0, (batch, heads, rows, *more), wide, q.device) for more in ((V,), ()))
        return mapped_attention.parallel(q, k, v, (S, z), None, None, feature_map, implementation=implementation)[0]

    return run


def _scales(implementation: str, fixed: Tensor | None = None) -> Function:
    """With gates and decays that are learned, or one decay that is not, without a gate."""

    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None, log_decay: Tensor | None = fixed) -> Tensor:
        assert log_decay is not None
        batch, _, heads, K = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        log_decay, count = log_decay.to(wide), log_decay.shape[-1]
        gate = filled(1.0, (1, 1, count, 1, 1), wide, q.device).expand(batch, q.shape[1], -1, -1, -1) if gate is None else gate
        S, z = (filled(0.0, (batch, count, heads, K, *more), wide, q.device) for more in ((v.shape[-1],), ()))
        return multiscale.parallel(q, k, v, q, k, log_decay, gate, (S, z), implementation=implementation)[0]

    return run


def _fla(case: Case, name: str, decay: Tensor | None) -> Function:
    compile_at_once()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        family, _, found = fla(case)[name].partition(".")
        op: Any = getattr(importlib.import_module(f"fla.ops.{family}"), found)
    if case.feature_map == "taylor2":
        return lambda q, k, v: op(q, k, v, use_norm=True)
    if decay is None:
        return lambda q, k, v: op(q, k, v, scale=1.0, normalize=True)[0]
    fixed = decay.flatten().expand(case.heads).contiguous()
    return lambda q, k, v: op(q, k, v, g_gamma=fixed, scale=1.0)[0]


def _exact(case: Case, decay: Tensor | None) -> Function:
    """What a peer computes of features, or of q and k where it makes its own."""
    if case.feature_map == "taylor2":
        return _linear(PLAIN, case.feature_map)
    return recurrences.normalised if decay is None else lambda q, k, v: recurrences.exact(q, k, v, float(decay))


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True).transpose(1, 2)


def both(run: Function, given: tuple[Tensor, ...], do: Tensor) -> list[Tensor]:
    """o and the gradient of each input."""
    leaves = [a.detach().requires_grad_() for a in given]
    o = run(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.to(o.dtype))]


def head(a: Tensor) -> Tensor:
    """The first row's first head of [B, T, H, ·]; the first row's gates; decays."""
    return a[:1, :, :1] if a.ndim == 4 else a[:1]


def errors(run: Function, exact: Function, given: tuple[Tensor, ...], do: Tensor) -> tuple[float, float]:
    """Of o and of the worst gradient. Heads do not mix, but gates and decays are one for all, whose gradients are those of one alone."""
    if len(given) > 3:
        given, do = tuple(head(a).contiguous() for a in given), head(do).contiguous()
    found = [head(a) for a in both(run, given, do)]
    true = both(exact, tuple(head(a).double() for a in given), head(do).double())
    first, *others = (float((a.double() - b).norm() / b.norm()) for a, b in zip(found, true, strict=True))
    return first, max(others)


def contest(case: Case, name: str, device: str, repeats: int, turn: Turn) -> Row:
    """One contestant, in a process of its own: compiles, waits for its turn, and is timed."""
    torch.set_float32_matmul_precision("highest")
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # which errors against float64 rule out
    it = entry(case, name, device)
    sets = [it.inputs(seed) for seed in range(SETS)] if not name.startswith(JLA) else []
    made = torch.Generator(device).manual_seed(77)
    shape = case.batch, case.length, case.heads, case.V
    gradients = [torch.randn(shape, generator=made, device=device).to(getattr(torch, case.dtype)) for _ in range(SETS)]
    if name.startswith(JLA):
        return _by_jax(case, name, device, repeats, gradients, turn)
    off = errors(it.run, it.exact, sets[0], gradients[0]) if it.exact else (None, None)

    def forward(given: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():
            return it.run(*given)

    calls: list[list[Callable[[], object]]] = [
        [lambda s=s: forward(s) for s in sets],
        [lambda s=s, do=do: both(it.run, s, do) for s, do in zip(sets, gradients, strict=True)],
    ]
    for call in (calls[0][0], calls[1][0]):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    turn()
    peak = peak_bytes(calls[1][0], device)
    host = alone = (None, None)
    if device == "cuda" and case.tabled and name == OURS:
        alone = tuple(kernels_ms(each, lambda _: torch.cuda.synchronize(), repeats) for each in calls)
    if device == "cuda" and not case.tabled:
        host = tuple(throughput_ms(each, lambda _: torch.cuda.synchronize(), repeats) for each in calls)
        calls = [graphed(each) for each in calls]
    times = [median_ms(each, device, repeats) for each in calls]
    return Row(name, times[0], times[1], *off, peak, *host, *alone)


def _by_jax(case: Case, name: str, device: str, repeats: int, gradients: list[Tensor], turn: Turn) -> Row:
    decay = float(decays(case.scales, device).flatten()[-1]) if case.scales else 0.0
    drawn = entry(dataclasses.replace(case, scales=min(case.scales, 1)), JLA, device).inputs
    sets = [(*drawn(seed), do) for seed, do in enumerate(gradients)]
    found, timed = recurrences.by_jax(sets, decay)
    true = both(lambda q, k, v: recurrences.exact(q, k, v, decay), tuple(head(a).double() for a in sets[0][:3]), head(sets[0][3]).double())
    first, *others = (float((head(a).double() - b).norm() / b.norm()) for a, b in zip(found, true, strict=True))
    turn()
    forward, whole = timed(repeats)
    if case.scales > 1:
        summed = recurrences.gated_sum([(*s, gates(case, device, seed)) for seed, s in enumerate(sets)], repeats)
        forward, whole = case.scales * forward + summed[0], case.scales * whole + summed[1]
    return Row(name, forward, whole, first, max(others))
