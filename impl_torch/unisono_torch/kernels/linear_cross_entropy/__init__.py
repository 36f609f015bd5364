"""`unisono::linear_cross_entropy`: logits, their loss and its gradient, so many rows at a time in one buffer.

Its columns are padded to a multiple of 64, since cuBLAS takes ten times as long for products 50,257 wide, and memory 2 bytes a store. They
take no part in a row's sum, are 0 in the gradient that takes the logits' place, and meet rows of zeros of the weights. Gradients of x and
of the weights are made forward, of Σ nats, in float32; backward multiplies them by what comes from above: no logits wait for it.
"""

# Triton's own language, which checkers of Python read wrongly
# pyright: basic, reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from unisono_torch.ops import linear_cross_entropy as op
from unisono_torch.ops.elementwise import ALIGNED
from unisono_torch.ops.transforms import again

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
BLOCK, EACH = 8192, 512  # columns of a block, and of one of its warps: so many that the rows under way fit into a GPU's L2
ROOM = 1 << 31  # bytes of logits at a time
TILE = 128  # rows of a product's tile, of which pieces are multiples
SCALE = 2.0**14  # of float16's gradient of logits: it has few digits below 6e-5, which shares of many ids are


@triton.jit
def nats_of_rows(logits, targets, nats, V, step, SCALE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """A program a row of `step` columns, V of them logits; with GRADIENT, that of its nats, times SCALE, comes to stand in its place."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits += row * step
    target = tl.load(targets + row)
    asked = target >= 0
    # before a gradient is written there
    mine = tl.load(logits + target, mask=asked & (target < V), other=float("nan")).to(tl.float32)
    most, total = float("-inf"), 0.0
    for start in range(0, step, BLOCK):
        x = tl.load(logits + start + column, mask=start + column < step, other=0.0).to(tl.float32)
        x = tl.where(start + column < V, x, float("-inf"))
        larger = tl.maximum(most, tl.max(x, 0))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # −∞ from itself is NaN
        total = total * tl.exp2((most - base) * LOG2E) + tl.sum(tl.exp2((x - base) * LOG2E), 0)
        most = larger
    tl.store(nats + row, tl.where(asked, most - mine + tl.log2(total) * LN2, 0.0))
    if GRADIENT:
        inverse = 1 / total
        for start in range(0, step, BLOCK):
            # whole padded rows, so that stores are wide
            at, there = logits + start + column, start + column < step
            x = tl.load(at, mask=there, other=0.0).to(tl.float32)
            x = tl.where(start + column < V, x, float("-inf"))
            share = tl.exp2((x - most) * LOG2E) * inverse - tl.where(start + column == target, 1.0, 0.0)
            share = tl.where(asked, share * SCALE, 0.0)
            tl.store(at, share.to(logits.dtype.element_ty), mask=there)


@torch.library.custom_op(
    "unisono::linear_cross_entropy",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor targets, bool of_x, bool of_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_cross_entropy(x, weight, bias, targets, of_x, of_weight):
    """As ops/linear_cross_entropy.py, float32 or narrower → Σ nats, nats, and of that sum the gradients of x, weight and bias, float32,
    times SCALE; those that are not asked for, by of_x and of_weight (bias too), are empty."""
    _, nats, dx, dweight, dbias = _fake(x, weight, bias, targets, of_x, of_weight)
    rows, asked, width = x.reshape(-1, x.shape[-1]), targets.reshape(-1).contiguous(), len(weight)
    padded = width + -width % ALIGNED
    weight, bias = _padded(weight.to(x.dtype), padded), None if bias is None else _padded(bias.to(x.dtype), padded)
    pieces = -(-len(rows) * padded * x.element_size() // ROOM)
    each = max(1, len(rows)) if pieces < 2 else triton.cdiv(triton.cdiv(len(rows), pieces), TILE) * TILE
    buffer = x.new_empty((min(each, len(rows)), padded))
    by_weight = dweight.new_zeros((padded, x.shape[-1])) if of_weight else None
    dbias.zero_()
    for first in range(0, len(rows), each):
        piece = slice(first, first + each)
        # a row that is not asked may hold anything
        given = torch.where(asked[piece, None] >= 0, rows[piece], 0)
        logits = buffer[: len(given)]
        if bias is None:
            torch.mm(given, weight.mT, out=logits)
        else:
            torch.addmm(bias, given, weight.mT, out=logits)
        _launch(logits, asked[piece], nats.view(-1)[piece], width, of_x or of_weight)
        if of_x:
            dx.view(rows.shape)[piece] = _product(logits, weight)
        if by_weight is not None:
            by_weight += _product(logits.mT, given)
            if bias is not None:
                dbias += logits.sum(0, dtype=torch.float32)[:width]
    return nats.sum(), nats, dx, dweight if by_weight is None else by_weight[:width], dbias


@linear_cross_entropy.register_fake
def _fake(x, weight, bias, targets, of_x, of_weight):
    def wide(*shape):
        return x.new_empty(shape, dtype=torch.float32)

    return (
        wide(), wide(*targets.shape), wide(*(x.shape if of_x else (0,))), wide(*(weight.shape if of_weight else (0,))),
        wide(len(weight) if of_weight and bias is not None else 0),
    )  # fmt: skip


def _padded(a: Tensor, rows: int) -> Tensor:
    """With rows of zeros, where it has fewer."""
    return F.pad(a, (0, 0) * (a.ndim - 1) + (0, rows - len(a))) if rows > len(a) else a.contiguous()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, which sums of products of narrower numbers are held in anyway."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _scale(dtype: torch.dtype) -> float:
    return SCALE if dtype == torch.float16 else 1.0


def _launch(logits: Tensor, targets: Tensor, nats: Tensor, width: int, gradient: bool) -> None:
    """logits [N, P], of which `width` columns are; targets, nats [N]."""
    block = min(BLOCK, triton.next_power_of_2(logits.shape[1]))
    with torch.cuda.device_of(logits):
        nats_of_rows[(len(logits),)](
            logits, targets, nats, width, logits.stride(0), _scale(logits.dtype), gradient, block, num_warps=max(1, block // EACH)
        )


def _setup(ctx, inputs, output) -> None:
    _, _, *gradients = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4], *gradients)


def _backward(ctx, upstream, *_):
    *inputs, dx, dweight, dbias = ctx.saved_tensors
    needed = ctx.needs_input_grad
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        found = again(lambda *given: op.plain(*given)[0], inputs, needed[:4], (upstream,))
    else:
        pairs = zip(inputs[:3], (dx, dweight, dbias), needed, strict=False)
        upstream = upstream / _scale(inputs[0].dtype)
        found = [(upstream * d).to(a.dtype) if need else None for a, d, need in pairs]
    return *found[:3], None, None, None


linear_cross_entropy.register_autograd(_backward, setup_context=_setup)
