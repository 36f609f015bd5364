"""Which implementation of an op runs: plain tensor operations or a Triton kernel."""

from __future__ import annotations

import torch
from unisono_spec.contract import InputError, nearest

IMPLEMENTATIONS = ("auto", "plain", "triton")


def check_implementation(implementation: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"implementation: {implementation!r} is unknown in PyTorch; {nearest(implementation, IMPLEMENTATIONS)}")
    return implementation


def use_triton(implementation: str, device: torch.device) -> bool:
    """Whether a kernel runs on `device`: always for "triton" (else InputError), on a GPU that can for "auto"."""
    check_implementation(implementation)
    if implementation == "plain" or (implementation == "auto" and device.type != "cuda"):
        return False
    if _available(device):
        return True
    if implementation == "triton":
        raise InputError(
            f"implementation: 'triton' cannot run on {device.type}; use 'auto' or 'plain', or a CUDA device with triton installed "
            "(pip install unisono[torch-cuda]), or Triton's interpreter (TRITON_INTERPRET=1 in the environment)"
        )
    return False


def no_kernel(implementation: str, op: str) -> None:
    """Raise InputError where `implementation` asks for a kernel that this op does not have."""
    if check_implementation(implementation) == "triton":
        raise InputError(f"implementation: there is no Triton kernel of {op}; use 'auto' or 'plain'")


def _available(device: torch.device) -> bool:
    # imported here, so that nobody without a GPU needs triton
    try:
        from unisono_torch.kernels import available
    except ImportError:
        return False
    return available(device)


def shorter(limit: int, length: int) -> int:
    """The smaller of the two, also where `length` is symbolic: torch.compile knows Python's min, torch.export only torch's."""
    return min(limit, length) if torch.compiler.is_dynamo_compiling() else torch.sym_min(limit, length)  # pyright: ignore[reportReturnType]
