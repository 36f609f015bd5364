"""Training and reading with PyTorch."""

from __future__ import annotations

from unisono_tools.backends.torch.objective import dropout_masks
from unisono_tools.backends.torch.reader import Reader
from unisono_tools.backends.torch.trainer import Trainer

__all__ = ["Reader", "Trainer", "dropout_masks"]
