"""Triton kernels. Importing this package needs neither Triton nor a GPU; the kernels are read when first called."""

from __future__ import annotations

import importlib.util
import os

import torch


@torch.compiler.assume_constant_result  # a compiler cannot look for modules
def available(device: torch.device | str) -> bool:
    """Whether the kernels run on `device`: a GPU with Triton installed, or the CPU under Triton's interpreter (TRITON_INTERPRET=1)."""
    if importlib.util.find_spec("triton") is None:
        return False
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    kind = torch.device(device).type
    return interpreted if kind == "cpu" else kind == "cuda" and torch.cuda.is_available() and not interpreted
