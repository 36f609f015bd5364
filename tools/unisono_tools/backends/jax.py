"""Training and reading with JAX: Flax NNX models, optax's AdamW."""

from __future__ import annotations

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
from unisono_spec.contract import Arrays, Config

from unisono_tools.backends.base import Batch, Running, Step, check_moments, decays, dropout_seeds, head
from unisono_tools.config import TrainConfig

Named = dict[str, jax.Array]


class Functional:
    """A model as a function of its named parameters, so that they can be differentiated, stored and replaced by name."""

    def __init__(self, model: Any) -> None:
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        flat = params.flat_state()
        self.params: Named = {_name(path): variable[...] for path, variable in flat}

        def build(named: Named) -> Any:
            leaves = [(path, variable.replace(named[_name(path)])) for path, variable in flat]
            return nnx.merge(graph, nnx.State.from_flat_path(dict(leaves)), rest)

        self.build = build


class Trainer:
    def __init__(self, train: TrainConfig, config: Config) -> None:
        self.train, self.config = train, config
        if train.threads:
            # read once, when XLA's CPU client starts
            os.environ["NPROC"] = str(train.threads)
        self.threads = int(os.environ.get("NPROC") or os.cpu_count() or 1)
        opt = train.optimizer
        decay = {name: bool(d) for name, d in decays(config, opt.weight_decay).items()}
        self.adamw = optax.chain(
            optax.scale_by_adam(b1=opt.beta1, b2=opt.beta2, eps=opt.eps), optax.add_decayed_weights(opt.weight_decay, mask=decay)
        )

    def init(self, params: Arrays, optimizer: Arrays | None = None) -> None:
        train = self.train
        with self._precision():
            model = unisono_jax.create(
                self.config,
                params,
                dtype=train.dtype,
                param_dtype=train.param_dtype,
                device=train.device,
                implementation=train.implementation,
            )
            self.functional = Functional(model)
            self.named = self.functional.params
            self.opt_state = self.adamw.init(self.named)
            if optimizer is not None:
                check_moments(self.config, optimizer)
                moments = ({n: jnp.asarray(optimizer[f"{kind}.{n}"], p.dtype) for n, p in self.named.items()} for kind in "mv")
                adam = optax.ScaleByAdamState(jnp.asarray(optimizer["count"][0], jnp.int32), *moments)
                self.opt_state = (adam, *self.opt_state[1:])  # pyright: ignore[reportIndexIssue]
            self._nll_grad = jax.jit(jax.value_and_grad(self._nll), static_argnames=("precomputed",))
            self._apply = jax.jit(self._update)

    def gradient(self, batch: Batch, step: int) -> tuple[Step, Arrays]:
        with self._precision():
            result, grads = self._backward(batch, step)
            return result, {name: np.asarray(grads[name]) for name in self.config.params()}

    def grad_step(self, batch: Batch, step: int, lr: float) -> Step:
        with self._precision():
            result, grads = self._backward(batch, step)
            if math.isfinite(result.loss) and math.isfinite(result.norm):
                clip = self.train.optimizer.clip
                factor = clip / result.norm if clip and result.norm > clip else 1.0
                self.named, self.opt_state = self._apply(self.named, self.opt_state, grads, factor, lr)
            return result

    def reader(self) -> Reader:
        return Reader.around(self.config, self.functional, self.named, self.train.dtype)

    def params(self) -> Arrays:
        return {name: np.asarray(self.named[name]) for name in self.config.params()}

    def optimizer_state(self) -> Arrays:
        adam: Any = self.opt_state[0]  # pyright: ignore[reportIndexIssue]
        m = {f"m.{name}": np.asarray(adam.mu[name]) for name in self.config.params()}
        v = {f"v.{name}": np.asarray(adam.nu[name]) for name in self.config.params()}
        return {**m, **v, "count": np.asarray(adam.count, np.int64)[None]}

    def _precision(self) -> AbstractContextManager:
        return jax.enable_x64(self.train.dtype == "float64")

    def _backward(self, batch: Batch, step: int) -> tuple[Step, Named]:
        loss, total = 0.0, None
        for i, part in enumerate(batch.parts(self.train.accumulation)):
            seeds = dropout_seeds(self.config, self.train.seed, step, i)
            inputs, targets = _ids(part.inputs), _ids(part.targets)
            mean, grads = self._nll_grad(
                self.named, inputs, targets, part.valid, part.state, seeds, float(batch.count), precomputed=part.precomputed
            )
            loss += float(mean)
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        assert total is not None
        return Step(loss, float(_norm(total))), total

    def _nll(self, named, inputs, targets, valid, state, seeds, count, precomputed):
        """Nats, summed over the targets that count, as a share of the whole batch's mean."""
        model = self.functional.build(named)
        dropout = self._dropout(inputs.shape[: 1 if precomputed else 2], seeds)
        if precomputed:
            logits = model.readout(inputs, dropout=dropout)
        else:
            logits, _ = model.forward(inputs, state, dropout=dropout)
        nll = _loss(head(self.config), logits, targets)
        return (nll if valid is None else jnp.where(valid, nll, 0)).sum() / count

    def _update(self, named: Named, opt_state: Any, grads: Named, factor: Any, lr: Any) -> tuple[Named, Any]:
        grads = jax.tree.map(lambda g: g * factor, grads)
        updates, opt_state = self.adamw.update(grads, opt_state, named)
        return jax.tree.map(lambda p, u: p - jnp.asarray(lr, p.dtype) * u, named, updates), opt_state

    def _dropout(self, shape: tuple[int, ...], seeds: jax.Array) -> list[jax.Array] | None:
        rate = self.config.dropout  # pyright: ignore[reportAttributeAccessIssue]
        if not rate:
            return None
        size = (*shape, self.config.d_model)  # pyright: ignore[reportAttributeAccessIssue]
        kept = [jax.random.bernoulli(jax.random.key(seeds[i]), 1 - rate, size) for i in range(len(seeds))]
        return [jnp.asarray(k, self.train.dtype) / (1 - rate) for k in kept]


class Reader:
    """Pads each chunk to the next power of two, so that only a few lengths are ever compiled."""

    tokenizer = None

    def __init__(self, config: Config, params: Arrays, dtype: str = "float32", device: str | None = None) -> None:
        param_dtype = "float64" if dtype == "float64" else "float32"
        with jax.enable_x64(dtype == "float64"):
            model = unisono_jax.create(config, params, dtype=dtype, param_dtype=param_dtype, device=device)
            functional = Functional(model)
        self._start(config, functional, functional.params, dtype)

    @classmethod
    def around(cls, config: Config, functional: Functional, named: Named, dtype: str) -> Reader:
        """A reader of parameters that are still being trained."""
        self = cls.__new__(cls)
        self._start(config, functional, named, dtype)
        return self

    def _start(self, config: Config, functional: Functional, named: Named, dtype: str) -> None:
        self.config, self.named, self.dtype = config, named, dtype
        self.functional = functional
        self.compiled_forward, self.compiled_step = _compiled(functional)

    def init_state(self, batch: int) -> Running:
        with self._precision():
            return self.functional.build(self.named).init_state(batch)

    def forward(self, tokens: np.ndarray, state: Running, reset: np.ndarray | None = None) -> tuple[np.ndarray, Running]:
        length = tokens.shape[1]
        padding = (1 << max(0, length - 1).bit_length()) - length
        pad = ((0, 0), (0, padding))
        tokens = np.pad(_ids(tokens), (*pad, (0, 0)) if tokens.ndim == 3 else pad)
        valid = np.broadcast_to(np.arange(length + padding) < length, tokens.shape[:2])
        marks = np.zeros(tokens.shape[:2], bool) if reset is None else np.pad(reset, pad)
        with self._precision():
            logits, state = self.compiled_forward(self.named, tokens, state, marks, valid)
            return _wide_numpy(logits[:, :length]), state

    def step(self, token: np.ndarray, state: Running) -> tuple[np.ndarray, Running]:
        with self._precision():
            logits, state = self.compiled_step(self.named, _ids(token), state)
            return _wide_numpy(logits), state

    def _precision(self) -> AbstractContextManager:
        return jax.enable_x64(self.dtype == "float64")


@functools.lru_cache(maxsize=4)
def _compiled(functional: Functional) -> tuple[Any, Any]:
    """forward and step, compiled once for all readers of the same model."""

    def forward(named: Named, tokens: jax.Array, state: Running, reset: jax.Array, valid: jax.Array) -> tuple[jax.Array, Running]:
        return functional.build(named).forward(tokens, state, reset, valid)

    def step(named: Named, token: jax.Array, state: Running) -> tuple[jax.Array, Running]:
        return functional.build(named).step(token, state)

    return jax.jit(forward), jax.jit(step)


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
