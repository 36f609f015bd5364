"""The models' mixers as layers of any network: y, state = layer(x, state=None, reset=None, valid=None).

    layer = LinearAttention(d_model=512, n_heads=8)
    y, state = layer(x)                          # x [B, T, D] → y [B, T, D], and a state of constant size
    y, state = layer.step(x_next, state)         # one more token, x_next [B, D]
    y, _ = layer(x, cu_seqlens=[0, 300, 512])    # two documents in one row, x [1, 512, D]

A layer has the parameters, by name and initial value, of the same mixer inside a model of one layer, and computes what that computes:
in x's dtype, or in what torch.autocast casts to, with sums, scores and states in float32 or wider.

Shapes: B batch, T time, D = d_model. reset [B, T] bool: a sequence starts anew before this token. valid [B, T] bool: where false, the
token is not read, and its output means nothing. state: a dict of tensors [B, …] as `init_state` makes it. Initial values are drawn
from torch's own generator unless `seed` says otherwise. InputError names what does not fit.
"""

from __future__ import annotations

from unisono_torch.nn.attention import LinearAttention, MultiScaleAttention, SlidingWindowAttention, SoftmaxAttention
from unisono_torch.nn.recurrent import S4D, CumulativeRetention, GatedShortConvolution, MoMGRU, SelectiveSSM, ShortConvolution

__all__ = [
    "S4D",
    "CumulativeRetention",
    "GatedShortConvolution",
    "LinearAttention",
    "MoMGRU",
    "MultiScaleAttention",
    "SelectiveSSM",
    "ShortConvolution",
    "SlidingWindowAttention",
    "SoftmaxAttention",
]
