"""Calls of kernels past 2³¹ elements, 65,535 rows and 100,000 tokens, in bfloat16: what `every --large` runs.

Rows do not know of each other, nor heads, nor channels: the last of them, alone, by plain operations in float64, is the truth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from unisono_conformance import numerics
from unisono_torch.ops import (
    activated_conv,
    decayed_sum,
    diagonal_ssm,
    elementwise,
    gated_scan,
    mapped_attention,
    multiscale,
    rotary,
    weighted_sum,
    window,
)

ROUNDINGS = 7  # to the dtype, at most, on the way to a gradient
ROW, FEW, ALL = slice(-1, None), slice(-8, None), slice(None)
LAST = (ROW, ALL, FEW)  # of [B, T, D]
HEAD = (ROW, ALL, ROW)  # of [B, T, H, K]
Index = tuple[slice, ...]


@dataclasses.dataclass
class Far:
    """op(*leaves, *others, how) → y; `places` say where the last row and its last channels lie in y, in each leaf and in each other."""

    name: str
    length: int
    op: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    places: tuple[Index, ...]

    def error(self) -> float:
        """The worst ‖a − exact‖ / ‖exact‖ of y and of the gradients of Σ y by the leaves."""
        _, *where = self.places
        y, gradients = self._both(self.leaves, self.others, "triton")
        found = [a[i] for a, i in zip((y, *gradients), self.places, strict=False)]
        given = [a[i].double() if a.is_floating_point() else a[i] for a, i in zip((*self.leaves, *self.others), where, strict=True)]
        true, exact = self._both(tuple(given[: len(gradients)]), tuple(given[len(gradients) :]), "plain")
        return max(float((a.double() - e).norm() / e.norm()) for a, e in zip(found, (true, *exact), strict=True))

    def _both(self, leaves: tuple[Tensor, ...], others: tuple[Tensor, ...], how: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = tuple(a.detach().requires_grad_() for a in leaves)
        y = self.op(*leaves, *others, how)
        return y.detach(), torch.autograd.grad(y, leaves, torch.ones((), dtype=y.dtype, device=y.device).expand_as(y))


def _normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="cuda").normal_()


def _wide(*size: int) -> Tensor:
    return _normal(*size, dtype=torch.float32)


def attention(b: int, t: int, h: int, n: int) -> Iterator[Far]:
    """Heads of 64 are those of the kernels in Gluon, one decay a kernel of its own there."""

    def linear(q: Tensor, k: Tensor, v: Tensor, how: str) -> Tensor:
        state = torch.zeros(len(q), q.shape[2], n, n, device="cuda"), torch.zeros(len(q), q.shape[2], n, device="cuda")
        return mapped_attention.parallel(q, k, v, state, feature_map="elu1", implementation=how)[0]

    def scales(q: Tensor, k: Tensor, v: Tensor, how: str, decays: tuple[float, ...] = (0.0, -0.01)) -> Tensor:
        rows, m, heads = len(q), len(decays), q.shape[2]
        state = torch.zeros(rows, m, heads, n, n, device="cuda"), torch.zeros(rows, m, heads, n, device="cuda")
        decay, weight = torch.tensor([[decays]], device="cuda"), torch.ones(1, 1, m, 1, 1, device="cuda").expand(rows, t, -1, -1, -1)
        return multiscale.parallel(q, k, v, q, k, decay, weight, state, implementation=how)[0]

    def one(q: Tensor, k: Tensor, v: Tensor, how: str) -> Tensor:
        return scales(q, k, v, how, (-0.01,))

    def near(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, count: Tensor, how: str) -> Tensor:
        return window.parallel(q, k, v, (keys, values, count), implementation=how)[0]

    def turned(q: Tensor, k: Tensor, how: str) -> Tensor:
        where = torch.arange(t, dtype=torch.int32, device="cuda").expand(len(q), t)
        turns = rotary.cos_sin(where, n, dtype=torch.promote_types(q.dtype, torch.float32))
        return torch.add(*rotary.turned(q, k, *turns, "elu1", implementation=how)[:2])

    shape = f"B{b} T{t} H{h} K=V={n}"
    for name, op in (("linear_attention", linear), ("multiscale", scales), ("multiscale, one decay", one)):
        q, k, v = (_normal(b, t, h, n) for _ in range(3))
        if op is not linear:
            q, k = q.abs_(), k.abs_()
        yield Far(f"{name} ({shape})", t, op, (q, k, v), (), (HEAD,) * 4)
    q, k, v = (_normal(b, t, h, n) for _ in range(3))
    before = _wide(b, 50, h, n), _wide(b, 50, h, n), torch.full((b,), 60, dtype=torch.int32, device="cuda")
    yield Far(f"window ({shape})", t, near, (q, k, v), before, (HEAD,) * 6 + ((ROW,),))
    yield Far(f"rotary ({shape})", t, turned, (q, k), (), (HEAD,) * 3)


def scans(b: int, t: int, d: int) -> Iterator[Far]:
    """N = 16 of the selective scan, four pairs of S4D, four taps."""

    def selective(u: Tensor, dt: Tensor, z: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, s: Tensor, how: str) -> Tensor:
        return gated_scan.parallel(u, dt, A, B, C, D, s, z=z, implementation=how)[0]

    def diagonal(u: Tensor, dt: Tensor, A: Tensor, C: Tensor, D: Tensor, s: Tensor, how: str) -> Tensor:
        return diagonal_ssm.parallel(u, dt, A, C, D, s, implementation=how)[0]

    def conv(x: Tensor, weight: Tensor, bias: Tensor, s: Tensor, how: str) -> Tensor:
        return activated_conv.parallel(x, weight, bias, s, implementation=how)[0]

    shape, channels = f"B{b} T{t} D{d}", (FEW,)
    u, dt, z = _normal(b, t, d), _normal(b, t, d).sub_(3), _normal(b, t, d)
    others = _normal(b, t, 16), _normal(b, t, 16), -_wide(d, 16).exp(), _wide(d), _wide(b, d, 16)
    at = (LAST,) * 4 + ((ROW,), (ROW,), channels, channels, (ROW, FEW))
    yield Far(f"gated_scan ({shape})", t, selective, (u, dt, z), others, at)
    del dt, z, others
    A, step = torch.stack([-_wide(d, 4).exp(), 3 * _wide(d, 4)], -1), torch.rand(d, device="cuda") / 10
    others = step, A, _wide(d, 4, 2), _wide(d), _wide(b, d, 4, 2)
    yield Far(f"diagonal_ssm ({shape})", t, diagonal, (u,), others, (LAST, LAST, *(channels,) * 4, (ROW, FEW)))
    yield Far(
        f"activated_conv ({shape})", t, conv, (u,), (_wide(d, 1, 4), _wide(d), _wide(b, 3, d)), (LAST, LAST, channels, channels, LAST)
    )


def sums(b: int, t: int, d: int) -> Iterator[Far]:
    def decayed(x: Tensor, s: Tensor, how: str) -> Tensor:
        return decayed_sum.parallel(x, 0.5, s, implementation=how)[0]

    def weighted(x: Tensor, w: Tensor, s: Tensor, how: str) -> Tensor:
        return weighted_sum.parallel(x, w, s, implementation=how)[0]

    def gate(x: Tensor, how: str) -> Tensor:
        return elementwise.gated_gelu(x)

    x, shape = _normal(b, t, d), f"B{b} T{t} D{d}"
    yield Far(f"decayed_sum ({shape})", t, decayed, (x,), (_wide(b, d),), (LAST, LAST, (ROW, FEW)))
    yield Far(f"weighted_sum ({shape})", t, weighted, (x,), (_wide(b, t).mul_(0.01), _wide(b, d)), (LAST, LAST, (ROW,), (ROW, FEW)))
    yield Far(f"gated_gelu ({shape})", t, gate, (x,), (), ((ROW, FEW),) * 2)


def calls() -> Iterator[Far]:
    for heads in ((8, 263_000, 16, 64), (70_000, 5, 1, 64), (70_000, 5, 1, 16), (1, 131_072, 4, 64), (1, 131_072, 4, 128)):
        yield from attention(*heads)
    for shape in ((8, 90_000, 3_072), (70_000, 5, 24), (1, 131_072, 40)):
        yield from scans(*shape)
        yield from sums(*shape)


def check(only: list[str]) -> None:
    for call in calls():
        if not only or any(part in call.name for part in only):
            worst, budget = call.error(), numerics.formula("bfloat16", call.length, ROUNDINGS, gradient=True)
            print(f"{call.name}: {worst:.1e} of {budget:.1e}{'' if worst <= budget else '  WRONG'}", flush=True)
        call.leaves = call.others = ()
        torch.cuda.empty_cache()
