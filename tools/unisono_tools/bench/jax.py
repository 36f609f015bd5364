"""JAX on a GPU: ops beside their peers, models in training, and decoded tokens.

python -m unisono_tools.bench.jax --output docs/results/kernels-jax-h100      # writes .json and .md
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import unisono_jax
from flax import nnx
from unisono_jax import decoding
from unisono_jax.ops import linear_attention, multiscale, selective_scan
from unisono_spec.contract import preset
from unisono_spec.contract.sampling import GREEDY

from unisono_tools.bench import report
from unisono_tools.bench.contestants import serving
from unisono_tools.bench.jax_ops import Arrays, associative, attention_inputs, chunked_einsum, scales_inputs, scan_inputs

# B, T, H, K = V, of features elu(x) + 1; and M; B, T, D, N
ATTENTION = ((8, 4096, 16, 64), (8, 1024, 16, 64), (8, 4096, 16, 128), (1, 32768, 16, 128))
SCALES = ((8, 4096, 16, 64, 4), (8, 4096, 16, 64, 1))
SCAN = ((8, 4096, 1536, 16), (1, 16384, 1536, 16))
LONGEST_EXACT = 4096  # tokens: errors are measured up to here
MODELS = (  # batch, length, implementations
    ("mamba-130m", 8, 2048, ("auto", "jla", "plain")),
    ("mamba-130m", 1, 16384, ("auto",)),
    ("lat-base", 8, 2048, ("auto", "plain")),
    ("lat-base", 1, 16384, ("auto", "plain")),
    ("s4d-base", 8, 2048, ("auto",)),
    ("maru", 8, 512, ("auto",)),
)
DECODED, CONTEXTS = ("lat-base", "mamba-130m", "transformer-base"), (1 << 10, 1 << 15)
AXES = {"linear_attention": "BTHK", "multiscale": "BTHKM", "selective_scan": "BTDN"}
PARTS = ("attention", "scales", "scan", "models", "decode")
SETS = 3
Row = dict[str, Any]


def median_ms(calls: list[Callable[[], Any]], repeats: int) -> float:
    """The median over rounds of a round's time a call; each call has inputs of its own."""
    jax.block_until_ready([call() for call in calls])
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready([call() for call in calls])
        times.append(1e3 * (time.perf_counter() - begin) / len(calls))
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes a second, read plus written."""
    source, negative = jnp.zeros(1 << 28, jnp.float32), jax.jit(lambda x: -x)
    return 2 * source.nbytes / median_ms([lambda: negative(source)] * SETS, 7) * 1e3


def contestants(op: str, widths: dict[str, int]) -> dict[str, Callable[..., jax.Array]]:
    """By name: functions of the op's inputs."""
    found: dict[str, Callable[..., jax.Array]] = {}
    for name in sorted(serving("jax", op, "cuda", "bfloat16", widths), key=["pallas", "plain", "jla"].index):
        if op == "linear_attention":
            found[name] = lambda q, k, v, S, z, name=name: linear_attention.parallel(q, k, v, (S, z), implementation=name)[0]
        elif op == "multiscale":
            found[name] = lambda q, k, v, a, c, S, z, name=name: multiscale.parallel(q, k, v, q, k, a, c, (S, z), implementation=name)[0]
        else:
            found[name] = lambda *given, name=name: selective_scan.parallel(*given, implementation=name)[0]
    jla = importlib.import_module("jla.ops") if importlib.util.find_spec("jla") else None
    if op == "linear_attention":
        found["chunked einsum, associative_scan"] = lambda q, k, v, S, z: chunked_einsum(q, k, v)
        if jla:
            found["jla simple_gla, no normaliser"] = lambda q, k, v, S, z: jla.linear_attention(
                "simple_gla", q, k, v, g=z.sum() * jnp.zeros(q.shape[:3]), scale=1.0
            )[0]
    elif op == "multiscale":
        if jla:  # a recurrence a scale, summed

            def each(q: jax.Array, k: jax.Array, v: jax.Array, a: jax.Array, c: jax.Array, S: jax.Array, z: jax.Array) -> jax.Array:
                logs = [jnp.broadcast_to(a[..., s, None], q.shape[:3]) for s in range(a.shape[2])]
                return sum(c[:, :, s] * jla.linear_attention("simple_gla", q, k, v, g=g, scale=1.0)[0] for s, g in enumerate(logs))  # pyright: ignore[reportReturnType]

            found["jla simple_gla, a scale each, no normaliser"] = each
    else:
        found["lax.associative_scan"] = associative
        if jla:
            found["jla mamba1, Δ in bf16"] = lambda u, dt, A, B, C, D, h: jla.linear_attention(
                "mamba1", C, B, u, dt=dt.astype(u.dtype), a=A, d=D, initial_state=h
            )[0]
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

            run: Callable[..., Any] = lambda q, k, v, S, z: linear_attention.recurrent(q, k, v, (S, z))[0]  # noqa: E731
        elif op == "multiscale":
            cut = [a[:1, :, :1] for a in wide[:4]] + [a[:1] for a in wide[4:6]] + [a[:1, :, :1] for a in wide[6:]]
            run = lambda q, k, v, a, c, S, z: multiscale.recurrent(q, k, v, q, k, a, c, (S, z))[0]  # noqa: E731
        else:
            do_, u, dt, A, B, C, D, h = wide
            cut = [do_[:1, :, :32], u[:1, :, :32], dt[:1, :, :32], A[:32], B[:1], C[:1], D[:32], h[:1, :32]]
            run = lambda *given: selective_scan.recurrent(*given)[0]  # noqa: E731
        o, found = jax.jit(slopes(run))(*map(jnp.asarray, cut))
        return tuple(map(np.asarray, (o, *found[: 2 if op == "selective_scan" else 3])))


def error(found: jax.Array, true: np.ndarray) -> float:
    part = np.asarray(found[tuple(slice(n) for n in true.shape)].astype(jnp.float32), np.float64)
    return float(np.linalg.norm(part - true) / np.linalg.norm(true))


def measure_op(op: str, shape: tuple[int, ...], rate: float, repeats: int) -> Iterator[Row]:
    """A case with one more row each time."""
    make = {"linear_attention": attention_inputs, "multiscale": scales_inputs, "selective_scan": scan_inputs}[op]
    sets = [make(shape, seed) for seed in range(SETS)]
    do = jax.random.normal(jax.random.key(9), shape[:3] if op == "selective_scan" else shape[:4]).astype(jnp.bfloat16)
    truth = exact(op, sets[0], do) if shape[1] <= LONGEST_EXACT else ()
    ins = sum(a.nbytes for a in sets[0])
    floor = [1e3 * (ins + do.nbytes) / rate, 1e3 * (2 * ins + do.nbytes) / rate]
    widths = {"K": shape[3], "V": shape[3], "N": shape[3]}
    case: Row = {"op": op, "shape": shape, "floor_ms": floor, "rows": []}
    for name, run in contestants(op, widths).items():
        row: Row = {"contestant": name}
        try:
            forward, begin = jax.jit(run), time.perf_counter()
            both = jax.jit(slopes(run)).lower(do, *sets[0]).compile()
            row["compile_s"] = time.perf_counter() - begin
            o, found = both(do, *sets[0])
            if truth and "no normaliser" not in name:
                row["error_o"], row["error_gradient"] = error(o, truth[0]), max(map(error, found, truth[1:]))
            del o, found
            memory: Any = both.memory_analysis()
            row["peak_bytes"] = memory.temp_size_in_bytes + memory.output_size_in_bytes
            row["forward_ms"] = median_ms([lambda s=s, f=forward: f(*s) for s in sets], repeats)
            row["both_ms"] = median_ms([lambda s=s, f=both: f(do, *s) for s in sets], repeats)
        except Exception as problem:  # a peer that refuses the shape, or does not fit
            if name in ("plain", "pallas", "jla"):
                raise
            row["note"] = str(problem).splitlines()[0][:90]
        print({"op": op, "shape": shape, **row}, flush=True)
        case["rows"].append(row)
        yield case


def trained(name: str, batch: int, length: int, implementation: str, steps: int) -> Row:
    """Forward, cross-entropy, backward, AdamW; bfloat16, parameters in float32."""
    model = unisono_jax.create(preset(name), seed=0, dtype="bfloat16", implementation=implementation)
    graph, params = nnx.split(model)
    optimizer = optax.adamw(1e-4)
    state = optimizer.init(params)
    tokens = jax.random.randint(jax.random.key(1), (batch, length + 1), 0, model.config.vocab_size)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits, _ = nnx.merge(graph, params).forward(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens[:, 1:]).mean()

    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        found, slope = jax.value_and_grad(loss)(params, tokens)
        change, state = optimizer.update(slope, state, params)
        return optax.apply_updates(params, change), state, found

    begin = time.perf_counter()
    run: Any = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, tokens).compile()
    row: Row = {"model": name, "batch": batch, "length": length, "implementation": implementation, "compile_s": time.perf_counter() - begin}
    times, losses = [], []
    for _ in range(steps + 2):
        begin = time.perf_counter()
        params, state, found = run(params, state, tokens)
        losses.append(float(found))
        times.append(time.perf_counter() - begin)
    row |= {"tokens_per_s": batch * length / statistics.median(times[2:]), "losses": losses}
    return {**row, "temporary_bytes": run.memory_analysis().temp_size_in_bytes}


def decoded(name: str, context: int, rounds: int = 5) -> Row:
    """The compiled loop that `generate` runs, a block of ids a call; the context is set, not read."""
    model = unisono_jax.create(preset(name), seed=0, dtype="bfloat16", param_dtype="bfloat16")
    call = model.compiled()
    state = model.init_state(1, context + 8 * decoding.BLOCK)
    if "position" in state:
        state["position"] = jnp.full_like(state["position"], context)
    run: Any = decoding._run
    times, first, before = [], np.zeros(1, np.int64), run._cache_size()
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        found = decoding.follow(call.graph, call.params, model.config, first, state, GREEDY, 0, decoding.BLOCK)
        assert found is not None
        times.append(time.perf_counter() - begin)
        first, state = found[0][:, -1], found[2]
    us = 1e6 * statistics.median(times[1:]) / decoding.BLOCK
    return {"model": name, "context": context, "us": us, "traces": run._cache_size() - before, "first_s": times[0]}


def markdown(result: Row) -> str:
    lines = ["# JAX on a GPU", "", *(f"- {name}: {value}" for name, value in result["run"].items())]
    lines += [
        f"- copy {result['copy_bytes_per_s'] / 1e9:.0f} GB/s, read plus written; floor: each input read once, each output written once",
        "- medians of rounds over three input sets, a round's time by the host; bfloat16, states and Δ in float32",
        "- errors: ‖a − exact‖ / ‖exact‖ against float64, of o and of the worst gradient; peak: temporaries and outputs of both ways",
    ]
    for case in result["ops"]:
        floor = case["floor_ms"]
        lines += ["", f"## {case['op']}, {' '.join(f'{a}{n}' for a, n in zip(AXES[case['op']], case['shape'], strict=True))}", ""]
        lines += [f"Floor: forward {floor[0]:.3f} ms, both ways {sum(floor):.3f} ms.", ""]
        lines += ["| contestant | forward ms | of floor | both ms | of floor | error o | error gradient | peak MiB | compiles in s |"]
        lines += ["|---" * 9 + "|"]
        for row in case["rows"]:
            if "both_ms" not in row:
                lines.append(f"| {row['contestant']} | {row['note']} |" + " |" * 7)
                continue
            cells = [row["contestant"]]
            for way, least in (("forward_ms", floor[0]), ("both_ms", sum(floor))):
                cells += [f"{row[way]:.3f}", f"{least / row[way]:.0%}"]
            cells += [f"{row[e]:.1e}" if e in row else "–" for e in ("error_o", "error_gradient")]
            lines.append(f"| {' | '.join(cells)} | {row['peak_bytes'] / 2**20:.0f} | {row['compile_s']:.1f} |")
    lines += [
        "",
        "## Models in training",
        "",
        "| model | B × T | implementation | tokens/s | temporaries GiB | compiles in s |",
        "|---" * 6 + "|",
    ]
    for row in result["models"]:
        if "note" in row:
            lines.append(f"| {row['model']} | {row['batch']} × {row['length']:,} | {row['implementation']} | {row['note']} | – | – |")
            continue
        cells = [row["model"], f"{row['batch']} × {row['length']:,}", row["implementation"], f"{row['tokens_per_s']:,.0f}"]
        lines.append(f"| {' | '.join(cells)} | {row['temporary_bytes'] / 2**30:.1f} | {row['compile_s']:.0f} |")
    lines += ["", "## Decoding", "", f"Batch 1, greedy, {decoding.BLOCK} ids a call of the compiled loop.", ""]
    lines += ["| model | context | µs a token | traces for six calls |", "|---|---|---|---|"]
    lines += [f"| {row['model']} | {row['context']:,} | {row['us']:,.0f} | {row['traces']} |" for row in result["decode"]]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.jax", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=pathlib.Path, help="where to write, without extension: .json and .md are added")
    options = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        parser.error("JAX sees no GPU here")
    command = "python -m unisono_tools.bench.jax" + ("" if options.parts == list(PARTS) else f" --parts {' '.join(options.parts)}")
    about = report.about(command, jax.devices()[0].device_kind, "unisono", "jax", "flax", "jax-linear-attention")
    result: Row = {"run": about, "copy_bytes_per_s": copy_rate(), "ops": [], "models": [], "decode": []}

    def kept(part: str, row: Row) -> None:
        if row not in result[part]:
            result[part].append(row)
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            options.output.with_suffix(".md").write_text(markdown(result), encoding="utf-8")

    for part, op, shapes in zip(PARTS, AXES, (ATTENTION, SCALES, SCAN), strict=False):
        for shape in shapes if part in options.parts else ():
            for case in measure_op(op, shape, result["copy_bytes_per_s"], options.repeats):
                kept("ops", case)
    if "models" in options.parts:
        for name, batch, length, implementations in MODELS:
            for implementation in implementations:
                try:
                    kept("models", trained(name, batch, length, implementation, options.repeats))
                except (jax.errors.JaxRuntimeError, unisono_jax.InputError) as problem:  # out of memory; jla is not here
                    note = str(problem).splitlines()[0][:60]
                    kept("models", {"model": name, "batch": batch, "length": length, "implementation": implementation, "note": note})
    if "decode" in options.parts:
        for name in DECODED:
            for context in CONTEXTS:
                kept("decode", decoded(name, context))
    print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
