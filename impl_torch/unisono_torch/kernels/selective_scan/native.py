"""The scan's kernels in CUDA C++ (forward.cu, adjoint.cu, backward.cu, sums.cu): which calls they serve, how they are compiled, launched.

Triton cannot take a token's row out of a tile in shared memory, nor choose which lane keeps which sum: its kernels, which have the same
lanes, groups and tiles, take 1.24 and 3.4 ms where these take a third. They serve what these do not, and Triton's interpreter.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import torch
from torch import Tensor

from unisono_torch.kernels import nvrtc

TILE = 32  # tokens between saved states
BLOCK = 32  # channels a program
WARPS = 4  # of a program
STATES = 16  # a channel's states in memory, padded
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as common.cu names them
# Each kernel's arguments in its order
FORWARD = "u dt A B C D z initial reset valid y final saved ends spans T dim segments tiles u_row dt_row z_row b_row c_row"
ADJOINT = "dt A C z reset valid dy ends spans T dim segments tiles dt_row z_row c_row"
BACKWARD = (
    "u dt A B C D z reset valid saved dy dfinal du ddt dz dA dBC dD dinitial ends spans T dim segments tiles u_row dt_row z_row b_row c_row"
)
SUMS = "dBC dA dD dB dC to_A to_D T dim batch segments"
ARGUMENTS = {"forward": FORWARD.split(), "adjoint": ADJOINT.split(), "backward": BACKWARD.split(), "sums": SUMS.split()}


def serves(u: Tensor, dt: Tensor, A: Tensor, z: Tensor | None, out_dtype: torch.dtype) -> bool:
    """Whether these kernels take such a call."""
    known = u.dtype in ELEMENTS and dt.dtype in ELEMENTS and out_dtype in ELEMENTS
    return known and (z is None or z.dtype == u.dtype) and A.shape[1] <= STATES and _there(u.device)


@functools.cache
def _there(device: torch.device) -> bool:
    """Whether `device` can run them: copies in the background, and bfloat16, since compute capability 8.0."""
    there = device.type == "cuda" and torch.cuda.is_available() and nvrtc.library() is not None
    return there and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _kernel(name: str, device: int, constants: tuple[tuple[str, int], ...]) -> nvrtc.Kernel:
    here = pathlib.Path(__file__).parent
    head = "".join(f"#define {each} {value}\n" for each, value in constants)
    source = "".join((here / f"{each}.cu").read_text(encoding="utf-8") for each in ("primitives", "common", name))
    module = nvrtc.Module(head + source)
    return nvrtc.Kernel(module, "scan", module.constant("shared_bytes"))


def _steps(a: Tensor) -> int:
    """Bits of where rows of [B, T, D] begin: the lowest says how many bytes at once can be copied of each."""
    return a.data_ptr() | a.stride(1) * a.element_size()


def launch(name: str, tensors: dict[str, Any], segments: int, tiles: int, softplus: bool, ends: bool = False, save: bool = False) -> None:
    """A kernel on what has its arguments' names: u, dt, z, B and C in rows, all others contiguous; A, D and states float32."""
    u, dt, A, B, C, z = (tensors[each] for each in ("u", "dt", "A", "B", "C", "z"))
    out = tensors["y" if name == "forward" else "dy"]
    (batch, length, width), states = u.shape, A.shape[1]
    rows = _steps(u) | _steps(dt) | (0 if z is None else _steps(z)) | (0 if name == "forward" else _steps(out))
    constants = (
        ("IN", ELEMENTS[u.dtype]),
        ("STEP", ELEMENTS[dt.dtype]),
        ("BC", ELEMENTS[B.dtype]),
        ("OUT", ELEMENTS[out.dtype]),
        ("N", states),
        ("VEC", min(16, rows & -rows)),
        ("ALIGNED", int(states == STATES and (_steps(B) | _steps(C)) % (4 * B.element_size()) == 0)),
        ("SOFTPLUS", int(softplus)),
        ("HAS_Z", int(z is not None)),
        ("HAS_RESET", int(tensors["reset"] is not None)),
        ("HAS_VALID", int(tensors["valid"] is not None)),
        ("ENDS", int(ends)),
        ("SAVE", int(save)),
    )
    arguments = {"T": length, "dim": width, "batch": batch, "segments": segments, "tiles": tiles}
    arguments |= {"u_row": u.stride(1), "dt_row": dt.stride(1), "z_row": 0 if z is None else z.stride(1)}
    arguments |= {"b_row": B.stride(1), "c_row": C.stride(1), **tensors}
    programs = -(-width // BLOCK) * segments * batch
    if name == "sums":
        programs = batch * -(-length // TILE) + -(-width * STATES // 4 // (32 * WARPS))
    kernel = _kernel(name, u.device.index or 0, constants)
    kernel(programs, 32 * WARPS, [arguments[each] for each in ARGUMENTS[name]])


def _ends(a: Tensor, segments: int, batch: int, width: int) -> dict[str, Tensor | None]:
    """What segments tell each other, of a's dtype."""
    if segments == 1:
        return {"ends": None, "spans": None}
    return {"ends": a.new_empty((batch, segments, width, STATES)), "spans": a.new_empty((batch, segments, width))}


def forward(tensors: dict[str, Any], segments: int, tiles: int, softplus: bool, save: bool) -> None:
    """Fills y, final and, if `save`, saved [B, tiles, D, STATES]."""
    batch, _, width = tensors["u"].shape
    tensors |= _ends(tensors["final"], segments, batch, width)
    if segments > 1:
        launch("forward", tensors, segments, tiles, softplus, ends=True)
    launch("forward", tensors, segments, tiles, softplus, save=save)


def backward(tensors: dict[str, Any], segments: int, tiles: int, softplus: bool) -> None:
    """Fills du, ddt, dz, dinitial, to_A and to_D, both float32, and of B's dtype dB and dC."""
    (batch, length, width), new = tensors["u"].shape, tensors["saved"].new_empty
    blocks, count = -(-width // BLOCK), -(-length // TILE)
    tensors |= _ends(tensors["saved"], segments, batch, width)
    tensors |= {"dA": new((batch, segments, width, STATES)), "dD": new((batch, segments, width))}
    tensors |= {"dBC": new((batch, blocks, count * TILE * 2 * STATES))}
    if segments > 1:
        launch("adjoint", tensors, segments, tiles, softplus)
    launch("backward", tensors, segments, tiles, softplus)
    launch("sums", tensors, segments, tiles, softplus)
