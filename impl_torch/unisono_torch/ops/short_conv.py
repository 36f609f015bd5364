"""Causal depthwise convolution over the last w tokens: y_t = Σ_d weight[:, w−1−d] ∘ x_{t−d} + bias. Before the first token stand zeros.

Shapes: x [B, T, D], weight [D, 1, w] (the last tap is the present token's), bias [D] or None, state [B, w−1, D]: the last
w−1 inputs, oldest first; reset and valid [B, T] bool or None. Each form returns (y [B, T, D], final state), float32 or wider.
y is 0 where a token is not valid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from unisono_spec.contract.shapes import shaped

from unisono_torch.ops.compact import Compact, segments, take
from unisono_torch.ops.dispatch import use_triton
from unisono_torch.ops.elementwise import silu, wide
from unisono_torch.ops.fold import fold, masked, restarted
from unisono_torch.ops.precision import exact


@exact
def step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, reset: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token: x [B, D], reset and valid [B]."""
    dtype = wide(x.dtype)
    state = state.to(dtype)
    if reset is not None:
        (state,) = masked(~reset, state)
    (x,) = masked(valid, x)
    seen = torch.cat([state, x.to(dtype)[:, None]], 1)  # [B, w, D]
    (read,) = masked(valid, seen)
    y = (read * weight[:, 0].to(dtype).mT).sum(1)
    y = y if bias is None else y + bias.to(dtype)
    if valid is None:
        return y, seen[:, 1:]
    return torch.where(valid[:, None], y, 0), torch.where(valid[:, None, None], seen[:, 1:], state)


@shaped
@exact
def recurrent(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, reset: Tensor | None = None, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: a fold of `step` over tokens, [B, T, …] → [B, T, …]."""
    return fold(lambda x_t, *rest: step(x_t, weight, bias, *rest), (x,), initial_state, reset, valid)


@shaped
@exact
def parallel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    chunk_size: int = 64,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One shifted product a tap, over the valid tokens; there are no chunks, since nothing is carried but the last inputs."""
    return through(x, weight, bias, initial_state, reset, valid, implementation)


@shaped
@exact
def through(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    reset: Tensor | None,
    valid: Tensor | None,
    implementation: str,
    activated: bool = False,
) -> tuple[Tensor, Tensor]:
    """`parallel`; activated: SiLU(y) in x's dtype, which a kernel has inside."""
    initial_state = restarted(reset, initial_state)
    kernel = use_triton(implementation, "short_conv", x.device, x.dtype, {"w": weight.shape[-1]})
    dtype, length, taps = wide(x.dtype), x.shape[1], weight.shape[-1]
    compact = None if valid is None else Compact(valid, x)
    if compact is not None:
        x = compact.pack(x)
    segment = now = owner = None
    if reset is not None or compact is not None:
        segment = segments(reset, x)
        # places behind the last valid token read nothing: a NaN among the last inputs must not meet their gradient of 0
        now = segment if compact is None else compact.pack(segment).masked_fill(~compact.present, -1)
        owner = torch.cat([torch.zeros_like(now[:, :1]).expand(-1, taps - 1), now], 1)  # the segment of each input [B, w−1+T]
    if kernel:
        from unisono_torch.kernels.short_conv import short_conv as convolved

        y = convolved(x, weight, bias, initial_state, owner, activated, x.dtype if activated else None)
    else:
        seen = torch.cat([initial_state.to(dtype), x.to(dtype)], 1)  # [B, w−1+T, D]
        y = seen.new_zeros(()) if bias is None else bias.to(dtype)
        for tap in range(taps):
            part = seen[:, tap : tap + length]
            if owner is not None:
                part = torch.where((owner[:, tap : tap + length] == now)[..., None], part, 0)
            y = y + part * weight[:, 0, tap].to(dtype)
        y = silu(y.to(x.dtype)) if activated else y
    if compact is None:
        final = torch.cat([initial_state.to(dtype), x[:, 1 - taps :].to(dtype)], 1)[:, 1 - taps :] if taps > 1 else initial_state.to(dtype)
        last = None if owner is None else owner[:, length:]
    else:
        newest = compact.read[:, None] + torch.arange(taps - 1, device=x.device)  # [B, w−1]
        final = take(torch.cat([initial_state.to(dtype), x.to(dtype)], 1), newest)
        last = None if owner is None else take(owner, newest)
    if last is not None and segment is not None:
        (final,) = masked(last == segment[:, -1:], final)
    return y if compact is None else compact.unpack(y), final
