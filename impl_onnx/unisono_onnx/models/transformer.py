"""The Transformer baseline: LAT's blocks with softmax attention and RoPE in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unisono_onnx.builder import Builder, Value
from unisono_onnx.models import lat
from unisono_onnx.models.blocks import States

if TYPE_CHECKING:
    from unisono_spec.contract.transformer import TransformerConfig


def read(g: Builder, state: States) -> tuple[Value, States]:
    config: TransformerConfig = g.config  # pyright: ignore[reportAssignmentType]
    return lat.read(g, state, config.as_lat())
