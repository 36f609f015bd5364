"""Which implementations the ops have here, as contract/implementations.py describes them; and whether those with kernels can run.

`python -m unisono_torch.kernels.registry` writes the table of docs/kernels.md.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping

import torch
from unisono_spec.contract.errors import InputError, nearest, shown
from unisono_spec.contract.implementations import PLAIN, Implementation, plain, table

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GPU = "cuda, or a CPU in Triton's interpreter"


def _triton(op: str, dtypes: tuple[torch.dtype, ...] = FLOATS, how: str = "", **served: Mapping) -> Implementation:
    return Implementation(op, "triton", dtypes, how=how, devices=GPU, **served)


IMPLEMENTATIONS = (
    *plain(
        {
            "decayed_sum": "a masked matmul in each chunk, by levels",
            "weighted_sum": "a masked matmul in each chunk, by levels",
            "linear_attention": "masked matmuls in chunks, states by a segmented sum",
            "multiscale": "masked matmuls in chunks, states by the same recurrence",
            "selective_scan": "chunk after chunk, states made again for the gradient",
            "short_conv": "one shifted product a tap",
            "diagonal_ssm": "Toeplitz matmuls in chunks; with resets lag by lag",
            "window": "a banded mask in chunks",
            "softmax_attention": "PyTorch's fused attention",
            "mom_gru": "a loop, products with x before it; its gradient written out",
            "rotary": "operations one by one",
        },
        FLOATS,
    ),
    _triton("decayed_sum", how="one sweep each way"),
    _triton("weighted_sum", how="one sweep each way"),
    _triton(
        "linear_attention",
        FLOATS[1:],
        "one sweep each way, φ in it",
        widths={"K": (1, 256), "V": (1, 256)},
        settings={"feature_map": ("none", "elu1", "relu", "learned", "taylor2"), "one_dtype": (True,)},
    ),
    _triton("multiscale", FLOATS[1:], "all scales at once, one q kᵀ", widths={"K": (1, 128), "V": (1, 128), "scales": (1, 8)}),
    _triton("selective_scan", how="one sweep each way, softplus and gate in it; to N = 16 in CUDA C++ on a GPU", widths={"N": (1, 64)}),
    _triton("short_conv", how="one pass each way, SiLU in it", widths={"w": (1, 16)}),
    _triton("diagonal_ssm", how="matmuls of chunks; with marks, and of few tokens, one sweep each way", widths={"P": (1, 128)}),
    _triton(
        "mom_gru",
        FLOATS[1:],
        "one launch each way for all tokens; in CUDA C++ since compute capability 9.0",
        widths={"n": (1, 16), "L": (1, 256), "d_m": (1, 128), "hidden": (1, 128)},
    ),
    _triton(
        "rotary",
        FLOATS[1:],
        "one pass each way over q and k, φ in it",
        widths={"K": (2, 256)},
        settings={"feature_map": ("none", "elu1", "relu", "learned")},
    ),
    _triton("window", FLOATS[1:], "a query's keys where they lie, one pass forward, two back", widths={"K": (1, 128), "V": (1, 128)}),
)
REGISTRY: Mapping[tuple[str, str], Implementation] = {(each.op, each.name): each for each in IMPLEMENTATIONS}


def why_not(
    kernel: Implementation, device: torch.device, dtype: torch.dtype, widths: Mapping[str, int], settings: Mapping[str, object]
) -> str | None:
    """Why `kernel` cannot serve such a call on `device`, and what would help; None where it can."""
    if kernel.name != PLAIN and not available(device):
        return (
            f"{kernel.name!r} cannot run on {device.type}; use 'auto' or 'plain', or a CUDA device with triton installed "
            "(pip install unisono[torch-cuda]), or Triton's interpreter (TRITON_INTERPRET=1 in the environment)"
        )
    return kernel.why_not(dtype, widths, settings)


def check_map(op: str, feature_map: str, tau: object) -> None:
    """Raises InputError unless `op`'s kernels know a feature map, which has the τ that it needs."""
    known = tuple(map(str, REGISTRY[op, "triton"].settings["feature_map"]))
    if feature_map not in known:
        raise InputError(f"feature_map: {shown(feature_map)} is unknown; {nearest(feature_map, known)}")
    if feature_map == "learned" and tau is None:
        raise InputError("tau: None; the feature map 'learned' needs its τ [1]")


@torch.compiler.assume_constant_result  # a compiler cannot look for modules
def available(device: torch.device | str) -> bool:
    """Whether the kernels run on `device`: a GPU with Triton installed, or the CPU under Triton's interpreter (TRITON_INTERPRET=1)."""
    if importlib.util.find_spec("triton") is None:
        return False
    kind = torch.device(device).type
    return interpreted() if kind == "cpu" else kind == "cuda" and torch.cuda.is_available() and not interpreted()


def hopper(device: torch.device) -> bool:
    """Whether kernels in Gluon for a Hopper GPU run on `device`: such a GPU, or Triton's interpreter."""
    return interpreted() or (_has_gluon() and torch.cuda.get_device_capability(device)[0] == 9)


@functools.cache
def _has_gluon() -> bool:
    return importlib.util.find_spec("triton.experimental.gluon") is not None


def interpreted() -> bool:
    """Whether Triton's functions run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


if __name__ == "__main__":
    print(table(IMPLEMENTATIONS))
