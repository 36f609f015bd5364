"""Reading with PyTorch: logits in NumPy, states where the model is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import unisono_torch
from torch import Tensor
from unisono_spec.contract import Arrays, Config
from unisono_spec.contract.generation import Generated
from unisono_spec.contract.sampling import Sampling
from unisono_torch.arrays import find_device
from unisono_torch.ops.elementwise import wide

from unisono_tools.backends.base import Running

_Found = TypeVar("_Found")


class Reader:
    backend = "torch"
    tokenizer = seq_len = None
    spare: Callable[[], bool] | None = None

    def __init__(self, config: Config, params: Arrays, dtype: str = "float32", device: str | None = None) -> None:
        self.device = find_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.config = config
        param_dtype = "float64" if dtype == "float64" else "float32"
        self.model: Any = unisono_torch.create(config, params, dtype=dtype, param_dtype=param_dtype, device=str(self.device))

    @classmethod
    def around(cls, config: Config, model: Any, device: torch.device, spare: Callable[[], bool] | None = None) -> Reader:
        """A reader of a model that is still being trained. spare: gives back memory of the training, if there is any."""
        self = cls.__new__(cls)
        self.config, self.device, self.spare = config, device, spare
        self.model = model
        return self

    def init_state(self, batch: int, capacity: int | None = None) -> Running:
        return self.model.init_state(batch, capacity)

    def forward(self, tokens: np.ndarray, state: Running, reset: np.ndarray | None = None) -> tuple[np.ndarray, Running]:
        logits, state = self._roomy(lambda: self._read(tokens, state, reset))
        return to_numpy(logits), state

    @property
    def far(self) -> bool:
        """Whether logits are computed elsewhere than where NumPy is."""
        return self.device.type != "cpu"

    @torch.no_grad()
    def nats(self, tokens: np.ndarray, targets: np.ndarray, state: Running, reset: np.ndarray | None = None) -> tuple[np.ndarray, Running]:
        """Of ids targets [B, T] after tokens [B, T], in float64 [B, T], where the logits are; the state after them."""
        return self._roomy(lambda: self._nats(tokens, targets, state, reset))

    @torch.no_grad()
    def step(self, token: np.ndarray, state: Running) -> tuple[np.ndarray, Running]:
        logits, state = self.model.step(self._tokens(token), state)
        return to_numpy(logits), state

    def generate(
        self,
        prompt: np.ndarray,
        max_new_tokens: int,
        sampling: Sampling,
        state: Running = None,
        n_generated: int = 0,
        valid: Any = None,
        seen: np.ndarray | None = None,
    ) -> Generated:
        return self.model.generate(prompt, max_new_tokens, sampling, state, n_generated, valid, seen)

    def to_numpy(self, state: Running) -> Arrays:
        return unisono_torch.numpy_state(state)

    def from_numpy(self, arrays: Arrays) -> Running:
        return unisono_torch.state_from_numpy(arrays, self.device)

    def _roomy(self, work: Callable[[], _Found]) -> _Found:
        """What `work` gives, tried again where it found too little memory and `spare` gave some back."""
        try:
            return work()
        except torch.OutOfMemoryError:
            if self.spare is None or not self.spare():
                raise
        return work()

    def _nats(self, tokens: np.ndarray, targets: np.ndarray, state: Running, reset: np.ndarray | None) -> tuple[np.ndarray, Running]:
        logits, state = self._read(tokens, state, reset)
        wide_logits = logits.double()
        asked = wide_logits.gather(-1, self._tokens(targets)[..., None])[..., 0]
        return (wide_logits.logsumexp(-1) - asked).cpu().numpy(), state

    @torch.no_grad()
    def _read(self, tokens: np.ndarray, state: Running, reset: np.ndarray | None) -> tuple[Tensor, Running]:
        marks = None if reset is None else torch.as_tensor(reset, device=self.device)
        return self.model(self._tokens(tokens), state, marks)

    def _tokens(self, tokens: np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(tokens, np.float32 if self.config.reads_frames else np.int64), device=self.device)


def to_numpy(x: Tensor | None) -> np.ndarray:
    """Float32 or wider, a copy of its own."""
    assert x is not None
    return x.detach().to(wide(x.dtype) if x.is_floating_point() else x.dtype).cpu().numpy().copy()
