"""The Transformer baseline: LAT's blocks with softmax attention and RoPE in every layer."""

from __future__ import annotations

from unisono_spec.contract.lat import LATConfig
from unisono_spec.contract.transformer import TransformerConfig

from unisono_jax.models.lat import LAT


class Transformer(LAT):
    def _blocks(self) -> LATConfig:
        assert isinstance(self.config, TransformerConfig)
        return self.config.as_lat()


MODEL = Transformer
