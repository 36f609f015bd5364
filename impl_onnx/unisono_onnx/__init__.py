"""Models as ONNX graphs, from the contract's parameters alone: no framework is asked (docs/onnx.md)."""

from unisono_onnx.targets import PRECISIONS, TARGETS
from unisono_onnx.writing import export, input_names, output_names

__all__ = ["PRECISIONS", "TARGETS", "export", "input_names", "output_names"]
