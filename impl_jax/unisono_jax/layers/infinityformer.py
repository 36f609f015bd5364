"""InfinityFormer's mixer around its op: heads, decays, and the weights that gate and mix the scales."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from unisono_spec.contract.infinityformer import InfinityFormerConfig

from unisono_jax.layers.ffn import GatedGELU
from unisono_jax.layers.leaves import Arrays, LayerNorm, Linear, sub, updated
from unisono_jax.layers.reading import Mask, Reading
from unisono_jax.ops import multiscale, rotary
from unisono_jax.ops.elementwise import sigmoid, softplus, wide
from unisono_jax.ops.features import feature_map

State = tuple[jax.Array, jax.Array]
Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


class Mixer(nnx.Module):
    """o_t = g_t r⁰_t + (1 − g_t) Σ_s softmax(c)_s r^s_t: the context path and the memories, gated."""

    def __init__(self, params: Arrays, config: InfinityFormerConfig) -> None:
        self.config = config
        self.qkv, self.decay, self.gate, self.out = (Linear(sub(params, name)) for name in ("qkv", "decay", "gate", "out"))
        self.mix = nnx.Param(params["mix"])
        if "tau" in params:
            self.tau = nnx.Param(params["tau"])

    def inputs(self, h: jax.Array, rotation: rotary.CosSin | None, valid: Mask) -> Inputs:
        """h [..., D] → q, k, v, q_norm, k_norm, log_decay, weight, as ops/multiscale.py takes them; all but v float32 or wider.

        Of a token that is not valid, those of q = k = 0.
        """
        config, dtype = self.config, wide(h)
        heads = (*h.shape[:-1], config.n_heads, config.head_width)
        q, k, v = (a.reshape(heads) for a in jnp.split(self.qkv(h, h.dtype), 3, -1))
        q, k = q.astype(dtype), k.astype(dtype)
        if rotation is not None and config.rope == "before":
            q, k = rotary.rotate_by(q, rotation), rotary.rotate_by(k, rotation)
        tau = self.tau[...] if config.feature_map == "learned" else None
        q_norm, k_norm = (feature_map(config.feature_map, a, tau, valid) for a in (q, k))
        q, k = q_norm, k_norm
        if rotation is not None and config.rope == "numerator":
            q, k = rotary.rotate_by(q, rotation), rotary.rotate_by(k, rotation)

        assert self.decay.bias is not None
        a = self.decay(h, dtype) if config.decay == "data" else self.decay.bias[...].astype(dtype)
        memories = jnp.broadcast_to(-softplus(-a), (*h.shape[:-1], config.n_scales))  # log λ = log σ(a), always finite
        log_decay = jnp.concatenate([jnp.zeros_like(memories[..., :1]), memories], -1)  # the context path does not forget

        logit = self.gate(h, dtype)  # [..., 1 or D]
        logit = logit.reshape(heads if config.gate == "vector" else (*h.shape[:-1], 1, 1))[..., None, :, :]
        shares = jax.nn.softmax(self.mix[...].astype(dtype))[:, None, None]
        weight = jnp.concatenate([sigmoid(logit), sigmoid(-logit) * shares], -3)  # [..., S+1, H or 1, V or 1]; 1 − g keeps its digits
        return q, k, v, q_norm, k_norm, log_decay, weight

    def __call__(self, h: jax.Array, rotation: rotary.CosSin | None, due: Mask, state: State, read: Reading) -> tuple[jax.Array, State]:
        """h [B, D] or [B, T, D] → what it adds, the state after it. due [B] or [B, T]: tokens after which S is compressed."""
        given = *self.inputs(h, rotation, read.marks.valid), state
        if due is None:
            o, after = read(multiscale, *given)
        else:  # sequential whatever the form: layer by layer instead of token by token
            op = multiscale.step if read.one_token else multiscale.recurrent
            o, after = op(*given, *read.marks, due, self.config.compress_rank)
        return self.out(o.reshape(h.shape).astype(h.dtype), h.dtype), after


class Block(nnx.Module):
    """x [B, (T,) D] → the same shape: x ← x + mixer(LN(x)), x ← x + FFN(LN(x))."""

    def __init__(self, params: Arrays, config: InfinityFormerConfig) -> None:
        self.mixer_norm, self.ffn_norm = LayerNorm(sub(params, "mixer_norm")), LayerNorm(sub(params, "ffn_norm"))
        self.mixer, self.ffn = Mixer(sub(params, "mixer"), config), GatedGELU(sub(params, "ffn"))

    def __call__(
        self, x: jax.Array, rotation: rotary.CosSin | None, due: Mask, state: State, read: Reading, masks: tuple[Mask, ...]
    ) -> tuple[jax.Array, State]:
        """x [B, D] or [B, T, D] → the same, the state after it. masks: what dropout multiplies the updates of mixer and FFN by."""
        update, after = self.mixer(self.mixer_norm(x).astype(x.dtype), rotation, due, state, read)
        x = updated(x, update, masks[0])
        return updated(x, self.ffn(self.ffn_norm(x), x.dtype), masks[1]), after
