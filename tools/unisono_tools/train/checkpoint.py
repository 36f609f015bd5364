"""Checkpoints: one folder a step, written under a temporary name, synced, and renamed, so that a half-written one is never seen.

checkpoints/step-00001000/model.safetensors      parameters; loads in every room
                          ema.safetensors        with --ema: averaged parameters, a model like the other, and what the run is evaluated by
                          optimizer.safetensors  AdamW's moments under contract names, the same for every backend
                          trainer.json           the run's config, step, best score, tokenizer, corpus, versions, threads
                          tokenizer.json         of a tokenizer that does not come with the tools
                          carried.safetensors    with data.order=streamed, the state that the next batch goes on from
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from unisono_spec.contract import Arrays, Config, InputError
from unisono_spec.contract.errors import shown
from unisono_spec.contract.files import (
    check_finite,
    load_arrays,
    load_params,
    load_state,
    save_arrays,
    save_params,
    save_state,
    write_bytes,
)
from unisono_spec.contract.plain import build, read_file, read_json

from unisono_tools.backends.base import check_moments, check_updates, steps_taken
from unisono_tools.config import TrainConfig, flatten, to_dict
from unisono_tools.data.tokenizers import DEFINITION, KNOWN, Tokenizer, tokenizer_beside

MODEL, EMA, OPTIMIZER, TRAINER = "model.safetensors", "ema.safetensors", "optimizer.safetensors", "trainer.json"
TOKENIZER = DEFINITION
CARRIED = "carried.safetensors"
FORMAT = 1  # of trainer.json
OPEN = ("train.model.overrides", "train.data.mixture", "train.data.task_options")  # names of their own
_STEP = re.compile(r"step-(\d{8,})")


class Damaged(InputError):
    """A checkpoint that cannot be continued from, though an older one may."""


@dataclasses.dataclass(frozen=True)
class Best:
    """The best validation so far: the step that had it, its loss, and the score of a task, of which more is better."""

    step: int
    loss: float
    score: float | None = None

    def beats(self, other: Best | None) -> bool:
        """A higher score; of equal ones, or without any, a lower loss."""
        return other is None or (-(self.score or 0.0), self.loss) < (-(other.score or 0.0), other.loss)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Everything that a run continues from."""

    step: int
    train: TrainConfig
    config: Config
    params: Arrays
    optimizer: Arrays
    best: Best | None
    tokenizer: Tokenizer | None
    threads: int
    corpus: str = ""  # the digest of what it was trained on
    carried: Arrays | None = None
    average: Arrays | None = None
    unjudged: bool = False  # a signal left out the evaluation that was due


def save(run: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into the run's folder, whole or not at all. A full disk is an InputError, and leaves the others as they are."""
    folder = run / "checkpoints"
    final = folder / f"step-{checkpoint.step:08d}"
    tokenizer = checkpoint.tokenizer
    temporary = folder / f".{final.name}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
        save_params(temporary / MODEL, checkpoint.config, checkpoint.params)
        if checkpoint.average is not None:
            save_params(temporary / EMA, checkpoint.config, checkpoint.average)
        save_arrays(temporary / OPTIMIZER, checkpoint.optimizer, checkpoint.config, "optimizer")
        if checkpoint.carried is not None:
            save_state(temporary / CARRIED, checkpoint.config, checkpoint.carried)
        about = {
            "format": FORMAT,
            "step": checkpoint.step,
            "train": to_dict(checkpoint.train),
            "best": None if checkpoint.best is None else dataclasses.asdict(checkpoint.best),
            "tokenizer": None if tokenizer is None else tokenizer.name,
            "corpus": checkpoint.corpus,
            "threads": checkpoint.threads,
            "unjudged": checkpoint.unjudged,
            "versions": versions(),
        }
        if tokenizer is not None and tokenizer.name not in KNOWN:
            write_bytes(temporary / TOKENIZER, tokenizer.definition.encode())
        write_bytes(temporary / TRAINER, json.dumps(about, indent=1).encode())
        sync(temporary)
        remove(final)
        os.rename(temporary, final)
        sync(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"{final}: cannot be written ({error.strerror}); free some space or choose another --out") from error
        raise
    return final


@dataclasses.dataclass(frozen=True)
class _About:
    """What trainer.json says."""

    step: int
    train: TrainConfig
    best: Best | None
    tokenizer: str | None
    threads: int
    versions: dict[str, Any]
    corpus: str = ""
    unjudged: bool = False
    format: int = FORMAT


def load(path: Path) -> Checkpoint:
    """Read a checkpoint's folder. Damaged where a file is missing, unreadable, not of this checkpoint, or holds NaN; InputError where
    another release wrote it."""
    about = _about(path / TRAINER)
    source = str(path / OPTIMIZER)
    try:
        config, params = load_params(path / MODEL)
        other, optimizer = load_arrays(path / OPTIMIZER, "optimizer", lambda config, declared: check_moments(config, declared, source))
        check_finite(optimizer, source)
        check_updates(optimizer, source)
        check_finite(params, str(path / MODEL))
        carried = _carried(path / CARRIED, config, about.train)
        tokenizer = None if about.tokenizer is None else saved_tokenizer(path / MODEL)
        averaged, average = load_params(path / EMA) if about.train.ema else (config, None)
        same = other == averaged == config == about.train.model.config() and about.step == steps_taken(optimizer)
    except InputError as error:
        raise Damaged(str(error)) from error
    if not same:
        raise Damaged(f"{path}: its files are not of one checkpoint; restore them or remove it to continue from the one before")
    read = (config, params, optimizer, about.best, tokenizer)
    return Checkpoint(about.step, about.train, *read, about.threads, about.corpus, carried, average, about.unjudged)


def _carried(path: Path, config: Config, train: TrainConfig) -> Arrays | None:
    if train.data.order != "streamed":
        return None
    other, state = load_state(path)
    if other != config or any(len(a) != train.batch_size for a in state.values()):
        raise InputError(f"{path}: is not of {train.batch_size} sequences of this run's model; restore it")
    return state


def _about(path: Path) -> _About:
    """Damaged where the file is; InputError where it is another release's, whose fields mean what this one does not know."""
    remedy = "restore it or remove this checkpoint"
    try:
        values = read_json(read_file(path, remedy), str(path), remedy)
        if not isinstance(values, dict):
            raise InputError(f"{path}: not a JSON object; {remedy}")
        _check_release(path, values)
        about = build(_About, values, "")
        best = about.best or Best(0, 0.0)
        if about.step < 0 or about.threads < 0 or not (math.isfinite(best.loss) and math.isfinite(best.score or 0)):
            raise InputError("its step, threads or best loss is no number that a run has")
        return about
    except _Foreign as error:
        raise InputError(str(error)) from error
    except InputError as error:
        raise Damaged(str(error) if str(path) in str(error) else f"{path}: {error}; {remedy}") from error


class _Foreign(InputError):
    pass


def _check_release(path: Path, values: dict[str, Any]) -> None:
    written = values.get("versions")
    writer = f"unisono {written.get('unisono', 'of another version')}" if isinstance(written, dict) else "another unisono"
    if values.get("format", FORMAT) != FORMAT:
        raise _Foreign(f"{path}: format {shown(values['format'])} of {writer}, this release reads {FORMAT}; install that release")
    train = values.get("train")
    known = {field.name for field in dataclasses.fields(_About)} | {f"train.{name}" for name in flatten(to_dict(TrainConfig()))}
    found = [*values, *(f"train.{name}" for name in flatten(train))] if isinstance(train, dict) else list(values)
    unknown = [name for name in found if name not in known and not name.startswith(OPEN)]
    if unknown:
        raise _Foreign(f"{path}: {unknown[0]!r} is no field that this release knows; {writer} wrote it, install another release to read it")


def newest(run: Path) -> tuple[Path, Checkpoint, list[str]] | None:
    """The newest checkpoint that is whole, and what is wrong with those after it. None without any; InputError where none is whole."""
    wrong: list[str] = []
    for path in reversed(steps(run).values()):
        try:
            return path, load(path), wrong
        except Damaged as error:
            wrong.append(str(error))
    if wrong:
        raise InputError(f"{run}: none of its checkpoints is whole: {wrong[0]}; restore one, or choose another --out")
    return None


def steps(run: Path) -> dict[int, Path]:
    """The run's complete checkpoints, oldest first."""
    folder = run / "checkpoints"
    found = {int(m[1]): p for p in folder.iterdir() if (m := _STEP.fullmatch(p.name))} if folder.is_dir() else {}
    return dict(sorted(found.items()))


def latest(run: Path) -> Path | None:
    found = steps(run)
    return found[max(found)] if found else None


def prune(run: Path, keep: int, best: Best | None, step: int) -> None:
    """Remove all but the best and the newest `keep` checkpoints up to `step`. Later ones are damaged, or the run had not gone back."""
    found = {number: path for number, path in steps(run).items() if number <= step}
    for number in list(found)[:-keep]:
        if best is None or number != best.step:
            remove(found[number])


def sweep(run: Path) -> None:
    """Remove what a killed run left half-written or half-removed."""
    folder = run / "checkpoints"
    for path in folder.glob(".step-*") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a folder by way of a name that is never read: no moment shows half of it."""
    if path.exists():
        hidden = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
        os.rename(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def model_file(path: Path) -> Path:
    """The model that a path means: itself, the one in a checkpoint's folder, or the one in a run's newest checkpoint. Of a run with --ema
    the averaged one, which its validation loss is of."""
    if path.is_file():
        return path
    folder = path if (path / MODEL).is_file() else latest(path)
    if folder is not None:
        return folder / (EMA if (folder / EMA).is_file() else MODEL)
    what = "holds no checkpoint" if path.is_dir() else "no such file or folder"
    raise InputError(f"{path}: {what}; give a run's folder, a checkpoint, a .safetensors or a .onnx file")


def training_of(model: Path) -> TrainConfig | None:
    """The run that made a model file; None where nothing beside it says so."""
    beside = model.with_name(TRAINER)
    return _about(beside).train if beside.is_file() else None


def tokenizer_of(model: Path) -> str | None:
    """The name of the tokenizer recorded beside a model file, or of the definition that lies there alone; None where neither does."""
    beside = model.with_name(TRAINER)
    return _about(beside).tokenizer if beside.is_file() else TOKENIZER if model.with_name(TOKENIZER).is_file() else None


def saved_tokenizer(model: Path, named: str | None = None) -> Tokenizer:
    """The tokenizer of a model file: what lies beside it, else what the file itself names, else bytes."""
    return tokenizer_beside(model, named or tokenizer_of(model) or "bytes")


def versions() -> dict[str, str]:
    """Versions of everything that decides the bits of a run."""
    found = {"python": platform.python_version()}
    for package in ("unisono", "numpy", "torch", "jax", "jaxlib", "flax", "optax", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def sync(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
