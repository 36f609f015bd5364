"""A model's head and its loss at once: cross-entropy of ids under logits W x + b, which need be neither kept nor all there at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from unisono_spec.contract import InputError
from unisono_spec.contract.checks import dtype_kind

from unisono_torch.ops.elementwise import FEWEST, linear, on_a_gpu, wide
from unisono_torch.ops.precision import exact


@exact
def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D], weight [V, D], bias [V], targets [...] integers in [0, V), negative where none is asked → Σ nats [], nats [...].

    nats = log Σ_j e^{y_j} − y_target of y = W x + b in x's dtype; float32, or float64 of float64; 0 where no target is asked, and no
    gradient comes of what x holds there. The sum has a gradient, the nats beside it have none. On a GPU wide vocabularies take one
    operator, compiled or not (kernels/linear_cross_entropy), where a target of V or more has the nats NaN.
    Raises InputError where targets are no ids of x's rows.
    """
    if x.shape[:-1] != targets.shape or dtype_kind(targets) != "i":
        raise InputError(f"targets: {targets.dtype} {tuple(targets.shape)} for x {tuple(x.shape)}; give an id for each row of x")
    targets = targets.long()
    if _serves(x, weight):
        from unisono_torch.kernels.linear_cross_entropy import linear_cross_entropy as kernel

        learns = torch.is_grad_enabled()
        of_weight = weight.requires_grad or (bias is not None and bias.requires_grad)
        return kernel(x, weight, bias, targets, learns and x.requires_grad, learns and of_weight)[:2]
    return plain(x, weight, bias, targets)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain operations."""
    asked = targets >= 0
    y = linear(torch.where(asked[..., None], x, 0), weight, bias)  # else NaN there would reach the weights
    none = -1
    flat = torch.where(asked, targets, none).flatten()
    nats = F.cross_entropy(y.reshape(-1, y.shape[-1]).to(wide(y.dtype)), flat, ignore_index=none, reduction="none").reshape(targets.shape)
    return nats.sum(), nats.detach()


def _serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the operator is worth it: what it keeps of gradients, in float32, must be less than the logits that it does not keep."""
    kept, logits = 4 * (x.numel() + weight.numel()), x.numel() // x.shape[-1] * len(weight) * x.element_size()
    return on_a_gpu(x) and len(weight) >= FEWEST and kept <= logits
