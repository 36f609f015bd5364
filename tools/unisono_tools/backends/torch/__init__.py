"""Training, reading and exporting with PyTorch."""

from __future__ import annotations

from pathlib import Path

import unisono_torch

from unisono_tools.backends.torch.reader import Reader
from unisono_tools.backends.torch.trainer import Trainer, dropout_masks

__all__ = ["Reader", "Trainer", "dropout_masks", "export"]


def export(source: Path, out: Path, tokenizer: str | None, target: str = "portable") -> None:
    """Write the model file `source` as an ONNX graph that says which tokenizer it was trained with."""
    from unisono_torch.onnx import export as write

    write(unisono_torch.load(source), out, {} if tokenizer is None else {"unisono.tokenizer": tokenizer}, target)
