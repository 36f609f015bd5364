"""S4D, the diagonal state space baseline: config, presets, parameters and states.

@inproceedings{gu2022s4d, title={On the Parameterization and Initialization of Diagonal State Space Models},
      author={Gu, Albert and Goel, Karan and Gupta, Ankit and Ré, Christopher}, booktitle={NeurIPS}, year={2022}}
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from unisono_spec.contract import parts
from unisono_spec.contract.base import Config, Param, State
from unisono_spec.contract.initial import Initial, normal, uniform, values


@dataclasses.dataclass(frozen=True)
class S4DConfig(Config):
    """x ← x + GLU(Linear(GELU(S4D(LN(x))))), x ← x + FFN(LN(x))."""

    arch: ClassVar[str] = "s4d"

    d_model: int = 512  # D
    n_layers: int = 6
    vocab_size: int = 50257  # V
    d_state: int = 64  # N states a channel, as N/2 conjugate pairs
    ffn_mult: int = 4  # the FFN is D → ffn_mult·D → D, exact GELU; 0 leaves it out
    tie_head: bool = False  # head.weight is embedding.weight
    head_bias: bool = True
    dropout: float = 0.0  # after each mixer and each FFN, in training only

    def validate(self) -> None:
        self.at_least(0, "ffn_mult")
        if self.d_state < 2 or self.d_state % 2:
            self.fail("d_state", "states come in conjugate pairs; use an even number ≥ 2")

    @property
    def n_updates(self) -> int:
        return self.n_layers * (2 if self.ffn_mult else 1)

    def params(self) -> dict[str, Param]:
        """Every parameter, in order. Pairs are (real, imaginary) in the last axis of C."""
        d, pairs, std = self.d_model, self.d_state // 2, parts.residual_std(self.n_layers)
        out = parts.embedding("embedding", self.vocab_size, d)
        for i in range(self.n_layers):
            layer = f"layers.{i}"
            out |= parts.norm(f"{layer}.mixer_norm", d)
            out[f"{layer}.mixer.log_dt"] = Param((d,), uniform(math.log(1e-3), math.log(1e-1)))
            out[f"{layer}.mixer.log_A_real"] = Param((d, pairs), Initial("constant", math.log(0.5)))  # A = −½ + iπn
            out[f"{layer}.mixer.A_imag"] = Param((d, pairs), values(*(math.pi * n for n in range(pairs))))
            out[f"{layer}.mixer.C"] = Param((d, pairs, 2), normal(1.0), weight_decay=True)
            out[f"{layer}.mixer.D"] = Param((d,), normal(1.0))
            out |= parts.linear(f"{layer}.mixer.out", 2 * d, d, std=std)  # rows: value, gate
            if self.ffn_mult:
                out |= parts.norm(f"{layer}.ffn_norm", d)
                out |= parts.linear(f"{layer}.ffn.up", self.ffn_mult * d, d)
                out |= parts.linear(f"{layer}.ffn.down", d, self.ffn_mult * d, std=std)
        out |= parts.norm("norm", d)
        return out | parts.head(self.vocab_size, d, self.tie_head, self.head_bias)

    def states(self, capacity: int | None = None) -> dict[str, State]:
        """Every state array, pairs as (real, imaginary). `capacity` is accepted for the sake of the contract."""
        return {f"layers.{i}.ssm": State((self.d_model, self.d_state // 2, 2)) for i in range(self.n_layers)}


CONFIG = S4DConfig
PRESETS: dict[str, S4DConfig] = {
    "s4d-base": S4DConfig(),
    "s4d-1m": S4DConfig(d_model=136, n_layers=5, vocab_size=256, tie_head=True, head_bias=False),
}
