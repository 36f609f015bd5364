"""Rotary position embedding (Su et al. 2021, eq 34), half-split: component i turns with component i + K/2.

A position is read as four digits in base 256. Each digit's turn is looked up in a table that float64 made, and the four turns
are multiplied as complex numbers: exact to a few roundings at every int32, where a float32 angle p·f is wrong by 1e-2 at 200,000.

Shapes: x, q, k [..., H, K], position [...] int32, cos and sin [..., K/2].
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unisono_torch.ops.dispatch import use_triton
from unisono_torch.ops.elementwise import wide
from unisono_torch.ops.features import feature_map as phi
from unisono_torch.ops.transforms import transformed

_BITS, _DIGITS = 8, 4
_TWO_PI = np.longdouble("6.283185307179586476925286766559005768")  # 2π: angles of many turns lose digits before cos
_tables: dict[tuple[int, float], np.ndarray] = {}  # NumPy's, so that no compiler or device context ever owns them
_on_gpus: dict[tuple[int, float, torch.device, torch.dtype], Tensor] = {}  # copies, for which a step of a graph has no time


def prepare(width: int, base: float = 10000.0) -> np.ndarray:
    """cos and sin of every digit's angle [2, 4, 256, K/2], made once for each width and base."""
    if (width, base) not in _tables:
        frequency = base ** (-2.0 * np.arange(width // 2) / width)  # [K/2]
        values = np.arange(2.0**_BITS, dtype=np.longdouble) * 2.0 ** (_BITS * np.arange(_DIGITS)[:, None])  # [4, 256]
        angle = np.mod(values[..., None] * frequency, _TWO_PI)
        _tables[width, base] = np.stack([np.cos(angle), np.sin(angle)]).astype(np.float64)
    return _tables[width, base]


def cos_sin(position: Tensor, width: int, base: float = 10000.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """position [...] → cos and sin of its angles [..., K/2] in `dtype`."""
    table = _table(position.device, width, base, dtype)
    cos, sin = table[:, 0][:, torch.bitwise_and(position.long(), 255)]
    for place in range(1, _DIGITS):
        digit = torch.bitwise_and(torch.bitwise_right_shift(position.long(), _BITS * place), 255)
        c, s = table[:, place][:, digit]
        cos, sin = cos * c - sin * s, cos * s + sin * c
    return cos, sin


def _table(device: torch.device, width: int, base: float, dtype: torch.dtype) -> Tensor:
    if device.type != "cuda" or torch.compiler.is_compiling() or transformed():
        return torch.from_numpy(prepare(width, base)).to(device, dtype)
    key = width, base, device, dtype
    if key not in _on_gpus:
        with torch.inference_mode(False):
            _on_gpus[key] = torch.from_numpy(prepare(width, base)).to(device, dtype)
    return _on_gpus[key]


def rotate_by(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., H, K] → [..., H, K]: turn each head of x; lengths stay as they are."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def rotate(x: Tensor, position: Tensor, base: float = 10000.0) -> Tensor:
    """x [..., H, K] → [..., H, K]: turn each head of x by the angles of its position; float32 or wider."""
    dtype = wide(x.dtype)
    return rotate_by(x.to(dtype), *cos_sin(position, x.shape[-1], base, dtype))


def turned(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    feature_map: str = "none",
    tau: Tensor | None = None,
    numerator: bool = False,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k, turned and then mapped by φ (features.py), as attention takes them: q, k, and those of its normaliser, the same arrays.

    numerator: φ(q) and φ(k), turned; the normaliser's, which are not. float32 or wider; a kernel's, of [B, T, H, K], in q's dtype.
    """
    if use_triton(implementation, "rotary", q.device, q.dtype, {"K": q.shape[-1]}, feature_map=feature_map):
        from unisono_torch.kernels.rotary import turned as kernel

        tau = tau if feature_map == "learned" else None  # a kernel leaves the gradient of others unwritten
        return kernel(q, k, cos, sin, feature_map, tau, numerator)

    def mapped(x: Tensor) -> Tensor:
        return x if feature_map == "none" else phi(feature_map, x, tau)

    q, k = (a.to(wide(a.dtype)) for a in (q, k))
    if not numerator:
        q, k = (mapped(rotate_by(a, cos, sin)) for a in (q, k))
        return q, k, q, k
    q, k = mapped(q), mapped(k)
    return rotate_by(q, cos, sin), rotate_by(k, cos, sin), q, k


class Turn:
    """RoPE of heads at some positions: cos and sin [..., K/2] of their angles, and which implementation of `turned` takes them."""

    def __init__(self, cos: Tensor, sin: Tensor, implementation: str = "auto") -> None:
        self.cos, self.sin, self.implementation = cos, sin, implementation

    def __call__(
        self, q: Tensor, k: Tensor, feature_map: str = "none", tau: Tensor | None = None, numerator: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return turned(q, k, self.cos, self.sin, feature_map, tau, numerator, self.implementation)
