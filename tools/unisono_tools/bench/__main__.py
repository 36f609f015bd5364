"""python -m unisono_tools.bench --device cuda --output docs/results/kernels"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import pathlib

from unisono_tools.bench import report
from unisono_tools.bench.cases import SUITES

PEERS = ("eager", "compile", "accelerated-scan", "jax")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="unisono bench", description="Time kernels against their peers and the hardware's floor.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--suite", choices=sorted(SUITES), help="default: cram on a GPU, small on a CPU")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=10, help="rounds over the input sets")
    parser.add_argument("--output", type=pathlib.Path, help="where to write, without extension: .json, .md and .png are added")
    options = parser.parse_args(argv)
    report.ready(parser, options.output)

    import torch

    from unisono_tools.bench.cram import run_case, time_accelerated
    from unisono_tools.bench.measure import ceilings

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; use --device cpu")
    suite = options.suite or ("cram" if options.device == "cuda" else "small")
    cases = [case for case in SUITES[suite] if options.only in case.name]
    if not cases:
        parser.error(f"--only {options.only!r}: no such case in {suite}; there are: {'; '.join(case.name for case in SUITES[suite])}")
    command = f"python -m unisono_tools.bench --device {options.device} --suite {suite} --repeats {options.repeats}"
    result = {
        "run": report.about(
            command + (f" --only '{options.only}'" if options.only else "") + f" --peers {' '.join(options.peers)}",
            torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} thread(s)",
            *("unisono", "torch", "triton", "jax", "accelerated-scan"),
        ),
        "ceilings": ceilings(options.device),
        "cases": [],
    }
    rate = result["ceilings"]["copy_bytes_per_s"]
    for case in cases:
        rows = run_case(case, options.device, options.repeats, set(options.peers))
        floors = [moved / rate * 1e3 for moved in case.floor_bytes()]
        made = {"name": case.name, **dataclasses.asdict(case), "floor_ms": floors, "rows": [dataclasses.asdict(row) for row in rows]}
        result["cases"].append(made)
        print(report.markdown({**result, "cases": [made]}).split("\n\n", 2)[2], flush=True)
        if options.output:
            report.write(result, options.output)
    if "accelerated-scan" in options.peers and options.device == "cuda" and importlib.util.find_spec("accelerated_scan"):
        # last, since an illegal access in a peer would end this process's use of the GPU
        for case, made in zip(cases, result["cases"], strict=True):
            if case.dtype == case.out_dtype and case.length & (case.length - 1) == 0 and case.length <= 65536:
                made["rows"].append(dataclasses.asdict(time_accelerated(case, options.device, options.repeats, rate)))
                torch.cuda.empty_cache()
        print(report.markdown(result))
        if options.output:
            report.write(result, options.output)
    if not options.output:
        print(json.dumps(result["ceilings"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
