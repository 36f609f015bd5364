"""The ops with a state, and functions that ONNX lacks, written in onnxscript (docs/onnx.md)."""
