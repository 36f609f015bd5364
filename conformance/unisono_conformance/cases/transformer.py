"""The Transformer baseline before the court: LAT's blocks, with a cache."""

from __future__ import annotations

from typing import Any

from unisono_spec.contract.lat import LATConfig
from unisono_spec.contract.transformer import TransformerConfig

from unisono_conformance.cases.lat import LAT
from unisono_conformance.cases.pairwise import pairwise


class Transformer(LAT):
    name = arch = "transformer"
    defaults = ("plain",)
    regimes = ("tame", "offset", "large", "dropout")

    def __init__(self) -> None:
        small: dict[str, Any] = {"d_model": 4, "n_layers": 2, "head_width": 2, "vocab_size": 7, "ffn_mult": 1}
        self.wide = {"wide": TransformerConfig(**{**small, "d_model": 96, "n_layers": 1, "head_width": 32})}
        # a dropout rate in the config must not act in evaluation
        self.variants = {
            "plain": TransformerConfig(**{**small, "d_model": 8, "head_width": 4}, dropout=0.25),  # RoPE's second pair tells its base
            **{str(i): TransformerConfig(**{**small, **row}) for i, row in enumerate(pairwise(FLAGS, lambda row: True))},
        }

    def blocks(self, setting: TransformerConfig) -> LATConfig:
        return setting.as_lat()


FLAGS = {"tie_head": (False, True), "head_bias": (True, False), "head_width": (2, 4), "rope_base": (100.0, 10000.0)}

CASES = (Transformer(),)
