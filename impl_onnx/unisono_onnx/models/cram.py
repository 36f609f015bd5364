"""CRAM, both schemes (docs/architectures/cram.md)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from unisono_onnx.builder import Builder, Value

if TYPE_CHECKING:
    from unisono_spec.contract.cram import CRAMConfig

States = dict[str, Value]
EPS = 1e-6  # beside the sum of weights


def read(g: Builder, state: States) -> tuple[Value, States]:
    config: CRAMConfig = g.config  # pyright: ignore[reportAssignmentType]
    if config.scheme == "fixed":
        # log λ from float64: powers stay right to float32 where λ is near 1
        xi, last = g.marked("DecayedSum", _code(g, config), state["xi"], rate=math.log(config.decay), gain=1 - config.decay)
        x = g.linear(xi, "input")
        for i in range(config.n_layers):
            x = g("Add", x, _ffn(g, g.norm(x, f"layers.{i}.norm"), f"layers.{i}.ffn"))
        return g.head(x), {"xi": last}
    x = g.embedding(g.tokens, "embedding")
    where, count = g.positions(state["position"])
    bits, out = g.digits(where, config.position_bits), {"position": count}
    large = not config.normalised  # nothing bounds a sum of s_t σ(x_t)
    for i in range(config.n_layers):
        layer = f"layers.{i}"
        u = g.norm(x, f"{layer}.input_norm") if config.input_norm else x
        key = g("ReduceSum", g("Mul", u, g("MatMul", u, g.matrix(f"{layer}.mixer.Q"))), [-1], keepdims=1)
        h = g("Concat", bits, g("Div", key, config.key_scale), axis=-1)
        for part in (0, 1):
            h = g.gelu_tanh(g.linear(h, f"{layer}.mixer.score.{part}"))
        s, names = g.linear(h, f"{layer}.mixer.score.2"), [f"{layer}.{name}" for name in config.sums]
        xi, after = _sum(g, config, u, s, [state[name] for name in names], f"{layer}.mixer.decay")
        out |= dict(zip(names, after, strict=True))
        if config.residual == "after":
            x = g.norm(g("Add", xi, _ffn(g, xi, f"{layer}.ffn")), f"{layer}.norm", large)
        else:
            read = g.norm(xi, f"{layer}.norm", large)
            x = g("Add", x, _ffn(g, g("Add", read, u) if config.skip else read, f"{layer}.ffn"))
    return g.head(x), out


def _sum(g: Builder, config: CRAMConfig, u: Value, s: Value, sums: list[Value], decay: str) -> tuple[Value, list[Value]]:
    """u [B, T, D], s [B, T, 1 or D], the sums before → ξ [B, T, D], and the sums after."""
    if not config.retains:
        xi, last = g.marked("WeightedSum", u, g("Squeeze", s, [-1]), *sums, exclusive=int(config.exclusive))
        return xi, [last]
    d, n = config.d_model, len(sums)
    w, rate = g.softplus(s) if config.normalised else s, np.zeros(d)
    if config.learned_decay:
        a = g.wide(decay)
        rate = -np.logaddexp(0, -a)  # log λ
        w = w if config.normalised else g("Mul", w, g.derived(f"{decay}.gain", np.exp(-np.logaddexp(0, a))))  # 1−λ
    terms = g("Mul", w, g.sigmoid(u))
    ones = g("Expand", np.float32(1), g("Shape", terms))
    if config.normalised:
        terms = g("Concat", terms, g("Mul", w, ones), axis=-1)
        ones = g("Expand", np.float32(1), g("Shape", terms))
    one = g("Slice", ones, [0], [1], [2])
    rates = g.derived(f"{decay}.rate", np.tile(rate, n)[:, None])
    state = g("Unsqueeze", g("Concat", *sums, axis=-1), [-1])
    op, more = ("FusedSelectiveScan", {"heads": n * d}) if g.fused else ("SelectiveScan", {})
    y, last = g.marked(op, terms, ones, rates, one, one, np.zeros(n * d, np.float32), state, **more)
    last = g("Squeeze", last, [-1])
    if not config.normalised:
        return y, [last]
    (top, bottom), after = g.split(y, d, d), g.split(last, d, d)
    return g("Div", top, g("Add", bottom, EPS)), list(after)


def _code(g: Builder, config: CRAMConfig) -> Value:
    """What the fixed scheme sums, before σ."""
    if config.codes == "frame":
        return g.tokens
    return g.digits(g.tokens, config.code_bits) if config.codes == "binary" else g.embedding(g.tokens, "embedding")


def _ffn(g: Builder, x: Value, name: str) -> Value:
    return g.linear(g.gelu_tanh(g.linear(x, f"{name}.up")), f"{name}.down")
