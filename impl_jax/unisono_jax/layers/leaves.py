"""Modules that hold arrays, in the contract's layout: `weight` is [out, in]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from unisono_jax.ops.elementwise import RMS_NORM_EPS, layer_norm, linear, rms_norm, wide

Arrays = Mapping[str, jax.Array]


def sub(params: Arrays, prefix: str) -> dict[str, jax.Array]:
    """The parameters below `prefix.`, with that prefix removed."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in params.items() if name.startswith(start)}


class Buffer(nnx.Variable):
    """What is saved with the parameters and never trained by a gradient."""


def _param(params: Arrays, name: str) -> nnx.Param | None:
    return nnx.Param(params[name]) if name in params else None


class Linear(nnx.Module):
    """x [..., in] → [..., out]: y = x Wᵀ + b. Without a bias in `params` there is none; a tied head has no weight of its own and passes
    it in.
    """

    def __init__(self, params: Arrays) -> None:
        self.weight, self.bias = nnx.data(_param(params, "weight")), nnx.data(_param(params, "bias"))

    def __call__(self, x: jax.Array, dtype: Any, weight: jax.Array | None = None) -> jax.Array:
        """x [..., in] → [..., out], computed in `dtype`."""
        own = self.weight if weight is None else None
        w = weight if own is None else own[...]
        assert w is not None
        return linear(x.astype(dtype), w, None if self.bias is None else self.bias[...])


class LayerNorm(nnx.Module):
    """[..., D] → [..., D], over the last axis; float32 or wider out."""

    def __init__(self, params: Arrays) -> None:
        self.weight, self.bias = nnx.Param(params["weight"]), nnx.Param(params["bias"])

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.weight[...], self.bias[...])


class RMSNorm(nnx.Module):
    """[..., D] → [..., D], over the last axis; float32 or wider out."""

    def __init__(self, params: Arrays, eps: float = RMS_NORM_EPS) -> None:
        self.weight, self.eps = nnx.Param(params["weight"]), eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps)


def norm(params: Arrays) -> LayerNorm | RMSNorm:
    """LayerNorm has a bias, RMSNorm none."""
    return LayerNorm(params) if "bias" in params else RMSNorm(params)


class Conv(nnx.Module):
    """The weight [channels, 1, width] and bias [channels] of ops/short_conv.py."""

    def __init__(self, params: Arrays) -> None:
        self.weight, self.bias = nnx.Param(params["weight"]), nnx.data(_param(params, "bias"))


class Embedding(nnx.Module):
    """ids [...] → their rows [..., D]."""

    def __init__(self, params: Arrays) -> None:
        self.weight = nnx.Param(params["weight"])

    def __call__(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """ids [...] → [..., D]."""
        return self.weight[...][ids].astype(dtype)


def updated(x: jax.Array, update: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x [..., D] → [..., D]: x + update, rounded once. mask: what dropout multiplies the update by."""
    dtype = wide(x)
    update = update.astype(dtype)
    return (x.astype(dtype) + (update if mask is None else update * mask.astype(dtype))).astype(x.dtype)
