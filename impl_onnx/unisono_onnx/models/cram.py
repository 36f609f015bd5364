"""CRAM, both schemes (docs/architectures/cram.md)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from unisono_onnx.builder import Builder, Value

if TYPE_CHECKING:
    from unisono_spec.contract.cram import CRAMConfig

States = dict[str, Value]


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
    for i in range(config.n_layers):
        layer = f"layers.{i}"
        u = g.norm(x, f"{layer}.input_norm") if config.input_norm else x
        key = g("ReduceSum", g("Mul", u, g("MatMul", u, g.matrix(f"{layer}.mixer.Q"))), [-1], keepdims=1)
        h = g("Concat", bits, g("Div", key, config.key_scale), axis=-1)
        for part in (0, 1):
            h = g.gelu_tanh(g.linear(h, f"{layer}.mixer.score.{part}"))
        s = g("Squeeze", g.linear(h, f"{layer}.mixer.score.2"), [-1])
        xi, out[f"{layer}.xi"] = g.marked("WeightedSum", u, s, state[f"{layer}.xi"], exclusive=int(config.exclusive))
        if config.residual == "after":
            x = g.norm(g("Add", xi, _ffn(g, xi, f"{layer}.ffn")), f"{layer}.norm")
        else:
            x = g("Add", x, _ffn(g, g.norm(xi, f"{layer}.norm"), f"{layer}.ffn"))
    return g.head(x), out


def _code(g: Builder, config: CRAMConfig) -> Value:
    """What the fixed scheme sums, before σ."""
    if config.codes == "frame":
        return g.tokens
    return g.digits(g.tokens, config.code_bits) if config.codes == "binary" else g.embedding(g.tokens, "embedding")


def _ffn(g: Builder, x: Value, name: str) -> Value:
    return g.linear(g.gelu_tanh(g.linear(x, f"{name}.up")), f"{name}.down")
