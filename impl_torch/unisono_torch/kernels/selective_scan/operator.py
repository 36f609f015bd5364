"""`unisono::selective_scan`, the PyTorch operator around the kernels: how they are cut, launched, traced and differentiated.

Opaque to torch.compile, which takes shapes and dtypes from the fake versions.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor
from unisono_spec.contract import InputError

from unisono_torch.kernels import interpreter
from unisono_torch.kernels.registry import FLOATS, interpreted
from unisono_torch.kernels.selective_scan import native
from unisono_torch.ops.transforms import again


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a scan is cut. Made from shape and dtype alone, so that a result's bits do not depend on the GPU."""

    constants: dict[str, int]  # of the kernel's meta parameters
    block: int  # channels a program
    warps: int
    registers: int | None  # a thread, at most
    segments: int
    tiles: int  # a segment


TILE = 64  # tokens between saved states
# Measured on an H100 (docs/results/kernels-scan-h100.md).
RATE = 1  # channels a thread holds states of
REGISTERS = {"forward": None, "ends": None, "backward": 168}  # a thread, at most
FEW = 16  # states; with more, the way back is faster with all registers than with more warps
# Warps that keep a GPU of about 130 multiprocessors busy; where a launch has a third of them or fewer, time is cut: another sweep, but each
# is shorter, and four times as many of them as fit at once leave no end at which few are at work.
WARPS = 1536
SHORTEST = 4  # tiles a segment, at least


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def padded(states: int) -> int:
    """N as the kernels hold it: a power of two, 4 or more."""
    return max(4, 1 << (states - 1).bit_length())


def make_cut(kernel: str, batch: int, length: int, width: int, states: int, interpreted: bool = False) -> Cut:
    """The cut of the kernel "forward" or "backward" for states [batch, width, padded(states)]."""
    lanes = max(4, padded(states) // 4)
    tile = 2 * lanes if interpreted else TILE  # the interpreter pays by the operation
    constants = {"ROWS": 32 // lanes, "TILE": tile, "RATE": RATE, "LANES": lanes}
    block = RATE * 32 // lanes
    segments, tiles = cut_time(batch * -(-width // block), -(-length // tile), 1 if interpreted else SHORTEST)
    registers = None if interpreted or states > FEW else REGISTERS[kernel]
    return Cut(constants, block, 1, registers, segments, tiles)


def cut_time(warps: int, count: int, shortest: int) -> tuple[int, int]:
    """How many segments of how many tiles, where there are `warps` without a cut and `count` tiles."""
    parallel = WARPS // max(1, warps)
    segments = max(1, min(4 * parallel, count // shortest)) if parallel >= 3 else 1
    tiles = -(-count // segments)
    return -(-count // tiles), tiles


def _natively(u: Tensor, B: Tensor, C: Tensor) -> tuple[tuple[int, int], dict[str, Tensor | None]]:
    """The cut for the CUDA kernels, and B and C as they take them."""
    batch, length, width = u.shape
    if B.dtype != C.dtype or B.dtype not in native.ELEMENTS:
        B, C = B.float(), C.float()
    cut = cut_time(batch * -(-width // native.BLOCK) * native.WARPS, -(-length // native.TILE), SHORTEST)
    return cut, {"B": _rows(B), "C": _rows(C)}


def _launch(kernel: str, u: Tensor, cut: Cut, tensors: dict[str, Tensor | None], **flags: object) -> None:
    """The kernel "forward", "backward" or "ends" (of the backward) on tensors of its arguments' names."""
    import triton.language as tl

    from unisono_torch.kernels.selective_scan import backward, forward

    if interpreted():
        interpreter.install()
    batch, length, width = u.shape
    function = forward.sweep if kernel == "forward" else getattr(backward, "sweep" if kernel == "backward" else kernel)
    acc = accumulator(u.dtype)
    rows = {f"{name.upper()}_ROW": 0 if (a := tensors.get(name)) is None else a.stride(1) for name in ("u", "dt", "z")}
    arguments = {
        **tensors,
        **flags,
        **rows,
        "T": length,
        "segments": cut.segments,
        "tiles": cut.tiles,
        "count": -(-length // cut.constants["TILE"]),
        "batches": batch,
        "DIM": width,
        "HAS_Z": tensors["z"] is not None,
        "HAS_RESET": tensors["reset"] is not None,
        "HAS_VALID": tensors["valid"] is not None,
        "ACC": tl.float64 if acc == torch.float64 else tl.float32,
        **cut.constants,
    }
    programs = -(-width // cut.block) * cut.segments * batch
    options = {"num_warps": cut.warps, "maxnreg": cut.registers}
    function[(programs,)](**{name: arguments[name] for name in function.arg_names}, **options)


def _cut(kernel: str, u: Tensor, A: Tensor) -> Cut:
    return make_cut(kernel, u.shape[0], u.shape[1], u.shape[2], A.shape[1], interpreted())


def _wide(a: Tensor, acc: torch.dtype, states: int) -> Tensor:
    """As the kernels hold states: in the accumulator's dtype, padded with zeros."""
    return F.pad(a.to(acc), (0, padded(states) - states)).contiguous()


def _rows(a: Tensor | None) -> Tensor | None:
    """[B, T, D] of which each row of D lies in one piece, rows of a sequence evenly and sequences end to end; else a copy."""
    if a is None or (a.stride(2) == 1 and a.stride(0) == a.shape[1] * a.stride(1)):
        return a
    return a.contiguous()


@torch.library.custom_op(
    "unisono::selective_scan",
    mutates_args=(),
    schema="(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? z, Tensor initial, Tensor? reset, Tensor? valid, "
    "bool softplus, bool save, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
)
def _scan(u, dt, A, B, C, D, z, initial, reset, valid, softplus, save, out_dtype):
    """y, the final state, and the states before each tile (empty unless `save`)."""
    y, final, saved = _scan_fake(u, dt, A, B, C, D, z, initial, reset, valid, softplus, save, out_dtype)
    if u.numel() == 0:
        return y, final.copy_(initial), saved.zero_()
    if native.serves(u, dt, A, z, out_dtype):
        cut, tensors = _natively(u, B, C)
        tensors |= {"u": _rows(u), "dt": _rows(dt), "z": _rows(z), "A": A.float().contiguous(), "D": D.float().contiguous(), "y": y}
        tensors |= {"initial": initial.float().contiguous(), "reset": _whole(reset), "valid": _whole(valid), "final": final, "saved": saved}
        with torch.cuda.device_of(u):
            native.forward(tensors, *cut, softplus, save)
        return y, final, saved
    acc, states, (batch, _, width) = accumulator(u.dtype), A.shape[1], u.shape
    cut = _cut("forward", u, A)
    n = padded(states)
    last = final if n == states else final.new_empty((batch, width, n))
    ends = last.new_empty((batch, cut.segments, width, n) if cut.segments > 1 else (0,))
    tensors = {"u": _rows(u), "dt": _rows(dt), "z": _rows(z), "D": D.contiguous(), "y": y, "final": last, "saved": saved, "ends": ends}
    tensors |= {"A": _wide(A, acc, states), "B": _wide(B, acc, states), "C": _wide(C, acc, states), "initial": _wide(initial, acc, states)}
    tensors |= {"reset": _whole(reset), "valid": _whole(valid), "spans": ends.new_empty(ends.shape[:3])}
    with torch.cuda.device_of(u):
        if cut.segments > 1:
            _launch("forward", u, cut, tensors, N=n, SOFTPLUS=softplus, SAVE=False, ENDS=True)
        _launch("forward", u, cut, tensors, N=n, SOFTPLUS=softplus, SAVE=save, ENDS=False)
    return y, final if n == states else final.copy_(last[..., :states]), saved


def _whole(a: Tensor | None) -> Tensor | None:
    return None if a is None else a.contiguous()


@_scan.register_fake
def _scan_fake(u, dt, A, B, C, D, z, initial, reset, valid, softplus, save, out_dtype):
    batch, length, width = u.shape
    acc, n = accumulator(u.dtype), padded(A.shape[1])
    if native.serves(u, dt, A, z, out_dtype):
        n, tile = native.STATES, native.TILE
    else:
        tile = make_cut("forward", 1, 1, 1, A.shape[1], interpreted()).constants["TILE"]
    saved = u.new_empty((batch, -(-length // tile), width, n) if save else (0,), dtype=acc)
    return u.new_empty(u.shape, dtype=out_dtype), u.new_empty((batch, width, A.shape[1]), dtype=acc), saved


@torch.library.custom_op(
    "unisono::selective_scan_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor dfinal, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? z, Tensor? reset, "
    "Tensor? valid, Tensor saved, bool softplus) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _scan_backward(dy, dfinal, u, dt, A, B, C, D, z, reset, valid, saved, softplus) -> tuple[Tensor, ...]:
    """Gradients of u, dt, A, B, C, D, z (empty without a gate) and the initial state."""
    gradients = _scan_backward_fake(dy, dfinal, u, dt, A, B, C, D, z, reset, valid, saved, softplus)
    du, ddt, dA, dB, dC, dD, dz, dinitial = gradients
    if u.numel() == 0:
        for a in (dA, dB, dC, dD):
            a.zero_()
        dinitial.copy_(dfinal)
        return gradients
    if native.serves(u, dt, A, z, dy.dtype):
        cut, tensors = _natively(u, B, C)
        tensors |= {"u": _rows(u), "dt": _rows(dt), "z": _rows(z), "A": A.float().contiguous(), "D": D.float().contiguous(), "saved": saved}
        tensors |= {"dfinal": dfinal.contiguous(), "dy": dy.contiguous(), "reset": _whole(reset), "valid": _whole(valid)}
        added, rows = {"to_A": dA, "to_D": dD, "dB": dB, "dC": dC}, tensors["B"]
        assert rows is not None
        kinds = {"to_A": torch.float32, "to_D": torch.float32, "dB": rows.dtype, "dC": rows.dtype}
        own = {name: a if a.dtype == kinds[name] else a.new_empty(a.shape, dtype=kinds[name]) for name, a in added.items()}
        tensors |= {"du": du, "ddt": ddt, "dz": dz, "dinitial": dinitial, **own}
        with torch.cuda.device_of(u):
            native.backward(tensors, *cut, softplus)
        for name, a in added.items():
            if own[name] is not a:
                a.copy_(own[name])
        return gradients
    acc, states, (batch, length, width) = accumulator(u.dtype), A.shape[1], u.shape
    n, cut = padded(states), _cut("backward", u, A)
    blocks = -(-width // cut.block)
    new = saved.new_empty
    partial = {"dA": new((batch, cut.segments, width, n)), "dD": new((batch, cut.segments, width))}
    partial |= {name: new((blocks, batch, length, n)) for name in ("dB", "dC")}
    ends = new((batch, cut.segments, width, n) if cut.segments > 1 else (0,))
    scratch = new((blocks * batch * cut.segments, cut.constants["TILE"] // cut.constants["LANES"], cut.block, n))
    first = new((batch, width, n))
    tensors = {"u": _rows(u), "dt": _rows(dt), "z": _rows(z), "D": D.contiguous(), "dy": dy.contiguous(), "saved": saved, "ends": ends}
    tensors |= {"A": _wide(A, acc, states), "B": _wide(B, acc, states), "C": _wide(C, acc, states), "dfinal": _wide(dfinal, acc, states)}
    tensors |= {"reset": _whole(reset), "valid": _whole(valid), "spans": ends.new_empty(ends.shape[:3]), "scratch": scratch}
    tensors |= {"du": du, "ddt": ddt, "dz": dz, "dinitial": first, **partial}
    with torch.cuda.device_of(u):
        if cut.segments > 1:
            _launch("ends", u, cut, tensors, N=n, SOFTPLUS=softplus)
        _launch("backward", u, cut, tensors, N=n, SOFTPLUS=softplus)
    dA.copy_(partial["dA"].sum((0, 1))[..., :states])
    dD.copy_(partial["dD"].sum((0, 1)))
    dB.copy_(partial["dB"].sum(0)[..., :states])
    dC.copy_(partial["dC"].sum(0)[..., :states])
    dinitial.copy_(first[..., :states])
    return gradients


@_scan_backward.register_fake
def _scan_backward_fake(dy, dfinal, u, dt, A, B, C, D, z, reset, valid, saved, softplus):
    dz = u.new_empty((0,) if z is None else z.shape, dtype=u.dtype if z is None else z.dtype)
    # each end to end, as the kernels write it, however what it is the gradient of lies in memory
    du, ddt, dA, dB, dC, dD, last = (torch.empty_like(a, memory_format=torch.contiguous_format) for a in (u, dt, A, B, C, D, dfinal))
    return du, ddt, dA, dB, dC, dD, dz, last


def _setup(ctx, inputs, output) -> None:
    u, dt, A, B, C, D, z, initial, reset, valid, ctx.softplus, _, ctx.out_dtype = inputs
    ctx.save_for_backward(u, dt, A, B, C, D, z, initial, reset, valid, output[2])
    ctx.mark_non_differentiable(output[2])


def _gradient(ctx, dy, dfinal, _):
    *given, saved = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        inputs = *given, ctx.softplus, False, ctx.out_dtype
        return again(_plain, inputs, ctx.needs_input_grad, (dy, dfinal))
    u, dt, A, B, C, D, z, initial, reset, valid = given
    *gradients, dz, dinitial = _scan_backward(dy, dfinal, u, dt, A, B, C, D, z, reset, valid, saved, ctx.softplus)
    return *gradients, None if z is None else dz, dinitial.to(initial.dtype), *(None,) * 5


def _plain(u, dt, A, B, C, D, z, initial, reset, valid, softplus, _, out_dtype):
    """The same in plain operations, for second derivatives."""
    from unisono_torch.ops import elementwise, selective_scan

    if softplus:
        dt = elementwise.softplus(dt)
    y, final = selective_scan.parallel(u, dt, A, B, C, D, initial, reset, valid, implementation="plain")
    if z is not None:
        y = y * elementwise.silu(z.to(y.dtype) if valid is None else torch.where(valid[..., None], z, 0).to(y.dtype))
    return y.to(out_dtype), final


_scan.register_autograd(_gradient, setup_context=_setup)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    z: Tensor | None = None,
    softplus: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, D], final state [B, D, N]) of ops/selective_scan.py; y ∘ SiLU(z) with a gate z, and Δ = softplus(dt) if `softplus`.

    u, dt, z [B, T, D], A [D, N], B, C [B, T, N], D [D], initial_state [B, D, N], reset and valid [B, T] bool. y is of `out_dtype`,
    float32 or wider unless told. An InputError names what does not fit.
    """
    if u.dtype not in FLOATS or u.ndim != 3:
        raise InputError(f"u: got {u.dtype} {tuple(u.shape)}; give [B, T, D] of one of {', '.join(map(str, FLOATS))}")
    if A.ndim != 2:
        raise InputError(f"A: got {tuple(A.shape)}; give [D, N]")
    (batch, length, width), states = u.shape, A.shape[1]
    for name, a, shape in (
        ("dt", dt, u.shape),
        ("A", A, (width, states)),
        ("B", B, (batch, length, states)),
        ("C", C, (batch, length, states)),
        ("D", D, (width,)),
        ("z", z, u.shape),
        ("initial_state", initial_state, (batch, width, states)),
        ("reset", reset, u.shape[:2]),
        ("valid", valid, u.shape[:2]),
    ):
        if a is not None and (a.shape != shape or a.device != u.device or (a.dtype == torch.bool) != (name in ("reset", "valid"))):
            kind = "bool" if name in ("reset", "valid") else "floating-point"
            raise InputError(f"{name}: got {a.dtype} {tuple(a.shape)} on {a.device}; give {kind} {tuple(shape)} on {u.device}")
    save = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in (u, dt, A, B, C, D, z, initial_state))
    given = u, dt, A, B, C, D, z, initial_state, reset, valid
    y, final, _ = torch.ops.unisono.selective_scan(*given, softplus, save, out_dtype or accumulator(u.dtype))
    return y, final
