"""Export to ONNX: one graph that reads sequences of any length and decodes token by token (docs/onnx.md)."""

from unisono_torch.onnx.export import export

__all__ = ["export"]
