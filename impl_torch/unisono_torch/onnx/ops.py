"""The sequence ops as ONNX functions: any T ≥ 1 and any B, at a cost linear in T and with a carry of constant size.

While torch traces a model for export, each sequence op leaves one node of the domain "unisono", which `inline` then replaces by
standard operators. So the tracer meets no arithmetic on lengths, which it would freeze at the traced length or take minutes over.

Tokens are cut into N = ⌈T/C⌉ chunks of C = min(T, 64). Sums inside chunks are one masked matmul; a Scan of N small steps carries the
state from chunk to chunk. At T = 1 all of it shrinks to one token: the same graph decodes, without padding.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

DOMAIN = "unisono"
_HEAD = f'<domain: "{DOMAIN}", opset_import: ["": 23, "{DOMAIN}": 1]>'

# In ONNX's own notation; each is `name <attributes> (inputs) => (outputs)`.
FUNCTIONS = (
    # x [B, T, …] → y [B, N, C, …], padded by zeros
    """Cut (x) => (y) {
        zero = Constant <value_ints: ints = [0]> ()
        one = Constant <value_ints: ints = [1]> ()
        limit = Constant <value_ints: ints = [64]> ()
        length = Shape <start: int = 1, end: int = 2> (x)
        chunk = Min (length, limit)
        up = Sub (chunk, one)
        most = Add (length, up)
        n = Div (most, chunk)
        whole = Mul (n, chunk)
        behind = Sub (whole, length)
        pads = Concat <axis: int = 0> (zero, behind)
        nothing = Constant <value_int: int = 0> ()
        filling = CastLike (nothing, x)
        padded = Pad (x, pads, filling, one)
        rest = Shape <start: int = 2> (x)
        shape = Concat <axis: int = 0> (zero, n, chunk, rest)
        y = Reshape (padded, shape)
    }""",
    # y [B, N, C, D], valid [B, T] → x [B, T, D]
    """Join (y, valid) => (x) {
        zero = Constant <value_ints: ints = [0]> ()
        one = Constant <value_ints: ints = [1]> ()
        free = Constant <value_ints: ints = [-1]> ()
        width = Shape <start: int = 3> (y)
        shape = Concat <axis: int = 0> (zero, free, width)
        long = Reshape (y, shape)
        length = Shape <start: int = 1, end: int = 2> (valid)
        x = Slice (long, zero, length, one)
    }""",
    # reset [B, T] → which tokens each token sums [B, N, C, C], query by key, and whether it still reads the carry [B, N, C, 1]
    """Reads <exclusive> (reset) => (reads, kept) {
        number = Cast <to: int = 6> (reset)
        cut = Cut (number)
        two = Constant <value_int: int = 2> ()
        segment = CumSum (cut, two)
        last = Constant <value_ints: ints = [3]> ()
        third = Constant <value_ints: ints = [2]> ()
        query = Unsqueeze (segment, last)
        key = Unsqueeze (segment, third)
        same = Equal (query, key)
        nothing = Constant <value_int: int = 0> ()
        step = Constant <value_int: int = 1> ()
        size = Shape <start: int = 2> (segment)
        scalar = Squeeze (size)
        index = Range (nothing, scalar, step)
        apart = Constant <value_int: int = @exclusive> ()
        latest = Sub (index, apart)
        back = Constant <value_ints: ints = [1]> ()
        row = Unsqueeze (latest, back)
        earlier = GreaterOrEqual (row, index)
        reads = And (same, earlier)
        none = CastLike (nothing, segment)
        kept = Equal (query, none)
    }""",
    # x [B, N, C, D] → its last row in each chunk, time first [N, B, D]
    """Last (x) => (y) {
        end = Constant <value_int: int = -1> ()
        rows = Gather <axis: int = 2> (x, end)
        y = Transpose <perm: ints = [1, 0, 2]> (rows)
    }""",
    # kept [B, N, C, 1], factor [N, B, 1], own [N, B, D], state [B, D] → the state before each chunk [B, N, 1, D], and after the last
    """Carry (kept, factor, own, state) => (before, final) {
        keep = Last (kept)
        final, each = Scan <num_scan_inputs: int = 3, body: graph = chunk (carry, keep_n, factor_n, own_n) => (next, now) {
            nothing = Constant <value_int: int = 0> ()
            zero = CastLike (nothing, carry)
            scaled = Mul (carry, factor_n)
            held = Where (keep_n, scaled, zero)
            next = Add (held, own_n)
            now = Identity (carry)
        }> (state, keep, factor, own)
        rows = Transpose <perm: ints = [1, 0, 2]> (each)
        two = Constant <value_ints: ints = [2]> ()
        before = Unsqueeze (rows, two)
    }""",
    # ξ_t = Σ_{j≤t} (1−λ) λ^{n_t−n_j} σ(x_j) + λ^{n_t} ξ_{−1}, n counting valid tokens; rate is log λ, gain 1−λ
    """DecayedSum <rate, gain> (x, initial, reset, valid) => (xi, final) {
        nothing = Constant <value_float: float = 0.0> ()
        depth = Constant <value_ints: ints = [2]> ()
        read = Unsqueeze (valid, depth)
        sigma = Sigmoid (x)
        scale = Constant <value_float: float = @gain> ()
        scaled = Mul (sigma, scale)
        masked = Where (read, scaled, nothing)
        u = Cut (masked)
        one = Cast <to: int = 1> (read)
        ones = Cut (one)
        along = Constant <value_int: int = 2> ()
        n = CumSum (ones, along)
        reads, kept = Reads <exclusive: int = 0> (reset)
        rows = Transpose <perm: ints = [0, 1, 3, 2]> (n)
        gap = Sub (n, rows)
        power = Where (reads, gap, nothing)
        log = Constant <value_float: float = @rate> ()
        exponent = Mul (power, log)
        decayed = Exp (exponent)
        weight = Where (reads, decayed, nothing)
        inner = MatMul (weight, u)
        own = Last (inner)
        whole = Mul (n, log)
        fade = Exp (whole)
        factor = Last (fade)
        before, final = Carry (kept, factor, own, initial)
        faded = Mul (fade, before)
        carried = Where (kept, faded, nothing)
        y = Add (inner, carried)
        xi = Join (y, valid)
    }""",
    # ξ_t = ξ_{−1} + Σ_{j≤t} s_j σ(x_j), or j<t if exclusive
    """WeightedSum <exclusive> (x, s, initial, reset, valid) => (xi, final) {
        nothing = Constant <value_float: float = 0.0> ()
        depth = Constant <value_ints: ints = [2]> ()
        read = Unsqueeze (valid, depth)
        weight = Unsqueeze (s, depth)
        sigma = Sigmoid (x)
        term = Mul (weight, sigma)
        masked = Where (read, term, nothing)
        xi, final = SegmentedSum <exclusive: int = @exclusive> (masked, initial, reset, valid)
    }""",
    # v [B, T, D] → its sums since the last reset, of int32 or float32
    """SegmentedSum <exclusive> (v, initial, reset, valid) => (xi, final) {
        u = Cut (v)
        f = Cast <to: int = 1> (u)
        reads, kept = Reads <exclusive: int = @exclusive> (reset)
        mask = Cast <to: int = 1> (reads)
        sums = MatMul (mask, f)
        inner = CastLike (sums, v)
        all, unused = Reads <exclusive: int = 0> (reset)
        full = Cast <to: int = 1> (all)
        end = Constant <value_ints: ints = [-1]> ()
        row = Gather <axis: int = 2> (full, end)
        total = MatMul (row, f)
        typed = CastLike (total, v)
        own = Last (typed)
        always = CastLike (kept, v)
        factor = Last (always)
        before, final = Carry (kept, factor, own, initial)
        nothing = Constant <value_int: int = 0> ()
        zero = CastLike (nothing, v)
        carried = Where (kept, before, zero)
        y = Add (inner, carried)
        xi = Join (y, valid)
    }""",
    # valid tokens read before each token [B, T] int32; counts within a chunk are at most 64, so exact in float32
    """Position (initial, reset, valid) => (position, final) {
        one = Constant <value_ints: ints = [1]> ()
        two = Constant <value_ints: ints = [2]> ()
        number = Cast <to: int = 6> (valid)
        v = Unsqueeze (number, two)
        start = Unsqueeze (initial, one)
        count, end = SegmentedSum <exclusive: int = 1> (v, start, reset, valid)
        position = Squeeze (count, two)
        final = Squeeze (end, one)
    }""",
)


def decayed_sum(x: Tensor, decay: float, initial_state: Tensor, reset: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The node that stands for `unisono_torch.ops.decayed_sum.parallel`."""
    # log λ from float64: powers stay right to float32 where λ is near 1
    attributes = {"rate": math.log(decay), "gain": 1 - decay}
    return _node("DecayedSum", (x, initial_state, reset, valid), attributes, x, initial_state)


def weighted_sum(x: Tensor, s: Tensor, initial_state: Tensor, reset: Tensor, valid: Tensor, exclusive: bool) -> tuple[Tensor, Tensor]:
    """The node that stands for `unisono_torch.ops.weighted_sum.parallel`."""
    return _node("WeightedSum", (x, s, initial_state, reset, valid), {"exclusive": int(exclusive)}, x, initial_state)


def position(initial_state: Tensor, reset: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The node that stands for `unisono_torch.ops.position.parallel`."""
    return _node("Position", (initial_state, reset, valid), {}, valid, initial_state)


def _node(name: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], like: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{name}", inputs, attributes, dtypes=(state.dtype, state.dtype), shapes=(like.shape, state.shape), version=1
    )
    return out[0], out[1]


def inline(model: Any) -> None:
    """Replace every node of the domain "unisono" in `model` (an onnx_ir.Model) by standard operators, and share equal ones."""
    import onnx_ir as ir
    from onnx import parser
    from onnx_ir.passes import common

    # calls of one another are written without the domain
    calls = re.compile(rf"= (?=({'|'.join(text.split(maxsplit=1)[0] for text in FUNCTIONS)}) )")
    for text in FUNCTIONS:
        function = ir.from_proto(parser.parse_function(_HEAD + calls.sub(f"= {DOMAIN}.", text)))
        model.functions[function.identifier()] = function
    for step in (
        common.InlinePass(),
        common.RemoveUnusedFunctionsPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ):
        step(model)
    model.opset_imports.pop(DOMAIN, None)
