"""Training with JAX."""

from __future__ import annotations

import dataclasses
import os
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import unisono_jax
from unisono_spec.contract import Arrays, Config, InputError

from unisono_tools.backends.base import SCALER, Batch, Step, caches, check_moments, dropout_seeds, ema_share, router_noise, trained
from unisono_tools.backends.jax import context
from unisono_tools.backends.jax.functional import Functional, Named, functional, ids
from unisono_tools.backends.jax.mesh import Devices
from unisono_tools.backends.jax.objective import gradient
from unisono_tools.backends.jax.reader import Reader
from unisono_tools.backends.jax.update import Pending, adamw, added, global_norm, scaler, update
from unisono_tools.config import TrainConfig


class Trainer:
    def __init__(self, train: TrainConfig, config: Config) -> None:
        self.train, self.config = train, config
        if train.compile:
            raise InputError("compile: true with backend jax, which compiles every step as it is; leave it out")
        if train.cuda_graphs is True:
            raise InputError("cuda_graphs: true with backend jax, whose compiled step is one call already; leave it out")
        if train.threads:
            # read once, when XLA's CPU client starts
            os.environ["NPROC"] = str(train.threads)
        self.threads = int(os.environ.get("NPROC") or os.cpu_count() or 1)
        self.devices = Devices(train)
        self.rank = self.devices.rank
        self.notes: list[str] = []

    def init(self, params: Arrays, optimizer: Arrays | None = None, carried: Arrays | None = None, average: Arrays | None = None) -> None:
        train, rows = self.train, self.train.batch_size // self.train.accumulation
        with self._precision():
            model, named = self._make(params)
            self.model = dataclasses.replace(model, recomputed=train.gradient_checkpointing)
            self.plain = model
            held = self.devices.hold
            self.named = held({name: named.pop(name) for name in trained(self.config)})
            self.buffers = self.devices.copies(named)
            self.opt_state: Any = adamw(self.config, train.optimizer).init(self.named)
            if optimizer is not None:
                check_moments(self.config, optimizer)
                moments = (held({n: jnp.asarray(optimizer[f"{kind}.{n}"], p.dtype) for n, p in self.named.items()}) for kind in "mv")
                adam = optax.ScaleByAdamState(jnp.asarray(optimizer["count"][0], jnp.int32), *moments)
                self.opt_state = (adam, *self.opt_state[1:])
            self.opt_state = (self.opt_state[0]._replace(count=self.devices.copies(self.opt_state[0].count)), *self.opt_state[1:])
            self.scaler = self.devices.copies(scaler(optimizer)) if train.dtype == "float16" else None
            self.averaged: Named | None = None
            if train.ema:
                averaged = self._make(params if average is None else average)[1]
                self.averaged = held({name: averaged[name] for name in self.named})
            # by microbatch
            self.states: dict[int, Named] = {
                i: unisono_jax.state_from_numpy({n: a[i * rows : (i + 1) * rows] for n, a in (carried or {}).items()}, train.device)
                for i in range(train.accumulation if carried else 0)
            }

    def any(self, flag: bool) -> bool:
        return self.devices.any(flag)

    def gradient(self, batch: Batch, step: int) -> tuple[Step, Arrays]:
        with self._precision():
            losses, groups, grads, _, _ = self._backward(batch, step)
            scale = 1.0 if self.scaler is None else float(self.scaler["scale"])
            result = Pending(losses, groups, global_norm(grads) / scale, np.float32(scale), np.bool_(False)).read()
            return result, {name: self.devices.fetch(grads[name]) / np.asarray(scale, grads[name].dtype) for name in trained(self.config)}

    def grad_step(self, batch: Batch, step: int, lr: float) -> Pending:
        with self._precision():
            losses, groups, grads, loads, self.states = self._backward(batch, step)
            held = (self.named, self.opt_state, self.buffers, self.scaler, self.averaged)
            share = ema_share(self.train.ema, step)
            held, *numbers = update(self.config, self.train.optimizer, held, grads, losses, loads, lr, share)
            self.named, self.opt_state, self.buffers, self.scaler, self.averaged = held
            return Pending(losses, groups, *numbers)

    def reader(self) -> Reader:
        found = {**(self.averaged or self.named), **self.buffers}
        if self.devices.mesh is not None:
            # by this process alone
            with self._precision():
                found = {name: jnp.asarray(a) for name, a in self._fetched(found).items()}
        return Reader.around(self.plain, found, self.train.dtype)

    def params(self) -> Arrays:
        return self._fetched({**self.named, **self.buffers})

    def average(self) -> Arrays | None:
        return self._fetched({**self.averaged, **self.buffers}) if self.averaged else None

    def optimizer_state(self) -> Arrays:
        adam: Any = self.opt_state[0]
        fetch = self.devices.fetch
        moments = {f"{kind}.{n}": fetch(a[n]) for kind, a in (("m", adam.mu), ("v", adam.nu)) for n in trained(self.config)}
        scaling = {name: fetch(a).astype(SCALER[name][0])[None] for name, a in (self.scaler or {}).items()}
        return {**moments, "count": fetch(adam.count).astype(np.int64)[None], **scaling}

    def carried(self) -> Arrays | None:
        states = [self.states[i] for i in sorted(self.states)]
        return {name: np.concatenate([self.devices.fetch(state[name]) for state in states]) for name in states[0]} if states else None

    def _fetched(self, named: Named) -> Arrays:
        return {name: self.devices.fetch(named[name]) for name in self.config.params()}

    def _make(self, params: Arrays) -> tuple[Functional, Named]:
        train = self.train
        model = unisono_jax.create(
            self.config,
            params,
            dtype=train.dtype,
            param_dtype=train.param_dtype,
            device=train.device,
            implementation=train.implementation,
        )
        return functional(model)

    def _precision(self) -> AbstractContextManager:
        return jax.enable_x64(self.train.dtype == "float64")

    def _backward(self, batch: Batch, step: int) -> tuple[list[jax.Array], list[jax.Array], Named, list[list[jax.Array]], dict[int, Named]]:
        """By microbatch: the loss and nats of the groups; the gradient of all, times the scale; by microbatch: the load of each noisy
        router, and the state to carry on."""
        scale = None if self.scaler is None else self.scaler["scale"]
        if self.devices.context > 1:
            shared, whole, seeds = context.arguments(self.config, batch, self.train.accumulation, self.train.seed, step)
            given = self.devices.microbatches(shared, stretches=True), self.devices.microbatches(whole, stretches=False)
            read = (self.named, self.buffers, self.model, self.devices.mesh)
            grads, (loss, groups, loads) = context.gradient(*read, *given, seeds, float(batch.count), scale)
            return [loss], [groups], grads, loads, {}
        losses, groups, total, every, states = [], [], None, [], {}
        for i, rows in enumerate(batch.microbatches(self.train.accumulation)):
            seeds = dropout_seeds(self.config, self.train.seed, step, i)
            noise = router_noise(self.config, self.train.seed, step, i, rows.targets.shape[:2])
            state: Any = rows.state
            if batch.carried:
                state = self.states.get(i)
                if state is None and caches(self.config):
                    state = self.plain({**self.named, **self.buffers}).init_state(len(rows.inputs), self.train.data.carry)
            state = self.devices.rows(state)
            given = self.devices.rows((ids(rows.inputs), ids(rows.targets), rows.scored, rows.reset, rows.valid, noise, rows.groups))
            inputs, targets, scored, reset, valid, noise, of = given
            arrays = (inputs, targets, scored, state, reset, valid, seeds, noise)
            read = (self.named, self.buffers, self.model, rows.precomputed)
            grads, (loss, loads, after, group) = gradient(*read, *arrays, float(batch.count), scale, of)
            if batch.carried:
                states[i] = after
            losses.append(loss)
            groups.append(group)
            total = grads if total is None else added(total, grads)
            every.append(loads)
        assert total is not None
        return losses, groups, total, every, states
