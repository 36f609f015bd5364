"""Several processes that train one model, as torchrun starts them: replicas (DDP), shards (FSDP2), or neighbours in time.

Of R processes, `context` neighbours share each sequence; the R / context groups of them each compute their share of every batch.
"""

from __future__ import annotations

import datetime
import inspect
import os
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from unisono_spec.contract import Config, InputError
from unisono_torch.arrays import find_device

from unisono_tools.config import LAUNCH, TrainConfig, launched, processes

# All wait while the first one evaluates and saves. A process that dies is torchrun's to notice, and ends all.
LONGEST = datetime.timedelta(days=1)


class Ranks:
    """This process among `size` of them. Alone, every method gives back what it gets."""

    def __init__(self, train: TrainConfig) -> None:
        self.rank, self.size = processes()
        self.context, self.sharded = train.context, train.parallel == "fsdp" and self.size > 1
        self.compiled = train.compile
        if train.devices not in (1, self.size):
            raise InputError(
                f"devices: {train.devices} with {self.size} process(es); start as many, as in `torchrun --nproc-per-node "
                f"{train.devices} -m unisono_tools.cli train …`, or leave it out"
            )
        if self.size % self.context:
            raise InputError(f"context: {self.context} does not divide {self.size} processes; start a multiple of {self.context}")
        # which share of a batch, of how many; which stretch of its sequences
        self.share, self.shares, self.stretch = self.rank // self.context, self.size // self.context, self.rank % self.context
        device = train.device
        cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
        local = launched("LOCAL_RANK", 0)
        if self.size > 1 and cuda and device in (None, "cuda"):
            if local >= torch.cuda.device_count():
                raise InputError(f"device: process {local} of this machine has no GPU of its own, there are {torch.cuda.device_count()}")
            device = f"cuda:{local}"
            torch.cuda.set_device(local)
        self.device = find_device(device or ("cuda" if cuda else "cpu"))
        if self.size > 1 and not dist.is_initialized():
            # addresses come from torchrun's environment
            launched("MASTER_PORT")
            if not os.environ.get("MASTER_ADDR"):
                raise InputError(f"MASTER_ADDR: not in the environment, where WORLD_SIZE is {self.size}; {LAUNCH}")
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=LONGEST)
        # what the processes agree on must not wait for their devices
        self.control = dist.new_group(backend="gloo", timeout=LONGEST) if self.size > 1 and self.device.type == "cuda" else None
        self.wrapped: Any = None

    def replicate(self, objective: nn.Module, fixed: bool) -> nn.Module:
        """DDP around it. fixed: every pass uses the same parameters, and is followed by an exchange."""
        if self.size == 1 or self.sharded or self.context > 1:
            return objective
        # said of every model all of whose parameters are used after all
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
        # each process moves its buffers alike; the option has another name from torch 2.13 on
        names = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        options: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
        wrapped = nn.parallel.DistributedDataParallel(objective, static_graph=fixed, find_unused_parameters=not fixed, **options)
        wrapped.register_comm_hook(None, _summed)
        self.wrapped = wrapped
        return wrapped

    def shard(self, objective: nn.Module, config: Config) -> None:
        """FSDP2: each process holds a share of every parameter, and sees all of a block while it computes it."""
        if not self.sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        # nothing here writes into what a block has given
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(self.device.type, (self.size,))
        # initial states that are learned lie in the blocks, and are needed before these: each process holds them whole
        named = dict(objective.model.named_parameters())  # pyright: ignore[reportAttributeAccessIssue]
        kept = {named[state.initial] for state in config.states().values() if state.initial is not None}
        units: list[Any] = []
        for layer in objective.model.layers:  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]
            if self.compiled:
                layer.compile(dynamic=False)  # a graph of its own, since it is gathered before and let go after
            units.append(fully_shard(layer, mesh=mesh, ignored_params=kept))
            if hasattr(layer, "scored_input"):
                register_fsdp_forward_method(layer, "scored_input")
        units.append(fully_shard(objective, mesh=mesh, ignored_params=kept))
        for unit in units:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        self.wrapped = objective

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Where gradients of several microbatches are added, the processes exchange them once, after the last."""
        if self.sharded:
            self.wrapped.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last or self.wrapped is None else self.wrapped.no_sync()

    def sums(self, p: Tensor) -> bool:
        """Whether DDP or FSDP2 sums the gradient of this parameter over the processes."""
        return self.context == 1 and (is_cut(p) or not self.sharded)

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sums over all processes, of equal tensors in equal order: one message a dtype."""
        if self.size == 1 or not tensors:
            return tensors
        out = list(tensors)
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            flat = torch.cat([tensors[i].reshape(-1) for i in places])
            dist.all_reduce(flat)
            for i, summed in zip(places, flat.split([tensors[i].numel() for i in places]), strict=True):
                out[i] = summed.view_as(tensors[i])
        return out

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if self.size == 1:
            return flag
        told = torch.tensor(float(flag))
        dist.all_reduce(told, group=self.control)
        return bool(told > 0)


def leave(code: int) -> None:
    """End this process, all of whose work is done, if it is one of several. Neither the group's destruction nor the interpreter's end is
    safe while gloo's threads run: now and then one was aborted, one waited for ever."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# A parameter that FSDP2 has cut is a DTensor, and a tensor otherwise.


def is_cut(p: Any) -> bool:
    return hasattr(p, "to_local")


def local(p: Any) -> Tensor:
    """What this process holds of a parameter or its gradient."""
    return p.to_local() if is_cut(p) else p


def share_of(full: Tensor, like: Any) -> Tensor:
    """What this process holds of `full`, cut as `like` is."""
    if not is_cut(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return local(distribute_tensor(full, like.device_mesh, like.placements))


def whole(held: Tensor, like: Any) -> Tensor:
    """The inverse; all processes ask at once."""
    if not is_cut(like):
        return held
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(held, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()).full_tensor()


def _summed(_, bucket):  # DDP refuses annotations that are strings
    """The sum, where DDP would take the mean: each process's loss is its share of the mean already."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])
