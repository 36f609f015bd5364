"""Whether the budgets hold on other machines: other orders of summation, thread counts and instruction sets than this one's.

    python -m unisono_conformance.machines --impl torch jax onnx numpy [--arch cram] [--profile dev] [--out FOLDER]

A library that is told to use an older instruction set adds, multiplies and rounds as it does on an older processor. Each setting runs the
court in a process of its own, and says the worst share of a budget that it took. `orders` needs no implementation: the spec in float32,
its sums over features and tokens in random orders.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from unisono_spec import create
from unisono_spec.contract.files import write_bytes
from unisono_spec.ops import elementwise

from unisono_conformance.cases import cases
from unisono_conformance.cases.base import ModelCase
from unisono_conformance.cases.draw import Draw
from unisono_conformance.judging import numerics, truth
from unisono_conformance.judging.patches import Patch, patched

DTYPE = "float32"
ORDERS = 16  # random orders of each config
CHUNKS = (1, 2, 3, 5, 8, 64)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Environment variables, and the implementations whose arithmetic they change."""

    variables: dict[str, str]
    impls: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.variables.items()) or "as it is"


SETTINGS = (
    Setting({}, ("numpy", "torch", "jax", "onnx")),
    *(Setting({"OPENBLAS_CORETYPE": core}, ("numpy", "onnx")) for core in ("Prescott", "Haswell", "SkylakeX", "Zen")),
    Setting({"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512_SKX"}, ("numpy", "onnx")),
    *(Setting({"ATEN_CPU_CAPABILITY": name}, ("torch",)) for name in ("default", "avx2")),
    *(Setting({"MKL_ENABLE_INSTRUCTIONS": name}, ("torch",)) for name in ("SSE4_2", "AVX2")),
    Setting({"MKL_CBWR": "COMPATIBLE"}, ("torch",)),
    *(Setting({"ONEDNN_MAX_CPU_ISA": name}, ("torch",)) for name in ("SSE41", "AVX2")),
    *(Setting({"XLA_FLAGS": f"--xla_cpu_max_isa={name}"}, ("jax",)) for name in ("SSE4_2", "AVX2")),
    *(Setting(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "3"), (impl,)) for impl in ("torch", "numpy")),
)


def orders(arch: str | None = None) -> Iterator[tuple[str, float]]:
    """Of each default config: the worst share over ORDERS random orders of summation."""
    for case in cases().values():
        if not isinstance(case, ModelCase) or arch not in (None, case.arch):
            continue
        for variant in case.defaults:
            draw = Draw(case.name, variant, batch=3, length=24, seed=1)
            setting, inputs = case.setting(draw), case.inputs(draw, DTYPE)
            (logits, budget), state = truth.expected(case, setting, inputs, DTYPE)
            random, worst = np.random.default_rng(0), 0.0
            for i in range(ORDERS):
                with patched(_reordered(random)):
                    model = create(setting, inputs.params, dtype=DTYPE)
                    form, chunk = ("recurrent", 64) if i == 0 else ("parallel", CHUNKS[i % len(CHUNKS)])
                    o, last = model.forward(inputs.arrays["tokens"], inputs.state, form=form, chunk_size=chunk)
                worst = max(worst, float(numerics.share(o, logits, budget).max()))
                worst = max([worst, *(float(numerics.share(last[n], a, limit).max(initial=0)) for n, (a, limit) in state.items())])
            yield f"{case.name} {variant}", worst


def _reordered(random: np.random.Generator) -> tuple[Patch, ...]:
    """The spec's sums over features, in another order at each call."""
    linear, layer_norm, rms_norm, softmax = elementwise.linear, elementwise.layer_norm, elementwise.rms_norm, elementwise.softmax

    def shuffled_linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        width = weight.shape[1]
        at = random.permutation(width)
        groups = [group for group in np.split(at, sorted(random.integers(0, width + 1, 2))) if group.size]
        y = sum(linear(x[..., group], weight[:, group]) for group in groups) if groups else linear(x, weight)
        return np.asarray(y if bias is None else y + bias)

    def shuffled(function: Any) -> Any:
        def over_features(x: np.ndarray, *weights: Any) -> np.ndarray:
            at = random.permutation(x.shape[-1])
            return function(x[..., at], *(w[at] if isinstance(w, np.ndarray) else w for w in weights))[..., np.argsort(at)]

        return over_features

    instead = {
        "linear": (linear, shuffled_linear),
        **{f.__name__: (f, shuffled(f)) for f in (layer_norm, rms_norm, softmax)},
    }
    modules = [module for name, module in sys.modules.items() if name.startswith("unisono_spec.")]
    return tuple((module, name, new) for module in modules for name, (old, new) in instead.items() if getattr(module, name, None) is old)


def judged(setting: Setting, impl: str, options: argparse.Namespace, folder: Path) -> tuple[float, str, int, int]:
    """The worst share, where it is, how many lines of the judgement failed, and of how many."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    variables = {**os.environ, **setting.variables}
    if "XLA_FLAGS" in setting.variables:
        variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {setting.variables['XLA_FLAGS']}"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "unisono_conformance.plugin", "--pyargs", "unisono_conformance",
        "--impl", impl, "--profile", options.profile, "--report", str(report), "--truth", str(folder / "truth"),
        *(["--arch", options.arch] if options.arch else []), *(["--dtype", options.dtype] if options.dtype else []),
    ]  # fmt: skip
    run = subprocess.run(command, env=variables, capture_output=True, text=True)
    if not report.is_file():
        return float("nan"), run.stdout[-300:] + run.stderr[-300:], 1, 0
    lines = json.loads(report.read_text())["lines"]
    worst = max(lines, key=lambda line: line["worst"])
    where = " ".join(str(worst[name]) for name in ("property", "case", "dtype", "form") if name in worst)
    return worst["worst"], where, sum(line["outcome"] == "failed" for line in lines), len(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_conformance.machines", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--impl", nargs="*", default=[], choices=("numpy", "torch", "jax", "onnx"))
    parser.add_argument("--arch")
    parser.add_argument("--dtype")
    parser.add_argument("--profile", default="dev")
    parser.add_argument("--only", default="", help="settings that contain this text")
    parser.add_argument("--out", type=Path, default=Path("build/machines"))
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, NumPy {np.__version__}\n")
    print("| what | setting | worst share | where | failed |\n|---|---|---|---|---|")

    def add(what: str, setting: str, share: float, where: str = "", failed: int = 0, of: int = ORDERS) -> None:
        rows.append({"what": what, "setting": setting, "share": share, "where": where, "failed": failed, "of": of})
        print(f"| {what} | {setting} | {share:.0%} | {where} | {failed} of {of} |", flush=True)

    for name, share in orders(options.arch):
        add("spec in float32", "sums in random orders", share, name, int(share > 1))
    with tempfile.TemporaryDirectory() as folder:
        for impl in options.impl:
            for setting in (s for s in SETTINGS if impl in s.impls and options.only in str(s)):
                add(impl, str(setting), *judged(setting, impl, options, Path(folder)))
    write_bytes(options.out / "machines.json", json.dumps(rows, indent=1).encode())
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
