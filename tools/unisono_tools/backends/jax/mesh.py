"""Several devices that train one model with JAX: a mesh, over which the compiler spreads what it is given."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from unisono_jax.arrays import find_devices
from unisono_spec.contract import InputError

from unisono_tools.config import TrainConfig, launched, processes


class Devices:
    """`devices` of this process, or all that the processes of torchrun (or of RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) see."""

    def __init__(self, train: TrainConfig) -> None:
        self.rank, self.processes = processes()
        if self.processes > 1 and not jax.distributed.is_initialized():
            # the port itself is torchrun's own
            place = f"{os.environ.get('MASTER_ADDR') or 'localhost'}:{launched('MASTER_PORT', 29500) + 1}"
            local = None if train.device == "cpu" or "LOCAL_RANK" not in os.environ else [launched("LOCAL_RANK")]
            jax.distributed.initialize(place, self.processes, self.rank, local_device_ids=local)
        found = find_devices(train.device) if train.device else jax.devices()
        if self.processes == 1:
            if len(found) < train.devices:
                raise InputError(
                    f"devices: {train.devices}, there are {len(found)} here; use as many, or on a CPU set "
                    f"XLA_FLAGS=--xla_force_host_platform_device_count={train.devices}"
                )
            found = found[: train.devices]
        elif train.devices not in (1, len(found)):
            raise InputError(f"devices: {train.devices}, and the {self.processes} processes have {len(found)}; leave it out")
        self.size, self.sharded, self.context = len(found), train.parallel == "fsdp", train.context
        if self.size % self.context:
            raise InputError(f"context: {self.context} does not divide {self.size} device(s); give a multiple of {self.context} in devices")
        # neighbours in time beside each other
        self.mesh = Mesh(np.array(found).reshape(-1, self.context), ("data", "time")) if self.size > 1 else None
        rows, shares = train.batch_size // train.accumulation, self.size // self.context
        if rows % shares:
            raise InputError(
                f"batch_size: {train.batch_size} does not divide into {shares} devices times accumulation {train.accumulation}; "
                f"use a multiple of {train.accumulation * shares}"
            )

    def rows(self, tree: Any) -> Any:
        """Arrays whose first axis is the batch's, each device with its share."""
        return tree if self.mesh is None else jax.tree.map(lambda a: self._put(a, PartitionSpec("data")), tree)

    def microbatches(self, tree: Any, stretches: bool) -> Any:
        """Arrays [A, B, …], whose second axis is the batch's; with `stretches` the third is cut too, among neighbours in time."""
        spec = PartitionSpec(None, "data", *(["time"] if stretches else []))
        return jax.tree.map(lambda a: self._put(a, spec), tree)

    def hold(self, tree: Any) -> Any:
        """Parameters and moments: copies, or shares of the longest axis that divides."""
        return tree if self.mesh is None else jax.tree.map(lambda a: self._put(a, self._cut(a.shape)), tree)

    def copies(self, tree: Any) -> Any:
        return tree if self.mesh is None else jax.tree.map(lambda a: self._put(a, PartitionSpec()), tree)

    def fetch(self, array: Any) -> np.ndarray:
        """All of it, as a copy; all processes ask at once."""
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            whole = array.addressable_data(0) if array.is_fully_replicated else multihost_utils.process_allgather(array, tiled=True)
            return np.array(whole)
        return np.array(array)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return flag if self.processes == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())

    def _cut(self, shape: tuple[int, ...]) -> PartitionSpec:
        axes = [i for i, n in enumerate(shape) if n % self.size == 0 and n] if self.sharded else []
        axis = max(axes, key=lambda i: shape[i], default=None)
        return PartitionSpec() if axis is None else PartitionSpec(*("data" if i == axis else None for i in range(len(shape))))

    def _put(self, array: Any, spec: PartitionSpec) -> jax.Array:
        if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding):
            return array  # what a step gave back
        given = np.asarray(array)
        assert self.mesh is not None
        return jax.make_array_from_callback(given.shape, NamedSharding(self.mesh, spec), lambda place: given[place])
