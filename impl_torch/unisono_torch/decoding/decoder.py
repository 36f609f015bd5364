"""Decoding with nothing on the host between tokens: a step of the model and the choice of the next id, on buffers that stay."""

from __future__ import annotations

import collections
import contextlib
import functools
import operator
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from unisono_spec.contract import InputError
from unisono_spec.contract.base import MAX_SIZE
from unisono_spec.contract.sampling import Sampling, trouble, uniform

from unisono_torch.decoding import sampling as law
from unisono_torch.decoding.fused import buffers, fused
from unisono_torch.decoding.parts import Held
from unisono_torch.kernels.registry import available
from unisono_torch.ops.graphs import captured
from unisono_torch.ops.transforms import transformed

if TYPE_CHECKING:
    from unisono_torch.kernels.decode.counts import Counts
    from unisono_torch.models.base import Model, State

BLOCK = 512  # ids between two looks of the host at what was chosen
KEPT = 4  # decoders of a model; each holds a state, and a graph's memory
FEWEST = 8  # ids for which a graph is worth making: that takes as long as a hundred steps without one
MOST = 65535  # sequences: programs along the second axis of a grid

_decoders: weakref.WeakKeyDictionary[Model, collections.OrderedDict] = weakref.WeakKeyDictionary()
_missed: weakref.WeakKeyDictionary[Model, int] = weakref.WeakKeyDictionary()  # ids, since one was made, for which there was none
_lock = threading.Lock()  # of both

Follow = Callable[..., tuple[np.ndarray, np.ndarray, "State"] | None]


class Decoder:
    """Steps of `model` for states like `state`; kind: how ids are chosen, "greedy" or "drawn". penalised: under a repetition penalty,
    for which `seen` [B, V] holds the ids of each text.

    It depends on the model's parameters where they are in memory now. Calls may come from several streams, one after another: under
    `lock`.

    Its buffers belong to no parameter and to no caller, and are no tensors of inference mode: it runs inside that mode and outside,
    in any order.
    """

    def __init__(self, model: Model, state: State, kind: str, penalised: bool = False) -> None:
        batch, device = next(iter(state.values())).shape[0], model.device
        self.kind, self.device, self.lock = kind, device, threading.Lock()
        self.left: Any = None  # an event on a GPU: the last call has copied what it returns
        with torch.inference_mode(False), torch.no_grad(), _on(device):
            new = torch.empty(0, device=device).new_zeros
            # what the host gives, in one copy: the ids that are read, and a number for each that is drawn; and what it takes in one
            self.given, self.found = new((1 + BLOCK, batch), dtype=torch.int64), new((3, BLOCK, batch), dtype=torch.int64)
            self.token, self.u, self.number = self.given[0], self.given[1:].view(torch.float64), new((), dtype=torch.int64)
            self.ids, self.ties, self.trouble = self.found
            self.law: tuple[float, ...] | None = None
            self.temperature, self.top_p = new((), dtype=torch.float64) + 1, new((), dtype=torch.float64) + 1
            self.top_k, self.penalty = new((), dtype=torch.int64), new((), dtype=torch.float64) + 1
            self.seen = new((batch, model.config.vocab_size), dtype=torch.bool) if penalised else None  # pyright: ignore[reportAttributeAccessIssue]
            self.counts = _counts(model, kind, batch, penalised)
            self.held = Held()
            self.state, self.one = self._stepper(model, state)
            self.graph = captured(self._step)[0] if device.type == "cuda" else None
            self.fresh = captured(self.held.refresh)[0] if device.type == "cuda" and self.held else None

    def _stepper(self, model: Model, state: State) -> tuple[State, Callable[[Tensor], Tensor]]:
        made = fused(model, state, self.held)
        if made is not None:
            return made
        own, there = buffers(state), weakref.ref(model)

        def one(token: Tensor) -> Tensor:
            model = there()
            assert model is not None
            logits, after = model._decoded(token, own)
            torch._foreach_copy_(list(own.values()), [after[name] for name in own])  # pyright: ignore[reportPrivateImportUsage]
            return logits

        return own, one

    def _step(self) -> None:
        logits, kernels, wrong = self.one(self.token), available(self.device), None
        if self.seen is not None:
            logits, wrong = law.penalised(logits, self.seen, self.penalty)
        into = self.number, self.ids, self.ties, self.trouble, self.token
        if self.counts is not None:
            from unisono_torch.kernels.decode import counts

            counts.draw(self.counts, logits, self.u, self.temperature, self.top_k, self.top_p, *into)
        elif kernels and self.kind == "drawn":
            from unisono_torch.kernels.decode.draw import draw

            draw(logits, self.u, self.temperature, self.top_k, self.top_p, *into)
        elif kernels and logits.dtype != torch.float64:
            from unisono_torch.kernels.decode.choose import choose

            choose(logits, *into)
        else:
            at = self.number[None]
            if self.kind == "greedy":
                ids, ties, bad = law.greedy(logits)
            else:
                ids, ties, bad = law.drawn(logits, self.u.index_select(0, at)[0], self.temperature, self.top_k, self.top_p)
            for rows, row in ((self.ids, ids), (self.ties, ties), (self.trouble, bad if wrong is None else wrong)):
                rows.index_copy_(0, at, row[None].long())
            self.token.copy_(ids)
        if self.seen is not None:
            self.seen.scatter_(1, self.token[:, None], True)
        self.number += 1

    @torch.no_grad()
    def run(
        self, first: np.ndarray, state: State, sampling: Sampling, number: int, count: int, seen: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, State]:
        """Read first [B] and all ids chosen after it but the last: `count` ids and near-ties [B, count], and the state.

        number: how many ids were generated before the first of them. seen [B, V]: the ids that each text holds, under a penalty.
        """
        ids, ties = np.empty((len(first), count), np.int64), np.empty((len(first), count), bool)
        with _on(self.device):
            if self.left is not None:
                torch.cuda.current_stream().wait_event(self.left)
            if self.fresh is None:
                self.held.refresh()
            else:
                self.fresh.replay()
            copied(self.state, state)
            chosen = sampling.temperature, sampling.top_p, min(sampling.top_k, MAX_SIZE)  # more than there are keeps all
            if self.kind == "drawn" and chosen != self.law:
                self.temperature.fill_(chosen[0])
                self.top_p.fill_(chosen[1])
                self.top_k.fill_(chosen[2])
                self.law = chosen
            if self.seen is not None:
                assert seen is not None
                self.seen.copy_(torch.from_numpy(seen))
                self.penalty.fill_(sampling.repetition_penalty)
            for start in range(0, count, BLOCK):
                some = slice(start, min(start + BLOCK, count))
                n = some.stop - start
                self.number.zero_()
                asked = [first[None]] if start == 0 else []
                if self.kind == "drawn":
                    asked.append(uniform(sampling.seed, len(first), number + start, n).view(np.int64))
                if asked:
                    place = self.given[start > 0 :]
                    place[: sum(map(len, asked))].copy_(torch.from_numpy(np.concatenate(asked)))
                for _ in range(n):
                    self.advance()
                found = self.found[:, :n].cpu().numpy()
                ids[:, some], ties[:, some], bad = found[0].T, found[1].T, found[2]
                if bad.any():
                    at = int(bad.any(1).argmax())
                    raise InputError(trouble(int(bad[at].max() if 1 not in bad[at] else 1), number + start + at))
            return ids, ties, self._ended(state)

    def _ended(self, like: State) -> State:
        """Copies of the state, in the order and the dtypes of `like`, each in memory of its own."""
        copies = {name: torch.empty(self.state[name].shape, dtype=a.dtype, device=self.device) for name, a in like.items()}
        copied(copies, self.state)
        self.left = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None
        return copies

    def advance(self) -> None:
        """One token, without waiting for it."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()


def _counts(model: Model, kind: str, batch: int, penalised: bool) -> Counts | None:
    """What ids of some rows of 16 bits are drawn with, where there are kernels."""
    if kind != "drawn" or penalised or model.compute_dtype.itemsize != 2 or not available(model.device):
        return None
    from unisono_torch.kernels.decode import counts

    return counts.Counts(batch, model.device) if batch in counts.ROWS else None


def copied(to: State, given: State) -> None:
    """`to` becomes `given`, in a launch for each pair of dtypes."""
    for kinds in {(own.dtype, given[name].dtype) for name, own in to.items()}:
        names = [name for name, own in to.items() if (own.dtype, given[name].dtype) == kinds]
        torch._foreach_copy_([to[name] for name in names], [given[name] for name in names])  # pyright: ignore[reportPrivateImportUsage]


def follower(model: Model) -> Follow | None:
    """What generates all ids after the first; None where a step at a time is what there is."""
    return (lambda *given: follow(model, *given)) if _serves(model) else None


def _serves(model: Model) -> bool:
    """Whether steps of it can be a graph here and now, if they are what its parameters say."""
    if model.device.type != "cuda" or transformed() or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return False
    return not getattr(model.config, "compress_every", 0)  # a singular value decomposition waits for the host


def _tensors(model: Model) -> tuple[Tensor, ...] | None:
    """Its parameters and buffers; None where a hook, adapter, parametrisation, shard or quantised weight acts in a step.

    One walk of our own, since each call of `generate` asks: PyTorch's take a millisecond for a hundred layers.
    """
    found: list[Tensor | None] = []
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None:
            continue
        if _foreign(type(module)) or module._forward_hooks or module._forward_pre_hooks:
            return None
        if module._parameters:
            found.extend(module._parameters.values())
        if module._buffers:
            found.extend(module._buffers.values())
        if module._modules:
            waiting.extend(module._modules.values())
    held = tuple(a for a in found if a is not None)
    return held if {nn.Parameter, Tensor}.issuperset(map(type, held)) else None


@functools.cache
def _foreign(kind: type) -> bool:
    return not kind.__module__.startswith(("unisono_torch.", "torch.nn.modules."))


def follow(
    model: Model, first: np.ndarray, state: State, sampling: Sampling, number: int, count: int, seen: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, State] | None:
    """As `Decoder.run`, by a decoder that is kept; None where none is, and too few ids have missed one so far to make it."""
    if not 0 < len(first) <= MOST or _ends_within(model, state, count):
        return None  # a step at a time says where it ends, and reads no rows as well
    with _lock:
        decoder = _decoder(model, state, "greedy" if sampling.temperature == 0 else "drawn", count, seen is not None)
    if decoder is None:
        return None
    with decoder.lock:
        return decoder.run(first, state, sampling, number, count, seen)


def _ends_within(model: Model, state: State, count: int) -> bool:
    longest, position = model.config.longest, state.get("position")
    return longest is not None and position is not None and max(position.tolist(), default=0) + count > longest


def _decoder(model: Model, state: State, kind: str, count: int, penalised: bool = False) -> Decoder | None:
    key = kind, penalised, tuple((name, state[name].shape, state[name].dtype) for name in sorted(state))  # in whatever order they came
    key = *key, model.implementation, model.dtype, model.compute_dtype
    tensors = _tensors(model)
    if tensors is None:
        return None
    key = *key, (*map(Tensor.data_ptr, tensors), *map(operator.attrgetter("dtype"), tensors))
    kept = _decoders.setdefault(model, collections.OrderedDict())
    if key not in kept:
        _missed[model] = missed = _missed.get(model, 0) + count
        if missed < FEWEST:
            return None
        _missed[model] = 0  # so that sizes that take turns make no graph a call
        for other in [other for other in kept if other[-1] != key[-1]]:
            del kept[other]  # of parameters that are gone
        try:
            kept[key] = Decoder(model, state, kind, penalised)
        except torch.OutOfMemoryError:  # those of other batches hold their states
            kept.clear()
            kept[key] = Decoder(model, state, kind, penalised)
        if len(kept) > KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
