"""LAT, Based, and the Transformer: embedding, x ← x + mixer(norm(x)), x ← x + ffn(norm(x)), norm, head (docs/architectures/lat.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from unisono_onnx.builder import Builder, Value
from unisono_onnx.models.blocks import States, gelu_ffn, short_conv

if TYPE_CHECKING:
    from unisono_spec.contract.lat import LATConfig


def read(g: Builder, state: States, blocks: LATConfig | None = None) -> tuple[Value, States]:
    config: LATConfig = blocks or g.config  # pyright: ignore[reportAssignmentType]
    before = state["position"]
    where, count = g.positions(before)
    x, out = g.embedding(g.tokens, "embedding"), {"position": count}
    if config.positions == "learned":
        read = g("Min", where, np.array(config.max_positions - 1, np.int32))
        x = g("Add", x, g.embedding(read, "position_embedding"))
    for i, kind in enumerate(config.kinds):
        layer = f"layers.{i}"
        h = g.norm(x, f"{layer}.mixer_norm")
        if kind == "conv":
            a, b = g.split(g.linear(h, f"{layer}.mixer.input"), config.conv_inner, config.conv_inner)
            y, out[f"{layer}.conv"] = short_conv(g, b, f"{layer}.mixer.conv", state[f"{layer}.conv"])
            o = g("Mul", g.silu(a), y)
        else:
            q, k, v = _heads(g, config, kind, h, where, layer)
            if kind == "linear":
                op = "FusedLinearAttention" if g.fused else "LinearAttention"
                names, given, more = [f"{layer}.S", f"{layer}.z"], (), {"heads": config.n_heads} if g.fused else {}
            else:
                op, names, given, more = "Window" if kind == "window" else "SoftmaxAttention", [f"{layer}.k", f"{layer}.v"], (before,), {}
            o, *after = g.marked(op, q, k, v, *(state[name] for name in names), *given, outputs=3 + len(given), **more)
            out |= dict(zip(names, after, strict=False))
            o = g.flat(g.norm(o, f"{layer}.mixer.head_norm") if kind == "linear" and config.head_norm else o)
        x = g("Add", x, g.linear(o, f"{layer}.mixer.out"))
        h, ffn = g.norm(x, f"{layer}.ffn_norm"), f"{layer}.ffn"
        if config.ffn == "swiglu":
            hidden = g("Mul", g.silu(g.linear(h, f"{ffn}.gate")), g.linear(h, f"{ffn}.up"))
            x = g("Add", x, g.linear(hidden, f"{ffn}.down"))
        else:
            x = g("Add", x, gelu_ffn(g, h, ffn))
    return g.head(x), out


def _heads(g: Builder, config: LATConfig, kind: str, h: Value, where: Value, layer: str) -> tuple[Value, Value, Value]:
    """q, k, v [B, T, H, ·], turned by their position, and through φ for linear attention."""
    width = config.qk_width if kind == "linear" else config.head_width
    qkv = g.split(g.linear(h, f"{layer}.mixer.qkv"), config.n_heads * width, config.n_heads * width, config.d_model)
    q, k, v = (g.heads(a, config.n_heads) for a in qkv)
    if config.positions == "rope":
        q, k = (g.rotate(a, where, width, config.rope_base) for a in (q, k))
    if kind == "linear":
        q, k = (g.features(a, config.feature_map, f"{layer}.mixer.tau") for a in (q, k))
    return q, k, v
