"""MARU beside the court: resets to M₀, routing, buffers, memory of the backward."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import unisono_jax
from flax import nnx
from jax.sharding import PartitionSpec as P
from unisono_jax.layers.leaves import Buffer
from unisono_jax.ops import mom_gru
from unisono_spec.contract import init_params
from unisono_spec.contract.maru import MARUConfig

from .forms import B, create, residual_floats

SMALL = MARUConfig(d_model=6, vocab_size=7, head_hidden=5, d_state=3, conv_width=3, n_banks=2, n_slots=3, d_memory=4, router_hidden=5)
GUMBEL = SMALL.replace(router="gumbel", temperature=0.7)


def cell(config: Any) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    start = "layers.0.cell."
    found = {name.removeprefix(start): a for name, a in init_params(config, 3, "float64").items() if name.startswith(start)}
    return {name: a + 0.3 * rng.normal(size=a.shape) for name, a in found.items()}


def test_a_reset_restores_the_learned_memory_and_gradients_reach_it(close, rng):
    p, x = cell(SMALL), rng.normal(size=(B, 5, 6))
    reset = np.arange(5) == np.full((B, 1), 2)
    with jax.enable_x64(True):

        @jax.jit
        def run(memory: Any, x: Any, reset: Any, h: Any, M: Any) -> Any:
            return mom_gru.hoisted(x, {**p, "memory": memory}, (h, M), reset)

        fresh = np.zeros((B, 6)), np.broadcast_to(p["memory"], (B, 2, 3, 4))
        used = rng.normal(size=(B, 6)), rng.normal(size=(B, 2, 3, 4))
        alone, _ = run(p["memory"], x, np.zeros_like(reset), *fresh)
        after, _ = run(p["memory"], np.roll(x, 2, 1), reset, *used)  # the same tokens, two places later
        close(after[:, 2:], alone[:, :3])
        assert (np.asarray(after[:, 0]) != np.asarray(alone[:, 0])).all()
        reached = jax.grad(lambda memory: run(memory, x, reset, *used)[0].sum())(p["memory"])
        assert (np.asarray(reached) != 0).all()


def test_gradients_inside_a_shard_map(close, rng):
    """Tokens and states are divided, parameters are not."""
    p, x, state = cell(SMALL), rng.normal(size=(B, 2, 6)), (rng.normal(size=(B, 6)), rng.normal(size=(B, 2, 3, 4)))
    mesh, share = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",)), P("rows")
    with jax.enable_x64(True):

        def run(p: Any, x: Any, state: Any) -> Any:
            return mom_gru.hoisted(x, p, state)[0]

        divided = jax.shard_map(run, mesh=mesh, in_specs=(P(), share, share), out_specs=share)
        found, truth = (jax.jit(jax.grad(lambda p, run=run: jnp.sin(run(p, x, state)).sum()))(p) for run in (divided, run))
    for name, a in truth.items():
        close(found[name], a)


def test_forward_mode(close, rng):
    """The loop's own rule beside a fold of steps, with marks, noise and a change of every argument."""
    p, x, state = cell(GUMBEL), rng.normal(size=(B, 4, 6)), (rng.normal(size=(B, 6)), rng.normal(size=(B, 2, 3, 4)))
    given = p, x, state, rng.gumbel(size=(B, 4, 2))
    change = jax.tree.map(lambda a: rng.normal(size=a.shape), given)
    reset, valid = rng.random((B, 4)) < 0.3, rng.random((B, 4)) < 0.7
    with jax.enable_x64(True):

        def both(form: Any, **more: Any) -> Any:
            run = lambda p, x, state, noise: form(x, p, state, reset, valid, noise=noise, temperature=0.7, **more)  # noqa: E731
            return jax.jit(lambda *a: jax.jvp(run, *a))(given, change)

        jax.tree.map(close, both(mom_gru.hoisted, chunk_size=2), both(mom_gru.recurrent))


def test_a_memory_of_width_1(close, rng):
    with jax.enable_x64(True):
        p, x = cell(SMALL.replace(d_memory=1, erase="separate")), rng.normal(size=(B, 5, 6))
        state = rng.normal(size=(B, 6)), rng.normal(size=(B, 2, 3, 1))
        for found, truth in zip(
            *(jax.tree.leaves(jax.jit(form)(x, p, state)) for form in (mom_gru.hoisted, mom_gru.recurrent)), strict=True
        ):
            close(found, truth)


def test_large_queries_of_a_memory_of_width_1(rng):
    """Where XLA fuses a product and the difference from its maximum, the maximum's own score was not its own."""
    p, x = cell(SMALL.replace(d_memory=1)), 1e12 * rng.normal(size=(B, 5, 6))
    given = jax.tree.map(jnp.float32, (x, p, (np.zeros((B, 6)), np.broadcast_to(p["memory"], (B, 2, 3, 1)))))
    assert np.isfinite(jax.jit(mom_gru.hoisted)(*given)[0]).all()


def test_noise_temperature_and_balance_act_in_training_only(close, rng):
    p = cell(GUMBEL)
    x, h = rng.normal(size=(2, 5, 6))
    noise = rng.gumbel(size=(5, 2))
    quiet = {**p, "balance_bias": np.zeros(2)}
    with jax.enable_x64(True):
        shares = np.asarray(mom_gru.routing(x, h, p))
        close(mom_gru.routing(x, h, quiet), shares)
        close(shares.sum(-1), np.ones(5))
        drawn = np.log(shares) + noise + p["balance_bias"]  # softmax forgets the sum that a logarithm lacks
        close(mom_gru.routing(x, h, p, noise, 0.7), jax.nn.softmax(drawn / 0.7))
        bias, load = mom_gru.balanced(jnp.zeros(2), jnp.full(2, 0.5), jnp.array([0.9, 0.1]))
        close(load, np.array([0.54, 0.46]))
        close(bias, np.array([-0.0004, 0.0004]))


def test_buffers_are_kept_but_not_trained():
    config = GUMBEL
    model = create(config, "float32")
    buffers = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, Buffer))}
    assert buffers == {name for name, p in config.params().items() if not p.trainable}
    assert list(unisono_jax.numpy_params(model)) == list(config.params())


def test_the_backward_keeps_memories_once_a_chunk():
    few, many = (residual_floats(SMALL.replace(n_slots=n), 512, 32) for n in (8, 1032))
    slots = 1024 * SMALL.n_banks * SMALL.d_memory
    # a copy at the start of each of 16 chunks for each of B rows, and a few of the initial one
    assert many - few < (512 // 32 + 8) * B * slots
