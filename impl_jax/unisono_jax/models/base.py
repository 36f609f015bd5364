"""The four verbs, once for all architectures. A subclass says how tokens are read: one each, or whole sequences of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer
from unisono_spec.contract import Config, InputError, check_dtype, generation, state_dtype, zero_state
from unisono_spec.contract.checks import as_array, check_ids, check_inputs, check_reading, check_training
from unisono_spec.contract.files import check_positions, save_params
from unisono_spec.contract.generation import Generated
from unisono_spec.contract.sampling import GREEDY, Sampling

from unisono_jax.arrays import ARRAYS, check_x64, drawn_key, numpy_params
from unisono_jax.decoding import follow
from unisono_jax.kernels.operator import within
from unisono_jax.layers.reading import Marks, Reading, Training
from unisono_jax.registry import check_implementation

Form = Literal["recurrent", "parallel"]
State = dict[str, jax.Array]
Dropout = Sequence[jax.Array] | None
Noise = Sequence[jax.Array] | None


class Model(nnx.Module):
    """A model in Flax NNX. Parameters keep the dtype they were made with; computation is in `dtype`.

    `forward` and `step` may be traced (jax.jit, jax.grad, nnx.jit, jax.vmap); `compiled` has them jitted. A model is made for
    evaluation, `deterministic`; after `train()` the config's dropout acts, drawn from the `rngs` that a call is given.
    """

    def __init__(self, config: Config, dtype: str = "float32", implementation: str = "auto") -> None:
        check_implementation(implementation)
        check_x64(check_dtype(dtype))
        self.config, self.dtype, self.implementation, self.deterministic = config, dtype, implementation, True

    def init_state(self, batch: int, capacity: int | None = None) -> State:
        """The state before the first token of `batch` sequences: arrays [batch, …] by name. capacity: the most tokens that softmax
        attention shall read.

        Gradients flow to the initial states that are parameters.
        """
        check_x64(self.dtype)
        state = {name: jnp.asarray(a) for name, a in zero_state(self.config, batch, capacity, self.dtype).items()}
        learned = {name: s.initial for name, s in self.config.states(capacity).items() if s.initial is not None}
        if learned:
            params = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(self, nnx.Param))}
            for name, initial in learned.items():
                state[name] = jnp.broadcast_to(params[initial][...].astype(state[name].dtype), state[name].shape)
        return state

    def forward(
        self,
        tokens: Any,
        state: State | None = None,
        reset: Any = None,
        valid: Any = None,
        form: Form = "parallel",
        chunk_size: int = 64,
        dropout: Dropout = None,
        noise: Noise = None,
        loads: list[jax.Array] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, State]:
        """tokens [B, T] (frames [B, T, F]) → logits [B, T, V], the state after the last token.

        reset [B, T]: the sequence starts anew before this token. valid [B, T]: where false, the token is not read.
        form="recurrent" folds `step`; form="parallel" computes whole sequences, in chunks where the form has chunks.
        dropout: what each residual update is multiplied by, `config.n_updates` arrays [B, T, D]; None is evaluation, and after
        `train()` what the config's rate draws from `rngs.dropout`.
        noise: what training adds in a noisy router, one array a layer; None is evaluation, as is every other model.
        loads: a list that receives each noisy router's mean share of its banks, [n] a layer; in the parallel form.
        Raises InputError on bad shapes and dtypes, and on ids outside the vocabulary where their values are known, not traced.

        Every call reads the model's code anew and dispatches its operations one by one: for many calls, `compiled()`, or the model itself.
        """
        tokens, reset, valid = _arrays(tokens, reset, valid)
        self._check(tokens, state, reset, valid)
        self._check_call(tokens, form, chunk_size, dropout, noise, loads)
        dropout = self._dropout(tokens.shape[:2], dropout, rngs)
        begun = self.init_state(*tokens.shape[:2]) if state is None else self._state(state)
        tokens, marks = self._tokens(tokens), Marks(*(None if m is None else jnp.asarray(m) for m in (reset, valid)))
        state = within(begun, tokens, marks, dropout, noise, self)
        if form == "parallel":
            x, state = self._read(tokens, state, Reading(marks, chunk_size, self.implementation), Training(dropout, noise, loads))
            return self._head(x), state

        def fold(state: State, given: tuple[jax.Array, Marks, Training]) -> tuple[State, jax.Array]:
            token, marks, training = given
            x, state = self._read(token, state, Reading(marks), training)
            return state, self._head(x)

        time_major = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (tokens, marks, Training(dropout, noise)))
        state, logits = lax.scan(fold, state, time_major)
        return jnp.swapaxes(logits, 0, 1), state

    def __call__(
        self, tokens: Any, state: State | None = None, reset: Any = None, valid: Any = None, **more: Any
    ) -> tuple[jax.Array, State]:
        """`forward`, compiled where it is not being traced already; `more` as there."""
        traced = any(isinstance(a, Tracer) for a in jax.tree.leaves((nnx.state(self), tokens, state, reset, valid, more)))
        read = self.forward if traced or more.get("loads") is not None else self.compiled().forward
        return read(tokens, state, reset, valid, **more)

    @property
    def device(self) -> Any:
        """Where the parameters are: a jax.Device, or the sharding of several."""
        return jax.tree.leaves(nnx.state(self))[0].device

    def step(self, token: Any, state: State, reset: Any = None, valid: Any = None, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, State]:
        """One token: token [B] (frame [B, F]), reset and valid [B] → logits [B, V], the state after it. rngs: as for `forward`."""
        token, reset, valid = _arrays(token, reset, valid)
        self._check(token, state, reset, valid, one=True)
        return self._one(token, state, reset, valid, self._dropout(token.shape[:1], None, rngs))

    def _one(self, token: Any, state: State, reset: Any, valid: Any, dropout: Dropout) -> tuple[jax.Array, State]:
        marks = Marks(*(None if m is None else jnp.asarray(m) for m in (reset, valid)))
        token = self._tokens(token)
        x, state = self._read(token, within(self._state(state), token, marks, dropout, self), Reading(marks), Training(dropout))
        return self._head(x), state

    def _dropout(self, shape: Sequence[int], given: Dropout, rngs: nnx.Rngs | None) -> Dropout:
        """`given`, or after `train()` what the config's dropout draws for `shape` [B, (T)]; None without dropout."""
        rate = self.config.dropout
        if given is not None or self.deterministic or not rate:
            return given
        if rngs is None:
            raise InputError("rngs: None in training with dropout; give rngs=nnx.Rngs(seed), or call eval() on the model")
        kept = jax.random.bernoulli(drawn_key(rngs, "dropout"), 1 - rate, (self.config.n_updates, *shape, self.config.d_model))
        return list(kept.astype(state_dtype(self.dtype)) / (1 - rate))

    def compiled(self) -> Compiled:
        """This model with `forward` and `step` jitted, as its parameters are now. Traces are shared by equal models."""
        return Compiled(self)

    def generate(
        self,
        prompt: Any,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        state: State | None = None,
        n_generated: int = 0,
        valid: Any = None,
        seen: np.ndarray | None = None,
    ) -> Generated:
        """Continue prompt [B, T] by `max_new_tokens` ids, `n_generated` ids after the first that was ever drawn with this seed.

        valid [B, T]: which tokens of a ragged prompt count, padded left, right or between. seen [B, V]: ids that the texts hold
        already, for a repetition penalty. What is returned says how to go on.
        """
        return self.compiled().generate(prompt, max_new_tokens, sampling, state, n_generated, valid, seen)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that every room loads."""
        save_params(path, self.config, numpy_params(self))

    def _check(self, tokens: Any, state: State | None, reset: Any, valid: Any, one: bool = False) -> None:
        check_x64(self.dtype)  # the mode may have changed since this model was made
        _check_traced(tokens, state, one)
        check_inputs(self.config, tokens, state, reset, valid, one=one, array=ARRAYS)
        if not self.config.reads_frames and not isinstance(tokens, Tracer):
            check_ids(np.asarray(tokens), self.config.vocab_size)
        length = 1 if one else tokens.shape[1]
        if state is not None and "position" in state and not isinstance(state["position"], Tracer):
            check_positions({"position": np.asarray(state["position"])}, length)
        self._check_reach(state, tokens.shape[0], length, *(m[:, None] if one and m is not None else m for m in (reset, valid)))

    def _check_call(self, tokens: Any, form: Any, chunk_size: Any, dropout: Any, noise: Any, loads: Any = None) -> None:
        check_reading(form, chunk_size)
        check_training(self.config, tuple(tokens.shape[:2]), dropout, noise, loads, ARRAYS)

    def _tokens(self, tokens: Any) -> jax.Array:
        return jnp.asarray(tokens, self.dtype if self.config.reads_frames else jnp.int32)

    def _state(self, state: State) -> State:
        """`state` in the dtypes that this model's dtype calls for, in the contract's order."""
        floats = state_dtype(self.dtype)
        return {name: jnp.asarray(state[name], jnp.int32 if s.integer else floats) for name, s in self.config.states().items()}

    def _check_reach(self, state: Mapping[str, Any] | None, batch: int, length: int, reset: Any, valid: Any) -> None:
        """Raise InputError where a sequence would pass the most tokens that this model can read, if the arrays' values are known."""

    def _read(self, tokens: jax.Array, state: State, read: Reading, training: Training) -> tuple[jax.Array, State]:
        """tokens [B, T], or [B] of one token, as `read` says → x [B, (T,) D], which `_head` reads; the state after them."""
        raise NotImplementedError

    def _head(self, x: jax.Array) -> jax.Array:
        """x [..., D] → logits [..., V]."""
        tied = self.embedding.weight[...] if self.config.tie_head else None  # pyright: ignore[reportAttributeAccessIssue]
        return self.head(self.norm(x), self.dtype, tied)  # pyright: ignore[reportAttributeAccessIssue]

    def _last(self, tokens: jax.Array, state: State, valid: jax.Array) -> tuple[jax.Array, State]:
        """tokens, valid [B, T] → the logits [B, V] of each row's last valid token, and no others; the state after all."""
        read = Reading(Marks(None, valid), 64, self.implementation)
        x, state = self._read(self._tokens(tokens), self._state(state), read, Training())
        latest = tokens.shape[1] - 1 - jnp.argmax(valid[:, ::-1], 1)
        return self._head(jnp.take_along_axis(x, latest[:, None, None], 1)[:, 0]), state


class Compiled:
    """`forward` and `step` of a model, jitted. One trace a config, dtype and shape, whichever model object asks."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.graph, self.params = nnx.split(model)

    def forward(
        self,
        tokens: Any,
        state: State | None = None,
        reset: Any = None,
        valid: Any = None,
        form: Form = "parallel",
        chunk_size: int = 64,
        dropout: Dropout = None,
        noise: Noise = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[jax.Array, State]:
        """tokens [B, T] → logits [B, T, V], the state after them: see `Model.forward`."""
        tokens, reset, valid = _arrays(tokens, reset, valid)
        self.model._check(tokens, state, reset, valid)
        self.model._check_call(tokens, form, chunk_size, dropout, noise)
        dropout = self.model._dropout(tokens.shape[:2], dropout, rngs)
        logits, after = _forward(self.graph, form, chunk_size, self.params, tokens, state, reset, valid, dropout, noise)
        return logits, self._ordered(after)

    def step(self, token: Any, state: State, reset: Any = None, valid: Any = None, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, State]:
        """token [B] → logits [B, V], the state after it: see `Model.step`."""
        token, reset, valid = _arrays(token, reset, valid)
        self.model._check(token, state, reset, valid, one=True)
        dropout = self.model._dropout(token.shape[:1], None, rngs)
        logits, after = _step(self.graph, self.params, token, state, reset, valid, dropout)
        return logits, self._ordered(after)

    def generate(
        self,
        prompt: Any,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        state: State | None = None,
        n_generated: int = 0,
        valid: Any = None,
        seen: np.ndarray | None = None,
    ) -> Generated:
        """prompt [B, T] → ids [B, max_new_tokens]: see `Model.generate`."""
        check_x64(self.model.dtype)
        before = state.values() if isinstance(state, Mapping) else ()
        made = jnp.zeros(())  # under jit all is traced, whatever it is made from
        if any(isinstance(a, Tracer) for a in (prompt, valid, made, *before, *jax.tree.leaves(self.params))):
            raise InputError(
                "prompt: it, the state, the model or all that is computed here is traced, and ids are drawn from known logits; "
                "generate outside of jit and vmap"
            )
        prompt = np.asarray(as_array("prompt", prompt))
        valid = None if valid is None else np.asarray(as_array("valid", valid))
        more = partial(follow, self.graph, self.params, self.model.config)  # all ids after the first
        found = generation.generate(
            self.model.config, self._begin, self._last, prompt, max_new_tokens, sampling, state, n_generated, valid, seen, more
        )
        return replace(found, state=self._ordered(found.state))

    def _ordered(self, state: State) -> State:
        """In the contract's order; jit sorts names."""
        return {name: state[name] for name in self.model.config.states()}

    def _begin(self, state: State | None, batch: int, more: int) -> State:
        """Caches are as long as a power of two, so that few sizes are compiled."""
        if state is None:
            return self.model.init_state(batch, 1 << (more - 1).bit_length())
        return generation.roomy(self.model.config, state, more, _padded)

    def _last(self, tokens: np.ndarray, state: State, valid: np.ndarray | None) -> tuple[np.ndarray, State]:
        """See `Model._last`. Tokens are padded to a power of two, so that few lengths are compiled."""
        if valid is None and tokens.shape[1] == 1:
            self.model._check(tokens[:, 0], state, None, None, one=True)
            logits, state = _step(self.graph, self.params, tokens[:, 0], state, None, None, None)
            return np.asarray(logits), state
        padding = (1 << (tokens.shape[1] - 1).bit_length()) - tokens.shape[1]
        valid = np.ones(tokens.shape, bool) if valid is None else valid
        tokens, valid = (np.pad(a, ((0, 0), (0, padding))) for a in (tokens.astype(np.int32), valid))
        self.model._check(tokens, state, None, valid)
        logits, state = _last(self.graph, self.params, tokens, state, valid)
        return np.asarray(logits), state


@partial(jax.jit, static_argnums=(0, 1, 2))
def _forward(
    graph: Any, form: Form, chunk_size: int, params: Any, tokens: Any, state: Any, reset: Any, valid: Any, dropout: Any, noise: Any
) -> Any:
    return nnx.merge(graph, params).forward(tokens, state, reset, valid, form, chunk_size, dropout, noise)


@partial(jax.jit, static_argnums=0)
def _step(graph: Any, params: Any, token: Any, state: Any, reset: Any, valid: Any, dropout: Any) -> Any:
    return nnx.merge(graph, params)._one(token, state, reset, valid, dropout)


@partial(jax.jit, static_argnums=0)
def _last(graph: Any, params: Any, tokens: Any, state: Any, valid: Any) -> Any:
    return nnx.merge(graph, params)._last(tokens, state, valid)


def _check_traced(tokens: Any, state: State | None, one: bool) -> None:
    """Raise InputError where jax.export traces sizes that are no numbers: a batch may be one, beside a state with as many rows."""
    number = [isinstance(n, int) for n in getattr(tokens, "shape", ())[:2]]
    if not all(number[1:]) and not one:
        raise InputError(f"tokens: shape {tokens.shape} has a symbolic length; export a program for each number of tokens")
    if not all(number[:1]) and state is None:
        raise InputError(f"state: none for a symbolic batch, {tokens.shape[0]}; give one with as many rows")


def _padded(array: Any, axis: int, n: int) -> jax.Array:
    return jnp.pad(jnp.asarray(array), [(0, n if i == axis else 0) for i in range(array.ndim)])


def _arrays(tokens: Any, reset: Any, valid: Any) -> list[Any]:
    """What has a shape and a dtype as it is; lists as NumPy's."""
    given = (("tokens", tokens), ("reset", reset), ("valid", valid))
    return [a if a is None and name != "tokens" else as_array(name, a) for name, a in given]
