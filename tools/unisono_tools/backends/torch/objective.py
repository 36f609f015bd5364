"""The nats of a batch as a PyTorch module, so that it can be compiled, replicated and sharded like one."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from unisono_spec.contract import Config
from unisono_torch.ops.elementwise import wide

State = dict[str, Tensor]


class Objective(nn.Module):
    """A model and its loss."""

    def __init__(self, config: Config, model: Any) -> None:
        super().__init__()
        self.config, self.model = config, model

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        scored: Tensor | None = None,
        state: State | None = None,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        dropout: Sequence[Tensor] | None = None,
        noise: Sequence[Tensor] | None = None,
        precomputed: bool = False,
        keep_state: bool = False,
        groups: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...], State, Tensor]:
        """Nats, summed over the targets that count; the load of each noisy router; with keep_state the state at the end; nats of the
        rows of each group [G], without a gradient."""
        loads: list[Tensor] = []
        drawn: dict[str, Any] = {"dropout": dropout, "noise": noise, "loads": loads if noise else None}
        if self.config.predicts == "categorical":
            asked = targets if scored is None else torch.where(scored, targets, -100)
            if precomputed:
                (total, counts), after = self.model.readout_nats(inputs, asked, dropout), {}
            else:
                total, counts, after = self.model.nats(inputs, asked, state, reset, valid, **drawn)
        else:
            if precomputed:
                logits, after = self.model.readout(inputs, dropout), {}
            else:
                logits, after = self.model(inputs, state, reset, valid, **drawn)
            nll = _of_frames(self.config.predicts, logits, targets)
            counts = nll if scored is None else torch.where(scored, nll, 0)
            total = counts.sum()
        # a copy: a block that is computed again measures its load again
        rows = counts.detach().flatten(1).sum(1) if groups is not None else counts.new_zeros(0)
        each = rows if groups is None else torch.where(groups, rows[:, None], 0).sum(0)
        return total, tuple(loads), after if keep_state else {}, each


def recompute_blocks(model: Any) -> None:
    """Of each block keep its inputs alone, and compute the rest again for the gradient (Chen et al. 2016)."""
    for layer in model.layers:
        # an adaptive CRAM layer is called twice, before the sum and after it
        for name in ("scored_input", "forward"):
            if hasattr(layer, name):
                # masks and noise are given, so nothing is drawn anew
                again = functools.partial(checkpoint, getattr(layer, name), use_reentrant=False, preserve_rng_state=False)
                setattr(layer, name, again)


def dropout_masks(
    config: Config, seeds: np.ndarray, shape: tuple[int, ...], dtype: str, device: torch.device | str = "cpu"
) -> list[Tensor] | None:
    """What each layer's update is multiplied by, [*shape, D]: 0, or 1 / (1 − rate)."""
    rate = config.dropout
    if not rate:
        return None
    size = (*shape, config.d_model)
    masks = []
    for seed in seeds:
        generator = torch.Generator(device).manual_seed(int(seed))
        kept = torch.empty(size, device=device).bernoulli_(1 - rate, generator=generator)
        masks.append((kept / (1 - rate)).to(getattr(torch, dtype)))
    return masks


def _of_frames(kind: str, logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each frame, in float32 or wider: those of its pixels, summed."""
    logits = logits.to(wide(logits.dtype))
    targets = targets.to(logits.dtype)
    if kind == "bernoulli":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)
    mean, log_variance = logits.chunk(2, -1)
    return 0.5 * (log_variance + (targets - mean) ** 2 * torch.exp(-log_variance) + math.log(2 * math.pi)).sum(-1)
