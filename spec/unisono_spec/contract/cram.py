"""CRAM: config, presets, parameters and states.

@misc{muraleedharan_cram, title={Cumulative Retention Autoregressive Models for Efficient Sequence Modeling},
      author={Muraleedharan, Abhinav}, note={University of Toronto}}
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

from unisono_spec.contract.base import Config, Param, State
from unisono_spec.contract.initial import ONES, ZEROS, normal, uniform


@dataclasses.dataclass(frozen=True)
class CRAMConfig(Config):
    """Both schemes of the paper. Fields that belong to the other scheme must keep their defaults."""

    arch: ClassVar[str] = "cram"
    gauges: ClassVar[dict[str, str]] = {".mixer.decay": "decay"}

    scheme: Literal["fixed", "adaptive"] = "fixed"
    d_model: int = 96  # D
    n_layers: int = 12
    ffn_mult: int = 4  # the FFN is D → ffn_mult·D → D
    vocab_size: int = 256  # V; unused with codes="frame"
    tie_head: bool = False  # head.weight is embedding.weight
    head_bias: bool = False
    dropout: float = 0.0  # after each FFN, in training only

    # fixed scheme, eqs 2–6: ξ_t = λ ξ_{t−1} + (1−λ) σ(x_t)
    codes: Literal["binary", "frame", "embedding"] = "binary"
    code_bits: int = 8  # codes="binary": digits of the token id, most significant first
    frame_size: int = 0  # codes="frame": F
    frame_head: Literal["bernoulli", "gaussian"] = "bernoulli"  # gaussian: F means, then F log variances
    decay: float = 0.5  # λ; the paper's is ½

    # adaptive scheme, eqs 7–10: ξ_t = ξ_{t−1} + s_φ([bits(p_t), x_tᵀQx_t / k_scale]) σ(x_t)
    position_bits: int = 20  # d_b
    position_offset: Literal["zero", "random"] = "zero"  # random: training starts each sequence anywhere
    k_scale: float = 0.0  # 0 stands for √D; 1 is the paper as printed
    input_norm: bool = False  # LayerNorm before σ and k
    exclusive: bool = False  # ξ_t without token t, as eqs 7–10 print it; one layer only
    residual: Literal["before", "after"] = "before"  # after: LN(ξ + FFN(ξ)), the source code's variant

    # departures from the adaptive scheme that let it learn more than bigrams, as docs/architectures/cram.md derives them
    channel_weights: bool = False  # s_φ gives each channel a weight of its own
    learned_decay: bool = False  # ξ_t = λ ∘ ξ_{t−1} + (1−λ) ∘ s_t σ(x_t), λ = σ(a) learned for each channel
    normalised: bool = False  # the weights are softplus(s), and ξ is divided by their sum, which decays alike
    skip: bool = False  # the FFN reads LN(ξ) + x: the last token is not one of t

    def validate(self) -> None:
        self.at_least(1, "ffn_mult")
        self.at_least(0, "frame_size")
        if not 0 < self.decay < 1:
            self.fail("decay", "use a number in (0, 1); the paper's value is 0.5")
        if not 1 <= self.position_bits <= 30:
            self.fail("position_bits", "use 1 to 30, since positions are int32; the default is 20")
        if not (math.isfinite(self.k_scale) and self.k_scale >= 0):
            self.fail("k_scale", "use 0 for √d_model, 1 for the paper's printed form, or another positive number")
        foreign = _ADAPTIVE_ONLY if self.scheme == "fixed" else _FIXED_ONLY
        for name in foreign:
            if getattr(self, name) != _DEFAULTS[name]:
                other = "adaptive" if self.scheme == "fixed" else "fixed"
                self.fail(name, f"it belongs to scheme={other!r}; leave it at {_DEFAULTS[name]!r}")
        if self.tie_head and not self.has_embedding:
            self.fail("tie_head", "only a model with an embedding can tie its head; use codes='embedding' or tie_head=False")
        if self.exclusive and self.n_layers > 1:
            self.fail("exclusive", "exclusive sums lose one more token at each layer; use n_layers=1")
        if self.exclusive and self.retains:
            self.fail("exclusive", "it is there to check the printed sum; leave channel_weights, learned_decay and normalised at False")
        if self.skip and self.residual == "after":
            self.fail("skip", "with residual='after' nothing but ξ is handed on; use residual='before'")
        if self.scheme == "fixed":
            self._validate_codes()

    def _validate_codes(self) -> None:
        if self.codes == "frame":
            self.at_least(1, "frame_size")
        elif self.frame_size or self.frame_head != "bernoulli":
            self.fail("frame_size" if self.frame_size else "frame_head", "it belongs to codes='frame'; leave it at its default")
        if not 1 <= self.code_bits <= 31:
            self.fail("code_bits", "use 1 to 31; 8 for bytes, 20 for the GPT-2 vocabulary")
        if self.codes == "binary" and self.vocab_size > 2**self.code_bits:
            self.fail("code_bits", f"{self.vocab_size} ids need at least {math.ceil(math.log2(self.vocab_size))} digits")

    @property
    def has_embedding(self) -> bool:
        return self.scheme == "adaptive" or self.codes == "embedding"

    @property
    def reads_frames(self) -> bool:
        return self.scheme == "fixed" and self.codes == "frame"

    @property
    def predicts(self) -> Literal["categorical", "bernoulli", "gaussian"]:
        return self.frame_head if self.reads_frames else "categorical"

    @property
    def starts(self) -> int:
        return 2**self.position_bits if self.position_offset == "random" else 1

    @property
    def precomputable(self) -> bool:
        """ξ of the fixed scheme, unless its codes are trained."""
        return self.scheme == "fixed" and self.codes != "embedding"

    @property
    def code_size(self) -> int:
        """Width of ξ in the fixed scheme."""
        if self.scheme != "fixed":
            return 0
        return {"binary": self.code_bits, "frame": self.frame_size, "embedding": self.d_model}[self.codes]

    @property
    def key_scale(self) -> float:
        return self.k_scale or math.sqrt(self.d_model)

    @property
    def retains(self) -> bool:
        """Whether the adaptive scheme's sum is another than eqs 8–10 print."""
        return self.channel_weights or self.learned_decay or self.normalised

    @property
    def sums(self) -> tuple[str, ...]:
        """What a layer of the adaptive scheme carries: the sum of weighted tokens, and that of weights."""
        return ("xi", "z") if self.normalised else ("xi",)

    def params(self) -> dict[str, Param]:
        """Every trainable parameter, in order."""
        d, hidden = self.d_model, self.ffn_mult * self.d_model
        out: dict[str, Param] = {}
        if self.has_embedding:
            out["embedding.weight"] = Param((self.vocab_size, d), normal(d**-0.5))
        if self.scheme == "fixed":
            out |= _linear("input", d, self.code_size)
        for i in range(self.n_layers):
            layer = f"layers.{i}"
            if self.scheme == "adaptive":
                if self.input_norm:
                    out |= _norm(f"{layer}.input_norm", d)
                bits = self.position_bits + 1
                out[f"{layer}.mixer.Q"] = Param((d, d), normal(d**-0.5), weight_decay=True)
                out |= _linear(f"{layer}.mixer.score.0", bits, bits)
                out |= _linear(f"{layer}.mixer.score.1", d, bits)
                out |= _linear(f"{layer}.mixer.score.2", d if self.channel_weights else 1, d)
                if self.learned_decay:
                    # λ from 0.27 to 0.998: means over one to four hundred tokens
                    out[f"{layer}.mixer.decay"] = Param((d,), uniform(-1.0, 6.0))
            out |= _norm(f"{layer}.norm", d)
            out |= _linear(f"{layer}.ffn.up", hidden, d)
            out |= _linear(f"{layer}.ffn.down", d, hidden)
        out |= _norm("norm", d)
        if not self.tie_head:
            out |= _linear("head", self.output_size, d, bias=self.head_bias)
        elif self.head_bias:
            out["head.bias"] = Param((self.output_size,), ZEROS)
        return out

    def states(self, capacity: int | None = None) -> dict[str, State]:
        """Every state array. `capacity` is accepted for the sake of the contract: the state is constant in size."""
        if self.scheme == "fixed":
            return {"xi": State((self.code_size,))}
        layers = {f"layers.{i}.{name}": State((self.d_model,)) for i in range(self.n_layers) for name in self.sums}
        return {"position": State((), integer=True), **layers}


_FIXED_ONLY = ("codes", "code_bits", "frame_size", "frame_head", "decay")
_DEPARTURES = ("channel_weights", "learned_decay", "normalised", "skip")
_ADAPTIVE_ONLY = ("position_bits", "position_offset", "k_scale", "input_norm", "exclusive", "residual", *_DEPARTURES)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(CRAMConfig)}


def _linear(name: str, out: int, into: int, bias: bool = True) -> dict[str, Param]:
    """LeCun normal weight, zero bias."""
    params = {f"{name}.weight": Param((out, into), normal(into**-0.5), weight_decay=True)}
    return {**params, f"{name}.bias": Param((out,), ZEROS)} if bias else params


def _norm(name: str, width: int) -> dict[str, Param]:
    return {f"{name}.weight": Param((width,), ONES), f"{name}.bias": Param((width,), ZEROS)}


CONFIG = CRAMConfig
PRESETS: dict[str, CRAMConfig] = {
    "cram-demo": CRAMConfig(d_model=128, n_layers=4),
    "cram-1m": CRAMConfig(scheme="adaptive", d_model=96, n_layers=12, tie_head=True),
    "cram-plus": CRAMConfig(
        scheme="adaptive", d_model=96, n_layers=12, tie_head=True, input_norm=True, learned_decay=True, normalised=True
    ),
    "cram-paper": CRAMConfig(scheme="adaptive", d_model=768, n_layers=12, vocab_size=50257),
    "cram-fixed-gpt2": CRAMConfig(d_model=768, n_layers=12, vocab_size=50257, code_bits=20),
    "cram-video": CRAMConfig(d_model=512, n_layers=4, codes="frame", frame_size=1024, head_bias=True),
}
