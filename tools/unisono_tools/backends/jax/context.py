"""Context parallelism: neighbouring devices share each sequence, and hand the state on in time and its gradient back.

Exact for every model whose state has a fixed size. All devices run one program. In each of A + C − 1 turns, of A microbatches and C
neighbours, each computes its stretch of one microbatch, a turn after the neighbour before it; what it computes in the turns in which it
has none counts nowhere. The way back is the gradient of that program.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from unisono_spec.contract import Config

from unisono_tools.backends.base import Batch, dropout_seeds, router_noise
from unisono_tools.backends.jax.functional import Functional, Named, ids
from unisono_tools.backends.jax.objective import dropout_kept, nats

ROWS, BOTH, NONE = PartitionSpec(None, "data"), PartitionSpec(None, "data", "time"), PartitionSpec()


def arguments(config: Config, batch: Batch, number: int, seed: int, step: int) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    """Of `number` microbatches A: arrays [A, B, T, …] that neighbours share, arrays [A, B, …] of whole sequences, dropout's seeds."""

    def split(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else array.reshape(number, -1, *array.shape[1:])

    rows = batch.targets.shape[0] // number
    noise = [router_noise(config, seed, step, i, (rows, batch.targets.shape[1])) for i in range(number)]
    shared = {
        "inputs": split(ids(batch.inputs)),
        "targets": split(ids(batch.targets)),
        "scored": split(batch.scored),
        "reset": split(batch.reset),
        "valid": split(batch.valid),
        "noise": None if noise[0] is None else [np.stack(layer) for layer in zip(*noise, strict=True)],  # pyright: ignore[reportArgumentType]
    }
    state = None if batch.state is None else {name: split(a) for name, a in batch.state.items()}
    return shared, {"state": state, "groups": split(batch.groups)}, np.stack([dropout_seeds(config, seed, step, i) for i in range(number)])


@functools.partial(jax.jit, static_argnames=("model", "mesh"))
def gradient(
    named: Named, buffers: Named, model: Functional, mesh: Mesh, shared: Any, whole: Any, seeds: Any, count: Any, scale: Any
) -> tuple[Named, tuple[jax.Array, jax.Array, list[list[jax.Array]]]]:
    """As objective.gradient, of all microbatches: the gradient; the loss without the scale, nats of the groups, the routers' loads by
    microbatch."""
    number, rows, length = shared["inputs"].shape[:3]
    kept = [dropout_kept(model.config, seeds[i], (rows, length)) for i in range(number)]
    # drawn for whole sequences, as one device would; each device gets its stretch of them
    shared = shared | {"kept": [jnp.stack(layer) for layer in zip(*kept, strict=True)] if model.config.dropout else None}
    share = functools.partial(_share, model=model, neighbours=mesh.shape["time"], devices=mesh.size)
    specs = (NONE, NONE, jax.tree.map(lambda _: BOTH, shared), jax.tree.map(lambda _: ROWS, whole), NONE, NONE)
    grads, loss, groups, loads = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=NONE, check_vma=False)(
        named, buffers, shared, whole, count, scale
    )
    return grads, (loss, groups, [[load[i] for load in loads] for i in range(number)])


def _share(
    named: Named, buffers: Named, shared: Any, whole: Any, count: Any, scale: Any, *, model: Functional, neighbours: int, devices: int
) -> tuple[Named, jax.Array, jax.Array, list[jax.Array]]:
    """What one device computes, and the sums over all of them."""
    number, rows = shared["inputs"].shape[:2]
    stretch, weights = lax.axis_index("time"), _weights(shared["valid"], number, devices)

    def loss(named: Named) -> tuple[jax.Array, tuple[jax.Array, jax.Array, list[jax.Array]]]:
        first = model({**named, **buffers}).init_state(rows)

        def turn(before: Named, t: jax.Array) -> tuple[Named, tuple[jax.Array, jax.Array, jax.Array, list[jax.Array]]]:
            i = t - stretch
            mine = (i >= 0) & (i < number)
            now, at = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, jnp.clip(i, 0, number - 1), keepdims=False), (shared, whole))
            start = first if at["state"] is None else {name: jnp.asarray(at["state"][name], a.dtype) for name, a in first.items()}
            state = jax.tree.map(lambda a, b: jnp.where(mine & (stretch > 0), a, b), before, start)
            scaled, (nll, loads, after, groups) = nats(
                named, buffers, model, False, now["inputs"], now["targets"], now["scored"], state, now["reset"], now["valid"],
                None, now["noise"], count, scale, at["groups"], now["kept"],
            )  # fmt: skip
            after = {name: lax.ppermute(after[name].astype(a.dtype), "time", _onwards(neighbours)) for name, a in first.items()}
            scaled, nll, groups = (jnp.where(mine, a, 0) for a in (scaled, nll, groups))
            return after, (scaled, nll, groups, loads)

        _, (scaled, nll, groups, loads) = lax.scan(turn, jax.tree.map(jnp.zeros_like, first), jnp.arange(number + neighbours - 1))
        # of turns, those in which this device had a microbatch
        return scaled.sum(), (nll.sum(), groups.sum(0), [_mean(lax.dynamic_slice_in_dim(load, stretch, number), weights) for load in loads])

    grads, (nll, groups, loads) = jax.grad(loss, has_aux=True)(named)
    return lax.psum((grads, nll, groups, loads), ("data", "time"))


def _onwards(neighbours: int) -> Sequence[tuple[int, int]]:
    return [(k, k + 1) for k in range(neighbours - 1)]


def _weights(valid: jax.Array | None, number: int, devices: int) -> jax.Array:
    """Which share of each microbatch's tokens this device has, [A]: a load is a mean over tokens."""
    if valid is None:
        return jnp.full(number, 1 / devices)
    here = valid.sum((1, 2))
    return here / jnp.maximum(lax.psum(here, ("data", "time")), 1)


def _mean(load: jax.Array, weights: jax.Array) -> jax.Array:
    """This device's part of the mean over all; of no tokens there is no load."""
    return jnp.where(weights[:, None] > 0, load * weights[:, None], 0)
