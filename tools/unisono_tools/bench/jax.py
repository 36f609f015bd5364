"""JAX on a GPU: ops beside their peers, models in training, and decoded tokens.

python -m unisono_tools.bench.jax --output docs/results/kernels-jax-h100      # writes .json and .md

A row is written as soon as it is there, and `--resume` measures those that are missing.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
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

from unisono_tools.bench import report
from unisono_tools.bench.jax_ops import OPS, contestants, exact, slopes

LONGEST_EXACT = 4096  # tokens: errors are measured up to here
MODELS = (  # batch, length, implementations
    ("mamba-130m", 8, 2048, ("jla", "pallas")),
    ("lat-base", 8, 2048, ("auto", "plain")),
    ("lat-base", 1, 16384, ("auto",)),
    ("s4d-base", 8, 2048, ("auto",)),
    ("maru", 8, 512, ("auto",)),
)
DECODED, CONTEXTS = ("lat-base", "mamba-130m", "transformer-base"), (1 << 10, 1 << 15)
PARTS = (*OPS, "models", "decode")
SETS, THREADS = 3, 16  # sets of inputs; programs that are compiled at a time
STEP, LATE = ("model", "batch", "length", "implementation"), "not compiled in time"
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


def error(found: jax.Array, true: np.ndarray) -> float:
    part = np.asarray(found[tuple(slice(n) for n in true.shape)].astype(jnp.float32), np.float64)
    return float(np.linalg.norm(part - true) / np.linalg.norm(true))


def built(run: Callable[..., jax.Array], do: Any, given: Any) -> tuple[Any, Any, float]:
    """Programs for values alone and with gradients, and how long they took."""
    begin = time.perf_counter()
    return jax.jit(run).lower(*given).compile(), jax.jit(slopes(run)).lower(do, *given).compile(), time.perf_counter() - begin


def given_to(op: str, shape: tuple[int, ...], seed: int = 0) -> tuple[jax.Array, Any]:
    """do, and what the op reads."""
    do = jax.random.normal(jax.random.key(9), shape[: OPS[op].axes_of_o]).astype(jnp.bfloat16)
    return do, OPS[op].inputs(shape, seed)


def sources(*names: str) -> str:
    """A digest of this room's files of these names and of all that they import here, or of all files, so that figures of two runs tell
    whether they are of the same."""
    folder, digest = pathlib.Path(unisono_jax.__path__[0]), hashlib.sha256()
    waiting = [path for path in folder.rglob("*.py") if not names or path.stem in names]
    found = set[pathlib.Path]()
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += imported(path, folder)
    for path in sorted(found):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def imported(path: pathlib.Path, folder: pathlib.Path) -> list[pathlib.Path]:
    """The modules of the package in `folder` that a file of it imports, inside functions too."""
    modules = set[str]()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
        elif isinstance(node, ast.Import):
            modules |= {each.name for each in node.names}
    paths = (folder.parent / f"{module.replace('.', '/')}.py" for module in modules if module.split(".")[0] == folder.name)
    return [path for path in paths if path.is_file()]


def begun(old: Row, run: dict[str, str]) -> Row:
    """What a run with the same versions on the same kind of device left, of the same sources; what was late is measured again."""
    for what in ("device", "versions"):
        if old["run"][what] != run[what]:
            raise SystemExit(f"--resume: {what} is {run[what]} here, there {old['run'][what]}; begin a new file")
    old["ops"] = [case for case in old["ops"] if case.get("sources") == sources(case["op"])]
    for case in old["ops"]:
        case["rows"] = [row for row in case["rows"] if row.get("note") != LATE]
    for part in ("models", "decode"):
        old[part] = [row for row in old[part] if row.get("sources") == sources() and row.get("note") != LATE]
    commands = dict.fromkeys([*old["run"]["command"].split("; "), run["command"]])
    return old | {"run": run | {"command": "; ".join(commands)}}


def prepared(pool: Executor, op: str, shape: tuple[int, ...], there: set[str]) -> dict[str, Future[Any]]:
    """Programs of all contestants that are not there yet, and the truth."""
    like = jax.eval_shape(lambda: given_to(op, shape))
    wanted = {name: run for name, run in contestants(op, shape).items() if name not in there}
    found: dict[str, Future[Any]] = {name: pool.submit(built, run, *like) for name, run in wanted.items()}
    if wanted and shape[1] <= LONGEST_EXACT:
        do, given = given_to(op, shape)
        found["truth"] = pool.submit(exact, op, given, do)
    return found


def measure_op(case: Row, ready: dict[str, Future[Any]], rate: float, repeats: int) -> Iterator[Row]:
    """The case with one more row each time."""
    op, shape = case["op"], tuple(case["shape"])
    do, _ = given_to(op, shape)
    sets = [OPS[op].inputs(shape, seed) for seed in range(SETS)]
    truth = ready.pop("truth", None)
    true = truth.result() if truth and truth.done() and not truth.cancelled() else ()
    ins = sum(a.nbytes for a in sets[0])
    case["floor_ms"] = [1e3 * (ins + do.nbytes) / rate, 1e3 * (2 * ins + do.nbytes) / rate]
    for name, programs in ready.items():
        row: Row = {"contestant": name}
        try:
            if programs.cancelled() or not programs.done():
                raise TimeoutError(LATE)
            forward, both, row["compile_s"] = programs.result()
            o, found = both(do, *sets[0])
            if true and "no normaliser" not in name:
                row["error_o"], row["error_gradient"] = error(o, true[0]), max(map(error, found, true[1:]))
            del o, found
            memory: Any = both.memory_analysis()
            row["peak_bytes"] = memory.temp_size_in_bytes + memory.output_size_in_bytes
            row["forward_ms"] = median_ms([lambda s=s, f=forward: f(*s) for s in sets], repeats)
            row["both_ms"] = median_ms([lambda s=s, f=both: f(do, *s) for s in sets], repeats)
        except Exception as problem:  # a peer that refuses the shape, or does not fit
            if name in ("plain", "pallas", "jla") and not isinstance(problem, TimeoutError):
                raise
            row["note"] = str(problem).splitlines()[0][:90]
        print({"op": op, "shape": shape, **row}, flush=True)
        case["rows"].append(row)
        yield case


def training(name: str, batch: int, length: int, implementation: str) -> tuple[Any, Any, Any, float]:
    """A compiled step: forward, cross-entropy, backward, AdamW; bfloat16, parameters in float32. Its parameters and tokens."""
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
    return run, (params, optimizer.init), tokens, time.perf_counter() - begin


def trained(name: str, batch: int, length: int, implementation: str, ready: Future[Any], steps: int) -> Row:
    run, (params, init), tokens, seconds = ready.result()
    row: Row = {"model": name, "batch": batch, "length": length, "implementation": implementation, "compile_s": seconds}
    state, times, losses = init(params), [], []
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
        lines += ["", f"## {case['op']}, {' '.join(f'{a}{n}' for a, n in zip(OPS[case['op']].axes, case['shape'], strict=True))}", ""]
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


def ready_op(pool: Executor, op: str, result: Row) -> list[tuple[Row, dict[str, Future[Any]]]]:
    """Of each shape the case, and programs for the rows that it has not yet."""
    cases = {tuple(case["shape"]): case for case in result["ops"] if case["op"] == op}
    ready = []
    for shape in OPS[op].shapes:
        case = cases.get(shape, {"op": op, "shape": shape, "sources": sources(op), "rows": []})
        ready.append((case, prepared(pool, op, shape, {row["contestant"] for row in case["rows"]})))
    return ready


def measure_ops(ready: list[tuple[Row, dict[str, Future[Any]]]], result: Row, repeats: int, keep: Callable[[], Any]) -> None:
    for made, programs in ready:
        for case in measure_op(made, programs, result["copy_bytes_per_s"], repeats) if programs else ():
            if case not in result["ops"]:
                result["ops"].append(case)
                result["ops"].sort(key=lambda case: (list(OPS).index(case["op"]), OPS[case["op"]].shapes.index(tuple(case["shape"]))))
            keep()


def ready_models(pool: Executor, result: Row) -> dict[tuple[str, int, int, str], Future[Any]]:
    there = [tuple(row[name] for name in STEP) for row in result["models"]]
    models = [each for each in ((*m[:3], how) for m in MODELS for how in m[3]) if each not in there]
    return {each: pool.submit(training, *each) for each in models}


def measure_models(ready: dict[tuple[str, int, int, str], Future[Any]], result: Row, repeats: int, keep: Callable[[], Any]) -> None:
    for each, steps in ready.items():
        try:
            if steps.cancelled() or not steps.done():
                raise TimeoutError(LATE)
            row = trained(*each, steps, repeats)
        except (jax.errors.JaxRuntimeError, unisono_jax.InputError, TimeoutError) as problem:  # out of memory; jla is not here
            row = {**dict(zip(STEP, each, strict=True)), "note": str(problem).splitlines()[0][:60]}
        result["models"].append(row | {"sources": sources()})
        keep()


def measure_decoding(result: Row, keep: Callable[[], Any]) -> None:
    there = [(row["model"], row["context"]) for row in result["decode"]]
    for each in ((name, context) for name in DECODED for context in CONTEXTS):
        if each not in there:
            result["decode"].append(decoded(*each) | {"sources": sources()})
            keep()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_tools.bench.jax", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--patience", type=float, default=300, help="seconds that all may compile, side by side (300)")
    parser.add_argument("--output", type=pathlib.Path, help="where to write, without extension: .json and .md are added")
    parser.add_argument("--resume", action="store_true", help="measure only what is missing in OUTPUT.json, or of other sources there")
    options = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        parser.error("JAX sees no GPU here")
    command = "python -m unisono_tools.bench.jax" + ("" if options.parts == list(PARTS) else f" --parts {' '.join(options.parts)}")
    about = report.about(command, jax.devices()[0].device_kind, "unisono", "jax", "flax", "jax-linear-attention")
    result: Row = {"run": about, "copy_bytes_per_s": copy_rate(), "ops": [], "models": [], "decode": []}
    there = options.output and options.output.with_suffix(".json")
    if options.resume and there and there.exists():
        result = begun(json.loads(there.read_text("utf-8")), about)

    def keep() -> None:
        report.keep(options.output, result, markdown(result))

    pool = ThreadPoolExecutor(THREADS)
    ops = [ready_op(pool, part, result) for part in options.parts if part in OPS]
    models = ready_models(pool, result) if "models" in options.parts else {}
    compiled = [each for cases in ops for _, programs in cases for each in programs.values()]
    wait([*compiled, *models.values()], options.patience)  # nothing is timed while anything compiles, but for what is late
    pool.shutdown(wait=False, cancel_futures=True)
    for ready in ops:
        measure_ops(ready, result, options.repeats, keep)
    measure_models(models, result, options.repeats, keep)
    if "decode" in options.parts:
        measure_decoding(result, keep)
    print(markdown(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
