"""The ops with a state as ONNX functions, written in onnxscript: any T ≥ 1 and any B, at a cost linear in T.

A sequence is cut into N = ⌈T/C⌉ chunks of C = min(T, 64) tokens, over which a Scan carries the state; a chunk is a few masked matmuls.
At T = 1 a chunk is that one token. Recurrences without such a form scan over tokens.

Sequences are [B, T, …], marks bool [B, T]; chunks are flattened to [B, C, X], and heads told by the shapes of the states. In chunks:
n_i counts the valid tokens of the chunk up to row i, its own included; `reads` [B, C, C] says whether row i reads row j (valid, not
later, and with no reset between them), `kept` [B, C, 1] whether it still reads the state before the chunk.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (onnxscript types its operators as if they were called with tensors at once)

from __future__ import annotations

from onnxscript import opset21 as op
from onnxscript import script
from onnxscript.values import Opset

OWN = Opset("unisono", 1)


@script(OWN)
def Chunks(x):
    """[B, T, …] → [N, B, C, X], padded by zeros."""
    rows = op.Reshape(x, op.Constant(value_ints=[0, 0, -1]))
    length = op.Shape(rows, start=1, end=2)
    one = op.Constant(value_ints=[1])
    size = op.Min(length, op.Constant(value_ints=[64]))
    number = op.Div(op.Sub(op.Add(length, size), one), size)
    behind = op.Sub(op.Mul(number, size), length)
    pads = op.Concat(op.Constant(value_ints=[0, 0, 0, 0]), behind, op.Constant(value_ints=[0]), axis=0)  # onnxruntime's tools know no axes
    padded = op.Pad(rows, pads)
    shape = op.Concat(op.Constant(value_ints=[0]), number, size, op.Shape(rows, start=2), axis=0)
    return op.Transpose(op.Reshape(padded, shape), perm=[1, 0, 2, 3])


@script(OWN)
def Joined(y, like):
    """[N, B, C, X] → [B, T, X], as long as `like`."""
    shape = op.Concat(op.Constant(value_ints=[0, -1]), op.Shape(y, start=3), axis=0)
    long = op.Reshape(op.Transpose(y, perm=[1, 0, 2, 3]), shape)
    cut = op.Slice(long, op.Constant(value_ints=[0]), op.Shape(like, start=1, end=2), op.Constant(value_ints=[1]))
    # who infers shapes cannot know that T tokens are left
    return op.Reshape(cut, op.Concat(op.Shape(like, start=0, end=2), op.Shape(y, start=3), axis=0))


@script(OWN)
def Output(y, like, valid):
    """[N, B, C, X] → the shape [B, T, …] of `like`, zeros where not valid."""
    shown = op.Where(op.Unsqueeze(valid, op.Constant(value_ints=[2])), Joined(y, like), op.Constant(value_float=0.0))
    return op.Reshape(shown, op.Shape(like))


@script(OWN)
def Numbers(mark):
    """bool → float32, which can be padded and summed."""
    return op.Cast(mark, to=1)


@script(OWN)
def Count(mark):
    """float marks [B, C, 1] → how many came up to each row, as floats.

    The sum is of integers: onnxruntime's converter to float16 leaves CumSum in float32, by casts that it misplaces in the body of a Scan.
    """
    return op.Cast(op.CumSum(op.Cast(mark, to=7), op.Constant(value_int=1)), to=1)


@script(OWN)
def Reads(reset, valid):
    """float marks [B, C, 1] → reads [B, C, C], kept [B, C, 1]."""
    half = op.Constant(value_float=0.5)
    segment = Count(reset)
    same = op.Equal(segment, op.Transpose(segment, perm=[0, 2, 1]))
    size = op.Squeeze(op.Shape(reset, start=1, end=2))
    index = op.Range(op.Constant(value_int=0), size, op.Constant(value_int=1))
    earlier = op.GreaterOrEqual(op.Unsqueeze(index, op.Constant(value_ints=[1])), index)
    present = op.Greater(op.Transpose(valid, perm=[0, 2, 1]), half)
    return op.And(op.And(same, earlier), present), op.Less(segment, half)


@script(OWN)
def Own(reads):
    """Each row itself [C, C]: what a softmax may always divide by."""
    size = op.Squeeze(op.Shape(reads, start=1, end=2))
    index = op.Range(op.Constant(value_int=0), size, op.Constant(value_int=1))
    return op.Equal(op.Unsqueeze(index, op.Constant(value_ints=[1])), index)


@script(OWN)
def LastRow(x):
    """[B, C, X] → [B, X]."""
    return op.Gather(x, op.Constant(value_int=-1), axis=1)


@script(OWN)
def Masked(x, mark):
    """x where `mark` > ½, else 0: no NaN passes."""
    return op.Where(op.Greater(mark, op.Constant(value_float=0.5)), x, op.Constant(value_float=0.0))


@script(OWN)
def Heads(x, heads):
    """[B, C, H·X], [1] → [B, H, C, X]."""
    shape = op.Concat(op.Constant(value_ints=[0, 0]), heads, op.Constant(value_ints=[-1]), axis=0)
    return op.Transpose(op.Reshape(x, shape), perm=[0, 2, 1, 3])


@script(OWN)
def Flat(x):
    """[B, H, C, X] → [B, C, H·X]."""
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))


@script(OWN)
def SlotNumbers(slots):
    """n of each slot [S] of a state that holds the newest token last: …, −1, 0."""
    count = op.Squeeze(op.Shape(slots, start=1, end=2))
    index = op.Range(op.Constant(value_int=0), count, op.Constant(value_int=1))
    return op.Cast(op.Add(op.Sub(index, count), op.Constant(value_int=1)), to=1)


@script(OWN)
def Newest(old, new, reads, kept, n):
    """old [B, S, X], oldest first, and new [B, C, X] → the newest S of both, of the last sequence; zeros in front."""
    place = SlotNumbers(old)
    middle, zero = op.Constant(value_ints=[1]), op.Constant(value_float=0.0)
    stays = LastRow(kept)  # [B, 1]
    held = op.Where(op.Unsqueeze(stays, op.Constant(value_ints=[2])), old, zero)
    moved = op.Transpose(op.Sub(n, op.Unsqueeze(LastRow(n), middle)), perm=[0, 2, 1])  # new n of new tokens [B, 1, C]
    old_moved = op.Unsqueeze(op.Sub(place, LastRow(n)), middle)  # [B, 1, S]
    to = op.Unsqueeze(place, middle)  # [S, 1]
    fresh = op.And(op.Equal(moved, to), op.Unsqueeze(LastRow(reads), middle))  # [B, S, C]
    takes = op.Cast(op.Concat(op.Equal(old_moved, to), fresh, axis=2), to=1)
    return op.MatMul(takes, op.Concat(held, new, axis=1))


@script(OWN)
def Counted(count, reads, kept):
    """Tokens of the last sequence [B, 1] int64, after a chunk before which there were `count`."""
    held = op.Where(LastRow(kept), count, op.Constant(value_int=0))
    return op.Add(held, op.ReduceSum(op.Cast(LastRow(reads), to=7), op.Constant(value_ints=[1])))
