"""InfinityFormer: embedding, x ← x + mixer(LN(x)), x ← x + FFN(LN(x)), LN, head (docs/architectures/infinityformer.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from unisono_onnx.builder import Builder, Value
from unisono_onnx.models.blocks import States

if TYPE_CHECKING:
    from unisono_spec.contract.infinityformer import InfinityFormerConfig


def read(g: Builder, state: States) -> tuple[Value, States]:
    config: InfinityFormerConfig = g.config  # pyright: ignore[reportAssignmentType]
    where, count = g.positions(state["position"])
    x, out = g.embedding(g.tokens, "embedding"), {"position": count}
    for i in range(config.n_layers):
        layer = f"layers.{i}"
        S, z = f"{layer}.S", f"{layer}.z"
        h = g.norm(x, f"{layer}.mixer_norm")
        q, k, v, q_norm, k_norm = _heads(g, config, h, where, f"{layer}.mixer")
        decay, weight = _log_decay(g, config, h, f"{layer}.mixer.decay"), _weight(g, config, h, f"{layer}.mixer")
        same, more = config.rope != "numerator", {"heads": (config.n_scales + 1) * config.n_heads} if g.fused else {}
        keys = () if g.fused and same else (q_norm, k_norm)
        op = ("FusedMultiscale" if same else "FusedMultiscaleApart") if g.fused else "Multiscale"
        o, out[S], out[z] = g.marked(op, q, k, v, *keys, decay, weight, state[S], state[z], outputs=3, **more)
        x = g("Add", x, g.linear(g.flat(o), f"{layer}.mixer.out"))
        a, b = g.split(g.linear(g.norm(x, f"{layer}.ffn_norm"), f"{layer}.ffn.up"), config.d_ffn, config.d_ffn)
        x = g("Add", x, g.linear(g.gelu(g("Mul", a, g.sigmoid(b))), f"{layer}.ffn.down"))
    return g.head(x), out


def _heads(g: Builder, config: InfinityFormerConfig, h: Value, where: Value, name: str) -> tuple[Value, ...]:
    """q, k, v, and q and k of the normaliser [B, T, H, ·]."""
    d = config.d_model
    q, k, v = (g.heads(part, config.n_heads) for part in g.split(g.linear(h, f"{name}.qkv"), d, d, d))

    def rotated(a: Value) -> Value:
        return g.rotate(a, where, config.head_width, config.rope_base)

    if config.rope == "before":
        q, k = rotated(q), rotated(k)
    q_norm, k_norm = (g.features(a, config.feature_map, f"{name}.tau") for a in (q, k))
    q, k = (rotated(q_norm), rotated(k_norm)) if config.rope == "numerator" else (q_norm, k_norm)
    return q, k, v, q_norm, k_norm


def _log_decay(g: Builder, config: InfinityFormerConfig, h: Value, name: str) -> Value:
    """log λ = log σ(a) [B or 1, T or 1, S+1], of which the first, the context path's, is 0."""
    if config.decay == "learned":
        fades = -np.logaddexp(0, -g.wide(f"{name}.bias"))
        return g.derived(f"{name}.log", np.concatenate([[0.0], fades])[None, None])
    fades = g("Neg", g.softplus(g("Neg", g.linear(h, name))))
    return g("Pad", fades, [0, 0, 1, 0, 0, 0])


def _weight(g: Builder, config: InfinityFormerConfig, h: Value, name: str) -> Value:
    """What each scale's reading is multiplied by [B, T, S+1, H or 1, V or 1]."""
    shape = [0, 0, 1, config.n_heads, config.head_width] if config.gate == "vector" else [0, 0, 1, 1, 1]
    logit = g("Reshape", g.linear(h, f"{name}.gate"), shape)
    mix = np.exp(g.wide(f"{name}.mix"))
    shares = g.derived(f"{name}.shares", (mix / mix.sum())[:, None, None])
    return g("Concat", g.sigmoid(logit), g("Mul", g.sigmoid(g("Neg", logit)), shares), axis=2)  # 1 − g keeps its digits
