"""The public layers: what the models' mixers compute, forms, packed documents, habits of Flax, errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unisono_jax
from flax import nnx
from unisono_jax import InputError
from unisono_jax import nn as layers
from unisono_jax.layers.cram import Mixer

D = 16
MADE: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (layers.LinearAttention, {"n_heads": 2}),
    "rope": (layers.LinearAttention, {"n_heads": 2, "positions": "rope", "feature_map": "learned", "qk_width": 6, "bias": False}),
    "window": (layers.SlidingWindowAttention, {"n_heads": 2, "window": 3, "positions": "rope"}),
    "softmax": (layers.SoftmaxAttention, {"n_heads": 2}),
    "multiscale": (layers.MultiScaleAttention, {"n_heads": 2, "decay": "data", "gate": "vector", "rope": "numerator"}),
    "compressed": (layers.MultiScaleAttention, {"n_heads": 2, "rope": "none", "compress_every": 4, "compress_rank": 3}),
    "mamba": (layers.SelectiveSSM, {"d_state": 4}),
    "s4d": (layers.S4D, {"d_state": 4}),
    "memory": (layers.MoMGRU, {"n_banks": 2, "n_slots": 4, "d_memory": 3, "router": "gumbel", "erase": "separate"}),
    "retention": (layers.CumulativeRetention, {"position_bits": 6}),
    "fixed": (layers.CumulativeRetention, {"decay": 0.75}),
    "conv": (layers.ShortConvolution, {"activation": "silu"}),
    "gated conv": (layers.GatedShortConvolution, {"mult": 2}),
}


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def make(name: str) -> Any:
    """A layer whose every parameter is random: zeros and ones would hide what they multiply."""
    kind, fields = MADE[name]
    layer = kind(D, **fields, seed=0, param_dtype="float64")
    rng = np.random.default_rng(1)
    nnx.update(layer, jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.4, a.shape)), nnx.state(layer)))
    return layer


def given(length: int, batch: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(length)
    return rng.normal(size=(batch, length, D)), rng.random((batch, length)) < 0.2, rng.random((batch, length)) < 0.7


def steps(layer: Any, x: Any, reset: Any, valid: Any) -> Any:
    def one(state: Any, part: Any) -> Any:
        y, state = layer.step(part[0], state, part[1], part[2])
        return state, y

    swapped = jax.tree.map(lambda a: jnp.swapaxes(jnp.asarray(a), 0, 1), (x, reset, valid))
    end, y = jax.lax.scan(one, layer.init_state(2, x.shape[1], x.dtype), swapped)
    return jnp.swapaxes(y, 0, 1), end


@pytest.mark.parametrize("name", [name for name in MADE if name not in ("retention", "fixed", "conv")])
def test_a_layer_is_the_mixer_inside_a_model_in_each_form(name, monkeypatch, close):
    layer, seen = make(name), []
    model: Any = unisono_jax.create(layer.layer.config.replace(vocab_size=7), dtype="float64")
    mixer = getattr(model.layers[0], layer.layer.prefix.rsplit(".", 1)[1])
    nnx.update(mixer, nnx.state(layer))
    called = type(mixer).__call__

    def watched(self, x, *rest):
        y, after = called(self, x, *rest)
        seen.append((x, y))
        return y, after

    monkeypatch.setattr(type(mixer), "__call__", watched)
    _, reset, valid = given(11)

    @nnx.jit
    def all_of(model: Any, layer: Any, reset: Any, valid: Any) -> Any:
        _, after = model.forward(jnp.arange(22).reshape(2, 11) % 7, None, reset, valid, chunk_size=4)
        x, inside = seen[0]
        return inside, after, layer(x, None, reset, valid, chunk_size=4), steps(layer, x, reset, valid)

    inside, after, (y, state), (stepped, end) = all_of(model, layer, reset, valid)
    close(y, inside)
    close(stepped * valid[..., None], y * valid[..., None])
    for kept, a in state.items():
        close(a, after[kept if kept in after else f"layers.0.{kept}"])
        close(end[kept], a)


def test_the_rest_is_what_it_says(close):
    x, reset, valid = given(9)
    conv, fixed, scored = make("conv"), make("fixed"), make("retention")
    taps = jnp.pad(x, ((0, 0), (3, 0), (0, 0)))
    convolved = sum((taps[:, i : i + 9] * conv.weight[...][:, 0, i] for i in range(4)), conv.bias[...])
    close(conv(x)[0], jax.nn.silu(convolved))
    close(fixed(x)[0][:, 1], 0.25 * (0.75 * jax.nn.sigmoid(x[:, 0]) + jax.nn.sigmoid(x[:, 1])))
    weights = Mixer.__call__(scored, scored.layer.config, jnp.asarray(x), jnp.arange(9)[None].repeat(2, 0))
    close(scored(x)[0], (weights * jax.nn.sigmoid(x)).cumsum(1))
    for layer in (conv, fixed, scored):
        (y, end), (stepped, state) = nnx.jit(lambda layer: (layer(x, None, reset, valid), steps(layer, x, reset, valid)))(layer)
        close(stepped * valid[..., None], y * valid[..., None])
        for kept in end:
            close(state[kept], end[kept])


@pytest.mark.parametrize("name", ["linear", "mamba", "memory"])
def test_documents_packed_by_cu_seqlens_know_nothing_of_each_other(name, close):
    layer, x = make(name), given(12, 1)[0]
    packed, _ = nnx.jit(lambda layer, x, ends: layer(x, cu_seqlens=ends))(layer, x, jnp.array([0, 5, 5, 12]))
    alone, _ = nnx.jit(lambda layer, x: layer(x))(layer, x[:, 5:])
    close(packed[:, 5:], alone)
    if name == "linear":
        close(layer(x, cu_seqlens=[0, 5, 5, 12])[0], packed)


@pytest.mark.parametrize("name", ["linear", "memory", "fixed"])
def test_habits(name):
    kind, fields = MADE[name]
    rngs = nnx.Rngs(0)
    one, other, again = kind(D, **fields, rngs=rngs), kind(D, **fields, rngs=rngs), kind(D, **fields, rngs=nnx.Rngs(0))
    leaves = [jax.tree.leaves(nnx.state(layer)) for layer in (one, other, again)]
    assert all((a == b).all() for a, b in zip(leaves[0], leaves[2], strict=True))
    assert name == "fixed" or not all((a == b).all() for a, b in zip(leaves[0], leaves[1], strict=True))
    y, state = jax.eval_shape(lambda x: one(x), jnp.zeros((2, 6, D), jnp.bfloat16))
    assert y.dtype == ("float32" if name in ("retention", "fixed") else "bfloat16")
    assert all(a.dtype in ("int32", "float32") for a in state.values())


@pytest.mark.parametrize("name", ["linear", "mamba"])
def test_padding_may_hold_anything(name):
    """NaN where a token is not valid reaches no output and no gradient, of weights neither."""
    layer, (x, _, valid) = make(name), given(5)
    assert not valid.all()

    @nnx.jit
    def found(layer, x):
        y, _ = layer(x, valid=valid)
        return y, nnx.grad(lambda layer, x: layer(x, valid=valid)[0].sum(), argnums=(0, 1))(layer, x)

    clean, holed = (jax.tree.leaves(found(layer, np.where(valid[..., None], x, hole))) for hole in (0.0, np.nan))
    assert all(np.array_equal(*pair) for pair in zip(clean, holed, strict=True))


def test_noise_reaches_the_router():
    layer, x = make("memory"), given(4)[0]
    assert not (layer(x, noise=np.ones((2, 4, 2)) * [1.0, 0])[0] == layer(x)[0]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 4, D + 1))}, r"x: shape \(2, 4, 17\) of float64, expected \[B, T, 16\] floats"),
        ({"x": np.zeros((2, 4, D), int)}, "x: shape"),
        ({"x": np.zeros((2, 0, D))}, "x: T is 0"),
        ({"x": "text"}, "x: shape"),
        ({"reset": np.zeros((2, 5), bool)}, r"reset: shape \(2, 5\)"),
        ({"valid": np.zeros((2, 4))}, "valid: shape"),
        ({"cu_seqlens": [0, 4]}, "cu_seqlens: .* one row"),
        ({"x": np.zeros((1, 4, D)), "cu_seqlens": [0, 3]}, r"cu_seqlens: \[0, 3\]; .* T=4"),
        ({"state": {"S": np.zeros(1)}}, "state: .*'S'.*, expected .*position"),
        ({"chunk_size": 0}, "chunk_size: 0"),
        ({"state": 3}, "state: 3 has type int; give arrays by name"),
        ({"state": {"S": [], "z": [], "position": []}}, r"state: position: \[\] has type list"),
    ],
)
def test_errors_name_field_value_and_remedy(change, message):
    with pytest.raises(InputError, match=message):
        layers.LinearAttention(D, 2, seed=0)(**{"x": np.zeros((2, 4, D)), **change})


class Scaled(layers.S4D):
    """Passes on what its base does not have."""

    def __init__(self, d_model: int, scale: float, **options: Any) -> None:
        super().__init__(d_model, scale=scale, **options)  # pyright: ignore[reportCallIssue]


def test_errors_of_sizes():
    for kind, fields in MADE.values():
        for odd in ("dtype", "n_layers", "layer", "kind"):
            with pytest.raises(InputError, match=f"^{odd}: no argument of this layer"):
                kind(D, **fields, seed=0, **{odd: 1})
        with pytest.raises(InputError, match="did you mean 'implementation'"):
            kind(D, **fields, seed=0, implementatoin="plain")
    with pytest.raises(InputError, match=r"^scale: no argument of this layer"):
        Scaled(D, scale=2.0, seed=0)
    with pytest.raises(InputError, match="n_heads: 3 must divide d_model=16"):
        layers.LinearAttention(D, 3, seed=0)
    with pytest.raises(InputError, match="rngs"):
        layers.LinearAttention(D, 2)
    with pytest.raises(InputError, match="rngs: 0 has type int"):
        layers.LinearAttention(D, 2, rngs=0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="rngs: has neither a stream 'params'"):
        layers.LinearAttention(D, 2, rngs=nnx.Rngs(dropout=0))
    with pytest.raises(InputError, match=r"rngs: .* outside of jit"):
        nnx.eval_shape(lambda: layers.S4D(D, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match="capacity"):
        layers.SoftmaxAttention(D, 2, seed=0).init_state(2)
