"""torch.compile of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.exc
from unisono_spec.contract import Config, InputError

# Whose steps are faster for it by measurement (docs/results/kernel-notes.md); what others gain, or lose, was not measured.
COMBINED = ("lat", "mamba", "s4d")


def compile_step(function: Callable[..., Any], config: Config, device: torch.device) -> Any:
    """`function` compiled anew for each shape. On a GPU, in models that wait for their host, small kernels of which none waits for another
    (weights of all layers cast, gradients cast back) are one launch: the same numbers, but for roundings, from fewer."""
    if device.type == "cuda" and config.arch in COMBINED:
        return torch.compile(function, dynamic=False, options={"combo_kernels": True})
    return torch.compile(function, dynamic=False)


def computing(objective: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
    """`objective(**arguments)` of a mapping; InputError where torch.compile cannot make it."""

    def compute(arguments: dict[str, Any]) -> Any:
        try:
            return objective(**arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise InputError(f"compile: {str(error).strip().splitlines()[0]}; leave it out, or see that a C++ compiler is here") from error

    return compute
