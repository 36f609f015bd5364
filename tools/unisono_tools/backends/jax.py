"""Training and reading with JAX: Flax NNX models, optax's AdamW."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import unisono_jax
from flax import nnx
from unisono_jax.ops.mom_gru import balanced
from unisono_spec.contract import Arrays, Config
from unisono_spec.contract.files import cast_state
from unisono_spec.contract.generation import Generated
from unisono_spec.contract.sampling import Sampling

from unisono_tools.backends.base import Batch, Running, Step, caches, check_moments, decays, dropout_seeds, router_noise, trained
from unisono_tools.config import Optimizer, TrainConfig

Named = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Functional:
    """A model as a function of its named parameters, so that they can be differentiated, stored and replaced by name.

    Equal models are equal keys: what is compiled for one serves the other.
    """

    config: Config
    graph: Any
    paths: tuple[tuple[tuple[Any, ...], type], ...]  # with the kind of variable that lies there

    def __call__(self, named: Named) -> Any:
        leaves = [(path, kind(named[_name(path)])) for path, kind in self.paths]
        return nnx.merge(self.graph, nnx.from_flat_state(leaves))


def functional(model: Any) -> tuple[Functional, Named]:
    """The model's function, and its parameters by contract name."""
    graph, params = nnx.split(model)
    flat = list(nnx.to_flat_state(params))
    paths = tuple((path, type(leaf)) for path, leaf in flat)
    return Functional(model.config, graph, paths), {_name(path): leaf[...] for path, leaf in flat}


class Trainer:
    def __init__(self, train: TrainConfig, config: Config) -> None:
        self.train, self.config, self.rank = train, config, 0
        if train.threads:
            # read once, when XLA's CPU client starts
            os.environ["NPROC"] = str(train.threads)
        self.threads = int(os.environ.get("NPROC") or os.cpu_count() or 1)

    def init(self, params: Arrays, optimizer: Arrays | None = None, carried: Arrays | None = None) -> None:
        train, rows = self.train, self.train.batch_size // self.train.accumulation
        with self._precision():
            model = unisono_jax.create(
                self.config,
                params,
                dtype=train.dtype,
                param_dtype=train.param_dtype,
                device=train.device,
                implementation=train.implementation,
            )
            self.model, named = functional(model)
            self.named = {name: named.pop(name) for name in trained(self.config)}
            self.buffers = named
            self.opt_state: Any = _adamw(self.config, train.optimizer).init(self.named)
            if optimizer is not None:
                check_moments(self.config, optimizer)
                moments = ({n: jnp.asarray(optimizer[f"{kind}.{n}"], p.dtype) for n, p in self.named.items()} for kind in "mv")
                adam = optax.ScaleByAdamState(jnp.asarray(optimizer["count"][0], jnp.int32), *moments)
                self.opt_state = (adam, *self.opt_state[1:])
            # by part of a batch
            self.states: dict[int, Named] = {
                i: unisono_jax.state_from_numpy({n: a[i * rows : (i + 1) * rows] for n, a in (carried or {}).items()}, train.device)
                for i in range(train.accumulation if carried else 0)
            }

    def any(self, flag: bool) -> bool:
        return flag

    def gradient(self, batch: Batch, step: int) -> tuple[Step, Arrays]:
        with self._precision():
            result, grads, _, _ = self._backward(batch, step)
            return result, {name: np.asarray(grads[name]) for name in trained(self.config)}

    def grad_step(self, batch: Batch, step: int, lr: float) -> Step:
        with self._precision():
            result, grads, loads, states = self._backward(batch, step)
            if math.isfinite(result.loss) and math.isfinite(result.norm):
                opt, self.states = self.train.optimizer, states
                factor = opt.clip / result.norm if opt.clip and result.norm > opt.clip else 1.0
                self.named, self.opt_state = _update(self.config, opt, self.named, self.opt_state, grads, factor, lr)
                for router, load in zip(self.config.routers, loads, strict=True):
                    names = [f"{router}.{name}" for name in ("balance_bias", "balance_load")]
                    bias, average = (self.buffers[name] for name in names)
                    rate = self.config.balance_rate
                    self.buffers |= dict(zip(names, balanced(bias, average, load.astype(bias.dtype), rate), strict=True))
            return result

    def reader(self) -> Reader:
        return Reader.around(self.model, {**self.named, **self.buffers}, self.train.dtype)

    def params(self) -> Arrays:
        found = {**self.named, **self.buffers}
        return {name: np.asarray(found[name]) for name in self.config.params()}

    def optimizer_state(self) -> Arrays:
        adam: Any = self.opt_state[0]
        m = {f"m.{name}": np.asarray(adam.mu[name]) for name in trained(self.config)}
        v = {f"v.{name}": np.asarray(adam.nu[name]) for name in trained(self.config)}
        return {**m, **v, "count": np.asarray(adam.count, np.int64)[None]}

    def carried(self) -> Arrays | None:
        parts = [self.states[i] for i in sorted(self.states)]
        return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]} if parts else None

    def _precision(self) -> AbstractContextManager:
        return jax.enable_x64(self.train.dtype == "float64")

    def _backward(self, batch: Batch, step: int) -> tuple[Step, Named, list[jax.Array], dict[int, Named]]:
        """Also the mean load of each noisy router, and the states to carry on, by part."""
        loss, total, every, states = 0.0, None, [], {}
        for i, part in enumerate(batch.microbatches(self.train.accumulation)):
            seeds = dropout_seeds(self.config, self.train.seed, step, i)
            noise = router_noise(self.config, self.train.seed, step, i, part.targets.shape[:2])
            state: Any = part.state
            if batch.carried:
                state = self.states.get(i)
                if state is None and caches(self.config):
                    state = self.model({**self.named, **self.buffers}).init_state(len(part.inputs), self.train.data.carry)
            arrays = (_ids(part.inputs), _ids(part.targets), part.scored, state, part.reset, part.valid, seeds, noise)
            read = (self.named, self.buffers, self.model, part.precomputed)
            (mean, (loads, after)), grads = _mean_and_gradient(*read, *arrays, float(batch.count))
            if batch.carried:
                states[i] = after
            loss += float(mean)
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
            every.append(loads)
        assert total is not None
        return Step(loss, float(_norm(total))), total, [jnp.mean(jnp.stack(loads), 0) for loads in zip(*every, strict=True)], states


@functools.partial(jax.jit, static_argnames=("model", "precomputed"))
@functools.partial(jax.value_and_grad, has_aux=True)
def _mean_and_gradient(
    named: Named,
    buffers: Named,
    model: Functional,
    precomputed: bool,
    inputs: Any,
    targets: Any,
    scored: Any,
    state: Any,
    reset: Any,
    valid: Any,
    seeds: Any,
    noise: Any,
    count: Any,
) -> tuple[jax.Array, tuple[list[jax.Array], Any]]:
    """Nats of the targets that count, as their share of the mean over all `count` targets of the batch; the noisy routers' loads, and
    the state at the end."""
    built, loads = model({**named, **buffers}), []
    dropout = dropout_masks(model.config, seeds, inputs.shape[: 1 if precomputed else 2], built.dtype)
    if precomputed:
        logits = built.readout(inputs, dropout=dropout)
    else:
        logits, state = built.forward(inputs, state, reset, valid, dropout=dropout, noise=noise, loads=loads if noise else None)
    nll = _loss(model.config.predicts, logits, targets)
    return (nll if scored is None else jnp.where(scored, nll, 0)).sum() / count, (loads, state)


def dropout_masks(config: Config, seeds: jax.Array | np.ndarray, shape: tuple[int, ...], dtype: str) -> list[jax.Array] | None:
    """What each layer's update is multiplied by, [*shape, D]: 0, or 1 / (1 − rate)."""
    rate = config.dropout
    if not rate:
        return None
    size = (*shape, config.d_model)
    kept = [jax.random.bernoulli(jax.random.key(seeds[i]), 1 - rate, size) for i in range(len(seeds))]
    return [jnp.asarray(k, dtype) / (1 - rate) for k in kept]


@functools.lru_cache
def _adamw(config: Config, opt: Optimizer) -> optax.GradientTransformation:
    """AdamW but for the learning rate, which the schedule gives step by step."""
    decay = {name: bool(d) for name, d in decays(config, opt.weight_decay).items()}
    return optax.chain(
        optax.scale_by_adam(b1=opt.beta1, b2=opt.beta2, eps=opt.eps), optax.add_decayed_weights(opt.weight_decay, mask=decay)
    )


@functools.partial(jax.jit, static_argnames=("config", "opt"))
def _update(config: Config, opt: Optimizer, named: Named, opt_state: Any, grads: Named, factor: Any, lr: Any) -> tuple[Named, Any]:
    grads = jax.tree.map(lambda g: g * factor, grads)
    updates, opt_state = _adamw(config, opt).update(grads, opt_state, named)
    return jax.tree.map(lambda p, u: p - jnp.asarray(lr, p.dtype) * u, named, updates), opt_state


class Reader:
    """Pads each chunk to the next power of two, so that only a few lengths are ever compiled."""

    tokenizer = seq_len = None

    def __init__(self, config: Config, params: Arrays, dtype: str = "float32", device: str | None = None) -> None:
        param_dtype = "float64" if dtype == "float64" else "float32"
        with jax.enable_x64(dtype == "float64"):
            model = unisono_jax.create(config, params, dtype=dtype, param_dtype=param_dtype, device=device)
        self.config, self.dtype = config, dtype
        self.model, self.named = functional(model)

    @classmethod
    def around(cls, model: Functional, named: Named, dtype: str) -> Reader:
        """A reader of parameters that are still being trained."""
        self = cls.__new__(cls)
        self.config, self.model, self.named, self.dtype = model.config, model, named, dtype
        return self

    def init_state(self, batch: int, capacity: int | None = None) -> Running:
        with self._precision():
            return self.model(self.named).init_state(batch, capacity)

    def forward(self, tokens: np.ndarray, state: Running, reset: np.ndarray | None = None) -> tuple[np.ndarray, Running]:
        length = tokens.shape[1]
        padding = (1 << max(0, length - 1).bit_length()) - length
        pad = ((0, 0), (0, padding))
        tokens = np.pad(_ids(tokens), (*pad, (0, 0)) if tokens.ndim == 3 else pad)
        valid = np.broadcast_to(np.arange(length + padding) < length, tokens.shape[:2])
        marks = np.zeros(tokens.shape[:2], bool) if reset is None else np.pad(reset, pad)
        with self._precision():
            logits, state = _forward(self.model, self.named, tokens, state, marks, valid)
            return _wide_numpy(logits[:, :length]), state

    def step(self, token: np.ndarray, state: Running) -> tuple[np.ndarray, Running]:
        with self._precision():
            logits, state = _step(self.model, self.named, _ids(token), state)
            return _wide_numpy(logits), state

    def generate(
        self, prompt: np.ndarray, max_new_tokens: int, sampling: Sampling, state: Running = None, n_generated: int = 0, valid: Any = None
    ) -> Generated:
        with self._precision():
            return self.compiled.generate(prompt, max_new_tokens, sampling, state, n_generated, valid)

    def to_numpy(self, state: Running) -> Arrays:
        return unisono_jax.numpy_state(state)

    def from_numpy(self, arrays: Arrays) -> Running:
        with self._precision():
            return unisono_jax.state_from_numpy(cast_state(self.config, arrays, self.dtype))

    @functools.cached_property
    def compiled(self) -> Any:
        """The model with the parameters of now."""
        return self.model(self.named).compiled()

    def _precision(self) -> AbstractContextManager:
        return jax.enable_x64(self.dtype == "float64")


@functools.partial(jax.jit, static_argnames="model")
def _forward(model: Functional, named: Named, tokens: Any, state: Running, reset: Any, valid: Any) -> tuple[jax.Array, Running]:
    return model(named).forward(tokens, state, reset, valid)


@functools.partial(jax.jit, static_argnames="model")
def _step(model: Functional, named: Named, token: Any, state: Running) -> tuple[jax.Array, Running]:
    return model(named).step(token, state)


@jax.jit
def _norm(grads: Named) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(g * g) for g in grads.values()))


def _loss(kind: str, logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Nats of each target, in float32 or wider; pixels of a frame are summed."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if kind == "categorical":
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    targets = targets.astype(logits.dtype)
    if kind == "bernoulli":
        return optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1)
    mean, log_variance = jnp.split(logits, 2, -1)
    return 0.5 * (log_variance + (targets - mean) ** 2 * jnp.exp(-log_variance) + math.log(2 * math.pi)).sum(-1)


def _name(path: tuple) -> str:
    """The contract's name of the parameter at an NNX path."""
    return ".".join(map(str, path))


def _ids(array: np.ndarray) -> np.ndarray:
    """Ids as int32, which JAX computes with; frames and ξ as they are."""
    return np.asarray(array, np.int32) if np.asarray(array).dtype.kind in "iu" else np.asarray(array)


def _wide_numpy(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
