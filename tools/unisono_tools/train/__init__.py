"""Training: the loop, its checkpoints and its logs."""

from unisono_tools.train.loop import Result, train

__all__ = ["Result", "train"]
