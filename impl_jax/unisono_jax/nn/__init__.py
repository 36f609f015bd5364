"""The models' mixers as layers of any Flax NNX network: y, state = layer(x, state=None, reset=None, valid=None).

    layer = LinearAttention(d_model=512, n_heads=8, rngs=nnx.Rngs(0))
    y, state = layer(x)                          # x [B, T, D] → y [B, T, D], and a state of constant size
    y, state = layer.step(x_next, state)         # one more token, x_next [B, D]
    y, _ = layer(x, cu_seqlens=[0, 300, 512])    # two documents in one row, x [1, 512, D]

A layer has the parameters, by name and initial value, of the same mixer inside a model of one layer, and computes what that computes:
in x's dtype, with sums, scores and states in float32 or wider. It may be traced (jax.jit, nnx.jit, jax.grad, jax.vmap).

Shapes: B batch, T time, D = d_model. reset [B, T] bool: a sequence starts anew before this token. valid [B, T] bool: where false, the
token is not read, and its output means nothing. state: a dict of arrays [B, …] as `init_state` makes it. Initial values are drawn from
`rngs.params` or with `seed`, one of which is needed, outside of traced code. InputError names what does not fit.
"""

from __future__ import annotations

from unisono_jax.nn.attention import LinearAttention, MultiScaleAttention, SlidingWindowAttention, SoftmaxAttention
from unisono_jax.nn.recurrent import S4D, CumulativeRetention, GatedShortConvolution, MoMGRU, SelectiveSSM, ShortConvolution

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
