"""LAT, the linear attention transformer, and Based: config, presets, parameters and states.

@inproceedings{katharopoulos2020, title={Transformers are {RNN}s: Fast Autoregressive Transformers with Linear Attention},
      author={Katharopoulos, Angelos and Vyas, Apoorv and Pappas, Nikolaos and Fleuret, François}, booktitle={ICML}, year={2020}}
@inproceedings{arora2024based, title={Simple linear attention language models balance the recall-throughput tradeoff},
      author={Arora, Simran and Eyuboglu, Sabri and Zhang, Michael and Timalsina, Aman and Alberti, Silas and Zinsley, Dylan
      and Zou, James and Rudra, Atri and Ré, Christopher}, booktitle={ICML}, year={2024}}
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from unisono_spec.contract import parts
from unisono_spec.contract.base import ANY, Config, Param, State
from unisono_spec.contract.errors import nearest
from unisono_spec.contract.initial import ONES

MIXERS = ("linear", "window", "softmax", "conv")


@dataclasses.dataclass(frozen=True)
class LATConfig(Config):
    """A transformer whose layers mix over time by linear attention, or by another mixer where `attention` says so."""

    arch: ClassVar[str] = "lat"

    d_model: int = 512  # D
    n_layers: int = 6
    vocab_size: int = 50257  # V
    head_width: int = 64  # of v, and of q and k under softmax; there are D / head_width heads
    attention: str | tuple[str, ...] = "linear"  # linear, window, softmax or conv for all layers, or one for each: a hybrid
    feature_map: Literal["elu1", "relu", "taylor2", "learned"] = "elu1"  # φ of the linear layers
    qk_width: int = 64  # K, of q and k in the linear layers; at most 16 for taylor2
    head_norm: bool = False  # RMSNorm of what each head of a linear layer reads
    window: int = 64  # w: how many tokens a window layer attends to, its own included
    conv_width: int = 3  # taps of a conv layer
    conv_mult: int = 4  # a conv layer is D → conv_mult·D, split in two halves, → D
    positions: Literal["none", "learned", "rope"] = "none"
    max_positions: int = 2048  # of positions="learned", which fail beyond
    rope_base: float = 10000.0
    norm: Literal["layer", "rms"] = "layer"
    ffn: Literal["gelu", "swiglu"] = "gelu"  # exact GELU
    ffn_mult: int = 4  # the FFN is D → ffn_mult·D → D
    bias: bool = True  # of every Linear and convolution but the head
    tie_head: bool = False  # head.weight is embedding.weight
    head_bias: bool = True
    dropout: float = 0.0  # after each mixer and each FFN, in training only

    def validate(self) -> None:
        self.at_least(1, "head_width", "qk_width", "window", "conv_width", "conv_mult", "ffn_mult", "max_positions")
        if self.d_model % self.head_width:
            self.fail("head_width", f"it must divide d_model={self.d_model}")
        for kind in self.kinds:
            if kind not in MIXERS:
                self.fail("attention", nearest(kind, MIXERS))
        if len(self.kinds) != self.n_layers:
            self.fail("attention", f"give one mixer, or one for each of the {self.n_layers} layers")
        if "conv" in self.kinds and self.conv_mult * self.d_model % 2:
            self.fail("conv_mult", "conv_mult·d_model is split in two halves; make it even")
        if "linear" in self.kinds and self.feature_map == "taylor2" and self.qk_width > 16:
            self.fail("qk_width", "taylor2 widens it to 1 + K + K²; use at most 16")
        if not self.rope_base > 1:
            self.fail("rope_base", "use a number above 1; the default is 10000")
        if self.positions == "rope":
            self._validate_rope()

    def _validate_rope(self) -> None:
        if "linear" in self.kinds and self.qk_width % 2:
            self.fail("qk_width", "RoPE rotates pairs; use an even width")
        if {"window", "softmax"} & set(self.kinds) and self.head_width % 2:
            self.fail("head_width", "RoPE rotates pairs; use an even width")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The mixer of each layer."""
        return (self.attention,) * self.n_layers if isinstance(self.attention, str) else self.attention

    @property
    def n_heads(self) -> int:
        return self.d_model // self.head_width

    @property
    def feature_width(self) -> int:
        """Width of φ(q) and φ(k)."""
        return 1 + self.qk_width + self.qk_width**2 if self.feature_map == "taylor2" else self.qk_width

    @property
    def conv_inner(self) -> int:
        """Channels of a conv layer's convolution."""
        return self.conv_mult * self.d_model // 2

    @property
    def longest(self) -> int | None:
        return self.max_positions if self.positions == "learned" else None

    @property
    def n_updates(self) -> int:
        return 2 * self.n_layers

    def params(self) -> dict[str, Param]:
        """Every parameter, in order."""
        d, std = self.d_model, parts.residual_std(self.n_layers)
        out = parts.embedding("embedding", self.vocab_size, d)
        if self.positions == "learned":
            out |= parts.embedding("position_embedding", self.max_positions, d)
        for i, kind in enumerate(self.kinds):
            out |= parts.norm(f"layers.{i}.mixer_norm", d, self.norm)
            out |= self._mixer(f"layers.{i}.mixer", kind, std)
            out |= parts.norm(f"layers.{i}.ffn_norm", d, self.norm)
            if self.ffn == "swiglu":
                out |= parts.linear(f"layers.{i}.ffn.gate", self.ffn_mult * d, d, self.bias)
            out |= parts.linear(f"layers.{i}.ffn.up", self.ffn_mult * d, d, self.bias)
            out |= parts.linear(f"layers.{i}.ffn.down", d, self.ffn_mult * d, self.bias, std)
        out |= parts.norm("norm", d, self.norm)
        return out | parts.head(self.vocab_size, d, self.tie_head, self.head_bias)

    def _mixer(self, name: str, kind: str, std: float) -> dict[str, Param]:
        d = self.d_model
        if kind == "conv":
            return {
                **parts.linear(f"{name}.input", 2 * self.conv_inner, d, self.bias),  # rows: a, b
                **parts.conv(f"{name}.conv", self.conv_inner, self.conv_width, self.bias),
                **parts.linear(f"{name}.out", d, self.conv_inner, self.bias, std),
            }
        width = self.qk_width if kind == "linear" else self.head_width
        out = parts.linear(f"{name}.qkv", 2 * self.n_heads * width + d, d, self.bias)  # rows: q, k, v, each head after head
        if kind == "linear" and self.feature_map == "learned":
            out[f"{name}.tau"] = Param((1,), ONES)
        if kind == "linear" and self.head_norm:
            out |= parts.norm(f"{name}.head_norm", self.head_width, "rms")
        return out | parts.linear(f"{name}.out", d, d, self.bias, std)

    def states(self, capacity: int | None = None) -> dict[str, State]:
        """Every state array. k and v of a window stand oldest first, the newest last; those of softmax by their position."""
        out = {"position": State((), integer=True)}
        heads, width = self.n_heads, self.head_width
        for i, kind in enumerate(self.kinds):
            layer = f"layers.{i}"
            if kind == "linear":
                out[f"{layer}.S"] = State((heads, self.feature_width, width))
                out[f"{layer}.z"] = State((heads, self.feature_width))
            elif kind == "conv":
                out[f"{layer}.conv"] = State((self.conv_width - 1, self.conv_inner))
            else:
                length = self.window if kind == "window" else ANY if capacity is None else capacity
                out |= {f"{layer}.{name}": State((length, heads, width)) for name in "kv"}
        return out


def _based(n_layers: int) -> tuple[str, ...]:
    """Of every five layers, the second is linear and the third a window (Arora et al., appendix)."""
    return tuple({1: "linear", 2: "window"}.get(i % 5, "conv") if i < 25 else "conv" for i in range(n_layers))


_BASED = LATConfig(
    d_model=1024,
    n_layers=27,
    attention=_based(27),
    feature_map="taylor2",
    qk_width=16,
    norm="rms",
    ffn="swiglu",
    ffn_mult=2,
    bias=False,
    tie_head=True,
    head_bias=False,
)
_1M = LATConfig(d_model=128, n_layers=5, vocab_size=256, head_width=32, qk_width=32)

CONFIG = LATConfig
PRESETS: dict[str, LATConfig] = {
    "lat-base": LATConfig(),
    "lat-bytes": LATConfig(vocab_size=256),
    "lat-1m": _1M,
    "linear-transformer-1m": _1M,  # LAT with elu1 is the Linear Transformer of Katharopoulos et al.
    "based": _BASED,
    "based-1m": _BASED.replace(d_model=96, n_layers=10, vocab_size=256, head_width=16, attention=_based(10)),
}
