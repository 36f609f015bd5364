"""What a graph may be made of."""

from __future__ import annotations

OPSETS = {"portable": 23, "ort": 23, "opset27": 27}
NEEDED = {"opset27": (1, 32)}  # of onnxruntime, which refuses newer opsets than it was released with
TARGETS = tuple(OPSETS)
PRECISIONS = ("float32", "float16", "int8", "int4")
