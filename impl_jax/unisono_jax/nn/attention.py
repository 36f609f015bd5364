"""Layers of attention: linear, over a window, softmax, and at several time scales."""

from __future__ import annotations

from typing import Literal, Unpack

import jax
from unisono_spec.contract import layer as described

from unisono_jax.layers import infinityformer, lat
from unisono_jax.layers.reading import Reading
from unisono_jax.nn.base import Layer, Options, State, drawn
from unisono_jax.ops import rotary
from unisono_jax.ops.elementwise import wide


class _Attention(Layer, lat.Attention):
    def _make(self, layer: described.Layer, kind: str, /, **options: Unpack[Options]) -> None:
        lat.Attention.__init__(self, drawn(layer, **options), layer.config, kind)  # pyright: ignore[reportArgumentType]
        self._begin(layer, **options)

    def _mix(self, x: jax.Array, state: State, read: Reading) -> tuple[jax.Array, State]:
        where, count = read.positions(state["position"], x)
        config, names = self.config, lat.STATES[self.kind]
        rotations = {self.width: rotary.cos_sin(where, self.width, config.rope_base, wide(x))} if config.positions == "rope" else {}
        y, after = lat.Attention.__call__(self, x, rotations, state["position"], tuple(state[name] for name in names), read)
        return y, {"position": count, **dict(zip(names, after, strict=True))}


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
        self._make(layer, "linear", **options)


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
        self._make(described.attention("window", d_model, n_heads, positions, rope_base, bias, window=window), "window", **options)


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
        self._make(described.attention("softmax", d_model, n_heads, positions, rope_base, bias), "softmax", **options)


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
        infinityformer.Mixer.__init__(self, drawn(layer, **options), layer.config)  # pyright: ignore[reportArgumentType]
        self._begin(layer, **options)

    def _mix(self, x: jax.Array, state: State, read: Reading) -> tuple[jax.Array, State]:
        config = self.config
        where, count = read.positions(state["position"], x)
        rotation = None if config.rope == "none" else rotary.cos_sin(where, config.head_width, config.rope_base, wide(x))
        due = (where + 1) % config.compress_every == 0 if config.compress_every else None
        y, (S, z) = infinityformer.Mixer.__call__(self, x, rotation, due, (state["S"], state["z"]), read)
        return y, {"position": count, "S": S, "z": z}
