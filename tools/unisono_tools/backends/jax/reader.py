"""Reading with JAX."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import unisono_jax
from unisono_spec.contract import Arrays, Config
from unisono_spec.contract.files import cast_state
from unisono_spec.contract.generation import Generated
from unisono_spec.contract.sampling import Sampling

from unisono_tools.backends.base import Running
from unisono_tools.backends.jax.functional import Functional, Named, functional, ids


class Reader:
    """Pads each chunk to the next power of two, so that only a few lengths are ever compiled."""

    backend = "jax"
    tokenizer = seq_len = None

    def __init__(self, config: Config, params: Arrays, dtype: str = "float32", device: str | None = None) -> None:
        param_dtype = "float64" if dtype == "float64" else "float32"
        with jax.enable_x64(dtype == "float64"):
            model = unisono_jax.create(config, params, dtype=dtype, param_dtype=param_dtype, device=device)
        self.config, self.dtype = config, dtype
        self.model, self.named = functional(model)

    @classmethod
    def around(cls, model: Functional, named: Named, dtype: str) -> Reader:
        """A reader of parameters that are still being trained."""
        self = cls.__new__(cls)
        self.config, self.model, self.named, self.dtype = model.config, model, named, dtype
        return self

    def init_state(self, batch: int, capacity: int | None = None) -> Running:
        with self._precision():
            return self.model(self.named).init_state(batch, capacity)

    @property
    def far(self) -> bool:
        """Whether logits are computed elsewhere than where NumPy is."""
        return any(device.platform != "cpu" for a in self.named.values() for device in a.devices())

    def forward(self, tokens: np.ndarray, state: Running, reset: np.ndarray | None = None) -> tuple[np.ndarray, Running]:
        logits, state = self._read(tokens, state, reset)
        with self._precision():
            return _wide_numpy(logits[:, : tokens.shape[1]]), state

    def nats(self, tokens: np.ndarray, targets: np.ndarray, state: Running, reset: np.ndarray | None = None) -> tuple[np.ndarray, Running]:
        """Of ids targets [B, T] after tokens [B, T], in float64 [B, T], where the logits are; the state after them."""
        logits, state = self._read(tokens, state, reset)
        padding = logits.shape[1] - targets.shape[1]
        with jax.enable_x64(True):
            found = _nats(logits, np.pad(ids(targets), ((0, 0), (0, padding))))
            return np.asarray(found)[:, : targets.shape[1]], state

    def _read(self, tokens: np.ndarray, state: Running, reset: np.ndarray | None) -> tuple[jax.Array, Running]:
        """Logits of the tokens and of what pads them."""
        length = tokens.shape[1]
        padding = (1 << max(0, length - 1).bit_length()) - length
        pad = ((0, 0), (0, padding))
        tokens = np.pad(ids(tokens), (*pad, (0, 0)) if tokens.ndim == 3 else pad)
        valid = np.broadcast_to(np.arange(length + padding) < length, tokens.shape[:2])
        marks = np.zeros(tokens.shape[:2], bool) if reset is None else np.pad(reset, pad)
        with self._precision():
            return _forward(self.model, self.named, tokens, state, marks, valid)

    def step(self, token: np.ndarray, state: Running) -> tuple[np.ndarray, Running]:
        with self._precision():
            logits, state = _step(self.model, self.named, ids(token), state)
            return _wide_numpy(logits), state

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
        with self._precision():
            return self.compiled.generate(prompt, max_new_tokens, sampling, state, n_generated, valid, seen)

    def to_numpy(self, state: Running) -> Arrays:
        return unisono_jax.numpy_state(state)

    def from_numpy(self, arrays: Arrays) -> Running:
        with self._precision():
            return unisono_jax.state_from_numpy(cast_state(self.config, arrays, self.dtype))

    @functools.cached_property
    def compiled(self) -> Any:
        """The model with the parameters of now."""
        return self.model(self.named).compiled()

    def _precision(self) -> AbstractContextManager:
        return jax.enable_x64(self.dtype == "float64")


@functools.partial(jax.jit, static_argnames="model")
def _forward(model: Functional, named: Named, tokens: Any, state: Running, reset: Any, valid: Any) -> tuple[jax.Array, Running]:
    return model(named).forward(tokens, state, reset, valid)


@functools.partial(jax.jit, static_argnames="model")
def _step(model: Functional, named: Named, token: Any, state: Running) -> tuple[jax.Array, Running]:
    return model(named).step(token, state)


@jax.jit
def _nats(logits: jax.Array, targets: jax.Array) -> jax.Array:
    wide = logits.astype(jnp.float64)
    asked = jnp.take_along_axis(wide, targets[..., None], -1)[..., 0]
    return jax.nn.logsumexp(wide, axis=-1) - asked


def _wide_numpy(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
