"""Heads whose widths hopper.py does not serve, copied into such as it does, some rows or heads at a time.

What is filled in has φ = 0 and no slope, or is a value 0: it adds nothing, and nothing of it comes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unisono_torch.kernels.linear_attention import table
from unisono_torch.kernels.rows import division

FILLED = {"elu1": -math.inf, "relu": 0.0, "none": 0.0}  # of q and k, by feature map
QUERIES = {"q", "k", "dq", "dk"}


def wide(n: int) -> int:
    """The least width from n on that hopper.py serves."""
    return max(table.LEAST + table.COPIED, -(-n // table.COPIED) * table.COPIED)


def served(q: Tensor, v: Tensor, feature_map: str, marks: bool) -> bool:
    """Whether a call's widths are worth it: those that are no multiples of 8, but not where both are narrow."""
    K, V = q.shape[-1], v.shape[-1]
    if marks or q.dtype != torch.bfloat16 or feature_map not in FILLED:
        return False
    return min(K, V) >= table.NARROWEST and table.LEAST < max(K, V) <= 256 and (K % table.COPIED > 0 or V % table.COPIED > 0)


def parts(q: Tensor, v: Tensor) -> float:
    """A part is to be at most one in so many."""
    (batch, length, heads, K), V = q.shape, v.shape[-1]
    if batch * length * heads * (K + V) < table.LARGE:
        return 1
    # on the way back four of K numbers are copied and three of V, of four each that inputs and outputs of both ways have
    return (wide(K) + 0.75 * wide(V)) / (K + V) / table.COPIES[max(K, V) > 128]


def _filled(a: Tensor, n: int, value: float) -> Tensor:
    """a with n channels, where copies of 16 bytes can begin."""
    if a.shape[-1] < n:
        return F.pad(a, (0, n - a.shape[-1]), value=value)
    return a if a.data_ptr() % 16 == 0 and all(step % table.COPIED == 0 for step in a.stride()[:3]) else a.contiguous()


def launch(
    way: str, moved: dict[str, Tensor], feature_map: str, tensors: dict[str, Any], delta: Tensor | None, serve: Callable[..., None]
) -> None:
    """`serve`, which is operator's for a Hopper GPU, on parts; outputs into those of `tensors`. delta: do·o, on the way back."""
    q, v = moved["q"], moved["v"]
    K, V = wide(q.shape[-1]), wide(v.shape[-1])
    more = K - q.shape[-1], V - v.shape[-1]
    outputs = ("o", "denominator") if way == "forward" else ("dq", "dk", "dv")
    states = {"S": 2, "z": 1} | ({} if delta is None else {"dS": 2, "dz": 1})
    padded = {n: F.pad(tensors[n], (*(0, more[1]) * (axes - 1), 0, more[0])) for n, axes in states.items()}
    padded |= {"S_out": torch.empty_like(padded["S"]), "z_out": torch.empty_like(padded["z"])}
    for part in division(q.shape[0], q.shape[2], parts(q, v)):
        copies = {
            n: _filled(part.of(a, 0, 2), K if n in QUERIES else V, FILLED[feature_map] if n in QUERIES else 0.0) for n, a in moved.items()
        }
        given = dict.fromkeys(("tau", "reset", "valid")) | {n: part.of(a, 0, 1) for n, a in padded.items()}
        if delta is not None:
            given |= {"delta": part.of(delta, 0, 2).contiguous(), "denominator": part.of(tensors["denominator"], 0, 2).contiguous()}
        made = {}
        for name in outputs:
            like = part.of(tensors[name], 0, 2)
            wider = () if name == "denominator" else (K if name in QUERIES else V,)
            made[name] = like.new_empty((*like.shape[:3], *wider))
        serve(way, copies, feature_map, given | made)
        del copies
        for name, a in made.items():
            like = part.of(tensors[name], 0, 2)
            like.copy_(a[..., : like.shape[-1]])
        del made, given  # before the next part's are made
    tensors["S_out"].copy_(padded["S_out"][..., : q.shape[-1], : v.shape[-1]])
    tensors["z_out"].copy_(padded["z_out"][..., : q.shape[-1]])
