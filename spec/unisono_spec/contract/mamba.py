"""Mamba: config, presets, parameters and states. Parameters of a block are named as in the published checkpoints.

@inproceedings{gu2024mamba, title={Mamba: Linear-Time Sequence Modeling with Selective State Spaces},
      author={Gu, Albert and Dao, Tri}, booktitle={COLM}, year={2024}}
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from unisono_spec.contract import parts
from unisono_spec.contract.base import Config, Param, State


@dataclasses.dataclass(frozen=True)
class MambaConfig(Config):
    """A stack of S6 blocks: x ← x + mamba(RMSNorm(x))."""

    arch: ClassVar[str] = "mamba"

    d_model: int = 768  # D
    n_layers: int = 24
    vocab_size: int = 50280  # V
    expand: int = 2  # a block is expand·D wide inside
    d_state: int = 16  # N
    conv_width: int = 4
    dt_rank: int = 0  # 0 stands for ⌈D / 16⌉
    bias: bool = False  # of in_proj and out_proj
    conv_bias: bool = True
    tie_head: bool = True
    head_bias: bool = False
    norm_eps: float = 1e-6  # ε of every RMSNorm; 1e-5 in the published checkpoints
    dropout: float = 0.0  # after each mixer, in training only

    def validate(self) -> None:
        self.at_least(1, "expand", "d_state", "conv_width")
        self.at_least(0, "dt_rank")
        if not 0 < self.norm_eps <= 1:
            self.fail("norm_eps", "use a number in (0, 1], such as 1e-6")

    @property
    def rank(self) -> int:
        """Of the projection to Δ."""
        return self.dt_rank or math.ceil(self.d_model / 16)

    def params(self) -> dict[str, Param]:
        """Every parameter, in order."""
        d, std = self.d_model, parts.residual_std(self.n_layers)
        out = parts.embedding("embedding", self.vocab_size, d)
        for i in range(self.n_layers):
            out |= parts.norm(f"layers.{i}.norm", d, "rms")
            block = self.expand, self.d_state, self.conv_width, self.rank, self.bias, self.conv_bias, std
            out |= parts.mamba(f"layers.{i}.mixer", d, *block)
        out |= parts.norm("norm", d, "rms")
        return out | parts.head(self.vocab_size, d, self.tie_head, self.head_bias)

    def states(self, capacity: int | None = None) -> dict[str, State]:
        """Every state array. `capacity` is accepted for the sake of the contract: the state is constant in size."""
        return {
            name: state
            for i in range(self.n_layers)
            for name, state in parts.mamba_states(f"layers.{i}", self.expand * self.d_model, self.conv_width, self.d_state).items()
        }


CONFIG = MambaConfig
PRESETS: dict[str, MambaConfig] = {
    "mamba-130m": MambaConfig(),
    "mamba-1m": MambaConfig(d_model=144, n_layers=7, vocab_size=256),
}
