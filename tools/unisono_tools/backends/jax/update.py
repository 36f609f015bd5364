"""What a step does once its gradient is there, decided on the device alone: the host waits for nothing."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from unisono_jax.ops.mom_gru import balanced
from unisono_spec.contract import Arrays, Config

from unisono_tools.backends.base import GROWTH, SCALE, SCALE_FLOOR, SCALE_LIMIT, Step, decays
from unisono_tools.backends.jax.functional import Named
from unisono_tools.config import Optimizer


class Pending:
    """A step's numbers on their way to the host."""

    def __init__(self, losses: list[jax.Array], groups: list[jax.Array], *values: Any) -> None:
        """losses, groups: by microbatch, the loss and nats of the groups."""
        self.losses, self.groups, self.values = losses, groups, values
        for value in (*losses, *groups, *values):
            if isinstance(value, jax.Array):
                value.copy_to_host_async()

    def read(self) -> Step:
        """Wait for this step, and for no later one."""
        norm, scale, skipped = (value.item() for value in self.values)
        groups = tuple(map(sum, zip(*(np.asarray(group).tolist() for group in self.groups), strict=True)))
        return Step(sum(loss.item() for loss in self.losses), norm, scale, bool(skipped), groups)


def scaler(saved: Arrays | None) -> Named:
    """Loss scaling for float16 (Micikevicius et al. 2018), by the rule of `base.SCALE`."""
    initial = {"scale": SCALE, "scale_steps": 0, "skipped": 0}
    values = {name: saved[name][0] if saved is not None and name in saved else value for name, value in initial.items()}
    return {name: jnp.asarray(value, jnp.float32 if name == "scale" else jnp.int32) for name, value in values.items()}


def _rescaled(held: Named, fine: jax.Array) -> Named:
    good = jnp.where(fine, held["scale_steps"] + 1, 0)
    scale = jnp.where(fine, jnp.where(good == GROWTH, held["scale"] * 2, held["scale"]), held["scale"] / 2)
    return {
        "scale": jnp.clip(scale, SCALE_FLOOR, SCALE_LIMIT),
        "scale_steps": jnp.where(good == GROWTH, 0, good),
        "skipped": held["skipped"] + ~fine,
    }


@jax.jit
def global_norm(grads: Named) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(g * g) for g in grads.values()))


@functools.lru_cache
def adamw(config: Config, opt: Optimizer) -> optax.GradientTransformation:
    """AdamW but for the learning rate, which the schedule gives step by step."""
    decay = {name: bool(d) for name, d in decays(config, opt.weight_decay).items()}
    return optax.chain(
        optax.scale_by_adam(b1=opt.beta1, b2=opt.beta2, eps=opt.eps), optax.add_decayed_weights(opt.weight_decay, mask=decay)
    )


@functools.partial(jax.jit, static_argnames=("config", "opt"), donate_argnames="held")
def update(
    config: Config, opt: Optimizer, held: Any, grads: Named, losses: list[jax.Array], loads: Any, lr: Any, share: Any
) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """What is held after the step, the same as before it where a number was not finite; the gradient's norm; the scale that it had;
    whether something was not finite."""
    named, opt_state, buffers, scaling, averaged = held
    scale = jnp.ones((), jnp.float32) if scaling is None else scaling["scale"]
    norm = global_norm(grads) / scale
    fine = jnp.isfinite(sum(losses)) & jnp.isfinite(norm)
    # 1 exactly where nothing is clipped
    factor = jnp.minimum(opt.clip / norm, 1) if opt.clip else jnp.ones_like(norm)
    grads = jax.tree.map(lambda g: g * (factor / scale), grads)
    updates, moved_state = adamw(config, opt).update(grads, opt_state, named)
    moved: Any = jax.tree.map(lambda p, u: p - jnp.asarray(lr, p.dtype) * u, named, updates)
    balance = dict(buffers)
    for router, load in zip(config.routers, zip(*loads, strict=True), strict=True):
        names = [f"{router}.{name}" for name in ("balance_bias", "balance_load")]
        bias, average = (buffers[name] for name in names)
        mean = jnp.mean(jnp.stack(load), 0).astype(bias.dtype)
        balance |= dict(zip(names, balanced(bias, average, mean, config.balance_rate), strict=True))
    mean = None if averaged is None else jax.tree.map(lambda a, p: a + jnp.asarray(share, a.dtype) * (p - a), averaged, moved)
    new, old = (moved, moved_state, balance, mean), (named, opt_state, buffers, averaged)
    named, opt_state, buffers, averaged = jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, old)
    return (named, opt_state, buffers, None if scaling is None else _rescaled(scaling, fine), averaged), norm, scale, ~fine


@jax.jit
def added(total: Named, grads: Named) -> Named:
    return jax.tree.map(jnp.add, total, grads)
