"""Functions of torch that its exporter would translate with a loss of digits."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (onnxscript types its operators as if they were called with tensors at once)

from __future__ import annotations

from typing import Any

from onnxscript import opset18 as op  # in which the exporter traces, before it converts to the opset that was asked for


def log_sigmoid(x: Any) -> Any:
    """min(x, 0) − log(1 + e^{−|x|}); the exporter's log σ(x) is 0 for x > 17, and −∞ for x < −88.

    ONNX has no log1p: log(1 + e) is 2 artanh(e / (2 + e)), to all digits also where e is small.
    """
    e = op.Exp(op.Neg(op.Abs(x)))
    two = op.CastLike(op.Constant(value_float=2.0), x)
    return op.Sub(op.Neg(op.Relu(op.Neg(x))), op.Mul(two, op.Atanh(op.Div(e, op.Add(two, e)))))
