"""What a graph may be made of."""

from __future__ import annotations

# 21: onnxruntime knows it since 1.20, and it has all that these graphs need
OPSETS = {"portable": 21, "ort": 21, "opset27": 27}
IR_VERSIONS = {21: 10, 27: 13}  # the file format's, released with the opset: what reads the one reads the other
NEEDED = {"opset27": (1, 32)}  # of onnxruntime, which refuses newer opsets than it was released with
TARGETS = tuple(OPSETS)
PRECISIONS = ("float32", "float16", "int8", "int4")
