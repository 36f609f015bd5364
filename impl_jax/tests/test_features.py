"""φ of q and k: what they hold where a token is not valid reaches nothing, τ neither."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from unisono_jax.layers import infinityformer, lat
from unisono_jax.layers.reading import Marks, Reading
from unisono_jax.ops import linear_attention, rotary
from unisono_jax.ops.features import feature_map
from unisono_spec.contract.infinityformer import InfinityFormerConfig
from unisono_spec.contract.lat import LATConfig

from .forms import B, T, create, marks

HOLES = pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
LAT = LATConfig(d_model=8, n_layers=1, vocab_size=7, head_width=4, qk_width=4, ffn_mult=2, feature_map="learned")
INFINITY = InfinityFormerConfig(d_model=8, n_layers=1, n_heads=2, d_ffn=6, vocab_size=7, feature_map="learned")


@HOLES
@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("name", ["elu1", "relu", "taylor2", "learned"])
def test_of_the_op(name: str, form: str, hole: float, rng: np.random.Generator):
    reset, valid = marks()
    q, k, v = rng.normal(size=(3, B, T, 2, 3)).astype(np.float32)
    features = feature_map(name, q, jnp.ones(1)).shape[-1]
    state = jnp.zeros((B, 2, features, 3)), jnp.zeros((B, 2, features))

    @jax.jit
    def found(q: jax.Array, k: jax.Array, tau: jax.Array) -> Any:
        def total(q: jax.Array, k: jax.Array, tau: jax.Array) -> tuple[jax.Array, Any]:
            mapped = (feature_map(name, a, tau, jnp.asarray(valid)) for a in (q, k))
            result = getattr(linear_attention, form)(*mapped, v, state, reset, valid)
            return sum((a.sum() for a in jax.tree.leaves(result)), jnp.zeros(())), result

        return jax.grad(total, (0, 1, 2), has_aux=True)(q, k, tau)

    clean, holed = (found(*(np.where(valid[..., None, None], a, value) for a in (q, k)), jnp.ones(1)) for value in (0.0, hole))
    assert all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (clean, holed)), strict=True))


@HOLES
@pytest.mark.parametrize("kind", ["lat", "infinityformer"])
def test_of_a_mixer(kind: str, hole: float, rng: np.random.Generator):
    """τ's gradient, of the projections that a layer's h becomes."""
    reset, valid = marks()
    h = rng.normal(size=(B, T, 8)).astype(np.float32)
    mixer = create(LAT if kind == "lat" else INFINITY, "float32").layers[0].mixer
    read = Reading(Marks(jnp.asarray(reset), jnp.asarray(valid)), 4, "plain")
    width = 4
    turn = rotary.cos_sin(jnp.arange(T)[None], width)

    @nnx.jit
    def slope(mixer: Any, h: jax.Array) -> jax.Array:
        def total(mixer: Any) -> jax.Array:
            if kind == "lat":
                assert isinstance(mixer, lat.Attention)
                state = jnp.zeros((B, 2, width, 4)), jnp.zeros((B, 2, width))
                return mixer(h, {width: turn}, jnp.zeros(B, jnp.int32), state, read)[0].sum()
            assert isinstance(mixer, infinityformer.Mixer)
            state = jnp.zeros((B, 4, 2, width, 4)), jnp.zeros((B, 4, 2, width))
            return mixer(h, turn, None, state, read)[0].sum()

        return nnx.grad(total)(mixer)["tau"][...]

    clean, holed = (slope(mixer, jnp.where(valid[..., None], h, value)) for value in (0.0, hole))
    assert clean.any()
    assert np.array_equal(clean, holed)
