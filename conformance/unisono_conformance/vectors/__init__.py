"""Reference vectors: small cases as safetensors files, for implementations in any language. README.md says how to read them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from unisono_spec.contract import config_to_dict
from unisono_spec.contract.errors import InputError
from unisono_spec.contract.files import write_bytes

from unisono_conformance.adapter import Target, load
from unisono_conformance.cases import cases
from unisono_conformance.cases.base import OpCase
from unisono_conformance.cases.draw import Draw
from unisono_conformance.judging import numerics
from unisono_conformance.judging.trial import Trial
from unisono_conformance.judging.truth import Slopes, slopes

FOLDER = Path(__file__).parent
MANIFEST = "manifest.json"
DTYPE = "float64"


PREFIX = {"params": "param", "inputs": "input", "state": "state"}


def draws() -> dict[str, Draw]:
    """What each vector is drawn from, by its file name: every config of CRAM and of the ops, the default ones of other models."""
    out = {}
    for case in cases().values():
        for variant in case.variants if case.level == "op" or case.in_full else case.defaults:
            out[f"{case.name.replace('/', '.')}.{variant}.safetensors"] = Draw(case.name, variant, length=6, seed=7)
    return out


def vector(draw: Draw, coordinates: bool = True) -> tuple[dict[str, np.ndarray], dict[str, str], Slopes]:
    """Arrays and metadata of one vector; its slopes, by coordinate or along random directions."""
    trial = Trial(Target(load("numpy"), DTYPE, "parallel"), draw, "vectors", "")
    case, inputs, random = trial.case, trial.running, draw.generator("marks")
    shape = (inputs.batch, inputs.length)
    inputs = inputs.replace(reset=random.random(shape) < 0.2, valid=random.random(shape) < 0.8)
    do, dstate = trial.cotangents(inputs)
    o, last = case.reference(trial.setting, inputs, "recurrent")
    arrays = {f"input.{n}": a for n, a in inputs.arrays.items()}
    arrays |= {f"param.{n}": a for n, a in inputs.params.items()} | {f"state.{n}": a for n, a in inputs.state.items()}
    arrays |= {"reset": inputs.reset, "valid": inputs.valid, "output": o} | {f"final.{n}": a for n, a in last.items()}  # pyright: ignore[reportAssignmentType]
    arrays |= {"cotangent.output": do} | {f"cotangent.final.{n}": a for n, a in dstate.items()}
    found = slopes(case, trial.setting, inputs, do, dstate, DTYPE, "coordinate" if coordinates else "map")
    setting = {**trial.setting, "op": case.op} if isinstance(case, OpCase) else config_to_dict(trial.setting)
    return arrays, {"format": "unisono-vector", "version": "1", "kind": case.level, "setting": json.dumps(setting)}, found


def encode(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, metadata)


def write(folder: Path = FOLDER) -> None:
    hashes = {}
    for name, draw in draws().items():
        arrays, metadata, found = vector(draw)
        for (group, array), (directions, slope, _) in found.items():
            arrays[f"gradient.{PREFIX[group]}.{array}"] = slope.reshape(directions[array].shape[1:])
        data = encode(arrays, metadata)
        write_bytes(folder / name, data)
        hashes[name] = hashlib.sha256(data).hexdigest()
    write_bytes(folder / MANIFEST, json.dumps(hashes, indent=1).encode() + b"\n")


def check(folder: Path = FOLDER) -> int:
    """Raise InputError where a file is not the manifest's, or is not what the spec says; returns how many were checked.

    Gradients were written by coordinate; they are checked along random directions, which takes a hundredth of the time.
    """
    from safetensors.numpy import load

    manifest = json.loads((folder / MANIFEST).read_text())
    found = {path.name for path in folder.glob("*.safetensors")}
    expected = draws()
    for name in sorted(found ^ set(manifest) | set(manifest) ^ set(expected)):
        raise InputError(f"{name}: not in all of the folder, the manifest and the cases; python -m unisono_conformance.vectors write")
    for name, digest in manifest.items():
        data = (folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise InputError(f"{name}: its hash is not the manifest's; restore the file")
    for name in manifest:
        _check_values(name, load((folder / name).read_bytes()), expected[name])
    return len(manifest)


def _check_values(name: str, arrays: dict[str, np.ndarray], draw: Draw) -> None:
    now, _, found = vector(draw, coordinates=False)
    wanted = {*now, *(f"gradient.{PREFIX[group]}.{array}" for (group, _), (directions, _, _) in found.items() for array in directions)}
    if set(arrays) != wanted:
        raise InputError(f"{name}: holds {sorted(set(arrays) ^ wanted)} or lacks it; python -m unisono_conformance.vectors write")

    def agree(what: str, is_: np.ndarray, was: np.ndarray, terms: float, size: int) -> None:
        # other machines' NumPy sums in another order
        budget = np.asarray(numerics.OTHER_MACHINE * numerics.formula(DTYPE, size, gradient=True) * terms)
        if numerics.share(was, is_.astype(np.float64), budget).max(initial=0) > 1:
            raise InputError(f"{name}: {what} is not what the spec says now; if the spec is right, write the vectors again")

    for key, a in now.items():
        agree(key, a, arrays[key], float(np.abs(a).max(initial=0)), a.size)
    for (group, _), (directions, slope, _) in found.items():
        along_each = {
            array: v.reshape(len(v), -1) * arrays[f"gradient.{PREFIX[group]}.{array}"].reshape(-1) for array, v in directions.items()
        }
        along, terms = (sum(f(products).sum(1) for products in along_each.values()) for f in (np.asarray, np.abs))
        size = sum(products.shape[1] for products in along_each.values())
        agree(f"gradient.{PREFIX[group]}.{', '.join(directions)}", np.asarray(slope), np.asarray(along), float(np.max(terms)), size)
