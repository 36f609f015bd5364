"""The NumPy spec as a backend: it evaluates and generates."""

from __future__ import annotations

from typing import Any

import numpy as np
from unisono_spec.contract import Arrays, Config, InputError
from unisono_spec.contract.files import cast_state
from unisono_spec.contract.generation import Generated
from unisono_spec.contract.sampling import Sampling
from unisono_spec.models import create

from unisono_tools.config import TrainConfig


class Trainer:
    def __init__(self, train: TrainConfig, config: Config) -> None:
        raise InputError("backend: 'numpy' has no gradients; train with torch or jax")


class Reader:
    backend = "numpy"
    tokenizer = seq_len = None

    def __init__(self, config: Config, params: Arrays, dtype: str = "float32", device: str | None = None) -> None:
        if device not in (None, "cpu"):
            raise InputError(f"device: {device!r}; backend numpy runs on the cpu")
        self.config, self.model = config, create(config, params, dtype=dtype)

    def init_state(self, batch: int, capacity: int | None = None) -> Arrays:
        return self.model.init_state(batch, capacity)

    def forward(self, tokens: np.ndarray, state: Arrays, reset: np.ndarray | None = None) -> tuple[np.ndarray, Arrays]:
        return self.model.forward(tokens, state, reset)

    def step(self, token: np.ndarray, state: Arrays) -> tuple[np.ndarray, Arrays]:
        return self.model.step(token, state)

    def generate(
        self,
        prompt: np.ndarray,
        max_new_tokens: int,
        sampling: Sampling,
        state: Any = None,
        n_generated: int = 0,
        valid: Any = None,
        seen: np.ndarray | None = None,
    ) -> Generated:
        return self.model.generate(prompt, max_new_tokens, sampling, state, n_generated, valid, seen)

    def to_numpy(self, state: Arrays) -> Arrays:
        return state

    def from_numpy(self, arrays: Arrays) -> Arrays:
        return cast_state(self.config, arrays, self.model.dtype)
