"""The cell's kernels in CUDA C++ (forward.cu, backward.cu): which calls they serve, how they are compiled and launched.

Triton cannot keep weights in registers over a loop, nor load what another program may be storing: its kernels, of the same phases, pass
four barriers a token. They serve what these do not, and Triton's interpreter.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import torch

from unisono_torch.kernels import nvrtc

WARPS = 8  # of a program
SHARED = 227 * 1024  # bytes that a program can have
WIDEST, COLUMNS, MOST = 768, 6, 10  # of h; of a program of one team, of two: its weights are in registers
# Each kernel's arguments in its order
FORWARD = (
    "h M given drawn reset valid w_h w_c w_candidate w_after after_bias router router_bias fresh "
    "before rho c gates candidate later memories residual out exchange T"
)
BACKWARD = (
    "h dM dout reset valid w_h w_c w_candidate w_after router fresh before rho gates candidate later memories "
    "dx dafter dlogits dh dfresh past exchange T"
)
SETTLED = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # the dtypes of what a decoded token leaves
ARGUMENTS = {"forward": FORWARD.split(), "backward": BACKWARD.split()}


@functools.cache
def _there(device: torch.device) -> bool:
    """Whether `device` can run them: tf32 since compute capability 8.0, shared memory for weights and banks since 9.0."""
    there = device.type == "cuda" and torch.cuda.is_available() and nvrtc.library() is not None
    return there and torch.cuda.get_device_capability(device) >= (9, 0)


def source(name: str, constants: tuple[tuple[str, int], ...]) -> str:
    here = pathlib.Path(__file__).parent
    head = "".join(f"#define {each} {value}\n" for each, value in constants)
    return head + "".join((here / f"{each}.cu").read_text(encoding="utf-8") for each in ("primitives", "common", name))


@functools.cache
def _kernel(name: str, device: int, constants: tuple[tuple[str, int], ...]) -> nvrtc.Kernel | None:
    """None where a program's share of the memory has no room."""
    module = nvrtc.Module(source(name, constants))
    shared = module.constant("shared_bytes")
    return nvrtc.Kernel(module, name, shared, cooperative=True) if shared <= SHARED else None


def constants(
    name: str, tensors: dict[str, Any], sizes: tuple[int, int], teams: int, programs: int, segment: int, keep: bool
) -> dict[str, int]:
    """What is compiled into a kernel of `teams` teams."""
    _, batch, width = tensors["h"].shape
    found = {
        "TEAMS": teams,
        "BATCH": batch // teams,
        "D": width,
        "WIDTH": tensors["fresh"].shape[1],
        "HIDDEN": tensors["router"].shape[1],
        "BANKS": sizes[0],
        "SLOTS": sizes[1],
        "AFTER": tensors["w_after"].shape[0 if name == "forward" else 1],
        "HAS_RESET": int(tensors["reset"] is not None),
        "HAS_VALID": int(tensors["valid"] is not None),
        "SEGMENT": segment,
        "PROGRAMS": programs // teams,
        "WARPS": WARPS,
    }
    if name == "forward":
        found |= {"HAS_DRAWN": int(tensors["drawn"] is not None), "KEEP": int(keep)}
        found |= {"SETTLE": 0 if tensors["out"] is None else SETTLED[tensors["out"].dtype]}
    return found | {"EXCHANGED": exchanged(name, found)}


def exchanged(name: str, constants: dict[str, int]) -> int:
    """How many values a team's programs exchange; rounded up to quads."""
    wide, narrow = (-(-constants[each] // 4) * 4 for each in ("D", "WIDTH"))
    banks, after, memory = (constants[each] for each in ("BANKS", "AFTER", "WIDTH"))
    if name == "forward":
        return -(-constants["BATCH"] * (2 * wide + banks * narrow + constants["HIDDEN"] + memory + after) // 4) * 4
    kinds = 4 if after > 2 * memory + 1 else 3
    piece = kinds * narrow + 4
    return constants["BATCH"] * (banks * piece + piece + -(-constants["HIDDEN"] // 4) * 4 + 4 * wide + narrow)


def launch(
    name: str, tensors: dict[str, Any], sizes: tuple[int, int], programs: int, segment: int, length: int, keep: bool, room: Any = None
) -> bool:
    """A kernel on what has its arguments' names, all contiguous; weights as forward.py and backward.py have them. room: of a decoded
    token's calls. → whether it serves."""
    h = tensors["h"]
    if not (h.dtype == torch.float32 and _there(h.device) and h.shape[2] <= min(WIDEST, COLUMNS * programs)):
        return False
    _, batch, width = h.shape
    for teams in (2, 1) if batch % 2 == 0 and width <= MOST * (programs // 2) else (1,):
        found = constants(name, tensors, sizes, teams, programs, segment, keep)
        kernel = _kernel(name, h.device.index or 0, tuple(found.items()))
        if kernel is not None:
            count = teams * found["EXCHANGED"]
            exchange = torch.zeros(count, device=h.device) if room is None else room.zeros(count, torch.float32)
            arguments = {**tensors, "exchange": exchange, "T": length}
            kernel(teams * found["PROGRAMS"], 32 * WARPS, [arguments[each] for each in ARGUMENTS[name]])
            return True
    return False
