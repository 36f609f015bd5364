"""MARU, the memory-augmented recurrent unit: config, presets, parameters and states."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

from unisono_spec.contract import parts
from unisono_spec.contract.base import Config, Param, State
from unisono_spec.contract.initial import ZEROS, Initial, normal, xavier_uniform


@dataclasses.dataclass(frozen=True)
class MARUConfig(Config):
    """A Mamba block, then a GRU that reads and writes banks of memory (MoM-GRU)."""

    arch: ClassVar[str] = "maru"
    gauges: ClassVar[dict[str, str]] = {".balance_load": "load"}

    d_model: int = 640  # D, of the Mamba block and of the cell
    n_layers: int = 1
    prenorm: bool = False  # x ← x + part(RMSNorm(x)) around the block and the cell, and a norm before the head
    vocab_size: int = 256  # V
    head_hidden: int = 320  # the head is D → head_hidden, ReLU, → V
    expand: int = 2  # the Mamba block is expand·D wide inside
    d_state: int = 16  # N
    conv_width: int = 4
    dt_rank: int = 0  # 0 stands for ⌈D / 16⌉
    n_banks: int = 4  # n
    n_slots: int = 128  # L of each bank
    d_memory: int = 64  # d_m of each slot
    router_hidden: int = 32
    erase: Literal["coupled", "separate"] = "coupled"  # one v erases and adds, or e has a projection of its own
    router: Literal["dense", "gumbel"] = "dense"  # gumbel: noise, temperature and balance bias, in training only
    temperature: float = 1.0  # of router="gumbel"
    balance_rate: float = 0.01  # of router="gumbel": how fast the balance bias follows the banks' load
    dropout: float = 0.0  # after each Mamba block and each cell, in training only

    def validate(self) -> None:
        self.at_least(1, "head_hidden", "expand", "d_state", "conv_width", "n_layers")
        self.at_least(1, "n_banks", "n_slots", "d_memory", "router_hidden")
        self.at_least(0, "dt_rank")
        if self.n_layers > 1 and not self.prenorm:
            self.fail("n_layers", "a stack needs norms and residuals; set prenorm=True")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            self.fail("temperature", "use a positive number")
        if not (math.isfinite(self.balance_rate) and self.balance_rate >= 0):
            self.fail("balance_rate", "use 0 for no balancing, or a positive number")

    @property
    def rank(self) -> int:
        """Of the projection to Δ."""
        return self.dt_rank or math.ceil(self.d_model / 16)

    @property
    def n_updates(self) -> int:
        return 2 * self.n_layers

    @property
    def noise_widths(self) -> tuple[int, ...]:
        """Gumbel noise for each bank of each layer, with router="gumbel" only."""
        return (self.n_banks,) * self.n_layers if self.router == "gumbel" else ()

    @property
    def routers(self) -> tuple[str, ...]:
        return tuple(f"layers.{i}.cell" for i in range(len(self.noise_widths)))

    def params(self) -> dict[str, Param]:
        """Every parameter, in order. `balance_bias` and `balance_load` are buffers that training's balancing rule updates."""
        d, std = self.d_model, parts.residual_std(self.n_layers) if self.prenorm else parts.STD
        out = parts.embedding("embedding", self.vocab_size, d)
        for i in range(self.n_layers):
            layer = f"layers.{i}"
            if self.prenorm:
                out |= parts.norm(f"{layer}.mamba_norm", d, "rms")
            out |= parts.mamba(f"{layer}.mamba", d, self.expand, self.d_state, self.conv_width, self.rank, True, True, std)
            if self.prenorm:
                out |= parts.norm(f"{layer}.cell_norm", d, "rms")
            out |= parts.linear(f"{layer}.project", d, d)
            out |= self._cell(f"{layer}.cell")
        if self.prenorm:
            out |= parts.norm("norm", d, "rms")
        out |= parts.linear("head.0", self.head_hidden, d) | parts.linear("head.1", self.vocab_size, self.head_hidden)
        return out if self.prenorm else _unnormed(out)

    def _cell(self, name: str) -> dict[str, Param]:
        d, m, n = self.d_model, self.d_memory, self.n_banks

        def xavier(part: str, out: int, into: int) -> dict[str, Param]:
            return parts.linear(f"{name}.{part}", out, into, initial=xavier_uniform(out, into))

        params = {
            f"{name}.memory": Param((n, self.n_slots, m), normal(0.1)),  # M₀
            **xavier("router.0", self.router_hidden, 2 * d),
            **xavier("router.1", n, self.router_hidden),
            **xavier("query", m, 2 * d),
            # rows: reset r, update ζ, candidate h̃, each drawn as a matrix of its own; columns of input: x, c
            f"{name}.input.weight": Param((3 * d, d + m), xavier_uniform(d, d + m), weight_decay=True),
            f"{name}.input.bias": Param((3 * d,), ZEROS),
            f"{name}.hidden.weight": Param((3 * d, d), xavier_uniform(d, d), weight_decay=True),
            **xavier("key", m, d),
            **xavier("value", m, d),
            **(xavier("erase", m, d) if self.erase == "separate" else {}),
            **xavier("gate", 1, d),
        }
        if self.router == "gumbel":
            params[f"{name}.balance_bias"] = Param((n,), ZEROS, trainable=False)
            params[f"{name}.balance_load"] = Param((n,), Initial("constant", 1 / n), trainable=False)
        return params

    def states(self, capacity: int | None = None) -> dict[str, State]:
        """Every state array; memories start as copies of M₀. `capacity` is accepted for the sake of the contract."""
        out: dict[str, State] = {}
        for i in range(self.n_layers):
            out |= parts.mamba_states(f"layers.{i}", self.expand * self.d_model, self.conv_width, self.d_state)
            out[f"layers.{i}.h"] = State((self.d_model,))
            out[f"layers.{i}.memory"] = State((self.n_banks, self.n_slots, self.d_memory), initial=f"layers.{i}.cell.memory")
        return out


def _unnormed(params: dict[str, Param]) -> dict[str, Param]:
    """Without norms nothing restores a signal's size: the embedding starts as N(0, 1) and each Linear keeps the variance of its input."""

    def initial(name: str, p: Param) -> Param:
        if p.initial != normal(parts.STD):
            return p
        return dataclasses.replace(p, initial=normal(1.0 if name == "embedding.weight" else p.shape[1] ** -0.5))

    return {name: initial(name, p) for name, p in params.items()}


CONFIG = MARUConfig
PRESETS: dict[str, MARUConfig] = {
    "maru": MARUConfig(),
    "maru-wide": MARUConfig(n_banks=6, n_slots=256, d_memory=128),
    "maru-1m": MARUConfig(d_model=144, n_layers=3, prenorm=True, head_hidden=144, n_slots=64, d_memory=16),
}
