"""One sequence read by four implementations, each in a process and an environment of its own: P17 through files.

    python -m unisono_conformance.handover jax FOLDER          reads the first quarter
    python -m unisono_conformance.handover torch FOLDER        the second; and exports the graphs
    python -m unisono_conformance.handover onnxruntime FOLDER  the third, from the graphs
    python -m unisono_conformance.handover check FOLDER        the spec reads the last, and compares everything

Needs neither pytest nor hypothesis. FOLDER holds a model file a case, and a safetensors file of logits and of state a step.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from unisono_spec import create
from unisono_spec.contract.errors import InputError
from unisono_spec.contract.files import load_arrays, load_params, load_state, save_arrays, save_params, save_state

from unisono_conformance.adapter import Arrays, load
from unisono_conformance.cases import cases
from unisono_conformance.cases.base import Case, ModelCase
from unisono_conformance.cases.draw import Draw
from unisono_conformance.cases.inputs import Inputs
from unisono_conformance.judging import truth
from unisono_conformance.judging.numerics import share

STEPS = ("jax", "torch", "onnxruntime", "check")
LENGTH = 24  # of the sequence that the steps share
DTYPE = "float32"


def relay() -> dict[str, tuple[Case, Draw, Inputs]]:
    """Models of every architecture, with resets and with padding, by the name of their files."""
    out = {}
    for case in cases().values():
        for variant in (case.handed_over or case.defaults[-1:]) if isinstance(case, ModelCase) else ():
            draw = Draw(case.name, variant, batch=3, length=LENGTH, seed=1)
            inputs = case.inputs(draw, DTYPE)
            random, shape = draw.generator("marks"), (draw.batch, draw.length)
            marked = inputs.replace(reset=random.random(shape) < 0.1, valid=random.random(shape) < 0.8)
            out[f"{case.name}-{variant}"] = (case, draw, marked)
    return out


def run(step: str, folder: Path) -> int:
    if step == STEPS[0]:
        shutil.rmtree(folder, ignore_errors=True)
    at = STEPS.index(step)
    worst = 0.0
    for name, (case, draw, inputs) in relay().items():
        setting = case.setting(draw)
        if at == 0:
            save_params(folder / f"{name}.safetensors", setting, inputs.params)
            state = inputs.state
        else:
            state = load_state(_need(folder / f"{name}.{STEPS[at - 1]}.state.safetensors"))[1]
        part = inputs.part(at * LENGTH // len(STEPS), (at + 1) * LENGTH // len(STEPS), state)
        logits, last = _read(step, folder, name, part)
        save_arrays(folder / f"{name}.{step}.logits.safetensors", {"logits": logits}, setting, "logits")
        save_state(folder / f"{name}.{step}.state.safetensors", setting, last)
        if step == STEPS[-1]:
            worst = max(worst, _compare(folder, name, case, setting, inputs, last))
    verdict = f"; worst share of the budget {worst:.0%}" if worst else ""
    print(f"handover: {step} has read its quarter of {len(relay())} sequences{verdict}")
    return int(worst > 1)


def _read(step: str, folder: Path, name: str, part: Inputs) -> tuple[np.ndarray, Arrays]:
    """Parameters come from the model file that the first step wrote, or from the graph that was exported from it."""
    read = (part.arrays["tokens"], part.state, part.reset, part.valid)
    if step == "onnxruntime":
        from unisono_conformance.adapters.onnx import open_graph

        return open_graph(_need(folder / f"{name}.onnx")).forward(*read)
    config, params = load_params(_need(folder / f"{name}.safetensors"))
    if step == "check":
        return create(config, params, dtype=DTYPE).forward(*read)
    model: Any = load(step).build(config, params, DTYPE, "cpu", "plain")
    if step == "torch":
        from unisono_conformance.adapters.torch import export

        export(model, folder / f"{name}.onnx")
    return model.forward(*read)


def _compare(folder: Path, name: str, case: Case, setting: object, inputs: Inputs, last: Arrays) -> float:
    """The worst share of the budget, over all logits of valid tokens and the final state."""
    (o, budget), state = truth.expected(case, setting, inputs, DTYPE)
    found = np.concatenate([load_arrays(_need(folder / f"{name}.{s}.logits.safetensors"), "logits")[1]["logits"] for s in STEPS], 1)
    assert inputs.valid is not None
    ratio = np.where(inputs.valid[..., None], share(found, o, budget), 0)
    quarters = np.split(ratio, len(STEPS), 1)
    print(f"  {name:<20}" + "  ".join(f"{s} {q.max():.0%}" for s, q in zip(STEPS, quarters, strict=True)))
    return max([float(ratio.max()), *(float(share(last[n], true, b).max()) for n, (true, b) in state.items())])


def _need(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such file; run the steps in order: {', '.join(STEPS)}")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_conformance.handover", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    try:
        return run(options.step, options.folder)
    except InputError as error:
        print(f"handover: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
