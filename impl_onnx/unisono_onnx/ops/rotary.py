"""Rotary position embedding as ONNX functions, by the tables of ops/rotary.py."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (onnxscript types its operators as if they were called with tensors at once)

from __future__ import annotations

from onnxscript import opset21 as op
from onnxscript import script

from unisono_onnx.ops.chunks import OWN


@script(OWN)
def Digit(table, digit, place):
    """table [2, 4, 256, K/2], digit [B, T] at `place` → its cos, sin [B, T, K/2]."""
    found = op.Gather(op.Gather(table, place, axis=1), digit, axis=1)
    return op.Gather(found, op.Constant(value_int=0), axis=0), op.Gather(found, op.Constant(value_int=1), axis=0)


@script(OWN)
def Times(a, b, c, d):
    """(a + ib)(c + id)."""
    return op.Sub(op.Mul(a, c), op.Mul(b, d)), op.Add(op.Mul(a, d), op.Mul(b, c))


@script(OWN)
def CosSin(position, table):
    """position [B, T] int32, cos and sin of each digit's angle in base 256 [2, 4, 256, K/2] → those of the position [B, T, K/2]."""
    base = op.Constant(value_int=256)
    first = op.Cast(position, to=7)
    second = op.Div(first, base)
    third = op.Div(second, base)
    cos_0, sin_0 = Digit(table, op.Mod(first, base), op.Constant(value_int=0))
    cos_1, sin_1 = Digit(table, op.Mod(second, base), op.Constant(value_int=1))
    cos_2, sin_2 = Digit(table, op.Mod(third, base), op.Constant(value_int=2))
    cos_3, sin_3 = Digit(table, op.Div(third, base), op.Constant(value_int=3))
    low_cos, low_sin = Times(cos_0, sin_0, cos_1, sin_1)
    lower_cos, lower_sin = Times(low_cos, low_sin, cos_2, sin_2)
    cos, sin = Times(lower_cos, lower_sin, cos_3, sin_3)
    return cos, sin


@script(OWN)
def Rotate(x, cos, sin):
    """x [B, T, H, K], cos and sin [B, T, K/2] → x, rotated."""
    heads = op.Constant(value_ints=[2])
    first, second = op.Split(x, num_outputs=2, axis=-1)
    rotated, across = Times(first, second, op.Unsqueeze(cos, heads), op.Unsqueeze(sin, heads))
    return op.Concat(rotated, across, axis=-1)
