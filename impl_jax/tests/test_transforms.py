"""Models under the transformations that JAX has: inside a shard_map, where types say along which axes arrays vary."""

from __future__ import annotations

from typing import Any

import bad_arguments
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import unisono_jax
from flax import nnx
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


def test_a_program_is_exported_for_every_batch() -> None:
    """A symbolic batch, with a state; a length is a number."""
    model = unisono_jax.create("cram-1m", seed=0)
    graph, params = nnx.split(model)

    def run(params: Any, tokens: jax.Array, state: Any) -> Any:
        return nnx.merge(graph, params).forward(tokens, state)

    def exported(shape: str, begun: bool) -> Any:
        batch, length = jax.export.symbolic_shape(shape)
        state = {n: jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for n, a in model.init_state(1, 8).items()} if begun else None
        return jax.export.export(jax.jit(run))(params, jax.ShapeDtypeStruct((batch, length), jnp.int32), state)

    tokens, state = jnp.arange(12).reshape(3, 4), model.init_state(3, 8)
    for found, true in zip(*(jax.tree.leaves(f(params, tokens, state)) for f in (exported("b, 4", True).call, jax.jit(run))), strict=True):
        np.testing.assert_array_equal(found, true)
    with pytest.raises(unisono_jax.InputError, match=r"tokens: .* symbolic length; export a program for each"):
        exported("3, t", True)
    with pytest.raises(unisono_jax.InputError, match="state: none for a symbolic batch, b; give one"):
        exported("b, 4", False)
