"""InfinityFormer's mixer around its op: heads, decays, and the weights that gate and mix the scales; and the block around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from unisono_spec.contract.infinityformer import InfinityFormerConfig

from unisono_torch.layers.basic import LayerNorm, Linear, updated
from unisono_torch.layers.ffn import GatedGELU
from unisono_torch.layers.reading import Mask, Reading, Rotation
from unisono_torch.ops import multiscale
from unisono_torch.ops.elementwise import linear, log_sigmoid, sigmoid, wide
from unisono_torch.ops.features import feature_map
from unisono_torch.ops.fold import masked

State = tuple[Tensor, Tensor]


class Decay(nn.Module):
    """h [B, (T,) D] → log λ of the S memories [B, (T,) S]: log σ(a), or log σ(w·h + a) of each token. Always finite."""

    def __init__(self, width: int, scales: int, data: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(scales, width)) if data else None
        self.bias = nn.Parameter(torch.empty(scales))

    def forward(self, h: Tensor) -> Tensor:
        """h [..., D] → [..., S], or [1, …, S] where all tokens have the same."""
        dtype = wide(h.dtype)
        if self.weight is not None:
            return log_sigmoid(linear(h.to(dtype), self.weight, self.bias))
        return log_sigmoid(self.bias.to(dtype)).reshape(*(1,) * (h.ndim - 1), -1)


class Mixer(nn.Module):
    """h [B, (T,) D] → the same shape: linear attention at S + 1 time scales."""

    def __init__(self, config: InfinityFormerConfig) -> None:
        super().__init__()
        d = config.d_model
        self.config = config
        self.qkv = Linear(d, 3 * d)
        self.tau = nn.Parameter(torch.empty(1)) if config.feature_map == "learned" else None
        self.decay = Decay(d, config.n_scales, config.decay == "data")
        self.mix = nn.Parameter(torch.empty(config.n_scales))
        self.gate = Linear(d, d if config.gate == "vector" else 1)
        self.out = Linear(d, d)

    def shares(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h [..., D] → log_decay, weight, as ops/multiscale.py takes them."""
        config, dtype, heads = self.config, wide(h.dtype), (self.config.n_heads, self.config.head_width)
        memories = self.decay(h)
        log_decay = torch.cat([torch.zeros_like(memories[..., :1]), memories], -1)  # the context path does not forget
        logit = self.gate(h.to(dtype)).unflatten(-1, heads if config.gate == "vector" else (1, 1))[..., None, :, :]
        mix = self.mix.to(dtype).softmax(-1)[:, None, None]
        weight = torch.cat([sigmoid(logit), sigmoid(-logit) * mix], -3)  # [..., S+1, H or 1, V or 1]; 1 − g keeps its digits
        return log_decay, weight

    def mapped(self, qkv: Tensor, rotation: Rotation | None, valid: Mask) -> tuple[Tensor, ...]:
        """qkv [..., 3, H, K] → q, k, v, q_norm, k_norm, as ops/multiscale.py takes them: those of 0 where a token is not valid."""
        (qkv,) = masked(valid, qkv)
        config = self.config
        q, k, v = qkv.unbind(-3)
        if rotation is not None:
            q, k, q_norm, k_norm = rotation(q, k, config.feature_map, self.tau, config.rope == "numerator")
            return q, k, v, q_norm, k_norm
        q, k = (feature_map(config.feature_map, a.to(wide(a.dtype)), self.tau) for a in (q, k))
        return q, k, v, q, k

    def forward(self, h: Tensor, rotation: Rotation | None, due: Mask, state: State, read: Reading) -> tuple[Tensor, State]:
        """h [B, D] or [B, T, D] → what it adds, the state after it. due [B] or [B, T]: tokens after which S is compressed."""
        config = self.config
        qkv, shares = self.qkv(h).unflatten(-1, (3, config.n_heads, config.head_width)), self.shares(h)
        if due is not None:  # sequential whatever the form: layer by layer instead of token by token
            op = multiscale.step if read.one_token else multiscale.recurrent
            o, after = op(*self.mapped(qkv, rotation, read.marks.valid), *shares, state, *read.marks, due, config.compress_rank)
        elif rotation is None or read.one_token:
            o, after = read(multiscale, *self.mapped(qkv, rotation, read.marks.valid), *shares, state)
        else:
            how = config.feature_map, self.tau, config.rope == "numerator"
            more: dict[str, Any] = {"chunk_size": read.chunk_size, "implementation": read.implementation, "still": True}
            o, after = multiscale.turned(qkv, rotation, *how, *shares, state, *read.marks, **more)
        return self.out(o.flatten(-2).to(h.dtype)), after


class Block(nn.Module):
    """x [B, (T,) D] → the same shape: x ← x + mixer(LN(x)), x ← x + FFN(LN(x))."""

    def __init__(self, config: InfinityFormerConfig) -> None:
        super().__init__()
        d = config.d_model
        self.mixer_norm = LayerNorm(d)
        self.mixer = Mixer(config)
        self.ffn_norm = LayerNorm(d)
        self.ffn = GatedGELU(d, config.d_ffn)

    def forward(
        self, x: Tensor, rotation: Rotation | None, due: Mask, state: State, read: Reading, masks: tuple[Mask, ...]
    ) -> tuple[Tensor, State]:
        """x [B, D] or [B, T, D] → the same, the state after it. masks: dropout's, of the mixer and of the FFN."""
        update, after = self.mixer(self.mixer_norm(x).to(x.dtype), rotation, due, state, read)
        x = updated(x, update, masks[0])
        return updated(x, self.ffn(self.ffn_norm(x).to(x.dtype)), masks[1]), after
