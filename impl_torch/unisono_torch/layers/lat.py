"""LAT's layers: attention over heads by one of three ops, the gated short convolution of Based, and the block around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from unisono_spec.contract.lat import LATConfig

from unisono_torch.layers.basic import Conv, LayerNorm, Linear, RMSNorm, updated
from unisono_torch.layers.ffn import GELUFFN, SwiGLU
from unisono_torch.layers.reading import Mask, Reading, Rotation
from unisono_torch.ops import mapped_attention, short_conv, softmax_attention, window
from unisono_torch.ops.elementwise import silu

Rotations = dict[int, Rotation]  # RoPE by head width
STATES = {"linear": ("S", "z"), "conv": ("conv",), "window": ("k", "v"), "softmax": ("k", "v")}
OPS = {"linear": mapped_attention, "window": window, "softmax": softmax_attention}
States = tuple[Tensor, ...]


class Attention(nn.Module):
    """x [B, (T,) D] → the same shape: heads, and one of the ops mapped_attention, window and softmax_attention."""

    def __init__(self, config: LATConfig, kind: str) -> None:
        super().__init__()
        self.kind, self.heads, self.rope = kind, config.n_heads, config.positions == "rope"
        self.width = config.qk_width if kind == "linear" else config.head_width
        self.feature_map = config.feature_map
        d = config.d_model
        self.qkv = Linear(d, 2 * self.heads * self.width + d, config.bias)
        self.tau = nn.Parameter(torch.empty(1)) if kind == "linear" and config.feature_map == "learned" else None
        self.head_norm = RMSNorm(config.head_width) if kind == "linear" and config.head_norm else None
        self.out = Linear(d, d, config.bias)

    def to_heads(self, x: Tensor, rotations: Rotations) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., D] → q, k, v [..., H, ·], turned by their position: then float32 or wider, for linear attention without a kernel."""
        n = self.heads * self.width
        q, k, v = (a.unflatten(-1, (self.heads, -1)) for a in self.qkv(x).split((n, n, x.shape[-1]), -1))
        if self.rope:
            q, k, _, _ = rotations[self.width](q, k)
        return (q, k, v) if self.kind == "linear" else (q.to(x.dtype), k.to(x.dtype), v)

    def forward(self, x: Tensor, rotations: Rotations, before: Tensor, state: States, read: Reading) -> tuple[Tensor, States]:
        """x [B, D] or [B, T, D] → what it adds, the state after it. before: the count of tokens before x [B]."""
        given = state if self.kind == "linear" else (*state, before)
        more: dict[str, Any] = {"feature_map": self.feature_map, "tau": self.tau} if self.kind == "linear" else {}
        if self.kind == "softmax" and read.fresh:
            more["fresh"] = True
        o, after = read(OPS[self.kind], *self.to_heads(x, rotations), given, **more)
        o = o if self.head_norm is None else self.head_norm(o)
        return self.out(o.flatten(-2).to(x.dtype)), after[:2]


class GatedConv(nn.Module):
    """x [B, (T,) D] → the same shape: W_o (SiLU(a) ∘ conv(b)), [a, b] = W_in x."""

    def __init__(self, config: LATConfig) -> None:
        super().__init__()
        self.input = Linear(config.d_model, 2 * config.conv_inner, config.bias)
        self.conv = Conv(config.conv_inner, config.conv_width, config.bias)
        self.out = Linear(config.conv_inner, config.d_model, config.bias)

    def forward(self, x: Tensor, rotations: Rotations, before: Tensor, state: States, read: Reading) -> tuple[Tensor, States]:
        a, b = self.input(x).chunk(2, -1)
        y, after = read(short_conv, b, self.conv.weight, self.conv.bias, state[0])
        return self.out(silu(a) * y.to(x.dtype)), (after,)


class Block(nn.Module):
    """x [B, (T,) D] → the same shape: x ← x + mixer(norm(x)), x ← x + ffn(norm(x))."""

    def __init__(self, config: LATConfig, kind: str) -> None:
        super().__init__()
        norm = RMSNorm if config.norm == "rms" else LayerNorm
        network = SwiGLU if config.ffn == "swiglu" else GELUFFN
        d = config.d_model
        self.states = STATES[kind]
        self.mixer_norm = norm(d)
        self.mixer = GatedConv(config) if kind == "conv" else Attention(config, kind)
        self.ffn_norm = norm(d)
        self.ffn = network(d, config.ffn_mult * d, config.bias)

    def forward(
        self, x: Tensor, rotations: Rotations, before: Tensor, state: States, read: Reading, masks: tuple[Mask, ...]
    ) -> tuple[Tensor, States]:
        """x [B, D] or [B, T, D] → the same, the state after it. masks: dropout's, of the mixer and of the FFN."""
        update, after = self.mixer(self.mixer_norm(x).to(x.dtype), rotations, before, state, read)
        x = updated(x, update, masks[0])
        return updated(x, self.ffn(self.ffn_norm(x).to(x.dtype)), masks[1]), after
