"""What the attention operators allocate, counted without a GPU: at the peak of both ways at most so many times inputs and outputs."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from unisono_torch.kernels.linear_attention import operator as linear
from unisono_torch.kernels.multiscale import operator as scales

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = ((8, 4096, 16), (4, 2048, 8), (1, 16384, 8))  # B, T, H
WIDTHS = (4, 16, 19, 48, 77, 80, 128, 161, 256)


class Held(TorchDispatchMode):
    """Bytes that are held beyond those of what is given, now and at most."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = {a.untyped_storage()._cdata for a in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for a in tree_leaves(out):
            storage = a.untyped_storage() if isinstance(a, Tensor) else None
            if storage is None or storage._cdata in self.seen:
                continue
            self.seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, which: int, size: int) -> None:
        self.seen.discard(which)
        self.now -= size


@pytest.fixture(autouse=True)
def _launches_nothing(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda self, grid: lambda *given, **how: None)
    for module in (linear, scales):  # cuts are a GPU's
        monkeypatch.setattr(module, "interpreted", lambda: False)
        monkeypatch.setattr(module, "hopper", lambda device: True)


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ratio(shape: tuple[int, int, int], K: int, V: int, rows: tuple[int, ...], forward: Any, backward: Any) -> float:
    """Of bytes at the peak over those of q, k, v, o, the state before and after, and all their gradients. rows: of the state, by head."""
    batch, length, heads = shape
    q, k, v, do = (empty(batch, length, heads, n) for n in (K, K, V, V))
    S, z = (empty(batch, *rows[:-1], heads, rows[-1], *more, dtype=F32) for more in ((V,), ()))
    given = sum(a.nbytes for a in (q, k, v, do, S, z))
    with Held(q, k, v, do, S, z) as held:
        o, *_, denominator = forward(q, k, v, S, z)
        backward(do, torch.empty_like(S), torch.empty_like(z), o, denominator, q, k, v, S, z)
    return (given + held.most) / (2 * sum(a.nbytes for a in (q, k, v, do)) + 4 * (S.nbytes + z.nbytes))


def of_linear(shape: tuple[int, int, int], K: int, V: int, feature_map: str = "elu1") -> float:
    more: tuple[Any, ...] = (None, None, None, feature_map)
    rows = (1 + K + K**2 if feature_map == "taylor2" else K,)
    forward, backward = linear._forward._init_fn, linear._backward._init_fn
    return ratio(shape, K, V, rows, lambda *a: forward(*a, *more), lambda *a: backward(*a, *more))


def of_scales(shape: tuple[int, int, int], K: int, V: int, count: int) -> float:
    decay, weight = empty(1, 1, count, dtype=F32), empty(*shape[:2], count, 1, 1, dtype=F32)

    def more(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> tuple[Any, ...]:
        return q, k, v, None, None, decay, weight, S, z, None, None

    def backward(do: Tensor, dS: Tensor, dz: Tensor, o: Tensor, denominator: Tensor, *given: Tensor) -> None:
        scales._backward._init_fn(do, dS, dz, denominator, *more(*given), True, True)

    return ratio(shape, K, V, (count, K), lambda *given: scales._forward._init_fn(*more(*given)), backward)


def test_one_scale_or_none():
    for shape, (K, V) in itertools.product(SHAPES, itertools.product(WIDTHS, WIDTHS)):
        most = 1.3 if max(K, V) <= 128 else 1.6
        assert of_linear(shape, K, V) <= most, (shape, K, V)
        if min(K, V) >= 16 and max(K, V) <= 128:
            assert of_scales(shape, K, V, 1) <= most, (shape, K, V)


def test_taylor2():
    for shape, K, V in itertools.product(SHAPES, (4, 8, 16), (4, 21, 64, 80, 128, 161)):
        assert of_linear(shape, K, V, "taylor2") <= 1.6, (shape, K, V)


def test_several_scales():
    for shape, K, V, count in itertools.product(SHAPES, (24, 64, 108, 128), (24, 50, 64, 128), (2, 4, 5)):
        assert of_scales(shape, K, V, count) <= 1.6, (shape, K, V, count)
    assert of_scales((1, 19570, 8), 50, 108, 5) <= 1.6
