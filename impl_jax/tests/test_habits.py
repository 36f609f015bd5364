"""What users of JAX and Flax try first."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unisono_jax as un
from flax import nnx
from unisono_jax import InputError

SMALL = un.preset("cram-1m", d_model=8, n_layers=1)
TOKENS = np.arange(8).reshape(2, 4)


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def test_a_preset_by_its_name_is_the_preset():
    with pytest.raises(InputError, match="'cram1m' is unknown; did you mean 'cram-1m'"):
        un.create("cram1m")
    assert jax.eval_shape(lambda: nnx.state(un.create("cram-1m"))) == jax.eval_shape(lambda: nnx.state(un.create(un.preset("cram-1m"))))


def test_jax_s_own_dtypes_and_a_call(close):
    model = un.create(SMALL, dtype=jnp.bfloat16, param_dtype=jnp.float16)
    assert model.dtype == "bfloat16"
    assert model.embedding.weight[...].dtype == jnp.float16  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError, match="dtype: 'int32'"):
        un.create(SMALL, dtype=jnp.int32)


def test_a_model_of_traced_parameters():
    with pytest.raises(InputError, match="params: traced; make the model outside of jit"):
        jax.eval_shape(lambda params: un.create(SMALL, params)(TOKENS), un.numpy_params(un.create(SMALL)))


def test_a_layer_s_dtype_is_a_model_s():
    layer: Any = un.nn.LinearAttention(8, 2, seed=0, param_dtype=jnp.bfloat16)
    assert layer.qkv.weight[...].dtype == jnp.bfloat16
    assert layer.init_state(1, dtype="float64")["S"].dtype == np.float64
    for dtype in ("int8", "half", jnp.int8, None, 5):
        with pytest.raises(InputError, match="dtype: "):
            un.nn.LinearAttention(8, 2, seed=0, param_dtype=dtype)


def test_a_model_is_callable_and_differentiable(close):
    model = un.create(SMALL, dtype="float64")
    logits, state = model(TOKENS)
    wanted, end = model.compiled().forward(TOKENS)
    close(logits, wanted)
    close(state["layers.0.xi"], end["layers.0.xi"])
    gradient = nnx.grad(lambda model: model(TOKENS)[0].sum())(model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert model.device in jax.devices()


def test_tabulate():
    assert "Embedding" in nnx.tabulate(un.create(SMALL), TOKENS, depth=1, console_kwargs={"color_system": None})


def test_a_state_of_another_byte_order_is_the_state():
    state = {"position": np.arange(3, dtype=">i4"), "xi": np.arange(6.0).reshape(3, 2)[:, ::-1].astype(">f4")}
    there = un.numpy_state(un.state_from_numpy(state))
    assert all(np.array_equal(there[name], a) and there[name].dtype == a.dtype.newbyteorder("=") for name, a in state.items())
