"""Functions without memory, and the dtypes they compute in."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LAYER_NORM_EPS = 1e-5
SHRINK = 2.0**-40  # of rows that may be so large that float32 does not hold their squares; with ε shrunk alike a norm stays what it is
RMS_NORM_EPS = 1e-6
FAR = 100.0  # where GELU is its limit, x or 0, to the last digit: beyond, its slope times the cube of x is 0 times infinity

Arrays = TypeVar("Arrays", jax.Array, tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array])


def wide(*arrays: jax.Array) -> np.dtype:
    """The dtype of sums, norms and scores over `arrays`: float32, or float64 where one of them is."""
    return jnp.result_type(jnp.float32, *arrays)


def widened(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """All of them in that dtype."""
    return tuple(a.astype(wide(*arrays)) for a in arrays)


def masked(valid: jax.Array | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [..., …], zero where `valid` [...] is false, so that a NaN there reaches neither outputs nor gradients."""
    if valid is None:
        return arrays
    return tuple(jnp.where(valid.reshape(valid.shape + (1,) * (a.ndim - valid.ndim)), a, 0) for a in arrays)


def restarted(reset: jax.Array | None, state: Arrays) -> Arrays:
    """A state [B, …], or its parts, as the first token of `reset` [B, T] finds it: zeros where it is reset, and a NaN is forgotten."""
    if reset is None:
        return state
    several = isinstance(state, (tuple, list))
    parts = masked(~reset[:, 0], *(state if several else (state,)))
    return parts if several else parts[0]  # pyright: ignore[reportReturnType]


def dot(subscripts: str, *arrays: jax.Array) -> jax.Array:
    """einsum in the dtype of float32 or wider operands."""
    return jnp.einsum(subscripts, *arrays, precision=lax.Precision.HIGHEST)


def dot_precision(dtype: Any) -> lax.Precision | None:
    """HIGHEST from float32 up: the default on a GPU is TF32, whose 10-bit mantissa is not float32 to any reader of a tolerance."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype).itemsize >= 4 else None


@jax.custom_jvp
def sigmoid(x: jax.Array) -> jax.Array:
    """[...] → [...]: the logistic function σ."""
    return jax.nn.sigmoid(x)


@sigmoid.defjvp
def _sigmoid_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    y = sigmoid(x)
    # jax's own y·(1−y) has no digits left where y rounds to 1
    return y, dx * y * sigmoid(-x)


@jax.custom_jvp
def tanh(x: jax.Array) -> jax.Array:
    """[...] → [...]: tanh x, whose slope is 4 σ(2x) σ(−2x): jax's own 1 − y² has no digits left where y rounds to 1."""
    return jnp.tanh(x)


@tanh.defjvp
def _tanh_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return tanh(x), dx * (4 * sigmoid(2 * x) * sigmoid(-2 * x))


def gelu_tanh(x: jax.Array) -> jax.Array:
    """[...] → [...]: GELU in its tanh form (Hendrycks & Gimpel 2016, section 2), rounded once to the dtype of x."""
    y = x.astype(wide(x))
    near = jnp.clip(y, -FAR, FAR)
    # ½(1 + tanh u) is σ(2u), which keeps the digits of its tail and of its derivative, where XLA's tanh has rounded to ±1
    return (y * sigmoid(2 * np.sqrt(2 / np.pi).item() * (near + 0.044715 * near**3))).astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """[...] → [...]: GELU, exact: x Φ(x) (Hendrycks & Gimpel 2016, section 2), rounded once to the dtype of x."""
    return jax.nn.gelu(x.astype(wide(x)), approximate=False).astype(x.dtype)


def silu(x: jax.Array) -> jax.Array:
    """[...] → [...]: x σ(x), rounded once to the dtype of x."""
    y = x.astype(wide(x))
    return (y * sigmoid(y)).astype(x.dtype)


@jax.custom_jvp
def softplus(x: jax.Array) -> jax.Array:
    """[...] → [...]: log(1 + e^x) at every x, with no threshold, rounded once to the dtype of x."""
    return jax.nn.softplus(x.astype(wide(x))).astype(x.dtype)


@softplus.defjvp
def _softplus_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return softplus(x), dx * sigmoid(x)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float = RMS_NORM_EPS) -> jax.Array:
    """x [..., D] → [..., D]: RMSNorm, ε = 1e-6 unless told (Zhang & Sennrich 2019, eq 4), float32 or wider whatever the dtype of x;
    right up to entries of 10¹⁸, whose squares float32 holds, and its gradient up to 10¹², of which it holds the cubes."""
    x = x.astype(wide(x))
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * weight.astype(x.dtype)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., D] → [..., D]: LayerNorm, ε = 1e-5 (Ba et al. 2016, eq 3), float32 or wider whatever the dtype of x; right up to entries of
    10²⁹, whose squares float32 does not hold."""
    x = x.astype(wide(x))
    centred = (x - x.mean(-1, keepdims=True)) * SHRINK
    variance = jnp.square(centred).mean(-1, keepdims=True)
    # rsqrt's derivative is that of a cube, which float32 does not hold either
    return centred / jnp.sqrt(variance + LAYER_NORM_EPS * SHRINK**2) * weight.astype(x.dtype) + bias.astype(x.dtype)


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x [..., in], weight [out, in], bias [out] → [..., out], in the dtype of x; products are summed in float32 or wider."""
    # contracted as it lies: XLA transposes a CPU's weights anew for every single row
    axes = (((x.ndim - 1,), (1,)), ((), ()))
    y = lax.dot_general(x, weight.astype(x.dtype), axes, precision=dot_precision(x.dtype), preferred_element_type=wide(x))
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y.astype(x.dtype)


def binary_digits(n: jax.Array, digits: int, dtype: Any) -> jax.Array:
    """The last `digits` (at most 31) binary digits of non-negative integers, most significant first: [...] → [..., digits]."""
    shifts = jnp.arange(digits - 1, -1, -1, dtype=jnp.int32)
    return ((n[..., None].astype(jnp.int32) >> shifts) & 1).astype(dtype)
