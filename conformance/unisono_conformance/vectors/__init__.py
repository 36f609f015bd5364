"""Reference vectors: small cases as safetensors files, for implementations in any language. README.md says how to read them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from unisono_spec.contract import config_to_dict
from unisono_spec.contract.errors import InputError
from unisono_spec.contract.files import write_bytes

from unisono_conformance import numerics
from unisono_conformance.cases import cases
from unisono_conformance.cases.base import ModelCase, OpCase
from unisono_conformance.cases.draw import Draw
from unisono_conformance.trial import Bench, Trial
from unisono_conformance.truth import slopes

FOLDER = Path(__file__).parent
MANIFEST = "manifest.json"
DTYPE = "float64"


def vectors() -> dict[str, tuple[dict[str, np.ndarray], dict[str, str]]]:
    """Every vector by its file name: arrays, and metadata."""
    out = {}
    for case in cases().values():
        for variant in case.variants:
            draw = Draw(case.name, variant, length=6, seed=7)
            kind = "model" if isinstance(case, ModelCase) else "op"
            out[f"{case.name.replace('/', '.')}.{variant}.safetensors"] = _vector(draw, kind)
    return out


def _vector(draw: Draw, kind: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    trial = Trial(Bench(None, DTYPE, "parallel"), draw, "vectors", "")  # pyright: ignore[reportArgumentType]
    case, inputs, random = trial.case, trial.running, draw.generator("marks")
    shape = (inputs.batch, inputs.length)
    inputs = inputs.replace(reset=random.random(shape) < 0.2, valid=random.random(shape) < 0.8)
    do, dstate = trial.cotangents(inputs)
    o, last = case.reference(trial.setting, inputs, "recurrent")
    arrays = {f"input.{n}": a for n, a in inputs.arrays.items()}
    arrays |= {f"param.{n}": a for n, a in inputs.params.items()} | {f"state.{n}": a for n, a in inputs.state.items()}
    arrays |= {"reset": inputs.reset, "valid": inputs.valid, "output": o} | {f"final.{n}": a for n, a in last.items()}  # pyright: ignore[reportAssignmentType]
    arrays |= {"cotangent.output": do} | {f"cotangent.final.{n}": a for n, a in dstate.items()}
    prefix = {"params": "param", "inputs": "input", "state": "state"}
    for (group, name), (directions, slope, _) in slopes(case, trial.setting, inputs, do, dstate, DTYPE, True).items():
        arrays[f"gradient.{prefix[group]}.{name}"] = slope.reshape(directions[name].shape[1:])
    setting = config_to_dict(trial.setting) if kind == "model" else {**trial.setting, "op": case.op if isinstance(case, OpCase) else ""}
    return arrays, {"format": "unisono-vector", "version": "1", "kind": kind, "setting": json.dumps(setting)}


def encode(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, metadata)


def write(folder: Path = FOLDER) -> None:
    hashes = {}
    for name, (arrays, metadata) in vectors().items():
        data = encode(arrays, metadata)
        write_bytes(folder / name, data)
        hashes[name] = hashlib.sha256(data).hexdigest()
    write_bytes(folder / MANIFEST, json.dumps(hashes, indent=1).encode() + b"\n")


def check(folder: Path = FOLDER) -> int:
    """Raise InputError where a file is not the manifest's, or is not what the spec says; returns how many were checked."""
    from safetensors.numpy import load

    manifest = json.loads((folder / MANIFEST).read_text())
    found = {path.name for path in folder.glob("*.safetensors")}
    expected = vectors()
    for name in sorted(found ^ set(manifest) | set(manifest) ^ set(expected)):
        raise InputError(f"{name}: not in all of the folder, the manifest and the cases; python -m unisono_conformance.vectors write")
    for name, digest in manifest.items():
        data = (folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise InputError(f"{name}: its hash is not the manifest's; restore the file")
        arrays, (now, _) = load(data), expected[name]
        for key, a in now.items():
            # other machines' NumPy sums in another order
            budget = numerics.OTHER_MACHINE * numerics.formula(DTYPE, a.size, gradient=True) * np.abs(a).max(initial=0)
            if key not in arrays or numerics.share(arrays[key], a.astype(np.float64), np.asarray(budget)).max(initial=0) > 1:
                raise InputError(f"{name}: {key} is not what the spec says now; if the spec is right, write the vectors again")
    return len(manifest)
