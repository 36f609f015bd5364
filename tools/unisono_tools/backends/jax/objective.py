"""The nats of a batch and their gradient."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from unisono_spec.contract import Config

from unisono_tools.backends.jax.functional import Functional, Named


def nats(
    named: Named,
    buffers: Named,
    model: Functional,
    precomputed: bool,
    inputs: Any,
    targets: Any,
    scored: Any,
    state: Any,
    reset: Any,
    valid: Any,
    seeds: Any,
    noise: Any,
    count: Any,
    scale: Any,
    groups: Any = None,
    kept: list[jax.Array] | None = None,
) -> tuple[jax.Array, tuple[jax.Array, list[jax.Array], Any, jax.Array]]:
    """Nats of the targets that count, as their share of the mean over all `count` targets of the batch, times the scale; and beside it:
    without the scale, the noisy routers' loads, the state at the end, nats of the rows of each group [G]. kept: where
    dropout's masks are not 0, if they were drawn already."""
    built, loads = model({**named, **buffers}), []
    if kept is None:
        dropout = dropout_masks(model.config, seeds, inputs.shape[: 1 if precomputed else 2], built.dtype)
    else:
        dropout = masks_of(kept, model.config, built.dtype)
    if precomputed:
        logits = built.readout(inputs, dropout=dropout)
    else:
        logits, state = built.forward(inputs, state, reset, valid, dropout=dropout, noise=noise, loads=loads if noise else None)
    nll = _loss(model.config.predicts, logits, targets)
    counts = nll if scored is None else jnp.where(scored, nll, 0)
    loss = counts.sum() / count
    each = jnp.zeros(0) if groups is None else jnp.where(groups, counts.reshape(len(groups), -1).sum(1, keepdims=True), 0).sum(0)
    return loss if scale is None else loss * scale, (loss, loads, state, each)


# of what `nats` gives first, and all that it gives beside it
gradient = jax.jit(jax.grad(nats, has_aux=True), static_argnames=("model", "precomputed"))


def dropout_masks(config: Config, seeds: jax.Array | np.ndarray, shape: tuple[int, ...], dtype: str) -> list[jax.Array] | None:
    """What each layer's update is multiplied by, [*shape, D]: 0, or 1 / (1 − rate)."""
    return masks_of(dropout_kept(config, seeds, shape), config, dtype) if config.dropout else None


def dropout_kept(config: Config, seeds: jax.Array | np.ndarray, shape: tuple[int, ...]) -> list[jax.Array]:
    """Where each layer's mask is not 0, [*shape, D] bool."""
    size = (*shape, config.d_model)
    return [jax.random.bernoulli(jax.random.key(seeds[i]), 1 - config.dropout, size) for i in range(len(seeds))]


def masks_of(kept: list[jax.Array], config: Config, dtype: str) -> list[jax.Array]:
    return [jnp.asarray(k, dtype) / (1 - config.dropout) for k in kept]


def _loss(kind: str, logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Nats of each target, in float32 or wider; pixels of a frame are summed."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if kind == "categorical":
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    targets = targets.astype(logits.dtype)
    if kind == "bernoulli":
        return optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1)
    mean, log_variance = jnp.split(logits, 2, -1)
    return 0.5 * (log_variance + (targets - mean) ** 2 * jnp.exp(-log_variance) + math.log(2 * math.pi)).sum(-1)
