"""Tensors of a published checkpoint: one safetensors file, or several under an index, all of whose headers are checked first."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from unisono_spec.contract.base import DTYPES, Arrays
from unisono_spec.contract.errors import InputError, shown
from unisono_spec.contract.files import MAX_HEADER, Declared, read_header
from unisono_spec.contract.memory import check_fits
from unisono_spec.contract.plain import read_file, read_json
from unisono_spec.contract.published.places import Place
from unisono_spec.contract.published.plan import Plan

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")
MOST_SHARDS = 4096
RESTORE, TOGETHER = "restore it or download it again", "give config and weights of one model"


def read_tensors(place: Place, plan: Plan, config: str) -> Arrays:
    """The tensors that `plan` names, float16 and bfloat16 as float32; InputError where there are others, or of other shapes.

    config: what messages call the config that they follow from. A tied head is checked, and left out.
    """
    files = _files(place)
    declared: dict[str, tuple[Path, Declared]] = {}
    for path, names in files:
        found = _header(path)
        if names is not None and set(names) != found.keys():
            raise InputError(f"{path}: holds {_listed(found)}, {INDEX} says {_listed(names)}; {RESTORE}")
        for name, one in found.items():
            if name in declared:
                raise InputError(f"{path}: {shown(name)} is in {declared[name][0].name} too; {RESTORE}")
            declared[name] = path, one
    _check(place, plan, {name: one for name, (_, one) in declared.items()}, config)
    wide = sum(math.prod(one.shape) * max(4, DTYPES[one.dtype].itemsize) for _, one in declared.values())
    check_fits(wide, str(place), "use a smaller model")
    out: Arrays = {}
    for path, _ in files:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    held = file.get_tensor(name)
                    out[name] = held if held.dtype.itemsize >= 4 else held.astype(np.float32)
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            raise InputError(f"{path}: not a readable safetensors file ({error}); {RESTORE}") from error
    return _untied(place, plan, out)


def _files(place: Place) -> list[tuple[Path, list[str] | None]]:
    """Each file with weights, and which tensors its index says that it holds."""
    if (one := place.get(ONE)) is not None:
        return [(one, None)]
    index = place.get(INDEX)
    if index is None:
        if pickles := place.pickles():
            raise InputError(
                f"{place}: its weights are in {_listed(pickles)}, a pickle, which can run code and is not read; take a copy in safetensors "
                "(the hub's conversions are at revision refs/pr/N), or write one with safetensors.torch.save_file where you trust it"
            )
        raise InputError(
            f"{place}: holds no {ONE}, nor an {INDEX}{place.note}; pytorch_model.bin and the like are pickles and not read: give a "
            "revision with safetensors (the hub's conversions are at refs/pr/N), or another repository"
        )
    values = read_json(read_file(index, RESTORE, MAX_HEADER), str(index), RESTORE, MAX_HEADER)
    where = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise InputError(f"{index}: has no weight_map of tensors to files; {RESTORE}")
    held: dict[str, list[str]] = {}
    for tensor, name in where.items():
        held.setdefault(name, []).append(tensor)
    out = []
    for name, tensors in held.items():
        if not _SHARD.fullmatch(name) or len(out) == MOST_SHARDS:
            raise InputError(f"{index}: weight_map: {shown(name)} is no .safetensors file beside it; {RESTORE}")
        path = place.get(name)
        if path is None:
            raise InputError(f"{place}: {name} is missing, which {INDEX} names; {RESTORE}")
        out.append((path, tensors))
    return out


def _header(path: Path) -> dict[str, Declared]:
    try:
        return read_header(path)[1]
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable safetensors file ({error}); {RESTORE}") from error


def _check(place: Place, plan: Plan, declared: dict[str, Declared], config: str) -> None:
    """Every tensor that the config calls for, none besides, each of its shape and of floats."""
    known = set(declared)
    if plan.tied is not None and not known.isdisjoint(plan.tied):
        known |= set(plan.tied)
    missing = [name for name in plan.tensors if name not in known]
    unknown = [name for name in declared if name not in plan.tensors]
    if missing or unknown:
        said = "; ".join(f"{what}: {_listed(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names)
        raise InputError(f"{place}: not the tensors of {config} in {plan.naming}'s naming ({said}); {TOGETHER}")
    for name, one in declared.items():
        if one.shape != plan.tensors[name]:
            raise InputError(f"{place}: {name} has shape {one.shape}, {config} says {plan.tensors[name]}; {TOGETHER}")
        if one.dtype not in DTYPES:
            raise InputError(f"{place}: {name} is of {one.dtype}; give weights in one of {', '.join(DTYPES)}")


def _untied(place: Place, plan: Plan, tensors: Arrays) -> Arrays:
    """Without the head that is the embedding once more, under whichever of the two names the file has it."""
    if plan.tied is None or plan.tied[1] not in tensors:
        return tensors
    embedding, head = plan.tied
    tensors = {embedding: tensors[head], **tensors}
    if not np.array_equal(tensors[embedding], tensors[head]):
        raise InputError(
            f"{place}: {head} differs from {embedding}, though the config ties them; set tie_word_embeddings to false to keep both, or "
            "remove the one that is stale"
        )
    return {name: a for name, a in tensors.items() if name != head}


def _listed(names: Iterable[str], most: int = 4) -> str:
    known = sorted(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(name if name.isprintable() and len(name) < 80 else shown(name) for name in known[:most]) + more
