"""The four verbs, once for all architectures. A subclass says how tokens are read: one each, or whole sequences of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from unisono_spec.contract import Config, InputError, check_dtype, config_to_dict, generation, state_dtype
from unisono_spec.contract.base import declared_states
from unisono_spec.contract.checks import as_array, check_array, check_ids, check_inputs, check_reading, check_training, dtype_kind
from unisono_spec.contract.files import check_positions, save_params
from unisono_spec.contract.generation import Generated
from unisono_spec.contract.sampling import GREEDY, Sampling

from unisono_torch.arrays import DTYPES, check_device, from_numpy, numpy_params, owned, readable, recorded, to_numpy
from unisono_torch.decoding import follower
from unisono_torch.layers.reading import Marks, Mask, Reading, Training
from unisono_torch.ops.dispatch import check_implementation
from unisono_torch.ops.linear_cross_entropy import linear_cross_entropy
from unisono_torch.ops.precision import autocast_dtype, exact
from unisono_torch.ops.transforms import transformed

Form = Literal["recurrent", "parallel"]
State = dict[str, Tensor]


class Model(nn.Module):
    """A model in PyTorch, whose `state_dict()` has the names that `config.params()` declares.

    Parameters are held in one dtype and computed with in `dtype`, and inside torch.autocast in what that casts to; norms, scores, sums
    and states are float32 or wider all the same. `.to(dtype)`, `.half()`, `.bfloat16()`, `.float()` and `.double()` change both.
    `implementation` goes to every op that has kernels. Under `.train()` the config's dropout acts, drawn from `generator`; `create`
    and `load` give a model under `.eval()`, where there is none.
    """

    dtype: str

    def __init__(self, config: Config, dtype: str = "float32", implementation: str = "auto") -> None:
        super().__init__()
        self.config, self.dtype, self.implementation = config, dtype, check_implementation(implementation)
        self._generator: torch.Generator | None = None

    def extra_repr(self) -> str:
        numbers = sum(p.numel() for p in self.parameters())
        fields = ", ".join(f"{name}={value!r}" for name, value in config_to_dict(self.config).items())
        return f"{numbers:,} parameters, dtype={self.dtype!r}, implementation={self.implementation!r}\n{fields}"

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def generator(self) -> torch.Generator:
        """What dropout is drawn from under `.train()`; `generator.manual_seed(n)` repeats a run. It begins with seed 0."""
        if self._generator is None or self._generator.device != self.device:
            self._generator = torch.Generator(self.device).manual_seed(0)
        return self._generator

    @property
    def compute_dtype(self) -> torch.dtype:
        """What is computed in here and now: `dtype`, or what torch.autocast casts to, which leaves float64 alone."""
        narrow = None if self.dtype == "float64" else autocast_dtype(self.device)
        return narrow or DTYPES[self.dtype]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Model:
        # what moves tensors leaves them two dtypes; what casts them makes one of them
        cast = {fn(torch.zeros(1, dtype=dtype)).dtype for dtype in (torch.float32, torch.float16)}
        if len(cast) == 1:
            self.dtype = check_dtype(str(cast.pop()).removeprefix("torch."))
        return super()._apply(fn, recurse)

    def _dropout(self, shape: Sequence[int], given: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
        """`given`, or under `.train()` what the config's dropout draws for `shape` [B, (T)]; None without dropout."""
        rate = self.config.dropout
        if given is not None or not self.training or not rate:
            return given
        # a compiler draws from torch's own generator alone
        source = None if torch.compiler.is_compiling() else self.generator
        like = (self.config.n_updates, *shape, self.config.d_model)
        kept = torch.rand(like, generator=source, device=self.device) >= rate
        return (kept.to(torch.promote_types(self.compute_dtype, torch.float32)) / (1 - rate)).unbind(0)

    def init_state(self, batch: int, capacity: int | None = None) -> State:
        """The state before the first token of `batch` sequences: arrays [batch, …] by name. capacity: the most tokens that softmax
        attention shall read.

        Gradients flow to the initial states that are parameters.
        """
        floats, device = DTYPES[state_dtype(self.dtype)], self.device
        state: State = {}
        # a compiler has sizes that are no numbers yet
        states = (
            self.config.states(capacity) if torch.compiler.is_compiling() else declared_states(self.config, batch, capacity, self.dtype)
        )
        for name, s in states.items():
            if s.initial is None:
                state[name] = torch.zeros((batch, *s.shape), dtype=torch.int32 if s.integer else floats, device=device)
            else:
                learned: Any = reduce(getattr, s.initial.split("."), self)  # torch.func may have put there what is no parameter
                state[name] = learned.to(floats).repeat(batch, *(1 for _ in s.shape))  # a copy, also for one row
        return state

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        form: Form = "parallel",
        chunk_size: int = 64,
        dropout: Sequence[Tensor] | None = None,
        noise: Sequence[Tensor] | None = None,
        loads: list[Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """tokens [B, T] (frames [B, T, F]) → logits [B, T, V], the state after the last token.

        reset [B, T]: the sequence starts anew before this token. valid [B, T]: where false, the token is not read.
        form="recurrent" folds `step`; form="parallel" computes whole sequences, in chunks where the form has chunks.
        dropout: what each residual update is multiplied by, `config.n_updates` tensors [B, T, D]; None draws the config's own under
        `.train()`, and is evaluation under `.eval()`.
        noise: what training adds in a noisy router, one tensor a layer; None is evaluation, as is every other model.
        loads: a list that receives each noisy router's mean share of its banks, [n] a layer; in the parallel form.
        Raises InputError on shapes, dtypes or a state that do not fit the config, and on ids outside the vocabulary where
        reading them is free: on the CPU, outside graphs that are captured and transforms of torch.func.
        """
        check_reading(form, chunk_size)
        self._check(tokens, state, reset, valid)
        fresh, (state, marks, training) = state is None, self._begun(tokens, state, reset, valid, dropout, noise, loads)
        if form == "parallel":
            return self._logits(tokens, state, marks, training, chunk_size, fresh)
        logits, length = [], tokens.shape[1]
        for token, mark, drawn in zip(tokens.unbind(1), marks.each(length), training.each(length), strict=True):
            y, state = self._logits(token, state, mark, drawn)
            logits.append(y)
        return torch.stack(logits, 1), state

    def nats(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: State | None = None,
        reset: Tensor | None = None,
        valid: Tensor | None = None,
        chunk_size: int = 64,
        dropout: Sequence[Tensor] | None = None,
        noise: Sequence[Tensor] | None = None,
        loads: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, State]:
        """The cross-entropy of targets [B, T] under `forward`'s logits → its sum, nats [B, T] without a gradient, the state.

        targets: ids, negative where none is asked, which counts as 0; float32 or wider. Logits are not kept, and on a GPU those of a wide
        vocabulary are not all there at a time (ops/linear_cross_entropy.py). The rest is as in `forward`, of models that predict ids.
        """
        check_reading("parallel", chunk_size)
        self._check(tokens, state, reset, valid)
        self._check_targets(targets, tokens.shape[:2])
        fresh, (state, marks, training) = state is None, self._begun(tokens, state, reset, valid, dropout, noise, loads)
        read = Reading(marks, chunk_size, self.implementation, fresh, self.compute_dtype)
        return self._read_to_nats(tokens, targets, state, read, training)

    @exact
    def _read_to_nats(
        self, tokens: Tensor, targets: Tensor, state: State, read: Reading, training: Training
    ) -> tuple[Tensor, Tensor, State]:
        x, state = self._read(tokens, state, read, training)
        return *self._nats(x, targets), owned(state)

    def step(self, token: Tensor, state: State, reset: Tensor | None = None, valid: Tensor | None = None) -> tuple[Tensor, State]:
        """One token: token [B] (frame [B, F]), reset and valid [B] → logits [B, V], the state after it."""
        self._check(token, state, reset, valid, one=True)
        return self._logits(token, recorded(state), Marks(reset, valid), Training(self._dropout(token.shape[:1], None)))

    def generate(
        self,
        prompt: Tensor | np.ndarray,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        state: State | None = None,
        n_generated: int = 0,
        valid: Tensor | np.ndarray | None = None,
        seen: np.ndarray | None = None,
    ) -> Generated:
        """Continue prompt [B, T] by `max_new_tokens` ids, `n_generated` ids after the first that was ever drawn with this seed.

        valid [B, T]: which tokens of a ragged prompt count, padded left, right or between. seen [B, V]: ids that the texts hold
        already, for a repetition penalty. What is returned says how to go on.
        """
        if transformed() or self.device.type == "meta":
            raise InputError("prompt: ids are drawn from known logits; generate outside of torch.func, with weights that are not on 'meta'")
        given, counted = _numpy("prompt", prompt), None if valid is None else _numpy("valid", valid)
        more = follower(self)  # on a GPU: the ids after the first
        return generation.generate(
            self.config, self._begin, self._last, given, max_new_tokens, sampling, state, n_generated, counted, seen, more
        )

    @torch.no_grad()
    def _begin(self, state: State | None, batch: int, more: int) -> State:
        if state is None:
            return self.init_state(batch, more)
        check_device(self.device, state)
        return generation.roomy(self.config, state, more, _padded)

    @torch.no_grad()
    def _last(self, tokens: np.ndarray, state: State, valid: np.ndarray | None) -> tuple[np.ndarray, State]:
        """tokens, valid [B, T] → the logits [B, V] of each row's last valid token, and no others; the state after all."""
        ids, mask = (None if a is None else from_numpy(a, self.device) for a in (tokens, valid))
        assert ids is not None
        self._check(ids, state, None, mask)
        if mask is None and ids.shape[1] == 1:
            logits, state = self._decoded(ids[:, 0], state)
        else:
            end = torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
            latest = end if mask is None else end - mask.flip(1).int().argmax(1)
            logits, state = self._logits(ids, state, Marks(None, mask), Training(), 64, latest=latest)
        wider = logits if logits.dtype == torch.float64 else logits.float()  # NumPy has no bfloat16
        return wider.cpu().numpy(), state

    def _decoded(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """`step` of evaluation, with nothing asked of the tensors' values."""
        return self._logits(token, state, Marks(), Training())

    def save(self, path: str | Path) -> None:
        """Write the parameters and the config as a safetensors file that loads in every room."""
        save_params(path, self.config, numpy_params(self))

    def _begun(
        self,
        tokens: Tensor,
        state: State | None,
        reset: Mask,
        valid: Mask,
        dropout: Sequence[Tensor] | None,
        noise: Sequence[Tensor] | None,
        loads: list[Tensor] | None,
    ) -> tuple[State, Marks, Training]:
        """What whole sequences that fit are read with, once the rest fits too."""
        check_training(self.config, tuple(tokens.shape[:2]), dropout, noise, loads, Tensor)
        state = self.init_state(tokens.shape[0], tokens.shape[1]) if state is None else recorded(state)
        return state, Marks(reset, valid), Training(self._dropout(tokens.shape[:2], dropout), noise, loads)

    def _check(self, tokens: Tensor, state: State | None, reset: Mask, valid: Mask, one: bool = False) -> None:
        check_inputs(self.config, tokens, state, reset, valid, one=one, array=Tensor)
        check_device(self.device, {"tokens": tokens, "reset": reset, "valid": valid, **(state or {})})
        if not self.config.reads_frames and readable(tokens) and tokens.device.type == "cpu":
            check_ids(tokens.numpy(), self.config.vocab_size)
        position = None if state is None else state.get("position")
        if position is not None and readable(position) and position.device.type == "cpu":
            check_positions({"position": position.numpy()}, 1 if one else tokens.shape[1])

    def _logits(
        self,
        tokens: Tensor,
        state: State,
        marks: Marks,
        training: Training,
        chunk_size: int | None = None,
        fresh: bool = False,
        latest: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """What `_read` and `_head` make of tokens [B, T], or [B] without a chunk_size. latest [B]: of these alone, [B, V]."""
        read = Reading(marks, chunk_size, self.implementation, fresh, self.compute_dtype)
        return self._read_to_head(tokens, state, read, training, latest)

    @exact
    def _read_to_head(self, tokens: Tensor, state: State, read: Reading, training: Training, latest: Tensor | None) -> tuple[Tensor, State]:
        x, state = self._read(tokens, state, read, training)
        if latest is not None:
            x = x[torch.arange(len(x), device=x.device), latest]
        return self._head(x), owned(state)

    def _read(self, tokens: Tensor, state: State, read: Reading, training: Training) -> tuple[Tensor, State]:
        """tokens [B, T], or [B] of one token, as `read` says → x [B, (T,) D], which `_head` reads; the state after them."""
        raise NotImplementedError

    def _head(self, x: Tensor) -> Tensor:
        """x [..., D] → logits [..., V]."""
        return self.head(self.norm(x).to(x.dtype), self._tied)  # pyright: ignore[reportCallIssue, reportOptionalCall]

    def _last_product(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `_head` ends with: x [..., D'], weight [V, D'] and bias [V] whose product logits are."""
        head: Any = self.head
        return self.norm(x).to(x.dtype), *head.weights(self._tied)  # pyright: ignore[reportCallIssue, reportOptionalCall]

    def _check_targets(self, targets: Tensor, rows: Sequence[int]) -> None:
        """Before anything is computed or drawn: ids for `rows` of logits."""
        if self.config.predicts != "categorical":
            raise InputError(f"targets: this model predicts a {self.config.predicts} distribution of frames; take its logits from forward")
        check_array("targets", targets, Tensor)
        check_device(self.device, {"targets": targets})
        shape = tuple(rows)
        if tuple(targets.shape) != shape or dtype_kind(targets) != "i":
            raise InputError(f"targets: shape {tuple(targets.shape)} of {targets.dtype}, expected {shape} ids; -100 where none is asked")
        if readable(targets) and targets.device.type == "cpu":
            check_ids(targets.clamp(min=0).numpy(), self.config.vocab_size, "targets")

    @exact
    def _nats(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., D], which `_head` reads, targets [...] → Σ nats, nats [...]."""
        return linear_cross_entropy(*self._last_product(x), targets)

    @property
    def _tied(self) -> Any:
        """The embedding's weight where the head has none of its own."""
        return self.embedding.weight if self.config.tie_head else None  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]


def _padded(array: Tensor, axis: int, n: int) -> Tensor:
    return torch.cat([array, array.new_zeros(*array.shape[:axis], n, *array.shape[axis + 1 :])], axis)


def _numpy(name: str, given: object) -> np.ndarray:
    return to_numpy(given) if isinstance(given, Tensor) else np.asarray(as_array(name, given))
