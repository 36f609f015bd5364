"""How JAX's benchmark measures a row: an op's contestant, a model's training, its decoding; each in a thread or a process of its own
(workers.py)."""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import unisono_jax
from flax import nnx
from unisono_jax import decoding
from unisono_spec.contract import preset
from unisono_spec.contract.sampling import GREEDY

from unisono_tools.bench.jax_ops import OPS, contestants, exact, slopes
from unisono_tools.bench.workers import Turn

SETS = 3  # of inputs
LASTS, MOST = 5.0, 10  # ms that a round lasts, calls of a set in it
ENOUGH = 1.0  # seconds after which no further round begins
STEPS = 7  # of training that count; two before them do not
Row = dict[str, Any]
Shape = tuple[int, ...]


def median_ms(calls: list[Callable[[], Any]], repeats: int) -> float:
    """The median over rounds of a round's time a call; each call has inputs of its own. What is short is called several times a round,
    lest that be the time in which a host begins and ends one."""

    def taken(passes: int) -> float:
        begin = time.perf_counter()
        jax.block_until_ready([call() for _ in range(passes) for call in calls])
        return 1e3 * (time.perf_counter() - begin)

    taken(1)
    passes = max(1, min(MOST, round(LASTS / taken(1))))
    times = []
    for _ in range(repeats):
        times.append(taken(passes))
        if len(times) > 2 and 1e-3 * sum(times) > ENOUGH:
            break
    return statistics.median(times) / passes / len(calls)


def device_ms(calls: list[Callable[[], Any]]) -> float | None:
    """What a GPU's kernels and copies take a call, by JAX's profiler; None where it tells of none."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([call() for call in calls])
        files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
        if not files:
            return None
        data = jax.profiler.ProfileData.from_file(str(files[-1]))
        lines = [line for plane in data.planes if "GPU" in plane.name for line in plane.lines if "Stream" in line.name]
        total = sum(event.duration_ns for line in lines for event in line.events)
    return 1e-6 * total / len(calls) or None


def copy_rate() -> float:
    """Bytes a second, read plus written."""
    source, negative = jnp.zeros(1 << 28, jnp.float32), jax.jit(lambda x: -x)
    return 2 * source.nbytes / median_ms([lambda: negative(source)] * SETS, 7) * 1e3


def error(found: jax.Array, true: np.ndarray) -> float:
    part = np.asarray(found[tuple(slice(n) for n in true.shape)].astype(jnp.float32), np.float64)
    return float(np.linalg.norm(part - true) / np.linalg.norm(true))


def given_to(op: str, shape: Shape, seed: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """do, and what the op reads."""
    do = jax.random.normal(jax.random.key(9), shape[: OPS[op].axes_of_o]).astype(jnp.bfloat16)
    return do, OPS[op].inputs(shape, seed)


def drawing(op: str, shape: Shape) -> Callable[[int], Any]:
    """A compiled `given_to`: the same program for each contestant, and for the truth."""
    program = jax.jit(lambda seed: given_to(op, shape, seed)).lower(jax.ShapeDtypeStruct((), jnp.int32)).compile()
    return lambda seed: program(jnp.int32(seed))


def truth_at(folder: str, op: str, shape: Shape) -> pathlib.Path:
    return pathlib.Path(folder, f"{op}{'x'.join(map(str, shape))}.npz")


def truth(op: str, shape: Shape, folder: str, turn: Turn) -> None:
    """The op's truth into a file of `folder`, made on the CPU while others compile."""
    do, given = jax.device_get(drawing(op, shape)(0))
    with jax.default_device(jax.devices("cpu")[0]):
        found = exact(op, given, do)
    np.savez(truth_at(folder, op, shape), *found)
    turn()


def op_row(op: str, shape: Shape, name: str, repeats: int, folder: str, turn: Turn) -> Row:
    """One contestant: bytes of inputs and of do; seconds that compiling took; ms by the host and by the device; errors, if there is a
    truth in `folder`; bytes of temporaries and outputs of both ways."""
    begin = time.perf_counter()
    given = drawing(op, shape)
    do, like = jax.eval_shape(lambda: given_to(op, shape, jnp.int32(0)))
    run = contestants(op, shape)[name]
    forward, both = jax.jit(run).lower(*like).compile(), jax.jit(slopes(run)).lower(do, *like).compile()
    row: Row = {"contestant": name, "compile_s": time.perf_counter() - begin}
    turn()
    sets = [given(seed) for seed in range(SETS)]
    row |= {"bytes": [sum(a.nbytes for a in sets[0][1]), do.size * do.dtype.itemsize]}
    path = truth_at(folder, op, shape)
    if path.exists() and "no normaliser" not in name:
        o, found = both(sets[0][0], *sets[0][1])
        with np.load(path) as true:
            arrays = list(true.values())
        row |= {"error_o": error(o, arrays[0]), "error_gradient": max(map(error, found, arrays[1:]))}
        del o, found
    memory: Any = both.memory_analysis()
    row["peak_bytes"] = memory.temp_size_in_bytes + memory.output_size_in_bytes
    for way, calls in (
        ("forward", [lambda g=g: forward(*g) for _, g in sets]),
        ("both", [lambda d=d, g=g: both(d, *g) for d, g in sets]),
    ):
        row |= {f"{way}_ms": median_ms(calls, repeats), f"{way}_device_ms": device_ms(calls)}
    return row


def training(name: str, batch: int, length: int, implementation: str, turn: Turn) -> Row:
    """A compiled step: forward, cross-entropy, backward, AdamW; bfloat16, parameters in float32."""
    begin = time.perf_counter()
    model = unisono_jax.create(preset(name), seed=0, dtype="bfloat16", implementation=implementation)
    graph, params = nnx.split(model)
    optimizer = optax.adamw(1e-4)
    tokens = jax.random.randint(jax.random.key(1), (batch, length + 1), 0, model.config.vocab_size)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits, _ = nnx.merge(graph, params).forward(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:]).mean()

    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        found, slope = jax.value_and_grad(loss)(params, tokens)
        change, state = optimizer.update(slope, state, params)
        return optax.apply_updates(params, change), state, found

    run = jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(optimizer.init, params), tokens).compile()
    row: Row = {"compile_s": time.perf_counter() - begin}
    turn()
    state, times, losses = optimizer.init(params), [], []
    for _ in range(STEPS + 2):
        begin = time.perf_counter()
        params, state, found = run(params, state, tokens)
        losses.append(float(found))
        times.append(time.perf_counter() - begin)
    memory: Any = run.memory_analysis()
    row |= {"tokens_per_s": batch * length / statistics.median(times[2:]), "losses": losses}
    return {**row, "temporary_bytes": memory.temp_size_in_bytes}


def decoded(name: str, contexts: tuple[int, ...], turn: Turn, rounds: int = 5) -> list[Row]:
    """The compiled loop that `generate` runs, a block of ids a call, a row a context, which is set and not read.

    traces: of the loop for all calls with a context. first_s: the first call, in which it is compiled.
    """
    model = unisono_jax.create(preset(name), seed=0, dtype="bfloat16", param_dtype="bfloat16")
    call = model.compiled()
    run: Any = decoding._run
    made, rows = [], []

    def block(first: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        found = decoding.follow(call.graph, call.params, model.config, first, state, GREEDY, 0, decoding.BLOCK)
        assert found is not None
        return found[0][:, -1], found[2]

    for context in contexts:
        state = model.init_state(1, context + 8 * decoding.BLOCK)
        if "position" in state:
            state["position"] = jnp.full_like(state["position"], context)
        begin, before = time.perf_counter(), run._cache_size()
        made.append((context, *block(np.zeros(1, np.int64), state), before, time.perf_counter() - begin, run._cache_size()))
    turn()
    for context, first, state, before, first_s, after in made:
        times, ready = [], run._cache_size()
        for _ in range(rounds):
            begin = time.perf_counter()
            first, state = block(first, state)
            times.append(time.perf_counter() - begin)
        us = 1e6 * statistics.median(times) / decoding.BLOCK
        traces = after - before + run._cache_size() - ready
        rows.append({"model": name, "context": context, "us": us, "traces": traces, "first_s": first_s})
    return rows


def contest(kind: str, *task: Any) -> Any:
    """What a process does, of a task's kind, its arguments and a turn."""
    return {"truth": truth, "op": op_row, "model": training, "decode": decoded}[kind](*task)
