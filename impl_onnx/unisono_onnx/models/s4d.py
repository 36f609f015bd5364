"""S4D as a stack: embedding, x ← x + mixer(LN(x)), x ← x + FFN(LN(x)), LN, head (Gu et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from unisono_onnx.builder import Builder, Value
from unisono_onnx.models.blocks import States, gelu_ffn

if TYPE_CHECKING:
    from unisono_spec.contract.s4d import S4DConfig


def read(g: Builder, state: States) -> tuple[Value, States]:
    config: S4DConfig = g.config  # pyright: ignore[reportAssignmentType]
    x, out = g.embedding(g.tokens, "embedding"), {}
    for i in range(config.n_layers):
        layer, name = f"layers.{i}", f"layers.{i}.ssm"
        y, out[name] = _scanned(g, g.norm(x, f"{layer}.mixer_norm"), f"{layer}.mixer", state[name])
        value, gate = g.split(g.linear(g.gelu(y), f"{layer}.mixer.out"), config.d_model, config.d_model)
        x = g("Add", x, g("Mul", value, g.sigmoid(gate)))
        if config.ffn_mult:
            x = g("Add", x, gelu_ffn(g, g.norm(x, f"{layer}.ffn_norm"), f"{layer}.ffn"))
    return g.head(x), out


def _scanned(g: Builder, u: Value, name: str, state: Value) -> tuple[Value, Value]:
    """What an input becomes one token later, e^{ΔA}, and what it adds, (e^{ΔA} − 1) / A, are float64: [D, P, 2]."""
    dt = np.exp(g.wide(f"{name}.log_dt"))[:, None]
    A = -np.exp(g.wide(f"{name}.log_A_real")) + 1j * g.wide(f"{name}.A_imag")
    power = g.derived(f"{name}.power", _pairs(np.exp(dt * A)), np.float64)
    still = np.abs(dt * A) < 1e-20  # the quotient is Δ to all digits, and as A may be 0, or has lost its own
    gain = g.derived(f"{name}.gain", _pairs(np.where(still, dt, np.expm1(dt * A) / np.where(still, 1, A))), np.float64)
    return g.marked("DiagonalSSM", u, power, gain, g.param(f"{name}.C"), g.param(f"{name}.D"), state)


def _pairs(z: np.ndarray) -> np.ndarray:
    return np.stack([np.real(z), np.imag(z)], -1)
