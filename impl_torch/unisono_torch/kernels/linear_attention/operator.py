"""`unisono::linear_attention`, the PyTorch operator around sweep.py: how it is cut, launched, traced and differentiated.

Opaque to torch.compile, which takes shapes and dtypes from the fake versions. Saved for the backward: inputs, o, and a float32
denominator a token and head; states are computed anew.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from unisono_torch.kernels.linear_attention import padded, table
from unisono_torch.kernels.registry import hopper, interpreted
from unisono_torch.kernels.rows import dense
from unisono_torch.ops.transforms import again


def _cut(cuts: dict[Any, table.Cut], way: str, dtype: torch.dtype, *width: int) -> table.Cut:
    return table.INTERPRETED if interpreted() else cuts[way, "bfloat16" if dtype == torch.bfloat16 else "float32", *width]


def segments(strips: int, length: int, chunk: int, programs: int | None = None, least: int = 0) -> tuple[int, int]:
    """(how many segments, tokens each, at least `least`): from the shape alone, so that a result's bits do not depend on the GPU."""
    shortest = max(least, table.SHORTEST if strips < table.FEW else table.LONG)
    count = max(1, min((programs or table.PROGRAMS) // strips, -(-length // shortest)))
    each = -(-length // (count * chunk)) * chunk
    return -(-length // each), each


def least(each: float, v: Tensor, K: int) -> int:
    """Tokens of a segment, for which `each` bytes a head are left."""
    return int(each / (table.OWN * 4 * v.element_size() * (K + v.shape[-1])))


def every(cut: table.Cut, size: int, v: Tensor, K: int, wide: int, rows: int) -> int:
    """Tokens between taylor2's kept states of `rows` times `wide` numbers of `size` bytes."""
    tokens = cut.every
    while size * rows * wide > tokens * table.KEPT * 4 * v.element_size() * (K + v.shape[-1]) and tokens < 4 * cut.every:
        tokens *= 2
    return tokens


def on_hopper(moved: dict[str, Tensor], feature_map: str, marks: bool) -> bool:
    """Whether hopper.py serves a call: on such a GPU (or in the interpreter), what a copy of 16 bytes and a product of 64 columns can."""
    q, v = moved["q"], moved["v"]
    if marks or q.dtype != torch.bfloat16 or feature_map not in ("none", "elu1", "relu"):
        return False
    if any(width % table.COPIED or not table.LEAST < width <= 256 for width in (q.shape[-1], v.shape[-1])):
        return False
    if any(a.data_ptr() % 16 or any(a.stride(i) % table.COPIED for i in range(3)) for a in moved.values()):
        return False
    return hopper(q.device)


def _launch_hopper(way: str, moved: dict[str, Tensor], feature_map: str, tensors: dict[str, Any]) -> None:
    from unisono_torch.kernels.linear_attention import hopper, hopper_forward

    q, v = moved["q"], moved["v"]
    (batch, length, heads, K), V = q.shape, v.shape[-1]
    BK, BV = (max(64, table.width_of(n, n)) for n in (K, V))
    cut = table.HOPPER[table.served_as(way, K, V)]
    strips = batch * heads * (BV // cut.block if way == "forward" else 2 * (BK // cut.block) + BV // cut.block)
    stages, room = cut.crowded if cut.crowded and strips > cut.programs else cut.stages, max(BK, BV)
    left = 4 * (room + 1) * cut.block * strips / (batch * heads)
    count, each = segments(strips, length, cut.chunk, cut.programs, least(left, v, K))
    scratch = (count - 1) * strips
    unit = 16 if all(a.stride(i) % 16 == 0 for a in moved.values() for i in range(3)) else table.COPIED
    shared = {
        "own": q.new_empty((scratch, room * cut.block), dtype=torch.float32), "own_z": q.new_empty((scratch, room), dtype=torch.float32),
        "T": length, "H": heads, "batches": batch, "segments": count, "length": each, "UNIT": unit,
        "K": K, "V": V, "BK": BK, "BV": BV, "MAP": feature_map, "C": cut.chunk, "BN": cut.block, "STAGES": stages, "WARPS": cut.warps,
        "num_warps": cut.warps,
    }  # fmt: skip
    steps = {f"{name[0]}{i}": a.stride(i) // unit for name, a in moved.items() for i in range(3)}
    arguments = {**shared, **steps, **moved, **{name: a for name, a in tensors.items() if name not in ("tau", "reset", "valid", "o")}}
    if way == "forward":
        sums, writes = cast(Any, hopper_forward.added), cast(Any, hopper_forward.forward)
        shared["PACKED"] = cut.packed and not interpreted()
        first = {**shared, **{name: a for name, a in steps.items() if name[0] in "kv"}, "k": moved["k"], "v": v}
        arguments |= {"o": tensors["o"], "PACKED": shared["PACKED"], "EARLY": cut.early}
    else:
        sums = writes = cast(Any, hopper.backward)
        arguments["delta"] = tensors["delta"] if "delta" in tensors else products(tensors["o"], moved["do"])
        first = {**arguments, "WRITES": False}
        arguments["WRITES"] = True
    with torch.cuda.device_of(q):
        if count > 1:
            sums[(strips * (count - 1),)](**first)
        writes[(strips * count,)](**arguments)


def _launch(
    way: str, q: Tensor, k: Tensor, v: Tensor, feature_map: str, tensors: dict[str, Any], do: Tensor | None = None
) -> Tensor | None:
    """Both launches of a way; its partial sums of τ's gradient."""
    given = {"q": q, "k": k, "v": v, **({} if do is None else {"do": do})}
    if on_hopper(given, feature_map, tensors["reset"] is not None or tensors["valid"] is not None):
        _launch_hopper(way, given, feature_map, tensors)
        return None
    if hopper(q.device) and padded.served(q, v, feature_map, tensors["reset"] is not None or tensors["valid"] is not None):
        delta = None if do is None else products(tensors["o"], do)
        padded.launch(way, given, feature_map, tensors, delta, _launch_hopper)
        return None
    from unisono_torch.kernels.linear_attention import sweep

    (heads, K), V = q.shape[2:], v.shape[-1]
    if feature_map == "taylor2":
        _launch_taylor(way, given, tensors)
        return None
    cut = _cut(table.TABLE, way, v.dtype, table.width_of(K, V))
    BK, BV = (max(16, 1 << (n - 1).bit_length()) for n in (K, V))
    block = cut.block  # also where it is wider than V: the table's cuts are right as they stand, others may not be
    strips = len(q) * heads * (-(-V // block) + (0 if way == "forward" else 2 * -(-K // block)))
    room, line = (BK * block, BK) if way == "forward" else (max(BK, BV) * block, block)
    arguments = _shared(given, cut, tensors, strips, room, line)
    arguments |= {"BK": BK, "BV": BV, "ROOM": room, "LINE": line, "SPLIT": cut.split, "MAP": feature_map}
    tau = None
    if do is not None:
        tau = q.new_zeros((arguments["segments"] * strips,), dtype=torch.float32) if feature_map == "learned" else None
        narrow, o = V <= table.NARROW, arguments.pop("o")
        arguments |= {"tau_out": tau, "o_dot": o if narrow else products(o, do), "GIVEN": not narrow}
    _run(getattr(sweep, way), strips, arguments)
    return tau


def _shared(
    moved: dict[str, Tensor], cut: table.Cut, tensors: dict[str, Any], strips: int, room: int, line: int, programs: int | None = None
) -> dict[str, Any]:
    """What every sweep is given."""
    import triton.language as tl

    q, v = moved["q"], moved["v"]
    (batch, length, heads, K), V = q.shape, v.shape[-1]
    count, each = segments(strips, length, cut.chunk, programs, least(4 * (room + line) * strips / (batch * heads), v, K))
    scratch = (count - 1) * strips
    strides = {f"{name[0]}{axis}": a.stride(axis) for name, a in moved.items() for axis in range(3)}
    unit = 16 if all(step % 16 == 0 for step in strides.values()) else 1  # so that loads are as wide as strides allow
    return {
        **moved, "T": length, "H": heads, "batches": batch, "segments": count, "length": each, "UNIT": unit,
        **{name: step // unit for name, step in strides.items()},
        **tensors,
        "own": q.new_empty((scratch, room), dtype=torch.float32),
        "own_z": q.new_empty((scratch, line), dtype=torch.float32),
        "cuts": q.new_empty((scratch,), dtype=torch.int32),
        "K": K, "V": V, "BN": cut.block, "C": cut.chunk, "STAGES": cut.stages,
        "HAS_RESET": tensors["reset"] is not None, "HAS_VALID": tensors["valid"] is not None,
        # the interpreter cannot compute in 16 bits
        "DOT": tl.bfloat16 if v.dtype == torch.bfloat16 and not interpreted() else tl.float32,
        "TF32": v.dtype == torch.float16,
        "num_warps": cut.warps,
    }  # fmt: skip


def _run(kernel: Any, strips: int, arguments: dict[str, Any]) -> None:
    count = arguments["segments"]
    with torch.cuda.device_of(arguments["q"]):
        if count > 1:
            kernel[(strips * (count - 1),)](**arguments, WRITES=False)
        kernel[(strips * count,)](**arguments, WRITES=True)


def _launch_taylor(way: str, moved: dict[str, Tensor], tensors: dict[str, Any]) -> None:
    """For each output that keys or queries sum up: a sweep, which keeps states, then what chunks make of these."""
    import triton.language as tl

    from unisono_torch.kernels.linear_attention import taylor

    (batch, length, heads, _), V, o = moved["q"].shape, moved["v"].shape[-1], tensors["o"]
    shared = {name: tensors[name] for name in ("reset", "valid", "denominator")}
    if way == "forward":
        shared |= {"do": None, "d0": 0, "d1": 0, "d2": 0, "delta": None}
    else:
        shared |= {"delta": products(o, moved["do"])}
    launch: Any = taylor.chunks
    for mode, S, z, out, dx in (
        (("o", "S", "z", "o", ""),) if way == "forward" else (("q", "S", "z", "", "dq"), ("k", "dS", "dz", "dv", "dk"))
    ):
        swept, cut = _cut(table.SWEEPS, mode, o.dtype), _cut(table.CHUNKS, mode, o.dtype)
        strips, parts = batch * heads * -(-V // swept.block), int(taylor.PARTS)
        arguments = _shared(moved, swept, shared, parts * strips, 64 * swept.block, 64, table.PROGRAMS * 3 // 2)
        alone = {name: arguments.pop(name) for name in ("own", "own_z", "cuts", "segments", "length")}
        alone |= {"S": tensors[S], "z": tensors[z], "S_out": tensors["S_out"], "z_out": tensors["z_out"]}
        kept, wide = torch.bfloat16 if arguments["DOT"] == tl.bfloat16 else torch.float32, -(-V // 16) * 16
        stretch = swept.every if interpreted() else every(swept, kept.itemsize, moved["v"], arguments["K"], wide, parts * 64)
        places = batch * heads, -(-length // stretch), parts * 64
        arguments |= {
            "states": o.new_empty((*places, wide), dtype=kept), "lines": o.new_empty(places, dtype=torch.float32),
            "EVERY": stretch, "WIDE": wide, "MODE": mode,
        }  # fmt: skip
        _run(taylor.sweeps, parts * strips, arguments | alone | {"maxnreg": swept.registers})
        del alone
        blocks, made = -(-V // cut.block), tensors.get(dx)
        sums = made if made is None or blocks == 1 else made.new_empty((blocks, *made.shape), dtype=torch.float32)
        arguments |= {"out": tensors.get(out), "dx_out": sums, "BN": cut.block, "C": cut.chunk, "STAGES": cut.stages}
        with torch.cuda.device_of(o):
            grid = (batch * heads * blocks * -(-length // cut.chunk),)
            launch[grid](**arguments | {"num_warps": cut.warps, "maxnreg": cut.registers})
        if made is not None and sums is not None and sums is not made:
            for block in sums[1:]:
                sums[0].add_(block)
            made.copy_(sums[0])
        del arguments, sums  # before the next states are made


def products(o: Tensor, do: Tensor) -> Tensor:
    """δ = do·o of each token and head."""
    from unisono_torch.kernels.linear_attention import sweep

    _, length, heads, V = o.shape
    delta, BV = o.new_empty(o.shape[:3], dtype=torch.float32), max(16, 1 << (V - 1).bit_length())
    rows, launch, steps = 8192 // BV, cast(Any, sweep.products), do.stride()[:3]
    unit = 16 if all(step % 16 == 0 for step in steps) else 1
    with torch.cuda.device_of(o):
        launch[(-(-delta.numel() // rows),)](
            o, do, delta, length, heads, delta.numel(), *(step // unit for step in steps), UNIT=unit, V=V, BV=BV, ROWS=rows
        )
    return delta


_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor S, Tensor z, Tensor? tau, Tensor? reset, Tensor? valid, str feature_map"


@torch.library.custom_op(
    "unisono::linear_attention", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)  # fmt: skip
def _forward(q, k, v, S, z, tau, reset, valid, feature_map):
    o, S_end, z_end, denominator = _forward_fake(q, k, v, S, z, tau, reset, valid, feature_map)
    if o.numel() == 0:
        return o, S_end.copy_(S), z_end.copy_(z), denominator
    q, k, v = dense(q), dense(k), dense(v)
    reset, valid = (None if a is None else a.contiguous() for a in (reset, valid))
    tensors = {
        "tau": tau, "reset": reset, "valid": valid, "S": S.contiguous(), "z": z.contiguous(),
        "o": o, "S_out": S_end, "z_out": z_end, "denominator": denominator,
    }  # fmt: skip
    _launch("forward", q, k, v, feature_map, tensors)
    return o, S_end, z_end, denominator


@_forward.register_fake
def _forward_fake(q, k, v, S, z, tau, reset, valid, feature_map):
    return (
        v.new_empty(v.shape),
        S.new_empty(S.shape, dtype=torch.float32),
        z.new_empty(z.shape, dtype=torch.float32),
        q.new_empty(q.shape[:3], dtype=torch.float32),
    )


@torch.library.custom_op(
    "unisono::linear_attention_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor dS, Tensor dz, Tensor o, Tensor denominator, {_INPUTS}) -> {_GRADIENTS}",
)
def _backward(do, dS, dz, o, denominator, q, k, v, S, z, tau, reset, valid, feature_map):
    """Gradients of q, k, v, S, z and τ (empty without it)."""
    given = (do, dS, dz, o, denominator, q, k, v, S, z, tau, reset, valid, feature_map)
    dq, dk, dv, S_out, z_out, dtau = _backward_fake(*given)
    if o.numel() == 0:
        return dq, dk, dv, S_out.copy_(dS), z_out.copy_(dz), dtau.zero_()
    q, k, v, do = dense(q), dense(k), dense(v), dense(do)
    reset, valid = (None if a is None else a.contiguous() for a in (reset, valid))
    tensors = {
        "tau": tau, "reset": reset, "valid": valid, "S": S.contiguous(), "z": z.contiguous(), "dS": dS.contiguous(), "dz": dz.contiguous(),
        "o": o.contiguous(), "denominator": denominator, "dq": dq, "dk": dk, "dv": dv, "S_out": S_out, "z_out": z_out,
    }  # fmt: skip
    partial = _launch("backward", q, k, v, feature_map, tensors, do)
    return dq, dk, dv, S_out, z_out, dtau if partial is None else partial.sum().reshape(dtau.shape).to(dtau.dtype)


@_backward.register_fake
def _backward_fake(do, dS, dz, o, denominator, q, k, v, S, z, tau, reset, valid, feature_map):
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        S.new_empty(S.shape, dtype=torch.float32),
        z.new_empty(z.shape, dtype=torch.float32),
        q.new_empty((0,)) if tau is None else tau.new_empty(tau.shape),
    )


def _setup(ctx, inputs, output) -> None:
    q, k, v, S, z, tau, reset, valid, ctx.feature_map = inputs
    o, _, _, denominator = output
    ctx.mark_non_differentiable(denominator)
    ctx.save_for_backward(o, denominator, q, k, v, S, z, tau, reset, valid)


def _gradient(ctx, do, dS, dz, _):
    saved = ctx.saved_tensors  # once: what torch.utils.checkpoint computes again is gone after it
    S, z, tau = saved[5:8]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        inputs = *saved[2:], ctx.feature_map
        return again(_plain, inputs, ctx.needs_input_grad, (do, dS, dz))
    dq, dk, dv, dS0, dz0, dtau = _backward(do, dS, dz, *saved, ctx.feature_map)
    return dq, dk, dv, dS0.to(S.dtype), dz0.to(z.dtype), None if tau is None else dtau, None, None, None


def _plain(q, k, v, S, z, tau, reset, valid, feature_map):
    """The same in plain operations, for second derivatives."""
    from unisono_torch.ops import linear_attention, mapped_attention

    if feature_map == "none":
        o, (S, z) = linear_attention.parallel(q, k, v, (S, z), reset, valid, implementation="plain")
    else:
        o, (S, z) = mapped_attention.parallel(q, k, v, (S, z), reset, valid, feature_map, tau, implementation="plain")
    return o.to(v.dtype), S, z


_forward.register_autograd(_gradient, setup_context=_setup)
