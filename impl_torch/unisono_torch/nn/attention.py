"""Layers of attention: linear, over a window, softmax, and at several time scales."""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor
from unisono_spec.contract import layer as described

from unisono_torch.layers import infinityformer, lat
from unisono_torch.layers.reading import Reading
from unisono_torch.nn.base import Layer, Options, State
from unisono_torch.ops import rotary
from unisono_torch.ops.elementwise import wide


class _Attention(Layer, lat.Attention):
    def _mix(self, x: Tensor, state: State, read: Reading) -> tuple[Tensor, State]:
        where, count = read.positions(state["position"], x)
        rotations = {}
        if self.rope:
            rotations = {self.width: read.rotation(where, self.width, self.rope_base, wide(x.dtype))}
        names = lat.STATES[self.kind]
        y, after = lat.Attention.forward(self, x, rotations, state["position"], tuple(state[name] for name in names), read)
        return y, {"position": count, **dict(zip(names, after, strict=True))}

    def _make(self, layer: described.Layer, kind: str, rope_base: float, /, **options: Unpack[Options]) -> None:
        with torch.device("meta"):
            lat.Attention.__init__(self, layer.config, kind)  # pyright: ignore[reportArgumentType]
        self.rope_base = rope_base
        if self.rope:
            rotary.prepare(self.width, rope_base)
        self._begin(layer, **options)


class LinearAttention(_Attention):
    """x [B, T, D] → [B, T, D]: normalised linear attention, oₜ = φ(qₜ)ᵀ Sₜ / (φ(qₜ)ᵀ zₜ + ε) (Katharopoulos et al. 2020, eqs 18–20;
    docs/architectures/lat.md).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        feature_map: Literal["elu1", "relu", "taylor2", "learned"] = "elu1",
        qk_width: int | None = None,
        positions: described.Positions = "none",
        rope_base: float = 10000.0,
        bias: bool = True,
        **options: Unpack[Options],
    ) -> None:
        """qk_width: K of each head, D / n_heads unless told; at most 16 for taylor2. State: S [B, H, Φ, V], z [B, H, Φ], position."""
        layer = described.attention("linear", d_model, n_heads, positions, rope_base, bias, feature_map=feature_map, qk_width=qk_width)
        self._make(layer, "linear", rope_base, **options)


class SlidingWindowAttention(_Attention):
    """x [B, T, D] → [B, T, D]: softmax attention over the last `window` tokens, each token's own included (Based: Arora et al. 2024)."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        window: int = 64,
        positions: described.Positions = "none",
        rope_base: float = 10000.0,
        bias: bool = True,
        **options: Unpack[Options],
    ) -> None:
        """State: k and v [B, window, H, D / H], the newest last, and position."""
        layer = described.attention("window", d_model, n_heads, positions, rope_base, bias, window=window)
        self._make(layer, "window", rope_base, **options)


class SoftmaxAttention(_Attention):
    """x [B, T, D] → [B, T, D]: causal softmax attention (Vaswani et al. 2017, eq 1), the quadratic baseline; `init_state` needs a
    capacity for its cache.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        positions: described.Positions = "none",
        rope_base: float = 10000.0,
        bias: bool = True,
        **options: Unpack[Options],
    ) -> None:
        """State: k and v [B, capacity, H, D / H] by position, and position."""
        layer = described.attention("softmax", d_model, n_heads, positions, rope_base, bias)
        self._make(layer, "softmax", rope_base, **options)


class MultiScaleAttention(Layer, infinityformer.Mixer):
    """x [B, T, D] → [B, T, D]: linear attention read from decayed memories beside an undecayed path, mixed by a gate
    (docs/architectures/infinityformer.md).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_scales: int = 3,
        feature_map: Literal["elu1", "relu", "learned"] = "elu1",
        decay: Literal["learned", "data"] = "learned",
        gate: Literal["scalar", "vector"] = "scalar",
        rope: Literal["before", "numerator", "none"] = "before",
        rope_base: float = 10000.0,
        compress_every: int = 0,
        compress_rank: int = 0,
        **options: Unpack[Options],
    ) -> None:
        """n_scales: S memories. State: S [B, S+1, H, K, V], z [B, S+1, H, K] with K = V = D / H, and position."""
        fields = {"n_scales": n_scales, "feature_map": feature_map, "decay": decay, "gate": gate, "rope": rope, "rope_base": rope_base}
        layer = described.multiscale(d_model, n_heads, **fields, compress_every=compress_every, compress_rank=compress_rank)
        with torch.device("meta"):
            infinityformer.Mixer.__init__(self, layer.config)  # pyright: ignore[reportArgumentType]
        if rope != "none":
            rotary.prepare(self.config.head_width, rope_base)
        self._begin(layer, **options)

    def _mix(self, x: Tensor, state: State, read: Reading) -> tuple[Tensor, State]:
        config = self.config
        where, count = read.positions(state["position"], x)
        rotation = None if config.rope == "none" else read.rotation(where, config.head_width, config.rope_base, wide(x.dtype))
        due = (where + 1) % config.compress_every == 0 if config.compress_every else None
        y, (S, z) = infinityformer.Mixer.forward(self, x, rotation, due, (state["S"], state["z"]), read)
        return y, {"position": count, "S": S, "z": z}
