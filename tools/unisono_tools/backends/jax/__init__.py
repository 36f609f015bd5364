"""Training and reading with JAX: Flax NNX models, optax's AdamW."""

from __future__ import annotations

from unisono_tools.backends.jax.functional import functional
from unisono_tools.backends.jax.objective import dropout_masks
from unisono_tools.backends.jax.reader import Reader
from unisono_tools.backends.jax.trainer import Trainer

__all__ = ["Reader", "Trainer", "dropout_masks", "functional"]
