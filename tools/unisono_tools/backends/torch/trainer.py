"""Training with PyTorch."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
import unisono_torch
from torch import Tensor
from torch.nn import functional as F
from unisono_spec.contract import Arrays, Config, InputError
from unisono_torch.ops.elementwise import wide
from unisono_torch.ops.mom_gru import balanced

from unisono_tools.backends.base import Batch, Step, caches, check_moments, decays, dropout_seeds, router_noise, trained
from unisono_tools.backends.torch.ranks import Ranks
from unisono_tools.backends.torch.reader import Reader, to_numpy
from unisono_tools.config import TrainConfig


class Trainer:
    def __init__(self, train: TrainConfig, config: Config) -> None:
        self.train, self.config = train, config
        if train.threads:
            torch.set_num_threads(train.threads)
        self.threads = torch.get_num_threads()
        self.ranks = Ranks(train.device)
        self.device, self.rank = self.ranks.device, self.ranks.rank
        parts = train.accumulation * self.ranks.size
        if train.batch_size % parts:
            what = f"{self.ranks.size} processes times {train.accumulation} parts"
            raise InputError(f"batch_size: {train.batch_size} does not divide into {what}; use a multiple of {parts}")
        if self.device.type == "cuda":
            # a resumed run has the same bits only if sums keep their order
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)

    def init(self, params: Arrays, optimizer: Arrays | None = None, carried: Arrays | None = None) -> None:
        train, opt = self.train, self.train.optimizer
        self.model: Any = unisono_torch.create(
            self.config,
            params,
            dtype=train.dtype,
            param_dtype=train.param_dtype,
            device=str(self.device),
            implementation=train.implementation,
        )
        named = dict(self.model.named_parameters())
        self.named = {name: named[name] for name in trained(self.config)}
        self.buffers = dict(self.model.named_buffers())
        decay = decays(self.config, opt.weight_decay)
        groups = [{"params": [p for n, p in self.named.items() if decay[n] == d], "weight_decay": d} for d in sorted(set(decay.values()))]
        self.optimizer = torch.optim.AdamW(groups, lr=opt.lr, betas=(opt.beta1, opt.beta2), eps=opt.eps)
        if optimizer is not None:
            check_moments(self.config, optimizer)
        for name, p in self.named.items():
            moments = [torch.zeros_like(p) if optimizer is None else self._moment(optimizer[f"{kind}.{name}"], p) for kind in "mv"]
            count = 0.0 if optimizer is None else float(optimizer["count"][0])
            self.optimizer.state[p] = {"step": torch.tensor(count), "exp_avg": moments[0], "exp_avg_sq": moments[1]}

        rows = train.batch_size // (train.accumulation * self.ranks.size)
        # by part of a batch; of those that this process computes
        self.states: dict[int, dict[str, Tensor]] = {
            i: unisono_torch.state_from_numpy({n: a[i * rows : (i + 1) * rows] for n, a in (carried or {}).items()}, device=self.device)
            for i in range(self.ranks.rank, train.batch_size // rows if carried else 0, self.ranks.size)
        }

    def any(self, flag: bool) -> bool:
        return self.ranks.any(flag)

    def gradient(self, batch: Batch, step: int) -> tuple[Step, Arrays]:
        result, _, _ = self._backward(batch, step)
        return result, {name: to_numpy(p.grad) for name, p in self.named.items()}

    def grad_step(self, batch: Batch, step: int, lr: float) -> Step:
        result, loads, states = self._backward(batch, step)
        if not (math.isfinite(result.loss) and math.isfinite(result.norm)):
            return result
        self.states = states
        clip = self.train.optimizer.clip
        if clip and result.norm > clip:
            for p in self.named.values():
                p.grad.mul_(clip / result.norm)  # pyright: ignore[reportOptionalMemberAccess]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for router, load in zip(self.config.routers, loads, strict=True):
            bias, average = (self.buffers[f"{router}.{name}"] for name in ("balance_bias", "balance_load"))
            moved = balanced(bias, average, load.to(bias.dtype), self.config.balance_rate)
            bias.copy_(moved[0])
            average.copy_(moved[1])
        return result

    def reader(self) -> Reader:
        return Reader.around(self.config, self.model, self.device)

    def params(self) -> Arrays:
        found = {**self.named, **self.buffers}
        return {name: to_numpy(found[name]) for name in self.config.params()}

    def optimizer_state(self) -> Arrays:
        states = {name: self.optimizer.state[p] for name, p in self.named.items()}
        m = {f"m.{name}": to_numpy(s["exp_avg"]) for name, s in states.items()}
        v = {f"v.{name}": to_numpy(s["exp_avg_sq"]) for name, s in states.items()}
        return {**m, **v, "count": np.array([next(iter(states.values()))["step"].item()], np.int64)}

    def carried(self) -> Arrays | None:
        if not self.states:
            return None
        parts = self.train.accumulation * self.ranks.size
        shapes = next(iter(self.states.values()))
        empty = {name: torch.zeros_like(a) for name, a in shapes.items()}
        joined = {name: torch.cat([self.states.get(i, empty)[name] for i in range(parts)]) for name in shapes}
        return unisono_torch.numpy_state(dict(zip(joined, self.ranks.sum(list(joined.values())), strict=True)))

    def _backward(self, batch: Batch, step: int) -> tuple[Step, list[Tensor], dict[int, dict[str, Tensor]]]:
        """Also the mean load of each noisy router, and the states to carry on, by part."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, loads, states = 0.0, [], {}
        parts = batch.microbatches(self.train.accumulation * self.ranks.size)
        # numbered as one process would that computes all of them: noise and dropout are the same
        for i in range(self.rank, len(parts), self.ranks.size):
            nll, load, state = self._nll(parts[i], step, i)
            mean = nll / batch.count
            mean.backward()
            loss += mean.item()
            loads.append(load)
            if batch.carried:
                states[i] = {name: a.detach() for name, a in state.items()}
        for p in self.named.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        means = [torch.stack(load).mean(0) for load in zip(*loads, strict=True)]
        if self.ranks.size > 1:
            grads: list[Any] = [p.grad for p in self.named.values()]
            total, *summed = self.ranks.sum([torch.tensor(loss, dtype=torch.float64, device=self.device), *grads, *means])
            loss = total.item()
            for p, grad in zip(self.named.values(), summed, strict=False):
                p.grad = grad
            means = [load / self.ranks.size for load in summed[len(grads) :]]
        norms = torch.stack([torch.linalg.vector_norm(p.grad) for p in self.named.values()])  # pyright: ignore[reportArgumentType]
        return Step(loss, torch.linalg.vector_norm(norms).item()), means, states

    def _nll(self, batch: Batch, step: int, part: int) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        """Nats, summed over the targets that count; the load of each noisy router; the state at the end."""
        inputs = torch.as_tensor(batch.inputs, device=self.device)
        seeds = dropout_seeds(self.config, self.train.seed, step, part)
        shape = tuple(inputs.shape[: 1 if batch.precomputed else 2])
        dropout = dropout_masks(self.config, seeds, shape, self.train.dtype, self.device)
        loads: list[Tensor] = []
        state: Any = None
        if batch.precomputed:
            logits = self.model.readout(inputs.to(getattr(torch, self.train.param_dtype)), dropout=dropout)
        else:
            if batch.carried:
                state = self.states.get(part)
                if state is None and caches(self.config):
                    state = self.model.init_state(len(inputs), self.train.data.carry)
            elif batch.state is not None:
                state = unisono_torch.state_from_numpy(batch.state, device=self.device)
            noise = router_noise(self.config, self.train.seed, step, part, shape)
            noise = None if noise is None else [torch.as_tensor(a, device=self.device) for a in noise]
            marks = (None if a is None else torch.as_tensor(a, device=self.device) for a in (batch.reset, batch.valid))
            logits, state = self.model(inputs, state, *marks, dropout=dropout, noise=noise, loads=loads)
        nll = _loss(self.config.predicts, logits, torch.as_tensor(batch.targets, device=self.device))
        counts = nll if batch.scored is None else torch.where(torch.as_tensor(batch.scored, device=self.device), nll, 0)
        return counts.sum(), loads, state or {}

    def _moment(self, array: np.ndarray, like: Tensor) -> Tensor:
        return torch.tensor(array, dtype=like.dtype, device=like.device)


def dropout_masks(
    config: Config, seeds: np.ndarray, shape: tuple[int, ...], dtype: str, device: torch.device | str = "cpu"
) -> list[Tensor] | None:
    """What each layer's update is multiplied by, [*shape, D]: 0, or 1 / (1 − rate)."""
    rate = config.dropout
    if not rate:
        return None
    size = (*shape, config.d_model)
    masks = []
    for seed in seeds:
        draw = torch.Generator(device).manual_seed(int(seed))
        kept = torch.empty(size, device=device).bernoulli_(1 - rate, generator=draw)
        masks.append((kept / (1 - rate)).to(getattr(torch, dtype)))
    return masks


def _loss(kind: str, logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each target, in float32 or wider; pixels of a frame are summed."""
    logits = logits.to(wide(logits.dtype))
    if kind == "categorical":
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").reshape(targets.shape)
    targets = targets.to(logits.dtype)
    if kind == "bernoulli":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)
    mean, log_variance = logits.chunk(2, -1)
    return 0.5 * (log_variance + (targets - mean) ** 2 * torch.exp(-log_variance) + math.log(2 * math.pi)).sum(-1)
