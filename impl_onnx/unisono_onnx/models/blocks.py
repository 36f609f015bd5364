"""What several architectures have: an FFN, the short convolution, the Mamba block."""

from __future__ import annotations

import numpy as np

from unisono_onnx.builder import Builder, Value

States = dict[str, Value]


def gelu_ffn(g: Builder, x: Value, name: str) -> Value:
    """Linear, exact GELU, Linear."""
    return g.linear(g.gelu(g.linear(x, f"{name}.up")), f"{name}.down")


def short_conv(g: Builder, x: Value, name: str, state: Value) -> tuple[Value, Value]:
    """A depthwise causal convolution: x [B, T, D], the last w−1 inputs [B, w−1, D] → y [B, T, D], 0 where not valid, the state."""
    weight = np.asarray(g.params[f"{name}.weight"])[:, 0].T  # [w, D]
    taps = g.derived(f"{name}.weight.T", weight)
    if len(weight) == 1:
        y, last = g("Mul", x, taps), g("Identity", state)
    else:
        y, last = g.marked("FusedShortConv" if g.fused else "ShortConv", x, taps, state)
    if g.has(f"{name}.bias"):
        y = g("Add", y, g.param(f"{name}.bias"))
    return g("Where", g("Unsqueeze", g.valid, [2]), y, 0.0), last


def mamba(g: Builder, x: Value, name: str, conv: Value, ssm: Value) -> tuple[Value, Value, Value]:
    """[u, z] = W_in x, u ← SiLU(conv(u)), y = S6(u), W_out (y ∘ SiLU(z)) (Gu & Dao 2024, figure 3) → [B, T, D], the states."""
    inner, n = np.shape(g.params[f"{name}.A_log"])
    rank = np.shape(g.params[f"{name}.dt_proj.weight"])[1]
    u, z = g.split(g.linear(x, f"{name}.in_proj"), inner, inner)
    u, conv = short_conv(g, u, f"{name}.conv1d", conv)
    u = g.silu(u)
    delta, B, C = g.split(g.linear(u, f"{name}.x_proj"), rank, n, n)
    dt = g.softplus(g.linear(delta, f"{name}.dt_proj"))
    A = g.derived(f"{name}.A", -np.exp(g.wide(f"{name}.A_log")))
    op, more = ("FusedSelectiveScan", {"heads": inner}) if g.fused else ("SelectiveScan", {})
    y, ssm = g.marked(op, u, dt, A, B, C, g.param(f"{name}.D"), ssm, **more)
    return g.linear(g("Mul", y, g.silu(z)), f"{name}.out_proj"), conv, ssm
