"""Mamba as a stack: embedding, x ← x + mamba(RMSNorm(x)), RMSNorm, head (Gu & Dao 2024, section 3.4)."""

from __future__ import annotations

from unisono_onnx.builder import Builder, Value
from unisono_onnx.models.blocks import States, mamba


def read(g: Builder, state: States) -> tuple[Value, States]:
    x, out = g.embedding(g.tokens, "embedding"), {}
    for i in range(g.config.n_layers):
        layer = f"layers.{i}"
        conv, ssm = f"{layer}.conv", f"{layer}.ssm"
        update, out[conv], out[ssm] = mamba(g, g.norm(x, f"{layer}.norm"), f"{layer}.mixer", state[conv], state[ssm])
        x = g("Add", x, update)
    return g.head(x), out
