"""The Transformer baseline: config, presets, parameters and states. Its blocks are LAT's, with softmax attention and RoPE.

@inproceedings{vaswani2017, title={Attention is All You Need}, booktitle={NeurIPS}, year={2017},
      author={Vaswani, Ashish and Shazeer, Noam and Parmar, Niki and Uszkoreit, Jakob and Jones, Llion and Gomez, Aidan N.
      and Kaiser, Łukasz and Polosukhin, Illia}}
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

from unisono_spec.contract.base import Config, Param, State
from unisono_spec.contract.lat import LATConfig


@dataclasses.dataclass(frozen=True)
class TransformerConfig(Config):
    """Pre-norm causal softmax attention with RoPE and a cache of keys and values. Its state needs a capacity."""

    arch: ClassVar[str] = "transformer"

    d_model: int = 512  # D
    n_layers: int = 6
    vocab_size: int = 50257  # V
    head_width: int = 64  # there are D / head_width heads
    ffn_mult: int = 4  # the FFN is D → ffn_mult·D → D, exact GELU
    rope_base: float = 10000.0
    tie_head: bool = False  # head.weight is embedding.weight
    head_bias: bool = True
    dropout: float = 0.0  # after each mixer and each FFN, in training only

    def validate(self) -> None:
        self.at_least(1, "head_width", "ffn_mult")
        if self.d_model % self.head_width or self.head_width % 2:
            self.fail("head_width", f"it must divide d_model={self.d_model}, and be even for RoPE")
        if not self.rope_base > 1:
            self.fail("rope_base", "use a number above 1; the default is 10000")

    def as_lat(self) -> LATConfig:
        """The same model as a LAT config."""
        return self._lat

    @functools.cached_property
    def _lat(self) -> LATConfig:
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return LATConfig(attention="softmax", positions="rope", **shared)

    @property
    def n_updates(self) -> int:
        return 2 * self.n_layers

    def params(self) -> dict[str, Param]:
        """Every parameter, in order."""
        return self.as_lat().params()

    def states(self, capacity: int | None = None) -> dict[str, State]:
        """Every state array: keys and values by position."""
        return self.as_lat().states(capacity)


CONFIG = TransformerConfig
PRESETS: dict[str, TransformerConfig] = {
    "transformer-base": TransformerConfig(),
    "transformer-1m": TransformerConfig(d_model=128, n_layers=5, vocab_size=256, head_width=32),
}
