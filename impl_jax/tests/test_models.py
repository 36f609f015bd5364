"""CRAM beside the court: presets, initial values, generation, Algorithm 1, files, errors."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unisono_jax
from flax import nnx
from unisono_conformance import numerics
from unisono_jax import InputError, models
from unisono_jax.models import base
from unisono_jax.ops import decayed_sum
from unisono_spec.contract import init_params, preset, presets
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.files import load_state, save_state
from unisono_spec.contract.sampling import Sampling, choose

B, T = 2, 10
SMALL: dict[str, Any] = {"d_model": 6, "vocab_size": 16, "ffn_mult": 2}
VARIANTS: dict[str, Any] = {
    "binary": CRAMConfig(**SMALL, n_layers=2, code_bits=4),
    "frame": CRAMConfig(**SMALL, n_layers=1, codes="frame", frame_size=3, frame_head="gaussian"),
    "adaptive": CRAMConfig(**SMALL, scheme="adaptive", n_layers=2, position_bits=4, tie_head=True),
    "after": CRAMConfig(**SMALL, scheme="adaptive", n_layers=1, position_bits=4, input_norm=True, residual="after"),
}


def model_of(config, dtype="float64", **changes) -> Any:
    """A model whose every parameter is random: zeros and ones would hide what they multiply."""
    rng = np.random.default_rng(1)
    params = {name: rng.normal(0, 0.4, p.shape) + (1.0 if name.endswith("norm.weight") else 0.0) for name, p in config.params().items()}
    return unisono_jax.create(config, params, dtype=dtype, **changes)


def tokens_of(config, rng, batch=B, length=T):
    if config.reads_frames:
        return rng.normal(size=(batch, length, config.frame_size))
    return rng.integers(0, config.vocab_size, (batch, length))


def test_sums_are_not_rounded_before_the_norm(close, rng):
    """bfloat16 in and out costs a few of its roundings; a bfloat16 ξ of 2,000 tokens would cost all of its digits."""
    config = VARIANTS["after"]
    tokens = tokens_of(config, rng, length=2000)
    found, _ = model_of(config, "bfloat16").compiled().forward(tokens)
    truth, _ = model_of(config, "float32").compiled().forward(tokens)
    assert found.dtype == jnp.bfloat16
    close(found, truth, numerics.rounding("bfloat16", 16))


@pytest.mark.parametrize("name", presets())
def test_parameters_of_presets(name):
    config: Any = preset(name)
    shapes: dict[str, Any] = {n: jax.ShapeDtypeStruct(p.shape, jnp.float32) for n, p in config.params().items()}
    make = importlib.import_module(f"unisono_jax.models.{config.arch}").MODEL
    flat = nnx.to_flat_state(nnx.state(make(config, shapes, "float32", "auto")))
    assert {".".join(map(str, path)): leaf.shape for path, leaf in flat} == {n: p.shape for n, p in config.params().items()}


def test_initial_values_are_the_contracts():
    config = preset("cram-1m")
    found = unisono_jax.numpy_params(unisono_jax.create(config, seed=3))
    assert sum(a.size for a in found.values()) == 1_060_212
    for name, a in init_params(config, 3).items():
        np.testing.assert_array_equal(found[name], a)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_k=9, seed=5)], ids=["greedy", "sampled"])
def test_generate_is_repeated_forward(rng, sampling):
    config = VARIANTS["adaptive"]
    model = model_of(config, "float32")
    text = np.zeros((B, 7), int)
    text[:, :3] = prompt = tokens_of(config, rng, length=3)
    generated = model.generate(prompt, 4, sampling)
    for position in range(4):
        logits, _ = model.compiled().forward(text)  # what is still 0 comes later and is not seen
        text[:, 3 + position], _ = choose(np.asarray(logits[:, 2 + position]), sampling, position)
    np.testing.assert_array_equal(generated.tokens, text[:, 3:])
    step: Any = base._step
    traces = step._cache_size()
    again = model_of(config, "float32").generate(prompt, 4, sampling)
    assert step._cache_size() == traces
    np.testing.assert_array_equal(again.tokens, generated.tokens)
    assert model.generate(prompt, 0).tokens.shape == (B, 0)


def test_algorithm_1_reads_out_what_forward_does(close, rng):
    config = VARIANTS["binary"]
    tokens = tokens_of(config, rng)
    with jax.enable_x64(True):
        model = model_of(config)
        digits = np.asarray(model.code(tokens))
        np.testing.assert_array_equal(digits @ (2 ** np.arange(3, -1, -1)), tokens)
        xi, _ = decayed_sum.recurrent(jnp.asarray(digits), config.decay, model.init_state(B)["xi"])
        close(model.readout(xi), model.forward(tokens)[0])


def test_files(close, rng, tmp_path):
    config = VARIANTS["after"]
    model = model_of(config, "float32")
    model.save(tmp_path / "model.safetensors")
    loaded = unisono_jax.load(tmp_path / "model.safetensors")
    assert loaded.config == config
    tokens = tokens_of(config, rng)
    logits, _ = model.compiled().forward(tokens)
    _, state = model.compiled().forward(tokens[:, :5])
    save_state(tmp_path / "state.safetensors", config, unisono_jax.numpy_state(state))
    _, arrays = load_state(tmp_path / "state.safetensors")
    rest, _ = loaded.compiled().forward(tokens[:, 5:], unisono_jax.state_from_numpy(arrays))
    close(rest, logits[:, 5:], numerics.rounding("float32", 200))


def test_arrays_of_the_user_and_of_a_model_are_not_one(rng):
    """On a CPU, JAX would keep aligned memory of NumPy's as it is, and hand out its own read-only."""
    config = VARIANTS["adaptive"]
    given = {name: np.asarray(a) for name, a in init_params(config).items()}
    given["layers.0.mixer.Q"] = _aligned(given["layers.0.mixer.Q"])
    for device in (None, "cpu"):
        model = unisono_jax.create(config, given, device=device)
        truth = model.forward(np.zeros((1, 3), int))[0].copy()
        for mine in (given, unisono_jax.numpy_params(model)):
            mine["layers.0.mixer.Q"] += 1
            np.testing.assert_array_equal(model.forward(np.zeros((1, 3), int))[0], truth)
            mine["layers.0.mixer.Q"] -= 1
        held = {name: _aligned(a) for name, a in unisono_jax.numpy_state(model.init_state(2)).items()}
        state = unisono_jax.state_from_numpy(held, device)
        for mine in (held, unisono_jax.numpy_state(state)):
            for name, a in mine.items():
                a += 1
                assert not np.asarray(state[name]).any()


def _aligned(a: np.ndarray) -> np.ndarray:
    """The same, at an address that XLA takes as it is."""
    room = np.empty(a.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    out = room[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    out[...] = a
    return out


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_dropout_acts_in_training_alone(close, rng, form):
    config = VARIANTS["adaptive"].replace(dropout=0.5)
    model, tokens = model_of(config, "float32"), tokens_of(config, rng)
    evaluated, _ = model.forward(tokens, form=form)
    state = model.init_state(B)
    quiet, _ = model.step(tokens[:, 0], state)
    model.train()
    for call in (lambda: model.forward(tokens, form=form), lambda: model.step(tokens[:, 0], state)):
        with pytest.raises(InputError, match="rngs: None in training"):
            call()
    for rngs, message in ((jax.random.key(0), "nnx.Rngs"), ({"dropout": 0}, "type dict"), (nnx.Rngs(params=0), "stream 'dropout'")):
        with pytest.raises(InputError, match=f"rngs: .*{message}"):
            model.forward(tokens, rngs=rngs)  # pyright: ignore[reportArgumentType]
    rngs = nnx.Rngs(3)
    first, second = (model.forward(tokens, form=form, rngs=rngs)[0] for _ in range(2))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, evaluated)
    np.testing.assert_array_equal(model.forward(tokens, form=form, rngs=nnx.Rngs(3))[0], first)
    assert not np.array_equal(model.step(tokens[:, 0], state, rngs=rngs)[0], quiet)
    compiled = model.compiled().forward(tokens, form=form, rngs=nnx.Rngs(3))[0]
    close(compiled, first, numerics.rounding("float32", 200))
    ones = [np.ones((B, T, config.d_model), np.float32)] * config.n_updates
    np.testing.assert_array_equal(model.forward(tokens, form=form, dropout=ones)[0], evaluated)
    written = model.generate(tokens, 2).tokens
    model.eval()
    np.testing.assert_array_equal(model.forward(tokens, form=form)[0], evaluated)
    np.testing.assert_array_equal(model.generate(tokens, 2).tokens, written)
    masks = model_of(config.replace(dropout=0.25), "float32")
    masks.train()
    values, counts = np.unique(np.stack(masks._dropout((50, 40), None, nnx.Rngs(0))), return_counts=True)
    np.testing.assert_array_equal(values, np.array([0, 1 / 0.75], np.float32))
    assert abs(counts[0] / counts.sum() - 0.25) <= numerics.sampling(counts.sum()) / 2  # a share of draws deviates by ½ at most


def test_bad_input_is_explained(rng):
    config = VARIANTS["adaptive"]
    model, tokens = model_of(config, "float32"), tokens_of(config, rng)
    for message, call in {
        "T is 0": lambda: model.forward(tokens[:, :0]),
        "tokens: shape.*integers": lambda: model.forward(tokens.astype(np.float32)),
        "tokens: shape ": lambda: model.step(tokens, model.init_state(B)),
        "outside the vocabulary": lambda: model.forward(tokens + config.vocab_size),
        "id -1 ": lambda: model.compiled().step(jnp.full(B, -1), model.init_state(B)),
        "reset: shape": lambda: model.forward(tokens, reset=np.zeros((B, T + 1), bool)),
        "valid: .*booleans": lambda: model.compiled().forward(tokens, valid=np.ones((B, T))),
        "state: position has shape": lambda: model.forward(tokens, model.init_state(B + 1)),
        "form: 'paralel'.*parallel": lambda: model.forward(tokens, form="paralel"),  # pyright: ignore[reportArgumentType]
        "chunk_size: 0": lambda: model.forward(tokens, chunk_size=0),
        "jax.enable_x64": lambda: unisono_jax.create(config, dtype="float64"),
        "JAX_ENABLE_X64=1": lambda: unisono_jax.create(config, param_dtype="float64"),
        "dtype: 'float23'": lambda: unisono_jax.create(config, dtype="float23"),
        "implementation: 'triton'": lambda: unisono_jax.create(config, implementation="triton"),
        "device: 'abacus'": lambda: unisono_jax.create(config, device="abacus"),
        "params: 'embedding.weight' is missing": lambda: unisono_jax.create(config, {}),
        "readout: ": lambda: model.readout(np.zeros((B, T, config.d_model))),
        "generate: a frame model": lambda: model_of(VARIANTS["frame"], "float32").generate(np.zeros((1, 2, 3)), 1),
    }.items():
        with pytest.raises(InputError, match=message):
            call()


def test_devices():
    cpu = jax.devices("cpu")[0]
    for device in ("cpu", "cpu:0", cpu):
        model = models.create(VARIANTS["binary"], device=device)
        assert {d for p in jax.tree.leaves(nnx.state(model)) for d in p.devices()} == {cpu}
