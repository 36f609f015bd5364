"""Models under the transformations that JAX has: inside a shard_map, where types say along which axes arrays vary."""

from __future__ import annotations

from typing import Any

import bad_arguments
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unisono_jax
from jax.sharding import PartitionSpec as P
from unisono_jax.nn import LinearAttention

MESH = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))


def divided(run: Any, tokens: jax.Array) -> Any:
    return jax.eval_shape(jax.shard_map(run, mesh=MESH, in_specs=P("rows"), out_specs=P("rows")), tokens)


@pytest.mark.parametrize("name", sorted(set(bad_arguments.MODELS) - {"frames"}))
def test_sequences_that_begin_inside_a_shard_map(name: str) -> None:
    """Each form without a state, and a token after it: what a loop carries is of one type from its beginning."""
    model: Any = unisono_jax.create(bad_arguments.MODELS[name])
    tokens = jnp.zeros((2, 3), jnp.int32)

    def both(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        folded, _ = model.forward(tokens, form="recurrent")
        logits, state = model.forward(tokens[:, :2], model.init_state(len(tokens), 3))
        return folded, jnp.concatenate([logits, model.step(tokens[:, 2], state)[0][:, None]], 1)

    for found in divided(both, tokens):
        assert found.shape == (2, 3, model.config.vocab_size)


def test_a_layer_begins_inside_a_shard_map() -> None:
    layer: Any = LinearAttention(d_model=4, n_heads=2, seed=0)
    assert divided(lambda x: layer(x)[0], jnp.zeros((2, 3, 4))).shape == (2, 3, 4)
