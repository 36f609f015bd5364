"""Functions without memory that ONNX has not, or not to all digits."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (onnxscript types its operators as if they were called with tensors at once)

from __future__ import annotations

from onnxscript import opset23 as op
from onnxscript import script

from unisono_onnx.ops.chunks import OWN


@script(OWN)
def Softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + e), e = e^{−|x|}.

    ONNX has no log1p: log(1 + e) is 2 artanh(e / (2 + e)), to all digits also where e is small.
    """
    e, two = op.Exp(op.Neg(op.Abs(x))), op.Constant(value_float=2.0)
    return op.Add(op.Relu(x), op.Mul(two, op.Atanh(op.Div(e, op.Add(two, e)))))


@script(OWN)
def Elu1(x):
    """x + 1 above 0 and e^x below: Elu(x) + 1 rounds to 0 where e^x has not yet."""
    zero, one = op.Constant(value_float=0.0), op.Constant(value_float=1.0)
    return op.Where(op.Greater(x, zero), op.Add(x, one), op.Exp(op.Min(x, zero)))


@script(OWN)
def Taylor2(x):
    """[..., K] → [1, x / K^¼, vec(x xᵀ) / √(2K)]."""
    last, two = op.Constant(value_ints=[-1]), op.Constant(value_float=2.0)
    k = op.Cast(op.Shape(x, start=-1), to=1)
    ahead = op.Shape(x, start=0, end=-1)
    outer = op.Mul(op.Unsqueeze(x, last), op.Unsqueeze(x, op.Constant(value_ints=[-2])))
    square = op.Div(op.Reshape(outer, op.Concat(ahead, last, axis=0)), op.Sqrt(op.Mul(two, k)))
    ones = op.Expand(op.Constant(value_float=1.0), op.Concat(ahead, op.Constant(value_ints=[1]), axis=0))
    return op.Concat(ones, op.Div(x, op.Sqrt(op.Sqrt(k))), square, axis=-1)
