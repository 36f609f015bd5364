"""LAT's layers: attention over heads by one of three ops, the gated short convolution of Based, and the block around them."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from unisono_spec.contract.lat import LATConfig

from unisono_jax.layers.ffn import GELUFFN, SwiGLU
from unisono_jax.layers.leaves import Arrays, Conv, Linear, norm, sub, updated
from unisono_jax.layers.reading import Mask, Reading
from unisono_jax.ops import linear_attention, rotary, short_conv, softmax_attention, window
from unisono_jax.ops.elementwise import silu, wide
from unisono_jax.ops.features import feature_map

OPS = {"linear": linear_attention, "window": window, "softmax": softmax_attention}
STATES = {"linear": ("S", "z"), "window": ("k", "v"), "softmax": ("k", "v"), "conv": ("conv",)}
States = tuple[jax.Array, ...]
Rotations = Mapping[int, rotary.CosSin]  # by head width; empty without RoPE


def rotated_widths(config: LATConfig) -> set[int]:
    """The head widths that RoPE turns."""
    if config.positions != "rope":
        return set()
    return {config.qk_width if kind == "linear" else config.head_width for kind in config.kinds if kind != "conv"}


class Attention(nnx.Module):
    """x [B, (T,) D] → the same shape: heads, and one of the ops linear_attention, window and softmax_attention."""

    def __init__(self, params: Arrays, config: LATConfig, kind: str) -> None:
        self.config, self.kind = config, kind
        self.width = config.qk_width if kind == "linear" else config.head_width
        self.qkv, self.out = Linear(sub(params, "qkv")), Linear(sub(params, "out"))
        if "tau" in params:
            self.tau = nnx.Param(params["tau"])
        self.head_norm = nnx.data(norm(head) if (head := sub(params, "head_norm")) else None)

    def to_heads(self, x: jax.Array, rotations: Rotations, valid: Mask) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [..., D] → q, k, v [..., H, ·], turned by their position; φ(q), φ(k) for linear attention, φ(0) where not valid."""
        n = self.config.n_heads * self.width
        qkv = jnp.split(self.qkv(x, x.dtype), [n, 2 * n], -1)
        heads = self.config.n_heads
        q, k, v = (a.reshape(*x.shape[:-1], heads, a.shape[-1] // heads) for a in qkv)
        if rotations:
            q, k = rotary.rotate_by(q, rotations[self.width]), rotary.rotate_by(k, rotations[self.width])
        if self.kind == "linear":
            tau = self.tau[...] if self.config.feature_map == "learned" else None
            q, k = (feature_map(self.config.feature_map, a.astype(wide(a)), tau, valid) for a in (q, k))
        return q, k, v

    def __call__(self, x: jax.Array, rotations: Rotations, before: jax.Array, state: States, read: Reading) -> tuple[jax.Array, States]:
        """x [B, D] or [B, T, D] → what it adds, the state after it. before [B]: how many tokens the sequences held."""
        given = state if self.kind == "linear" else (*state, before)
        o, after = read(OPS[self.kind], *self.to_heads(x, rotations, read.marks.valid), given)
        o = o if self.head_norm is None else self.head_norm(o)
        return self.out(o.reshape(x.shape).astype(x.dtype), x.dtype), after[:2]


class GatedConv(nnx.Module):
    """x [B, (T,) D] → the same shape: W_o (SiLU(a) ∘ conv(b)), [a, b] = W_in x."""

    def __init__(self, params: Arrays) -> None:
        self.input, self.conv, self.out = Linear(sub(params, "input")), Conv(sub(params, "conv")), Linear(sub(params, "out"))

    def __call__(self, x: jax.Array, rotations: Rotations, before: jax.Array, state: States, read: Reading) -> tuple[jax.Array, States]:
        a, b = jnp.split(self.input(x, x.dtype), 2, -1)
        y, after = read(short_conv, b, self.conv.weight[...], None if self.conv.bias is None else self.conv.bias[...], state[0])
        gated = silu(a.astype(y.dtype)) * y.astype(x.dtype).astype(y.dtype)
        return self.out(gated.astype(x.dtype), x.dtype), (after,)


class Block(nnx.Module):
    """x [B, (T,) D] → the same shape: x ← x + mixer(norm(x)), x ← x + ffn(norm(x))."""

    def __init__(self, params: Arrays, config: LATConfig, kind: str) -> None:
        mixer = sub(params, "mixer")
        self.mixer_norm, self.ffn_norm = norm(sub(params, "mixer_norm")), norm(sub(params, "ffn_norm"))
        self.mixer = GatedConv(mixer) if kind == "conv" else Attention(mixer, config, kind)
        self.ffn = (SwiGLU if config.ffn == "swiglu" else GELUFFN)(sub(params, "ffn"))

    def __call__(
        self, x: jax.Array, rotations: Rotations, before: jax.Array, state: States, read: Reading, masks: tuple[Mask, ...]
    ) -> tuple[jax.Array, States]:
        """x [B, D] or [B, T, D] → the same, the state after it. masks: what dropout multiplies the updates of mixer and FFN by."""
        update, after = self.mixer(self.mixer_norm(x).astype(x.dtype), rotations, before, state, read)
        x = updated(x, update, masks[0])
        return updated(x, self.ffn(self.ffn_norm(x), x.dtype), masks[1]), after
