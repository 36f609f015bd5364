"""What the tests of the architectures share: models far from their initial values, marks, and what a backward keeps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import unisono_jax
from flax import nnx
from unisono_spec.contract import Config, init_params

B, T = 2, 12


def create(config: Config, dtype: str = "float64", **changes: Any) -> Any:
    """A model far from its initial values: zeros and ones would hide what they multiply."""
    rng = np.random.default_rng(1)
    params = {name: p + 0.3 * rng.normal(size=p.shape) for name, p in init_params(config, 3, "float64").items()}
    return unisono_jax.create(config, params, dtype=dtype, **changes)


def tokens(config: Any, length: int = T) -> np.ndarray:
    return np.random.default_rng(length).integers(0, config.vocab_size, (B, length))


def marks(length: int = T) -> tuple[np.ndarray, np.ndarray]:
    """reset, valid: among them a reset where the token is not valid, and padding at the end of a row."""
    rng = np.random.default_rng(length + 1)
    reset, valid = rng.random((B, length)) < 0.15, rng.random((B, length)) < 0.7
    reset[0, length // 2], valid[0, length // 2], valid[1, -2:] = True, False, False
    return reset, valid


def residual_floats(config: Config, length: int, chunk_size: int = 64) -> int:
    """What the backward of one marked forward pass keeps."""
    graph, params = nnx.split(create(config, "float32"))
    given, (reset, valid) = jnp.asarray(tokens(config, length)), map(jnp.asarray, marks(length))

    def kept(params: Any) -> Any:
        _, pull = jax.vjp(lambda p: nnx.merge(graph, p).forward(given, None, reset, valid, chunk_size=chunk_size)[0], params)
        return pull

    return sum(a.size for a in jax.tree.leaves(jax.eval_shape(kept, params)))
