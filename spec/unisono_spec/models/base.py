"""The four verbs, once for all architectures. A subclass says how tokens are read: one each, or whole sequences of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unisono_spec.contract import count_params, generation
from unisono_spec.contract.base import DTYPES, Arrays, Config, initial_state
from unisono_spec.contract.checks import as_array, check_config, check_ids, check_inputs, check_reading, check_training
from unisono_spec.contract.errors import InputError, shown
from unisono_spec.contract.files import check_params, check_positions, save_params
from unisono_spec.contract.generation import Generated
from unisono_spec.contract.sampling import GREEDY, Sampling
from unisono_spec.layers.norm import norm
from unisono_spec.layers.params import Rounding, exact
from unisono_spec.layers.reading import Marks, Mask, Reading, Training
from unisono_spec.ops.elementwise import linear

Form = Literal["recurrent", "parallel"]


class Model:
    """A model in NumPy. `params` are wider or narrower arrays; they are computed with in `dtype`.

    `rounded` is applied to what each layer hands on; the court passes a random perturbation of a dtype's rounding error there.
    """

    def __init__(self, config: Config, params: Arrays, dtype: str = "float64", rounded: Rounding = exact) -> None:
        check_config(config)
        if not isinstance(dtype, str) or dtype not in ("float32", "float64"):
            raise InputError(f"dtype: {shown(dtype)}; the NumPy spec computes in float32 or float64")
        check_params(config, params, array=np.ndarray, complex_step=True)
        self.config, self.dtype, self.rounded = config, dtype, rounded
        # complex parameters are the complex step's and stay as they are
        self.params = {name: p if p.dtype.kind == "c" else p.astype(DTYPES[dtype]) for name, p in params.items()}

    @property
    def device(self) -> str:
        """Where the parameters are: "cpu"."""
        return "cpu"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({count_params(self.config):,} parameters, dtype={self.dtype!r}, {self.config})"

    def init_state(self, batch: int, capacity: int | None = None) -> Arrays:
        """The state before the first token of `batch` sequences: arrays [batch, …] by name. capacity: the most tokens that softmax
        attention shall read.
        """
        return initial_state(self.config, self.params, batch, capacity, self.dtype)

    def forward(
        self,
        tokens: np.ndarray,
        state: Arrays | None = None,
        reset: np.ndarray | None = None,
        valid: np.ndarray | None = None,
        form: Form = "parallel",
        chunk_size: int = 64,
        dropout: Sequence[np.ndarray] | None = None,
        noise: Sequence[np.ndarray] | None = None,
    ) -> tuple[np.ndarray, Arrays]:
        """tokens [B, T] (frames [B, T, F]) → logits [B, T, V], the state after the last token.

        reset [B, T]: the sequence starts anew before this token. valid [B, T]: where false, the token is not read.
        form="recurrent" folds `step`; form="parallel" computes whole sequences, in chunks where the form has chunks.
        dropout: what each residual update is multiplied by, `config.n_updates` arrays [B, T, D]; None is evaluation.
        noise: what training adds in a noisy router, one array a layer; None is evaluation, as is every other model.
        """
        tokens = self._check(tokens, state, reset, valid)
        check_reading(form, chunk_size)
        check_training(self.config, tokens.shape[:2], dropout, noise, array=np.ndarray)
        state = self.init_state(len(tokens), tokens.shape[1]) if state is None else state
        marks, training = Marks(reset, valid), Training(dropout, noise)
        if form == "parallel":
            x, state = self._read(tokens, state, Reading(marks, chunk_size), training)
            return self._head(x), _owned(state)
        logits = []
        for t in range(tokens.shape[1]):
            x, state = self._read(tokens[:, t], state, Reading(marks.at(t)), training.at(t))
            logits.append(self._head(x))
        return np.stack(logits, 1), _owned(state)

    __call__ = forward

    def step(
        self, token: np.ndarray, state: Arrays, reset: np.ndarray | None = None, valid: np.ndarray | None = None
    ) -> tuple[np.ndarray, Arrays]:
        """One token: token [B] (frame [B, F]), reset and valid [B] → logits [B, V], the state after it."""
        token = self._check(token, state, reset, valid, one=True)
        x, state = self._read(token, state, Reading(Marks(reset, valid)), Training())
        return self._head(x), _owned(state)

    def generate(
        self,
        prompt: np.ndarray,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        state: Arrays | None = None,
        n_generated: int = 0,
        valid: np.ndarray | None = None,
        seen: np.ndarray | None = None,
    ) -> Generated:
        """Continue prompt [B, T] by `max_new_tokens` ids, `n_generated` ids after the first that was ever drawn with this seed.

        valid [B, T]: which tokens of a ragged prompt count, padded left, right or between. seen [B, V]: ids that the texts hold
        already, for a repetition penalty. What is returned says how to go on.
        """
        prompt, valid = as_array("prompt", prompt), None if valid is None else as_array("valid", valid)
        return generation.generate(self.config, self._begin, self._last, prompt, max_new_tokens, sampling, state, n_generated, valid, seen)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that every room loads."""
        save_params(path, self.config, self.params)

    def _begin(self, state: Arrays | None, batch: int, more: int) -> Arrays:
        return self.init_state(batch, more) if state is None else generation.roomy(self.config, state, more, _padded)

    def _last(self, tokens: np.ndarray, state: Arrays, valid: Mask) -> tuple[np.ndarray, Arrays]:
        """tokens, valid [B, T] → the logits [B, V] of each row's last valid token, and no others; the state after all."""
        if valid is None and tokens.shape[1] == 1:
            return self.step(tokens[:, 0], state)
        x, state = self._read(tokens, state, Reading(Marks(None, valid), 64), Training())
        return self._head(x[np.arange(len(x)), _latest(tokens, valid)]), _owned(state)

    def _check(self, tokens: Any, state: Arrays | None, reset: Mask = None, valid: Mask = None, one: bool = False) -> np.ndarray:
        """`tokens` as an array, if all fits the config."""
        tokens = as_array("tokens", tokens)
        check_inputs(self.config, tokens, state, reset, valid, one=one, array=np.ndarray, complex_step=True)
        if not self.config.reads_frames:
            check_ids(tokens, self.config.vocab_size)
        if state is not None:
            check_positions(state, 1 if one else tokens.shape[1])
        return tokens

    def _read(self, tokens: np.ndarray, state: Arrays, read: Reading, training: Training) -> tuple[np.ndarray, Arrays]:
        """tokens [B, T], or [B] of one token, as `read` says → x [B, (T,) D], which `_head` reads; the state after them."""
        raise NotImplementedError

    def _updated(self, x: np.ndarray, update: np.ndarray, mask: Mask) -> np.ndarray:
        """x + update. mask: what dropout multiplies the update by."""
        return self.rounded(x + (update if mask is None else update * mask))

    def _head(self, x: np.ndarray) -> np.ndarray:
        """x [..., D] → logits [..., V]."""
        p = self.params
        weight = p["head.weight"] if "head.weight" in p else p["embedding.weight"]
        return self.rounded(linear(norm(p, "norm", x, self.rounded, self.config.norm_eps), weight, p.get("head.bias")))


def _owned(state: Arrays) -> Arrays:
    """Each array in memory of its own and no more: an op may hand on a slice of a whole sequence."""
    return {name: a if a.base is None else a.copy() for name, a in state.items()}


def _latest(tokens: np.ndarray, valid: Mask) -> np.ndarray | int:
    """Where each row's last valid token stands; anywhere in a row that has none."""
    return tokens.shape[1] - 1 if valid is None else tokens.shape[1] - 1 - valid[:, ::-1].argmax(1)


def _padded(array: np.ndarray, axis: int, n: int) -> np.ndarray:
    return np.pad(array, [(0, n if i == axis else 0) for i in range(array.ndim)])


def numpy_params(model: Model) -> Arrays:
    """A copy of every parameter by its contract name, as in the other rooms."""
    return {name: p.copy() for name, p in model.params.items()}


def numpy_state(state: Arrays) -> Arrays:
    """A copy of a running state, as in the other rooms."""
    return {name: a.copy() for name, a in state.items()}


def state_from_numpy(state: Arrays) -> Arrays:
    """A running state from any room, in memory of its own."""
    return numpy_state(state)
