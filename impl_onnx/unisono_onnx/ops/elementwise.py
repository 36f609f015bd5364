"""Functions without memory that ONNX has not, or not to all digits."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (onnxscript types its operators as if they were called with tensors at once)

from __future__ import annotations

from onnxscript import opset21 as op
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
def Logistic(x):
    """σ(x) = 1 / (1 + e^−x), to its last digits: onnxruntime's Sigmoid is a rational function, off by 1e-7 however small σ(x) is.

    e^88 is the last power of e that float32 holds; e^−88 is no normal number any more.
    """
    one = op.Constant(value_float=1.0)
    return op.Div(one, op.Add(one, op.Exp(op.Clip(op.Neg(x), None, op.Constant(value_float=88.0)))))


@script(OWN)
def RMSNorm(x, weight, epsilon: float):
    """x / √(mean x² + ε) · weight, by the nodes in which onnxruntime knows one norm; opset 23 was the first to have an operator."""
    square = op.Pow(x, op.Constant(value_float=2.0))
    mean = op.ReduceMean(square, op.Constant(value_ints=[-1]), keepdims=1)
    return op.Mul(op.Div(x, op.Sqrt(op.Add(mean, op.Constant(value_float=epsilon)))), weight)


@script(OWN)
def SiLU(x):
    """x σ(x)."""
    return op.Div(x, op.Add(op.Constant(value_float=1.0), op.Exp(op.Clip(op.Neg(x), None, op.Constant(value_float=88.0)))))


@script(OWN)
def TanhGELU(x):
    """x σ(2u), u = √(2/π) (x + 0.044715 x³), for ½(1 + tanh u) has no digits where it is small."""
    inner = op.Add(op.Constant(value_float=1.5957691216), op.Mul(op.Constant(value_float=0.0713548162726), op.Mul(x, x)))
    return op.Mul(x, Logistic(op.Mul(x, inner)))


@script(OWN)
def GELU(x):
    """x Φ(x), Φ(x) = ½ erfc(−x/√2), for ½(1 + erf) has no digits where it is small, and ONNX has no erfc.

    erfc(z) = t p(t) e^{−z²}, t = 2 / (2 + z), for z ≥ 0: p of degree 8, with the least greatest relative error up to z = 10, where erfc
    leaves float32 (Lawson's algorithm; off by 0.7 roundings). erfc(−z) = 2 − erfc(z).
    """
    zero, two = op.Constant(value_float=0.0), op.Constant(value_float=2.0)
    z = op.Mul(op.Abs(x), op.Constant(value_float=0.70710678))
    t = op.Div(two, op.Add(two, z))
    p = op.Constant(value_float=-0.0590977468)
    p = op.Add(op.Mul(p, t), op.Constant(value_float=0.284715757))
    p = op.Add(op.Mul(p, t), op.Constant(value_float=-0.487492211))
    p = op.Add(op.Mul(p, t), op.Constant(value_float=0.27840257))
    p = op.Add(op.Mul(p, t), op.Constant(value_float=-0.0268574829))
    p = op.Add(op.Mul(p, t), op.Constant(value_float=0.20278531))
    p = op.Add(op.Mul(p, t), op.Constant(value_float=0.243078783))
    p = op.Add(op.Mul(p, t), op.Constant(value_float=0.282378758))
    p = op.Add(op.Mul(p, t), op.Constant(value_float=0.28208622))
    tail = op.Mul(op.Mul(p, t), op.Exp(op.Neg(op.Mul(z, z))))
    return op.Mul(op.Mul(x, op.Constant(value_float=0.5)), op.Where(op.Greater(x, zero), op.Sub(two, tail), tail))


@script(OWN)
def Elu1(x):
    """x + 1 above 0 and e^x below: Elu(x) + 1 rounds to 0 where e^x has not yet."""
    zero, one = op.Constant(value_float=0.0), op.Constant(value_float=1.0)
    return op.Where(op.Greater(x, zero), op.Add(x, one), op.Exp(op.Neg(op.Relu(op.Neg(x)))))


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
