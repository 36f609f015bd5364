"""Which implementation of an op runs: plain tensor operations, or one that kernels/registry.py names."""

from __future__ import annotations

import functools
import logging

import torch
from unisono_spec.contract import InputError, nearest
from unisono_spec.contract.errors import shown
from unisono_spec.contract.implementations import PLAIN, choices

from unisono_torch.kernels.registry import IMPLEMENTATIONS, REGISTRY, available, why_not
from unisono_torch.ops.transforms import transformed

CHOICES = choices(IMPLEMENTATIONS)
_log = logging.getLogger("unisono_torch")


def check_implementation(implementation: str, device: torch.device | None = None) -> str:
    """Raises InputError where `implementation` is unknown, or no kernel of it runs on `device`."""
    if implementation not in CHOICES:
        raise InputError(f"implementation: {shown(implementation)} is unknown in PyTorch; {nearest(implementation, CHOICES)}")
    if device is not None and implementation not in ("auto", PLAIN) and not available(device):
        some = next(each for each in IMPLEMENTATIONS if each.name == implementation)
        raise InputError(f"implementation: {why_not(some, device, some.dtypes[0], {}, {})}")
    return implementation


def use_triton(
    implementation: str, op: str, device: torch.device, dtype: torch.dtype, widths: dict[str, int] | None = None, **settings: object
) -> bool:
    """Whether the Triton kernel of `op` serves this call.

    Always for "triton", else InputError with the reason; on a GPU, where it can, for "auto", which logs a reason once where it cannot.
    """
    check_implementation(implementation)
    if implementation == PLAIN:
        return False
    kernel = REGISTRY.get((op, "triton"))
    if kernel is None:
        why = f"there is no Triton kernel of {op}; use 'auto' or 'plain'"
    elif implementation == "auto" and device.type != "cuda":
        why = f"{op} has kernels for a GPU, not for {device.type}"
    elif transformed():
        why = "torch.func and forward-mode differentiation know plain operations only; use 'auto' or 'plain'"
    else:
        why = why_not(kernel, device, dtype, widths or {}, settings)
    if why is None:
        return True
    if implementation == "triton":
        raise InputError(f"implementation: {why}")
    if not torch.compiler.is_compiling():  # a compiler traces no logging
        _tell(op, why)
    return False


@functools.cache  # once
def _tell(op: str, why: str) -> bool:
    _log.debug("%s: plain tensor operations, since %s", op, why)
    return True


def shorter(limit: int, length: int) -> int:
    """The smaller of the two, also where `length` is symbolic: torch.compile knows Python's min, torch.export only torch's."""
    return min(limit, length) if torch.compiler.is_dynamo_compiling() else torch.sym_min(limit, length)  # pyright: ignore[reportReturnType]
