"""Training with PyTorch."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import torch.utils.deterministic
import unisono_torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from unisono_spec.contract import Arrays, Config, InputError
from unisono_torch.ops.mom_gru import balanced

from unisono_tools.backends.base import Batch, Step, caches, check_moments, decays, dropout_seeds, ema_share, router_noise, trained
from unisono_tools.backends.torch import context
from unisono_tools.backends.torch.compiling import compile_step, computing
from unisono_tools.backends.torch.graphs import Graphed, unfit
from unisono_tools.backends.torch.objective import Objective, State, dropout_masks, recompute_blocks
from unisono_tools.backends.torch.ranks import Ranks, is_cut, local, share_of, whole
from unisono_tools.backends.torch.reader import Reader, to_numpy
from unisono_tools.backends.torch.update import Pending, Scaler, adamw, average_if, multiply, step_if
from unisono_tools.config import TrainConfig


class Trainer:
    def __init__(self, train: TrainConfig, config: Config) -> None:
        self.train, self.config = train, config
        if train.threads:
            torch.set_num_threads(train.threads)
        self.threads = torch.get_num_threads()
        self.ranks = Ranks(train)
        self.device, self.rank = self.ranks.device, self.ranks.rank
        self.n_microbatches = train.accumulation * self.ranks.shares
        if train.batch_size % self.n_microbatches:
            what = f"{self.ranks.shares} processes times accumulation {train.accumulation}"
            raise InputError(f"batch_size: {train.batch_size} does not divide into {what}; use a multiple of {self.n_microbatches}")
        self.unfit = unfit(self.device, self.ranks.size)
        if train.cuda_graphs is True and self.unfit:
            raise InputError(f"cuda_graphs: true {self.unfit}; give one GPU (--device cuda), or leave it out")
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
        objective: Any = Objective(self.config, self.model)
        self.ranks.shard(objective, self.config)
        named = dict(self.model.named_parameters())
        self.named: dict[str, Tensor] = {name: named[name] for name in trained(self.config)}
        # what this process holds of each, as plain tensors
        self.held = {name: local(p.detach()) for name, p in self.named.items()}
        self.buffers = dict(self.model.named_buffers())
        if train.compile and not self.ranks.sharded:
            objective = compile_step(objective, self.config, self.device)
        # a state that is carried takes the place of initial states that are parameters; a fixed graph must end its first pass
        self.objective: Any = self.ranks.replicate(objective, fixed=train.data.order != "streamed" and train.accumulation == 1)
        self._compute = computing(self.objective)
        graphs = bool(train.cuda_graphs) and self.unfit is None
        self.graphs = Graphed(self._compute, list(self.named.values()), must=train.cuda_graphs is True) if graphs else None
        decay = decays(self.config, opt.weight_decay)
        groups = [
            {"params": [p for n, p in self.held.items() if decay[n] == d and p.numel()], "weight_decay": d}
            for d in sorted(set(decay.values()))
        ]
        self.optimizer = adamw([group for group in groups if group["params"]], opt.lr, (opt.beta1, opt.beta2), opt.eps)
        if optimizer is not None:
            check_moments(self.config, optimizer)
        self.count = torch.tensor(0.0 if optimizer is None else float(optimizer["count"][0]), device=self.device)
        self.moments: dict[str, list[Tensor]] = {}
        for name, p in self.held.items():
            saved = None if optimizer is None else [optimizer[f"{kind}.{name}"] for kind in "mv"]
            moments = [torch.zeros_like(p) for _ in "mv"] if saved is None else [self._share(a, name) for a in saved]
            self.moments[name] = moments
            self.optimizer.state[p] = {"step": self.count.clone(), "exp_avg": moments[0], "exp_avg_sq": moments[1]}
        self.scaler = Scaler(self.device, optimizer) if train.dtype == "float16" else None
        initial = params if average is None else average
        self.averaged = {name: self._share(initial[name], name) for name in self.named} if train.ema else None
        rows = train.batch_size // self.n_microbatches
        # by microbatch; of those that this process computes
        self.states: dict[int, State] = {
            i: unisono_torch.state_from_numpy({n: a[i * rows : (i + 1) * rows] for n, a in (carried or {}).items()}, device=self.device)
            for i in range(self.ranks.share, self.n_microbatches if carried else 0, self.ranks.shares)
        }

    @property
    def notes(self) -> list[str]:
        return self.graphs.notes if self.graphs else []

    def any(self, flag: bool) -> bool:
        return self.ranks.any(flag)

    def gradient(self, batch: Batch, step: int) -> tuple[Step, Arrays]:
        nats, _, _ = self._backward(batch, step)
        result = Pending(nats, self._norm(), *self._one_and_no()).read()
        scale = 1.0 if self.scaler is None else self.scaler.scale.item()
        return result, {name: to_numpy(whole(grad, self.named[name])) / scale for name, grad in self._gradients().items()}

    @torch.no_grad()
    def grad_step(self, batch: Batch, step: int, lr: float) -> Pending:
        with torch.enable_grad():
            nats, loads, states = self._backward(batch, step)
        norm = self._norm()
        fine = torch.isfinite(nats[0]) & torch.isfinite(norm)
        scale, _ = self._one_and_no()
        pending = Pending(nats, norm, scale, ~fine)
        factor = 1 / scale if self.scaler is not None else None
        clip = self.train.optimizer.clip
        if clip:
            shrink = (clip / norm).clamp(max=1)
            factor = shrink if factor is None else factor * shrink
        if factor is not None:
            multiply(list(self._gradients().values()), factor)
        for name, grad in self._gradients().items():
            self.held[name].grad = grad
        self.count = self.count + fine.to(self.count.dtype)
        step_if(self.optimizer, fine, lr)
        for router, load in zip(self.config.routers, loads, strict=True):
            bias, average = (self.buffers[f"{router}.{name}"] for name in ("balance_bias", "balance_load"))
            for buffer, moved in zip((bias, average), balanced(bias, average, load.to(bias.dtype), self.config.balance_rate), strict=True):
                buffer.copy_(torch.where(fine, moved, buffer))
        if self.scaler is not None:
            self.scaler.update(fine)
        if self.averaged is not None:
            average_if(list(self.averaged.values()), list(self.held.values()), fine, ema_share(self.train.ema, step))
        self.states = states
        return pending

    def reader(self) -> Reader:
        spare = self.graphs.release if self.graphs else None
        if self.averaged is None and not self.ranks.sharded:
            return Reader.around(self.config, self.model, self.device, spare)
        params = self.average() or self.params()
        return Reader.around(self.config, self._make(params) if self.rank == 0 else None, self.device, spare)

    def params(self) -> Arrays:
        return self._whole(self.held)

    def average(self) -> Arrays | None:
        return None if self.averaged is None else self._whole(self.averaged)

    def optimizer_state(self) -> Arrays:
        found = {f"{kind}.{name}": self._array(self.moments[name][i], name) for i, kind in enumerate("mv") for name in self.named}
        return {**found, "count": np.array([self.count.item()], np.int64), **(self.scaler.state() if self.scaler else {})}

    def _whole(self, held: dict[str, Tensor]) -> Arrays:
        found = {name: self._array(a, name) for name, a in held.items()} | {name: to_numpy(a) for name, a in self.buffers.items()}
        return {name: found[name] for name in self.config.params()}

    def _array(self, held: Tensor, name: str) -> np.ndarray:
        return to_numpy(whole(held, self.named[name]))

    def _share(self, array: np.ndarray, name: str) -> Tensor:
        p = self.named[name]
        return share_of(torch.tensor(array, dtype=p.dtype, device=self.device), p)

    def _gradients(self) -> dict[str, Tensor]:
        """What this process holds of the gradient."""
        return {name: local(p.grad) for name, p in self.named.items()}  # pyright: ignore[reportArgumentType]

    def carried(self) -> Arrays | None:
        if not self.states:
            return None
        shapes = next(iter(self.states.values()))
        empty = {name: torch.zeros_like(a) for name, a in shapes.items()}
        joined = {name: torch.cat([self.states.get(i, empty)[name] for i in range(self.n_microbatches)]) for name in shapes}
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
        """The loss, and nats of the groups, [1 + G]; mean loads of noisy routers; the states to carry on, by microbatch. Gradients, times
        the scale, are in `.grad`."""
        for p in self.named.values():
            p.grad = None
        microbatches, ranks = batch.microbatches(self.n_microbatches), self.ranks
        # numbered as one process would that computes all of them: noise and dropout are the same
        mine = range(ranks.share, self.n_microbatches, ranks.shares)
        weight = 1 / batch.count if self.scaler is None else self.scaler.scale / batch.count
        if ranks.context > 1:
            found = context.backward(
                ranks,
                len(mine),
                lambda i, state: self._compute(self._arguments(microbatches[mine[i]], step, mine[i], state)),
                lambda: self.model.init_state(self.train.batch_size // self.n_microbatches),
                weight,
            )
            # a load is a mean over tokens
            shares = [context.weight_of(microbatches[i], ranks) for i in mine]
            found = [(one[0], [load * w for load in one[1]], one[2], one[3]) for w, one in zip(shares, found, strict=True)]
        else:
            found = []
            graphs = self.graphs if self.graphs is not None and self.graphs.why is None else None
            for i in mine:
                arguments = self._arguments(microbatches[i], step, i)
                if graphs is not None:
                    found.append(graphs(arguments, weight, first=i == mine[0], last=i == mine[-1]))
                    continue
                with ranks.accumulating(last=i == mine[-1]):
                    found.append(self._compute(arguments))
                    (found[-1][0] * weight).backward()
        states = {i: {name: a.detach() for name, a in one[2].items()} for i, one in zip(mine, found, strict=True)}
        nats = [torch.cat([one[0].detach()[None].to(self.sums) / batch.count, one[3].to(self.sums)]) for one in found]
        nats = sum(nats[1:], nats[0])
        for p in self.named.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        means = [torch.stack(load).mean(0).detach() for load in zip(*(one[1] for one in found), strict=True)]
        if ranks.size > 1:
            # replicas and shards have exchanged their gradients as they came
            own: list[Any] = [p for p in self.named.values() if not ranks.sums(p)]
            nats, *summed = ranks.sum([nats, *(p.grad for p in own), *means])
            for p, grad in zip(own, summed, strict=False):
                p.grad = grad
            means = [load / ranks.shares for load in summed[len(own) :]]
        return nats, means, states if batch.carried else {}

    def _arguments(self, batch: Batch, step: int, microbatch: int, state: State | None = None) -> dict[str, Any]:
        """What the objective takes, on the device. state: where this process's stretch of the sequences starts."""
        seeds = dropout_seeds(self.config, self.train.seed, step, microbatch)
        shape = batch.inputs.shape[: 1 if batch.precomputed else 2]
        dropout = dropout_masks(self.config, seeds, shape, self.train.dtype, self.device)
        noise = None if batch.precomputed else router_noise(self.config, self.train.seed, step, microbatch, shape)
        if self.ranks.context > 1:
            # drawn for all of the sequence, as one process would
            where = context.stretch(batch, self.ranks)
            dropout = None if dropout is None else [a[:, where] for a in dropout]
            noise = None if noise is None else [a[:, where] for a in noise]
            batch = context.cut(batch, self.ranks)
        given: dict[str, Any] = {
            "inputs": self._put(batch.inputs),
            "targets": self._put(batch.targets),
            "scored": self._put(batch.scored),
            "dropout": dropout,
            "groups": self._put(batch.groups),
            "precomputed": batch.precomputed,
            "keep_state": batch.carried or self.ranks.context > 1,
        }
        if batch.precomputed:
            return given | {"inputs": given["inputs"].to(getattr(torch, self.train.param_dtype))}
        if batch.carried:
            state = self.states.get(microbatch)
            if state is None and caches(self.config):
                state = self.model.init_state(len(batch.inputs), self.train.data.carry)
        elif state is None and batch.state is not None:
            state = {name: self._put(a) for name, a in batch.state.items()}
        given["noise"] = None if noise is None else [self._put(a) for a in noise]
        return given | {"state": state, "reset": self._put(batch.reset), "valid": self._put(batch.valid)}

    def _norm(self) -> Tensor:
        """The gradient's global norm, of the loss without its scale."""
        grads = self._gradients()
        if self.ranks.sharded:
            cut, kept = ([g for n, g in grads.items() if is_cut(self.named[n]) == of] for of in (True, False))
            (norm,) = self.ranks.sum([get_total_norm(cut) ** 2])
            # of none the norm would be a number of the host's, whose copy waits for the device
            norm = (norm + get_total_norm(kept) ** 2 if kept else norm).sqrt()
        else:
            norm = get_total_norm(list(grads.values()))
        return norm if self.scaler is None else norm / self.scaler.scale

    def _put(self, array: np.ndarray | None) -> Any:
        """On the device, by a copy that the host does not wait for."""
        if array is None:
            return None
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor.to(self.device)
