"""`unisono::scan`, the PyTorch operator around the kernels of sweep.py: how it is cut, launched, traced and differentiated.

Opaque to torch.compile, which takes shapes and dtypes from the fake versions.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from unisono_spec.contract import InputError

from unisono_torch.ops.transforms import again

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """How sweep.py cuts a scan. Like Chain made from shape and dtype alone, so that a result's bits do not depend on the GPU."""

    rows: int  # tokens a tile
    block: int  # channels a program
    warps: int
    length: int  # tokens a segment
    segments: int
    halo: int  # tokens swept before a segment
    stages: int = 3


@dataclasses.dataclass(frozen=True)
class Chain:
    """How chain.py cuts a scan."""

    rows: int  # tokens a thread sums by itself
    chunks: int  # of as many tokens, a tile
    block: int  # channels a tile
    warps: int
    tiles: int  # along the time
    registers: int  # a thread, at most: few enough for many programs at once, with little or nothing spilled


# Warps a launch of sweeps should have: enough for the loads in flight of about 130 multiprocessors, few enough to run all at once.
WARPS = 1024
SHORTEST = 128  # tokens a segment of a sweep; below, its start-up and its halo show
TILE = 256  # tokens a tile of a chain, at most: the fewer, the more often a state has to pass from tile to tile


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_sweep(shape: tuple[int, int, int], dtype: torch.dtype, decay: float, interpreted: bool = False) -> Sweep | None:
    """Tiles as wide as 1, 2 or 4 warps' 16-byte loads, whichever overhangs the width least; segments as long as a full GPU allows.

    None where the halo is not clearly short beside a segment.
    """
    batch, length, width = shape
    rows = 8 if interpreted else 4
    lanes = _interpreted(width) if interpreted else 32 * 16 // dtype.itemsize
    warps = 1 if interpreted else min((4, 2, 1), key=lambda n: -(-width // (n * lanes)) * n)
    block = max(16, min(warps * lanes, 1 << (width - 1).bit_length()))
    # beyond the halo a term weighs less than 2^−64 (2^−128 in float64) of what it was
    halo = math.ceil((128 if dtype == torch.float64 else 64) * math.log(2) / -math.log(decay))
    halo = -(-halo // rows) * rows
    shortest = min(max(SHORTEST, 2 * halo), 2 * SHORTEST)
    strips = batch * -(-width // block)
    segment = max(shortest, -(-length * strips * warps // WARPS))
    segment = min(-(-segment // rows) * rows, -(-length // rows) * rows)
    return Sweep(rows, block, warps, segment, -(-length // segment), halo) if 2 * halo <= segment else None


def _interpreted(width: int) -> int:
    """Channels a program in the interpreter, which takes as long for many as for few; more than one program for wide rows, too."""
    return 16 if width <= 64 else 64


def make_chain(kernel: str, shape: tuple[int, int, int], dtype: torch.dtype, interpreted: bool = False) -> Chain:
    """64 numbers a thread (32 in float64), in rows of 64 bytes or more, of which a thread loads 8 or 16."""
    _, length, width = shape
    block = _interpreted(width) if interpreted else 16 if dtype == torch.float64 else 32
    # in backward a thread of 8 channels sums more of them, for `dweight`, by itself; so wide, it needs half as many rows
    rows = 4 if interpreted else 8 if kernel == "backward" and dtype.itemsize == 2 else 16
    chunks = max(1, min(TILE, 1 << (length - 1).bit_length()) // rows)
    warps = 1 if interpreted else max(1, chunks * rows // 64)
    return Chain(rows, chunks, block, warps, -(-length // (rows * chunks)), 128 if kernel == "forward" else 168)


def _launch(kernel: str, x: Tensor, decay: float, exclusive: bool, plan: Sweep | Chain, tensors: dict[str, Tensor | None]) -> None:
    """The kernel "forward" or "backward" of sweep.py or chain.py, as the plan says, on tensors of its arguments' names."""
    import triton.language as tl

    from unisono_torch.kernels.scan import chain, sweep

    batch, length, width = x.shape
    acc = accumulator(x.dtype)
    strips = -(-width // plan.block) * batch
    arguments = {
        "x": x,
        **tensors,
        "T": length,
        "D": width,
        "DECAY": decay,
        # by how much the rounded λ is off: a bias, which n tokens would raise to the n-th power
        "DRIFT": 0.0 if acc == torch.float64 else decay / torch.tensor(decay, dtype=acc).item() - 1,
        "HAS_RESET": tensors["reset"] is not None,
        "ACC": tl.float64 if acc == torch.float64 else tl.float32,
        "FAST": acc == torch.float32 and x.is_cuda,
        "ROWS": plan.rows,
        "BLOCK": plan.block,
        "num_warps": plan.warps,
    }
    if kernel == "forward":
        arguments["HAS_INITIAL"] = tensors["initial"] is not None
    if isinstance(plan, Sweep):
        arguments |= {"segments": plan.segments, "length": plan.length, "halo": plan.halo, "STAGES": plan.stages}
        getattr(sweep, kernel)[(strips * plan.segments,)](**arguments)
        return
    # a word holds −1 before its state
    states = torch.full((plan.tiles, batch, width), -1, dtype=torch.int64 if acc == torch.float64 else torch.int32, device=x.device)
    # of what a thread sums, on average
    age = sum(n * decay**n for n in range(plan.rows)) / sum(decay**n for n in range(plan.rows))
    flags = {
        "LAG": age * arguments["DRIFT"],
        "EXCLUSIVE": exclusive,
        "HAS_WEIGHT": tensors["weight"] is not None,
        "HAS_VALID": tensors["valid"] is not None,
    }
    sizes = {"CHUNKS": plan.chunks, "maxnreg": plan.registers}
    getattr(chain, kernel)[(strips * plan.tiles,)](**arguments, **flags, **sizes, states=states, tiles=plan.tiles, batches=batch)


def _plan(kernel: str, x: Tensor, weight: Tensor | None, valid: Tensor | None, decay: float) -> Sweep | Chain:
    import triton

    from unisono_torch.kernels.scan import sweep

    interpreted = not isinstance(sweep.forward, triton.JITFunction)
    if interpreted:
        from unisono_torch.kernels import interpreter

        interpreter.install()
    shape = (x.shape[0], x.shape[1], x.shape[2])
    plan = make_sweep(shape, x.dtype, decay, interpreted) if weight is None and valid is None else None
    return plan or make_chain(kernel, shape, x.dtype, interpreted)


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
    plan = _plan("forward", x, weight, valid, decay)
    tensors = {"initial": initial, "reset": reset, "xi": xi, "final": final}
    if isinstance(plan, Chain):
        tensors |= {"weight": weight, "valid": valid}
    with torch.cuda.device_of(x):
        _launch("forward", x, decay, exclusive, plan, tensors)
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
    plan = _plan("backward", x, weight, valid, decay)
    partial = None if weight is None else x.new_empty((-(-x.shape[2] // plan.block), *weight.shape), dtype=accumulator(x.dtype))
    tensors = {"reset": reset, "dxi": dxi, "dfinal": dfinal, "dx": dx, "dinitial": dinitial}
    if isinstance(plan, Chain):
        tensors |= {"weight": weight, "valid": valid, "dweight": partial}
    with torch.cuda.device_of(x):
        _launch("backward", x, decay, exclusive, plan, tensors)
    return dx, dweight if partial is None else partial.sum(0).to(dweight.dtype), dinitial


@_scan_backward.register_fake
def _scan_backward_fake(dxi, dfinal, x, weight, reset, valid, decay, exclusive):
    dweight = x.new_empty((0,)) if weight is None else torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dweight, torch.empty(dfinal.shape, dtype=dfinal.dtype, device=x.device)


def _setup(ctx, inputs, output) -> None:
    x, weight, initial, reset, valid, ctx.decay, ctx.exclusive, ctx.out_dtype = inputs
    ctx.save_for_backward(x, weight, initial, reset, valid)


def _gradient(ctx, dxi, dfinal):
    x, weight, initial, reset, valid = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        inputs = x, weight, initial, reset, valid, ctx.decay, ctx.exclusive, ctx.out_dtype
        return again(_plain, inputs, ctx.needs_input_grad, (dxi, dfinal))
    dx, dweight, dinitial = _scan_backward(dxi, dfinal, x, weight, reset, valid, ctx.decay, ctx.exclusive)
    return (
        dx,
        None if weight is None else dweight,
        None if initial is None else dinitial.to(initial.dtype),
        *(None,) * 5,
    )


def _plain(x, weight, initial, reset, valid, decay, exclusive, out_dtype):
    """The same scan in plain operations, for second derivatives."""
    from unisono_torch.ops import decayed_sum, weighted_sum

    start = x.new_zeros(x.shape[::2], dtype=accumulator(x.dtype)) if initial is None else initial
    if weight is None:
        xi, final = decayed_sum.parallel(x, decay, start, reset, valid, implementation="plain")
    else:
        xi, final = weighted_sum.parallel(x, weight, start, reset, valid, exclusive, implementation="plain")
    return xi.to(out_dtype), final


_scan.register_autograd(_gradient, setup_context=_setup)


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
    if exclusive and weight is None:
        raise InputError("exclusive: a decayed sum has no exclusive form; give weights, or exclusive=False")
    if weight is None and not 0 < decay < 1:
        raise InputError(f"decay: got {decay}; give a number between 0 and 1, both excluded")
    return torch.ops.unisono.scan(x, weight, initial, reset, valid, float(decay), exclusive, out_dtype)
