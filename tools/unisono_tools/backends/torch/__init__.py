"""Training, reading and exporting with PyTorch."""

from __future__ import annotations

from pathlib import Path

import unisono_torch

from unisono_tools.backends.torch.reader import Reader
from unisono_tools.backends.torch.trainer import Trainer, dropout_masks

__all__ = ["Reader", "Trainer", "dropout_masks", "export"]


def export(source: Path, out: Path, tokenizer: str | None, seq_len: int | None = None, target: str = "portable") -> None:
    """Write the model file `source` as an ONNX graph that says with which tokenizer, and on how many tokens at once, it was trained."""
    from unisono_torch.onnx import export as write

    known = {"unisono.tokenizer": tokenizer, "unisono.seq_len": seq_len}
    write(unisono_torch.load(source), out, {name: str(value) for name, value in known.items() if value is not None}, target)
