"""Training with PyTorch."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import torch._dynamo.exc
import torch.utils.deterministic
import unisono_torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from unisono_spec.contract import Arrays, Config, InputError
from unisono_torch.ops.mom_gru import balanced

from unisono_tools.backends.base import Batch, Step, caches, check_moments, decays, dropout_seeds, ema_share, router_noise, trained
from unisono_tools.backends.torch.objective import Objective, State, dropout_masks, recompute_blocks
from unisono_tools.backends.torch.ranks import Ranks
from unisono_tools.backends.torch.reader import Reader, to_numpy
from unisono_tools.backends.torch.update import Pending, Scaler, adamw, average_if, multiply, step_if
from unisono_tools.config import TrainConfig


class Trainer:
    def __init__(self, train: TrainConfig, config: Config) -> None:
        self.train, self.config = train, config
        if train.threads:
            torch.set_num_threads(train.threads)
        self.threads = torch.get_num_threads()
        self.ranks = Ranks(train.device)
        self.device, self.rank = self.ranks.device, self.ranks.rank
        self.parts = train.accumulation * self.ranks.size
        if train.batch_size % self.parts:
            what = f"{self.ranks.size} processes times {train.accumulation} parts"
            raise InputError(f"batch_size: {train.batch_size} does not divide into {what}; use a multiple of {self.parts}")
        self.sums = torch.float32 if self.device.type == "mps" else torch.float64  # of what is reported
        if self.device.type == "cuda":
            # a resumed run has the same bits only if sums keep their order
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]

    def init(self, params: Arrays, optimizer: Arrays | None = None, carried: Arrays | None = None, average: Arrays | None = None) -> None:
        train, opt = self.train, self.train.optimizer
        self.model = self._make(params)
        if train.gradient_checkpointing:
            recompute_blocks(self.model)
        self.objective: Any = Objective(self.config, self.model)
        if train.compile:
            self.objective = torch.compile(self.objective, dynamic=False)
        named = dict(self.model.named_parameters())
        self.named = {name: named[name] for name in trained(self.config)}
        self.buffers = dict(self.model.named_buffers())
        decay = decays(self.config, opt.weight_decay)
        groups = [{"params": [p for n, p in self.named.items() if decay[n] == d], "weight_decay": d} for d in sorted(set(decay.values()))]
        self.optimizer = adamw(groups, opt.lr, (opt.beta1, opt.beta2), opt.eps)
        if optimizer is not None:
            check_moments(self.config, optimizer)
        count = 0.0 if optimizer is None else float(optimizer["count"][0])
        for name, p in self.named.items():
            moments = [torch.zeros_like(p) if optimizer is None else self._moment(optimizer[f"{kind}.{name}"], p) for kind in "mv"]
            steps = torch.tensor(count, dtype=torch.float32, device=p.device)
            self.optimizer.state[p] = {"step": steps, "exp_avg": moments[0], "exp_avg_sq": moments[1]}
        self.scaler = Scaler(self.device, optimizer) if train.dtype == "float16" else None
        self.averaged: Any = self._make(params if average is None else average) if train.ema else None
        rows = train.batch_size // self.parts
        # by part of a batch; of those that this process computes
        self.states: dict[int, State] = {
            i: unisono_torch.state_from_numpy({n: a[i * rows : (i + 1) * rows] for n, a in (carried or {}).items()}, device=self.device)
            for i in range(self.rank, self.parts if carried else 0, self.ranks.size)
        }

    def any(self, flag: bool) -> bool:
        return self.ranks.any(flag)

    def gradient(self, batch: Batch, step: int) -> tuple[Step, Arrays]:
        loss, _, _ = self._backward(batch, step)
        result = Pending(loss, self._norm(), *self._one_and_no()).read()
        scale = 1.0 if self.scaler is None else self.scaler.scale.item()
        return result, {name: to_numpy(p.grad) / scale for name, p in self.named.items()}

    @torch.no_grad()
    def grad_step(self, batch: Batch, step: int, lr: float) -> Pending:
        with torch.enable_grad():
            loss, loads, states = self._backward(batch, step)
        norm = self._norm()
        fine = torch.isfinite(loss) & torch.isfinite(norm)
        scale, _ = self._one_and_no()
        pending = Pending(loss, norm, scale, ~fine)
        factor = 1 / scale if self.scaler is not None else None
        clip = self.train.optimizer.clip
        if clip:
            shrink = (clip / norm).clamp(max=1)
            factor = shrink if factor is None else factor * shrink
        if factor is not None:
            multiply([p.grad for p in self.named.values()], factor)  # pyright: ignore[reportArgumentType]
        step_if(self.optimizer, fine, lr)
        for router, load in zip(self.config.routers, loads, strict=True):
            bias, average = (self.buffers[f"{router}.{name}"] for name in ("balance_bias", "balance_load"))
            for buffer, moved in zip((bias, average), balanced(bias, average, load.to(bias.dtype), self.config.balance_rate), strict=True):
                buffer.copy_(torch.where(fine, moved, buffer))
        if self.scaler is not None:
            self.scaler.update(fine)
        if self.averaged is not None:
            average = dict(self.averaged.named_parameters())
            average_if([average[name] for name in self.named], list(self.named.values()), fine, ema_share(self.train.ema, step))
            for name, buffer in self.averaged.named_buffers():
                buffer.copy_(self.buffers[name])
        self.states = states
        return pending

    def reader(self) -> Reader:
        return Reader.around(self.config, self.model if self.averaged is None else self.averaged, self.device)

    def params(self) -> Arrays:
        found = {**self.named, **self.buffers}
        return {name: to_numpy(found[name]) for name in self.config.params()}

    def average(self) -> Arrays | None:
        if self.averaged is None:
            return None
        found = {**dict(self.averaged.named_parameters()), **self.buffers}
        return {name: to_numpy(found[name]) for name in self.config.params()}

    def optimizer_state(self) -> Arrays:
        states = {name: self.optimizer.state[p] for name, p in self.named.items()}
        m = {f"m.{name}": to_numpy(s["exp_avg"]) for name, s in states.items()}
        v = {f"v.{name}": to_numpy(s["exp_avg_sq"]) for name, s in states.items()}
        count = np.array([next(iter(states.values()))["step"].item()], np.int64)
        return {**m, **v, "count": count, **(self.scaler.state() if self.scaler else {})}

    def carried(self) -> Arrays | None:
        if not self.states:
            return None
        shapes = next(iter(self.states.values()))
        empty = {name: torch.zeros_like(a) for name, a in shapes.items()}
        joined = {name: torch.cat([self.states.get(i, empty)[name] for i in range(self.parts)]) for name in shapes}
        return unisono_torch.numpy_state(dict(zip(joined, self.ranks.sum(list(joined.values())), strict=True)))

    def _make(self, params: Arrays) -> Any:
        train = self.train
        return unisono_torch.create(
            self.config,
            params,
            dtype=train.dtype,
            param_dtype=train.param_dtype,
            device=str(self.device),
            implementation=train.implementation,
        )

    def _one_and_no(self) -> tuple[Tensor, Tensor]:
        """The loss's scale; that nothing was skipped."""
        one = torch.ones((), dtype=self.sums, device=self.device)
        return one if self.scaler is None else self.scaler.scale, torch.zeros_like(one)

    def _backward(self, batch: Batch, step: int) -> tuple[Tensor, list[Tensor], dict[int, State]]:
        """The loss; the mean load of each noisy router; the states to carry on, by part. Gradients, times the scale, are in `.grad`."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, loads, states = torch.zeros((), dtype=self.sums, device=self.device), [], {}
        parts = batch.microbatches(self.parts)
        # numbered as one process would that computes all of them: noise and dropout are the same
        for i in range(self.rank, self.parts, self.ranks.size):
            nll, load, state = self._compute(self._arguments(parts[i], step, i))
            mean = nll / batch.count
            (mean if self.scaler is None else mean * self.scaler.scale).backward()
            loss += mean.detach()
            loads.append(load)
            if batch.carried:
                states[i] = {name: a.detach() for name, a in state.items()}
        for p in self.named.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        means = [torch.stack(load).mean(0).detach() for load in zip(*loads, strict=True)]
        if self.ranks.size > 1:
            grads: list[Any] = [p.grad for p in self.named.values()]
            loss, *summed = self.ranks.sum([loss, *grads, *means])
            for p, grad in zip(self.named.values(), summed, strict=False):
                p.grad = grad
            means = [load / self.ranks.size for load in summed[len(grads) :]]
        return loss, means, states

    def _compute(self, arguments: dict[str, Any]) -> Any:
        if not self.train.compile:
            return self.objective(**arguments)
        try:
            return self.objective(**arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise InputError(f"compile: {str(error).strip().splitlines()[0]}; leave it out, or see that a C++ compiler is here") from error

    def _arguments(self, batch: Batch, step: int, part: int) -> dict[str, Any]:
        """What the objective takes, on the device."""
        seeds = dropout_seeds(self.config, self.train.seed, step, part)
        shape = batch.inputs.shape[: 1 if batch.precomputed else 2]
        given: dict[str, Any] = {
            "inputs": self._put(batch.inputs),
            "targets": self._put(batch.targets),
            "scored": self._put(batch.scored),
            "dropout": dropout_masks(self.config, seeds, shape, self.train.dtype, self.device),
            "precomputed": batch.precomputed,
            "keep_state": batch.carried,
        }
        if batch.precomputed:
            return given | {"inputs": given["inputs"].to(getattr(torch, self.train.param_dtype))}
        state = None if batch.state is None else {name: self._put(a) for name, a in batch.state.items()}
        if batch.carried:
            state = self.states.get(part)
            if state is None and caches(self.config):
                state = self.model.init_state(len(batch.inputs), self.train.data.carry)
        noise = router_noise(self.config, self.train.seed, step, part, shape)
        given["noise"] = None if noise is None else [self._put(a) for a in noise]
        return given | {"state": state, "reset": self._put(batch.reset), "valid": self._put(batch.valid)}

    def _norm(self) -> Tensor:
        """The gradient's global norm, of the loss without its scale."""
        norm = get_total_norm([p.grad for p in self.named.values()])  # pyright: ignore[reportArgumentType]
        return norm if self.scaler is None else norm / self.scaler.scale

    def _put(self, array: np.ndarray | None) -> Any:
        """On the device, by a copy that the host does not wait for."""
        if array is None:
            return None
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor.to(self.device)

    def _moment(self, array: np.ndarray, like: Tensor) -> Tensor:
        return torch.tensor(array, dtype=like.dtype, device=like.device)
