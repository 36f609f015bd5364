"""`unisono::scan`, the PyTorch operator around the kernels of sweep.py: how it is cut, launched, traced and differentiated.

Opaque to torch.compile, which takes shapes and dtypes from the fake versions.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from unisono_spec.contract import InputError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a scan is cut. Made from shape and dtype alone, so that a result's bits do not depend on the GPU."""

    rows: int  # tokens a tile
    block: int  # channels a program
    warps: int
    length: int  # tokens a segment
    segments: int
    halo: int | None  # tokens swept before a segment instead of a carry; None: carries, if there are several segments
    stages: int = 3


# Warps a launch should have: enough for the loads in flight of about 130 multiprocessors, few enough to run all at once.
WARPS = 1024
SHORTEST = 256  # tokens a segment; below, its start-up shows


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_plan(shape: tuple[int, int, int], dtype: torch.dtype, decay: float, masked: bool, interpreted: bool = False) -> Plan:
    """Tiles as wide as 1, 2 or 4 warps' 16-byte loads, whichever overhangs the width least; segments as long as a full GPU allows.

    A halo is the start where it is clearly cheaper than reading everything twice.
    """
    batch, length, width = shape
    rows = 8 if interpreted else 4
    lanes = 16 if interpreted else 32 * 16 // dtype.itemsize
    warps = 1 if interpreted else min((4, 2, 1), key=lambda n: -(-width // (n * lanes)) * n)
    block = max(16, min(warps * lanes, 1 << (width - 1).bit_length()))
    strips = batch * -(-width // block)
    segment = max(SHORTEST, -(-length * strips * warps // WARPS))
    segment = min(-(-segment // rows) * rows, -(-length // rows) * rows)
    segments = -(-length // segment)
    halo = None
    if decay < 1 and not masked:
        # beyond the halo a term weighs less than 2^−64 (2^−128 in float64) of what it was
        halo = math.ceil((128 if dtype == torch.float64 else 64) * math.log(2) / -math.log(decay))
        halo = -(-halo // rows) * rows
        halo = halo if 2 * halo <= segment else None
    return Plan(rows, block, warps, segment, segments, halo)


def _run(kernel: str, plan: Plan, x: Tensor, decay: float, exclusive: bool, entry: Tensor | None, has_initial: bool, **tensors) -> None:
    """One sweep, or three (reduce, fold, sweep) where segments need carries. `entry` is the state that enters the first one swept."""
    import triton.language as tl

    from unisono_torch.kernels import sweep

    batch, length, width = x.shape
    acc = accumulator(x.dtype)
    strips = -(-width // plan.block) * batch
    tile = {
        "ACC": tl.float64 if acc == torch.float64 else tl.float32,
        "ROWS": plan.rows,
        "BLOCK": plan.block,
        "num_warps": plan.warps,
    }
    common = {
        "x": x,
        **tensors,
        "T": length,
        "D": width,
        "segments": plan.segments,
        "length": plan.length,
        "DECAY": decay,
        # by how much the rounded λ is off: a bias, which n tokens would raise to the n-th power
        "DRIFT": 0.0 if acc == torch.float64 else decay / torch.tensor(decay, dtype=acc).item() - 1,
        "EXCLUSIVE": exclusive,
        "HAS_WEIGHT": tensors["weight"] is not None,
        "HAS_RESET": tensors["reset"] is not None,
        "HAS_VALID": tensors["valid"] is not None,
        "FAST": acc == torch.float32 and x.is_cuda,
        "STAGES": plan.stages,
        **tile,
    }
    carry = None
    if plan.segments > 1 and plan.halo is None:
        local, carry = (x.new_empty((batch, plan.segments, width), dtype=acc) for _ in range(2))
        product = x.new_empty((batch, plan.segments), dtype=acc)
        reduced = {"halo": 0, "REDUCE": True, "HAS_INITIAL": False, "HAS_CARRY": False}
        getattr(sweep, kernel)[(strips * plan.segments,)](**common, carry=None, local=local, product=product, **reduced)
        order = {"REVERSE": kernel == "backward", "HAS_INITIAL": entry is not None}
        sweep.fold[(strips,)](local, product, entry, carry, width, plan.segments, **order, **tile)
    swept = {"halo": plan.halo or 0, "REDUCE": False, "HAS_INITIAL": has_initial, "HAS_CARRY": carry is not None}
    getattr(sweep, kernel)[(strips * plan.segments,)](**common, carry=carry, local=None, product=None, **swept)


def _plan(x: Tensor, decay: float, valid: Tensor | None) -> Plan:
    import triton

    from unisono_torch.kernels import sweep

    interpreted = not isinstance(sweep.forward, triton.JITFunction)
    if interpreted:
        from unisono_torch.kernels import interpreter

        interpreter.install()
    return make_plan((x.shape[0], x.shape[1], x.shape[2]), x.dtype, decay, valid is not None, interpreted)


@torch.library.custom_op(
    "unisono::scan",
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? initial, Tensor? reset, Tensor? valid, float decay, bool exclusive, ScalarType out_dtype)"
    " -> (Tensor, Tensor)",
)
def _scan(x, weight, initial, reset, valid, decay, exclusive, out_dtype):
    xi, final = _scan_fake(x, weight, initial, reset, valid, decay, exclusive, out_dtype)
    if xi.numel() == 0:
        return xi, final.zero_() if initial is None else final.copy_(initial)
    x = x.contiguous()
    weight, initial, reset, valid = (None if a is None else a.contiguous() for a in (weight, initial, reset, valid))
    tensors = {"weight": weight, "initial": initial, "reset": reset, "valid": valid, "xi": xi, "final": final}
    with torch.cuda.device_of(x):
        _run("forward", _plan(x, decay, valid), x, decay, exclusive, initial, initial is not None, **tensors)
    return xi, final


@_scan.register_fake
def _scan_fake(x, weight, initial, reset, valid, decay, exclusive, out_dtype):
    final = x.new_empty((x.shape[0], x.shape[2]), dtype=accumulator(x.dtype))
    return torch.empty(x.shape, dtype=out_dtype, device=x.device), final


@torch.library.custom_op(
    "unisono::scan_backward",
    mutates_args=(),
    schema="(Tensor dxi, Tensor dfinal, Tensor x, Tensor? weight, Tensor? reset, Tensor? valid, float decay, bool exclusive)"
    " -> (Tensor, Tensor, Tensor)",
)
def _scan_backward(dxi, dfinal, x, weight, reset, valid, decay, exclusive):
    """Gradients of x, weight (empty without weights) and the initial state."""
    dx, dweight, dinitial = _scan_backward_fake(dxi, dfinal, x, weight, reset, valid, decay, exclusive)
    if x.numel() == 0:
        return dx, dweight.zero_(), dinitial.copy_(dfinal)
    dxi, dfinal, x = dxi.contiguous(), dfinal.contiguous(), x.contiguous()
    weight, reset, valid = (None if a is None else a.contiguous() for a in (weight, reset, valid))
    plan = _plan(x, decay, valid)
    blocks = -(-x.shape[2] // plan.block)
    parts = None if weight is None else x.new_empty((blocks, *weight.shape), dtype=accumulator(x.dtype))
    tensors = {"weight": weight, "reset": reset, "valid": valid, "dxi": dxi, "dfinal": dfinal}
    with torch.cuda.device_of(x):
        outputs = {"dx": dx, "dweight": parts, "dinitial": dinitial}
        _run("backward", plan, x, decay, exclusive, dfinal, True, **tensors, **outputs)
    return dx, dweight if parts is None else parts.sum(0).to(dweight.dtype), dinitial


@_scan_backward.register_fake
def _scan_backward_fake(dxi, dfinal, x, weight, reset, valid, decay, exclusive):
    dweight = x.new_empty((0,)) if weight is None else torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dweight, torch.empty_like(dfinal)


def _setup(ctx, inputs, output) -> None:
    x, weight, initial, reset, valid, ctx.decay, ctx.exclusive, _ = inputs
    ctx.initial_dtype = None if initial is None else initial.dtype
    ctx.save_for_backward(x, weight, reset, valid)


def _gradient(ctx, dxi, dfinal):
    x, weight, reset, valid = ctx.saved_tensors
    dx, dweight, dinitial = _scan_backward(dxi, dfinal, x, weight, reset, valid, ctx.decay, ctx.exclusive)
    return (
        dx,
        None if weight is None else dweight,
        None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype),
        *(None,) * 5,
    )


def _no_second_gradient(ctx, *_):
    raise NotImplementedError("the scan kernels are differentiable once; for second derivatives use implementation='plain'")


_scan.register_autograd(_gradient, setup_context=_setup)
_scan_backward.register_autograd(_no_second_gradient)


def scan(
    x: Tensor,
    weight: Tensor | None,
    initial: Tensor | None,
    reset: Tensor | None,
    valid: Tensor | None,
    decay: float,
    exclusive: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """s_t = decay s_{t−1} + (weight_t, or 1−decay without weights) σ(x_t) → (s [B, T, D], s_{T−1} [B, D]).

    x [B, T, D], weight, reset and valid [B, T], initial [B, D]. An InputError names what does not fit.
    """
    if x.dtype not in FLOATS or x.ndim != 3:
        raise InputError(f"x: got {x.dtype} {tuple(x.shape)}; give [B, T, D] of one of {', '.join(map(str, FLOATS))}")
    for name, a, shape in (
        ("s", weight, x.shape[:2]),
        ("initial_state", initial, x.shape[::2]),
        ("reset", reset, x.shape[:2]),
        ("valid", valid, x.shape[:2]),
    ):
        if a is not None and (a.shape != shape or a.device != x.device or (a.dtype == torch.bool) != (name in ("reset", "valid"))):
            kind = "bool" if name in ("reset", "valid") else "floating-point"
            raise InputError(f"{name}: got {a.dtype} {tuple(a.shape)} on {a.device}; give {kind} {tuple(shape)} on {x.device}")
    if weight is None and not 0 < decay < 1:
        raise InputError(f"decay: got {decay}; give a number between 0 and 1, both excluded")
    return torch.ops.unisono.scan(x, weight, initial, reset, valid, float(decay), exclusive, out_dtype)
