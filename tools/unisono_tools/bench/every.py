"""Runs every kernel, forward and backward, where it could go wrong unseen: on a GPU.

    compute-sanitizer --tool memcheck python -m unisono_tools.bench.every --alone    # and --tool racecheck: odd shapes, marks, small
    python -m unisono_tools.bench.every --large                                      # past 2³¹ elements, 65,535 rows and 100,000 tokens

Both are compared with plain operations in float64, large calls (large.py) in their last row and its last heads or channels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

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
    selective_scan,
    short_conv,
    weighted_sum,
    window,
)
from unisono_torch.ops.linear_cross_entropy import linear_cross_entropy

from unisono_tools.bench import large

Tensors = tuple[Tensor, ...]
Call = Callable[..., tuple[Tensor, Any]]


def _draw(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator("cuda").manual_seed(seed + sum(size)), device="cuda").to(dtype)


def small(dtype: torch.dtype) -> Iterator[tuple[str, Call, Tensors]]:
    """(name, op, what it is differentiated by) at widths and lengths that fill no block."""
    b, t, d, h = 2, 150, 37, 3
    reset = torch.rand(b, t, generator=torch.Generator("cuda").manual_seed(1), device="cuda") < 0.05
    valid = torch.rand(b, t, generator=torch.Generator("cuda").manual_seed(2), device="cuda") < 0.9
    marks: dict[str, Any] = {"reset": reset, "valid": valid}

    def x(*size: int, seed: int = 0) -> Tensor:
        return _draw(*size, dtype=dtype, seed=seed)

    yield "decayed_sum", lambda x, s, how: decayed_sum.parallel(x, 0.5, s, **marks, implementation=how), (x(b, t, d), _draw(b, d))
    yield (
        "weighted_sum",
        lambda x, w, s, how: weighted_sum.parallel(x, w, s, **marks, implementation=how),
        (x(b, t, d), _draw(b, t), _draw(b, d)),
    )
    for K, V in ((16, 16), (20, 33), (64, 64), (80, 128), (200, 256)):
        rows, state = (x(b, t, h, K), x(b, t, h, K, seed=1), x(b, t, h, V)), (_draw(b, h, K, V), _draw(b, h, K).abs())
        yield (
            f"linear_attention {K} × {V}",
            lambda q, k, v, S, z, how: mapped_attention.parallel(q, k, v, (S, z), **marks, feature_map="elu1", implementation=how),
            (*rows, *state),
        )
        if K <= 128 and V <= 128:
            q, k, v = rows
            state = _draw(b, 2, h, K, V), _draw(b, 2, h, K).abs()
            yield (
                f"multiscale {K} × {V}",
                lambda q, k, v, decay, c, S, z, how: multiscale.parallel(q, k, v, q, k, decay, c, (S, z), **marks, implementation=how),
                (q.abs(), k.abs(), v, -torch.rand(b, t, 2, device="cuda"), _draw(b, t, 2, 1, 1), *state),
            )
    if dtype == torch.bfloat16:  # kernels in Gluon take no marks; so long that time is cut
        for K, V in ((64, 64), (64, 128), (128, 64), (128, 128)):
            q, k, v = x(b, 1100, h, K), x(b, 1100, h, K, seed=1), x(b, 1100, h, V)
            state = _draw(b, h, K, V), _draw(b, h, K).abs()
            yield (
                f"linear_attention {K} × {V}, unmarked",
                lambda q, k, v, S, z, how: mapped_attention.parallel(q, k, v, (S, z), feature_map="elu1", implementation=how),
                (q, k, v, *state),
            )
            scaled = (a[:, None].expand(-1, 3, *a.shape[1:]).contiguous() for a in state)
            decay, weight = -torch.rand(1, 1, 3, device="cuda") / 8, _draw(b, 1100, 3, 1, 1)
            yield (
                f"multiscale {K} × {V}, unmarked",
                lambda q, k, v, decay, c, S, z, how: multiscale.parallel(q, k, v, q, k, decay, c, (S, z), implementation=how),
                (q.abs(), k.abs(), v, decay, weight, *scaled),
            )
            state = _draw(b, 1, h, K, V), _draw(b, 1, h, K).abs()
            yield (
                f"multiscale {K} × {V}, one decay, unmarked",
                lambda q, k, v, decay, c, S, z, how: multiscale.parallel(q, k, v, q, k, decay, c, (S, z), implementation=how),
                (q.abs(), k.abs(), v, decay[..., 1:2].clone(), weight[:, :, :1].clone(), *state),
            )
            if K == V:
                state = _draw(b, 3, h, K, V), _draw(b, 3, h, K).abs()
                yield (
                    f"turned multiscale {K}, unmarked",
                    lambda qkv, tau, decay, c, S, z, how: _turned_scales(qkv, tau, decay, c, (S, z), how),
                    (x(b, 1100, 3, h, K), torch.ones(1, device="cuda"), decay, weight, *state),
                )
    yield (
        "linear_attention taylor2",
        lambda q, k, v, S, z, how: mapped_attention.parallel(q, k, v, (S, z), **marks, feature_map="taylor2", implementation=how),
        (x(b, t, h, 11), x(b, t, h, 11, seed=1), x(b, t, h, 40), _draw(b, h, 133, 40), torch.zeros(b, h, 133, device="cuda")),
    )
    for K, numerator in ((20, False), (64, False), (64, True)):
        where = torch.arange(t, dtype=torch.int32, device="cuda").expand(b, t)
        yield (
            f"rotary {K}, {'in the numerator' if numerator else 'before φ'}",
            lambda q, k, tau, how, where=where, numerator=numerator: _turned(q, k, tau, where, numerator, how),
            (x(b, t, h, K), x(b, t, h, K, seed=1), torch.ones(1, device="cuda")),
        )
    for K, V, w in ((20, 33, 70), (64, 64, 64), (128, 128, 50)):
        count = torch.tensor([3, 2 * w], dtype=torch.int32, device="cuda")
        yield (
            f"window {K} × {V}",
            lambda q, k, v, keys, values, how, count=count: _windowed(q, k, v, keys, values, count, marks, how),
            (x(b, t, h, K), x(b, t, h, K, seed=1), x(b, t, h, V), _draw(b, w, h, K), _draw(b, w, h, V)),
        )
        yield (
            f"window {K} × {V}, unmarked",
            lambda q, k, v, keys, values, how, count=count: _windowed(q, k, v, keys, values, count, {}, how),
            (x(b, t, h, K), x(b, t, h, K, seed=1), x(b, t, h, V), _draw(b, w, h, K), _draw(b, w, h, V)),
        )
    for n in (16, 24):
        scan = x(b, t, d), x(b, t, d, seed=1) - 3, -_draw(d, n).exp(), x(b, t, n), x(b, t, n, seed=1), _draw(d), _draw(b, d, n)
        yield (
            f"selective_scan {n}",
            lambda u, dt, A, B, C, D, s, how: selective_scan.parallel(u, dt.float().exp().to(u.dtype), A, B, C, D, s, **marks,
                                                                      implementation=how),
            scan,
        )  # fmt: skip
        yield (
            f"gated_scan {n}",
            lambda u, dt, A, B, C, D, s, z, how: gated_scan.parallel(u, dt, A, B, C, D, s, **marks, z=z, implementation=how),
            (*scan, x(b, t, d, seed=2)),
        )
    for op in (short_conv, activated_conv):
        yield (
            op.__name__.rpartition(".")[2],
            lambda x, w, bias, s, how, op=op: op.parallel(x, w, bias, s, **marks, implementation=how),
            (x(b, t, d), _draw(d, 1, 4), _draw(d), _draw(b, 3, d)),
        )
    for op in (elementwise.gelu, elementwise.gelu_tanh, elementwise.gated_gelu):
        yield op.__name__, lambda x, how, op=op: (op(x), ()), (x(b, t, 2 * d),)
    targets = torch.randint(1100, (b, t), generator=torch.Generator("cuda").manual_seed(3), device="cuda")
    targets = torch.where(valid, targets, -1)
    yield (  # of so many rows and so narrow that the operator is worth it
        "linear_cross_entropy",
        lambda x, w, bias, how: (linear_cross_entropy(x, w, bias, targets)[0], ()),
        (x(b, t, 32), x(1100, 32, seed=1), x(1100)),
    )
    p = 20
    A = torch.stack([-_draw(d, p).exp(), 3 * _draw(d, p)], -1)
    dt = torch.rand(d, device="cuda") / 10
    yield (
        "diagonal_ssm",
        lambda u, A, C, D, s, how: diagonal_ssm.parallel(u, dt.to(D.dtype), A, C, D, s, **marks, implementation=how),
        (x(b, t, d), A, _draw(d, p, 2), _draw(d), _draw(b, d, p, 2)),
    )
    yield (  # so long that products serve it
        "diagonal_ssm, unmarked",
        lambda u, A, C, D, s, how: diagonal_ssm.parallel(u, dt.to(D.dtype), A, C, D, s, implementation=how),
        (x(b, 2100, d), A, _draw(d, p, 2), _draw(d), _draw(b, d, p, 2)),
    )


def _turned(q: Tensor, k: Tensor, tau: Tensor, where: Tensor, numerator: bool, how: str) -> tuple[Tensor, Tensors]:
    turns = rotary.cos_sin(where, q.shape[-1], dtype=torch.promote_types(q.dtype, torch.float32))
    first, *others = rotary.turned(q, k, *turns, "learned", tau, numerator, how)
    return first, tuple(others if numerator else others[:1])


def _turned_scales(qkv: Tensor, tau: Tensor, decay: Tensor, c: Tensor, state: tuple[Tensor, Tensor], how: str) -> tuple[Tensor, Any]:
    where = torch.arange(qkv.shape[1], dtype=torch.int32, device="cuda")[None]
    turn = rotary.Turn(*rotary.cos_sin(where, qkv.shape[-1], dtype=torch.promote_types(qkv.dtype, torch.float32)), how)
    return multiscale.turned(qkv, turn, "learned", tau, False, decay, c, state, implementation=how)


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, count: Tensor, marks: dict[str, Any], how: str
) -> tuple[Tensor, Tensors]:
    o, (keys, values, _) = window.parallel(q, k, v, (keys, values, count), **marks, implementation=how)
    return o, (keys, values)


def both(op: Call, given: Tensors, how: str) -> list[Tensor]:
    """Outputs, final states, gradients."""
    leaves = [a.detach().requires_grad_() for a in given]
    y, state = op(*leaves, how)
    outputs = [y, *(state if isinstance(state, tuple) else (state,))]
    found = torch.autograd.grad(outputs, leaves, [torch.ones_like(a) for a in outputs])
    return [a.detach() for a in (*outputs, *found)]


def _error(a: Tensor, exact: Tensor) -> float:
    return float((a.double() - exact.double()).norm() / exact.double().norm())


def check_small(dtypes: list[str], alone: bool, only: list[str]) -> None:
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    for dtype in (getattr(torch, name) for name in dtypes):
        name_of = str(dtype).removeprefix("torch.")
        for name, op, given in small(dtype):
            if only and not any(part in name for part in only):
                continue
            if alone:
                finite = all(bool(a.isfinite().all()) for a in both(op, given, "triton"))
                print(f"{name}, {name_of}: {'ran' if finite else 'NOT FINITE'}", flush=True)
                continue
            budget = numerics.formula(name_of, given[0].shape[1], large.ROUNDINGS, gradient=True)
            exact = both(op, tuple(a.double() for a in given), "plain")
            worst = max(_error(a, b) for a, b in zip(both(op, given, "triton"), exact, strict=True))
            print(f"{name}, {name_of}: {worst:.1e} of {budget:.1e}{'' if worst <= budget else '  WRONG'}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.every", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--alone", action="store_true", help="kernels without what they are compared with, which takes a sanitizer minutes")
    parser.add_argument("--only", nargs="*", default=[], metavar="PART", help="calls alone whose names have such a part")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    if options.large:
        large.check(options.only)
    else:
        check_small(options.dtypes, options.alone, options.only)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
