"""What JAX's ops are timed on, what is timed beside them, and their truth."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from unisono_jax.ops import diagonal_ssm, linear_attention, mom_gru, multiscale, selective_scan
from unisono_jax.ops.features import elu1

from unisono_tools.bench.contestants import serving

Arrays = tuple[jax.Array, ...]
Seed = int | jax.Array


def attention_inputs(shape: tuple[int, ...], seed: Seed) -> Arrays:
    """φ(q), φ(k), v, S, z."""
    batch, _, heads, width = shape
    q, k, v = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(seed), 3))
    q, k, v = (a.astype(jnp.bfloat16) for a in (elu1(q), elu1(k), v))
    return q, k, v, jnp.zeros((batch, heads, width, width)), jnp.zeros((batch, heads, width))


def scales_inputs(shape: tuple[int, ...], seed: Seed) -> Arrays:
    """φ(q), φ(k), v, log λ, weights, S, z: the first scale forgets nothing, one weight a token, as InfinityFormer has them."""
    batch, length, heads, width, scales = shape
    q, k, v, *_ = attention_inputs(shape[:4], seed)
    decay, weight = (jax.random.normal(key, (batch, length, scales)) for key in jax.random.split(jax.random.key(seed + 100)))
    log_decay = -jnp.exp(decay - 2).at[..., 0].set(0)
    state = jnp.zeros((batch, scales, heads, width, width)), jnp.zeros((batch, scales, heads, width))
    return q, k, v, log_decay, jax.nn.sigmoid(weight)[..., None, None], *state


def chunked_einsum(q: jax.Array, k: jax.Array, v: jax.Array, size: int = 64) -> jax.Array:
    """What one writes first: bf16 einsums in chunks, states of chunks by lax.associative_scan."""
    batch, length, heads, width = q.shape
    q, k, v = (a.reshape(batch, length // size, size, heads, width) for a in (q, k, v))

    def dot(subscripts: str, *arrays: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, *arrays, preferred_element_type=jnp.float32)

    scores = jnp.where(jnp.tril(jnp.ones((size, size), bool)), dot("bnthk,bnjhk->bnhtj", q, k), 0)
    own = dot("bnjhk,bnjhv->bnhkv", k, v), k.astype(jnp.float32).sum(2)
    S, z = (lax.associative_scan(jnp.add, a, axis=1) - a for a in own)
    top = dot("bnhtj,bnjhv->bnthv", scores.astype(v.dtype), v) + dot("bnthk,bnhkv->bnthv", q, S.astype(v.dtype))
    bottom = jnp.swapaxes(scores.sum(-1), 2, 3) + dot("bnthk,bnhk->bnth", q.astype(jnp.float32), z)
    return (top / (bottom + 1e-6)[..., None]).astype(v.dtype).reshape(batch, length, heads, width)


def scan_inputs(shape: tuple[int, ...], seed: Seed) -> Arrays:
    """u, Δ, A, B, C, D, h: Δ between e^−5 and e^−1 for most."""
    b, t, d, n = shape
    keys = iter(jax.random.split(jax.random.key(seed), 7))

    def normal(*size: int) -> jax.Array:
        return jax.random.normal(next(keys), size)

    u, dt, A, B, C = normal(b, t, d), jax.nn.softplus(normal(b, t, d) - 3), -jnp.exp(normal(d, n)), normal(b, t, n), normal(b, t, n)
    u, B, C = (a.astype(jnp.bfloat16) for a in (u, B, C))
    return u, dt, A, B, C, normal(d), normal(b, d, n)


def associative(u: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array, D: jax.Array, h: jax.Array) -> jax.Array:
    """lax.associative_scan over tokens."""
    a = jnp.exp(dt[..., None] * A)
    b = (dt * u)[..., None] * B[:, :, None].astype(jnp.float32)
    b = b.at[:, 0].add(a[:, 0] * h)
    states = lax.associative_scan(lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1]), (a, b), axis=1)[1]
    return (states * C[:, :, None]).sum(-1) + D * u


def diagonal_inputs(shape: tuple[int, ...], seed: Seed) -> Arrays:
    """u, Δ, A, C, D, h, as S4D's layers start: Δ from 1e-3 to 1e-1, A = −½ + iπn."""
    b, t, d, p = shape
    keys = iter(jax.random.split(jax.random.key(seed), 5))
    u = jax.random.normal(next(keys), (b, t, d)).astype(jnp.bfloat16)
    dt = jnp.exp(jax.random.uniform(next(keys), (d,), minval=np.log(1e-3), maxval=np.log(1e-1)))
    A = jnp.broadcast_to(jnp.stack([jnp.full(p, -0.5), jnp.pi * jnp.arange(p)], -1), (d, p, 2))
    return u, dt, A, *(jax.random.normal(key, size) for key, size in zip(keys, ((d, p, 2), (d,), (b, d, p, 2)), strict=True))


def associative_pairs(u: jax.Array, dt: jax.Array, A: jax.Array, C: jax.Array, D: jax.Array, h: jax.Array) -> jax.Array:
    """S4D's recurrence by lax.associative_scan over tokens."""
    factor, _, gain = diagonal_ssm.discretised(dt, A)
    b = gain * u[..., None, None].astype(jnp.float32)
    b = b.at[:, 0].add(diagonal_ssm.times(factor, h))
    times = diagonal_ssm.times
    a = jnp.broadcast_to(factor, b.shape)
    states = lax.associative_scan(lambda x, y: (times(x[0], y[0]), times(y[0], x[1]) + y[1]), (a, b), axis=1)[1]
    return 2 * times(C, states)[..., 0].sum(-1) + D * u


def cell_inputs(shape: tuple[int, ...], seed: Seed) -> Arrays:
    """x, h, M, then MoM-GRU's parameters in the order of CELL."""
    batch, length, d, n, slots, m = shape
    keys = iter(jax.random.split(jax.random.key(seed), 20))
    sizes = {"memory": (n, slots, m), "router.0": (32, 2 * d), "router.1": (n, 32), "query": (m, 2 * d), "input": (3 * d, d + m)}
    sizes |= {"hidden": (3 * d, d), "key": (m, d), "value": (m, d), "gate": (1, d)}

    def made(name: str) -> jax.Array:
        size = sizes[name.removesuffix(".weight").removesuffix(".bias")]
        if name.endswith("bias"):
            return jnp.zeros(size[0])
        return jax.random.normal(next(keys), size) * (0.1 if name == "memory" else (2 / sum(size)) ** 0.5)

    p = {name: made(name) for name in CELL}
    x = jax.random.normal(next(keys), (batch, length, d)).astype(jnp.bfloat16)
    return x, jnp.zeros((batch, d)), jnp.broadcast_to(p["memory"], (batch, *p["memory"].shape)), *p.values()


CELL = (
    "memory",
    "hidden.weight",
    *(f"{n}.{a}" for n in ("router.0", "router.1", "query", "input", "key", "value", "gate") for a in ("weight", "bias")),
)


def _cell(form: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, h, M, *p: form(x, dict(zip(CELL, p, strict=True)), (h, M))


class Timed(NamedTuple):
    """An op: letters of its shapes' axes; how many of them o has; shapes, the widths that a kernel asks for, inputs; its forms as
    functions of those, and how many of them are tokens'."""

    axes: tuple[str, ...]
    axes_of_o: int
    shapes: tuple[tuple[int, ...], ...]
    widths: tuple[str, ...]
    inputs: Callable[[tuple[int, ...], Seed], Arrays]
    parallel: Callable[..., Any]
    recurrent: Callable[..., Any]
    tokens: int


OPS = {
    "linear_attention": Timed(  # of features elu(x) + 1
        ("B", "T", "H", "K"), 4, ((8, 4096, 16, 64), (8, 1024, 16, 64), (8, 4096, 16, 128), (1, 32768, 16, 128)), ("K", "V"),
        attention_inputs,
        lambda q, k, v, S, z, **more: linear_attention.parallel(q, k, v, (S, z), **more),
        lambda q, k, v, S, z: linear_attention.recurrent(q, k, v, (S, z)), 3,
    ),
    "multiscale": Timed(
        ("B", "T", "H", "K", "M"), 4, ((8, 4096, 16, 64, 4), (8, 4096, 16, 64, 1)), ("K", "V"), scales_inputs,
        lambda q, k, v, a, c, S, z, **more: multiscale.parallel(q, k, v, q, k, a, c, (S, z), **more),
        lambda q, k, v, a, c, S, z: multiscale.recurrent(q, k, v, q, k, a, c, (S, z)), 3,
    ),
    "selective_scan": Timed(
        ("B", "T", "D", "N"), 3, ((8, 4096, 1536, 16), (1, 16384, 1536, 16)), ("N",), scan_inputs,
        selective_scan.parallel, selective_scan.recurrent, 2,
    ),
    "diagonal_ssm": Timed(
        ("B", "T", "D", "P"), 3, ((8, 4096, 512, 32), (1, 16384, 512, 32)), ("P",), diagonal_inputs,
        diagonal_ssm.parallel, diagonal_ssm.recurrent, 1,
    ),
    "mom_gru": Timed(
        ("B", "T", "D", "n", "L", "M"), 3, ((16, 512, 640, 4, 128, 64),), (), cell_inputs,
        lambda *given, implementation="auto": _cell(lambda *a: mom_gru.hoisted(*a, implementation=implementation))(*given),
        _cell(mom_gru.recurrent), 1,
    ),
}  # fmt: skip


def contestants(op: str, shape: tuple[int, ...]) -> dict[str, Callable[..., jax.Array]]:
    """By name: functions of the op's inputs."""
    found: dict[str, Callable[..., jax.Array]] = {}
    widths = dict.fromkeys(OPS[op].widths, shape[3])
    for name in sorted(serving("jax", op, "cuda", "bfloat16", widths), key=["pallas", "plain", "jla"].index):
        found[name] = lambda *given, name=name: OPS[op].parallel(*given, implementation=name)[0]
    jla = importlib.import_module("jla.ops") if importlib.util.find_spec("jla") else None
    if op == "linear_attention":
        found["chunked einsum, associative_scan"] = lambda q, k, v, S, z: chunked_einsum(q, k, v)
        if jla:
            found["jla simple_gla, no normaliser"] = lambda q, k, v, S, z: jla.linear_attention(
                "simple_gla", q, k, v, g=z.sum() * jnp.zeros(q.shape[:3]), scale=1.0
            )[0]
    elif op == "multiscale" and jla:  # a recurrence a scale, summed

        def each(q: jax.Array, k: jax.Array, v: jax.Array, a: jax.Array, c: jax.Array, S: jax.Array, z: jax.Array) -> jax.Array:
            logs = [jnp.broadcast_to(a[..., s, None], q.shape[:3]) for s in range(a.shape[2])]
            return sum(c[:, :, s] * jla.linear_attention("simple_gla", q, k, v, g=g, scale=1.0)[0] for s, g in enumerate(logs))  # pyright: ignore[reportReturnType]

        found["jla simple_gla, a scale each, no normaliser"] = each
    elif op == "selective_scan":
        found["lax.associative_scan"] = associative
        if jla:
            found["jla mamba1, Δ in bf16"] = lambda u, dt, A, B, C, D, h: jla.linear_attention(
                "mamba1", C, B, u, dt=dt.astype(u.dtype), a=A, d=D, initial_state=h
            )[0]
    elif op == "diagonal_ssm":
        found["lax.associative_scan"] = associative_pairs
    return found


def slopes(run: Callable[..., jax.Array]) -> Callable[..., Any]:
    def both(do: jax.Array, *given: jax.Array) -> tuple[jax.Array, Any]:
        o, pull = jax.vjp(run, *given)
        return o, pull(do.astype(o.dtype))

    return both


def exact(op: str, given: Arrays, do: jax.Array) -> tuple[np.ndarray, ...]:
    """o and the gradients of the tokens' arrays in float64: of one sequence, and one head or 32 channels of it."""
    with jax.enable_x64(True):
        wide = [np.asarray(a.astype(jnp.float32), np.float64) for a in (do, *given)]
        if op == "linear_attention":
            cut = [a[:1, :, :1] for a in wide[:4]] + [a[:1, :1] for a in wide[4:]]
        elif op == "multiscale":
            cut = [a[:1, :, :1] for a in wide[:4]] + [a[:1] for a in wide[4:6]] + [a[:1, :, :1] for a in wide[6:]]
        elif op == "selective_scan":
            do_, u, dt, A, B, C, D, h = wide
            cut = [do_[:1, :, :32], u[:1, :, :32], dt[:1, :, :32], A[:32], B[:1], C[:1], D[:32], h[:1, :32]]
        elif op == "diagonal_ssm":
            do_, u, dt, A, C, D, h = wide
            cut = [do_[:1, :, :32], u[:1, :, :32], dt[:32], A[:32], C[:32], D[:32], h[:1, :32]]
        else:
            cut = [a[:1] for a in wide[:4]] + wide[4:]
        o, found = jax.jit(slopes(lambda *a: OPS[op].recurrent(*a)[0]))(*map(jnp.asarray, cut))
        return tuple(map(np.asarray, (o, *found[: OPS[op].tokens])))
