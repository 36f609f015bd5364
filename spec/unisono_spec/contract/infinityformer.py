"""InfinityFormer: config, presets, parameters and states.

@misc{infinityformer2023, title={InfinityFormer: Linear Complexity Transformer with Unlimited Context}, year={2023}}
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

from unisono_spec.contract import parts
from unisono_spec.contract.base import Config, Param, State
from unisono_spec.contract.initial import ONES, Initial, values


@dataclasses.dataclass(frozen=True)
class InfinityFormerConfig(Config):
    """Linear attention read from S decayed memories beside an undecayed context path, mixed by a gate."""

    arch: ClassVar[str] = "infinityformer"
    gauges: ClassVar[dict[str, str]] = {".mixer.decay.bias": "decay", ".mixer.gate.bias": "gate"}

    d_model: int = 768  # D
    n_layers: int = 12
    n_heads: int = 12  # H; each D / H wide
    d_ffn: int = 3072  # F: the FFN is D → 2F, gated to F, → D
    vocab_size: int = 50257  # V
    n_scales: int = 3  # S memories beside the context path
    feature_map: Literal["elu1", "relu", "learned"] = "elu1"
    decay: Literal["learned", "data"] = "learned"  # data: λ_t = σ(w·h_t + a), per token and scale
    gate: Literal["scalar", "vector"] = "scalar"  # one g a token, or one a channel
    rope: Literal["before", "numerator", "none"] = "before"  # of φ; numerator: on φ(q) and φ(k), in the numerator only
    rope_base: float = 10000.0
    compress_every: int = 0  # R: after every R-th token, each S becomes its best approximation of rank compress_rank; 0: never
    compress_rank: int = 0
    tie_head: bool = True
    head_bias: bool = False
    dropout: float = 0.1  # after each mixer and each FFN, in training only

    def validate(self) -> None:
        self.at_least(1, "n_heads", "d_ffn", "n_scales")
        self.at_least(0, "compress_every", "compress_rank")
        if self.d_model % self.n_heads:
            self.fail("n_heads", f"it must divide d_model={self.d_model}")
        if self.rope != "none" and self.head_width % 2:
            self.fail("n_heads", f"heads are {self.head_width} wide and RoPE rotates pairs; make d_model / n_heads even, or rope='none'")
        if self.rope == "numerator" and self.feature_map == "relu":
            # the normaliser of unturned features can be 0 where the numerator of turned ones is not: a value over ε
            self.fail("rope", "turned features need a normaliser that is never empty; use rope='before', or feature_map='elu1'")
        if not self.rope_base > 1:
            self.fail("rope_base", "use a number above 1; the default is 10000")
        if bool(self.compress_every) != bool(self.compress_rank):
            self.fail("compress_rank", "compression needs both compress_every and compress_rank; 0 and 0 turn it off")
        if self.compress_rank > self.head_width:
            self.fail("compress_rank", f"a state of {self.head_width} × {self.head_width} has no higher rank; use less")

    @property
    def head_width(self) -> int:
        """K and V of each head."""
        return self.d_model // self.n_heads

    @property
    def no_graph(self) -> str:
        if not self.compress_every:
            return ""
        return (
            f"compress_every: {self.compress_every}; memory compression needs a singular value decomposition, "
            "which ONNX does not have; export a model with compress_every=0 and compress_rank=0"
        )

    @property
    def n_updates(self) -> int:
        return 2 * self.n_layers

    def resting_floats(self) -> tuple[int, int]:
        """Floats of one head's S at one scale: dense, and as a truncated SVD of compress_rank, which is smaller only for
        ranks below K·V / (K + V + 1). Between two compressions S is dense: only a state that is stored can be the smaller one."""
        k = self.head_width
        return k * k, self.compress_rank * (2 * k + 1)

    def params(self) -> dict[str, Param]:
        """Every parameter, in order."""
        d, std, out = self.d_model, parts.residual_std(self.n_layers), parts.embedding("embedding", self.vocab_size, self.d_model)
        for i in range(self.n_layers):
            layer = f"layers.{i}"
            out |= parts.norm(f"{layer}.mixer_norm", d)
            out |= parts.linear(f"{layer}.mixer.qkv", 3 * d, d)
            if self.feature_map == "learned":
                out[f"{layer}.mixer.tau"] = Param((1,), ONES)
            if self.decay == "data":
                out |= parts.linear(f"{layer}.mixer.decay", self.n_scales, d, bias=False)
            out[f"{layer}.mixer.decay.bias"] = Param((self.n_scales,), _decays(self.n_scales))  # a
            out[f"{layer}.mixer.mix"] = Param((self.n_scales,), _mix(self.n_scales))  # c
            width = d if self.gate == "vector" else 1
            out |= parts.linear(f"{layer}.mixer.gate", width, d, bias=False)
            out[f"{layer}.mixer.gate.bias"] = Param((width,), Initial("constant", -2.0))  # mostly memory at first
            out |= parts.linear(f"{layer}.mixer.out", d, d, std=std)
            out |= parts.norm(f"{layer}.ffn_norm", d)
            out |= parts.linear(f"{layer}.ffn.up", 2 * self.d_ffn, d)
            out |= parts.linear(f"{layer}.ffn.down", d, self.d_ffn, std=std)
        out |= parts.norm("norm", d)
        return out | parts.head(self.vocab_size, d, self.tie_head, self.head_bias)

    def states(self, capacity: int | None = None) -> dict[str, State]:
        """Every state array; scale 0 is the context path. `capacity` is accepted for the sake of the contract."""
        out = {"position": State((), integer=True)}
        scales = (self.n_scales + 1, self.n_heads, self.head_width)
        for i in range(self.n_layers):
            out[f"layers.{i}.S"] = State((*scales, self.head_width))
            out[f"layers.{i}.z"] = State(scales)
        return out


def _decays(n: int) -> Initial:
    """a with σ(a) = λ and 1 − λ log-spaced from 1e-1 to 1e-3: 0.9, 0.99, 0.999. Equal decays would have equal gradients for ever."""
    forgotten = [10.0 ** -(1 + 2 * s / (n - 1)) for s in range(n)] if n > 1 else [1e-2]
    return values(*(math.log((1 - f) / f) for f in forgotten))


def _mix(n: int) -> Initial:
    """From 0.1 to −0.1 in equal steps; not equal, for the same reason."""
    return values(*(0.1 - 0.2 * s / (n - 1) for s in range(n)) if n > 1 else (0.1,))


CONFIG = InfinityFormerConfig
PRESETS: dict[str, InfinityFormerConfig] = {
    "infinityformer-base": InfinityFormerConfig(),
    "infinityformer-1m": InfinityFormerConfig(d_model=128, n_layers=4, n_heads=4, d_ffn=492, vocab_size=256),
}
