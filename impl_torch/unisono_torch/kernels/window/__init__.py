"""Softmax attention over a window of tokens, by blocks of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor
from unisono_spec.contract import InputError

from unisono_torch.kernels.window import operator as _operator  # noqa: F401  (registers the operator)


def window(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, count: Tensor, segment: Tensor | None = None) -> Tensor:
    """o [B, T, H, V] of ops/window.py, in v's dtype: q, k [B, T, H, K] and v [B, T, H, V] of one dtype, all tokens valid.

    keys [B, w, H, K], values [B, w, H, V], of which the last `count` [B] int32 are there. segment [B, T] int32: how many resets came up
    to a token. Differentiable in q, k, v, keys and values; a second time by plain operations.
    """
    (batch, length, heads, width), (w, depth) = q.shape, (keys.shape[1], v.shape[-1])
    shapes = {
        "k": (k, (batch, length, heads, width)), "v": (v, (batch, length, heads, depth)), "keys": (keys, (batch, w, heads, width)),
        "values": (values, (batch, w, heads, depth)), "count": (count, (batch,)), "segment": (segment, (batch, length)),
    }  # fmt: skip
    for name, (a, shape) in shapes.items():
        if a is not None and (a.shape != shape or a.device != q.device or a.is_floating_point() == (name in ("count", "segment"))):
            raise InputError(f"{name}: got {a.dtype} {tuple(a.shape)} on {a.device}; give {shape} on {q.device}")
    if any(a.dtype != v.dtype for a in (q, k)):
        raise InputError(f"q, k, v: got {q.dtype}, {k.dtype}, {v.dtype}; give one dtype")
    return torch.ops.unisono.window(q, k, v, keys, values, count, segment)[0]
