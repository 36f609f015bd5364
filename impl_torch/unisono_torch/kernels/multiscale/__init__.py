"""Linear attention read at several time scales (InfinityFormer), all of which share q kᵀ."""

from __future__ import annotations

import torch
from torch import Tensor
from unisono_spec.contract import InputError

from unisono_torch.kernels.multiscale import operator as _operator  # noqa: F401  (registers the operator)

State = tuple[Tensor, Tensor]


def multiscale(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    log_decay: Tensor,
    weight: Tensor,
    initial_state: State,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, State]:
    """As ops/multiscale.py, of one dtype; q_norm and k_norm None: q and k. o comes in v's dtype, the state in float32.

    A weight for each channel takes one pass a scale. Differentiable in every real argument; a second time by plain operations.
    """
    S, z = initial_state
    batch, length, heads, width = q.shape
    scales, values = S.shape[1], v.shape[-1]
    shapes = {
        "k": (k, (batch, length, heads, width)), "v": (v, (batch, length, heads, values)),
        "q_norm": (q_norm, (batch, length, heads, width)), "k_norm": (k_norm, (batch, length, heads, width)),
        "initial_state's S": (S, (batch, scales, heads, width, values)), "initial_state's z": (z, (batch, scales, heads, width)),
        "reset": (reset, (batch, length)), "valid": (valid, (batch, length)),
    }  # fmt: skip
    for name, (a, shape) in shapes.items():
        if a is not None and (a.shape != shape or a.device != q.device or (a.dtype == torch.bool) != (name in ("reset", "valid"))):
            raise InputError(f"{name}: got {a.dtype} {tuple(a.shape)} on {a.device}; give {shape} on {q.device}")
    for name, a, shape in (("log_decay", log_decay, (batch, length, scales)), ("weight", weight, (batch, length, scales, heads, values))):
        if a.ndim != len(shape) or any(n not in (1, most) for n, most in zip(a.shape, shape, strict=True)) or a.shape[2] != scales:
            raise InputError(f"{name}: got {tuple(a.shape)}; give {shape}, or 1 where it is one for all (but for scales)")
    if any(a is not None and a.dtype != v.dtype for a in (q, k, q_norm, k_norm)) or (q_norm is None) != (k_norm is None):
        raise InputError("q, k, v, q_norm, k_norm: give one dtype, and both of the last two or neither")

    def run(weight: Tensor, log_decay: Tensor, S: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.unisono.multiscale(q, k, v, q_norm, k_norm, log_decay, weight, S, z, reset, valid)[:3]

    if weight.shape[-1] == 1:
        o, S, z = run(weight, log_decay, S, z)
        return o, (S, z)
    ones, read, states, lines = torch.ones_like(weight[:1, :1, :1, :1, :1]), torch.zeros((), device=v.device), [], []
    weight = weight if valid is None else torch.where(valid[:, :, None, None, None], weight, 0)
    for s in range(scales):
        o, S_end, z_end = run(ones, log_decay[:, :, s : s + 1], S[:, s : s + 1], z[:, s : s + 1])
        read = read + weight[:, :, s] * o
        states.append(S_end)
        lines.append(z_end)
    return read.to(v.dtype), (torch.cat(states, 1), torch.cat(lines, 1))
