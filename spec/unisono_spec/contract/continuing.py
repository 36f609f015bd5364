"""A running state, and where its text stands: what one process or machine saves, another goes on from as if it had never stopped.

The file is a state file (contract/files.py), which every room reads. Its metadata hold one more text, `generation`, as JSON:
`unread`, ids that the state has not read yet; `n_generated`; `held`, the last ids whose text is not whole, such as half a character;
`temperature`, `top_k`, `top_p`, `repetition_penalty`, and with a penalty `seen`, the ids that the text holds; and `seed` as a text,
since 64 bits are more than JSON's numbers hold everywhere.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from unisono_spec.contract.base import Arrays, Config
from unisono_spec.contract.checks import check_ids
from unisono_spec.contract.errors import InputError, shown
from unisono_spec.contract.files import check_state, load_state, read_metadata, save_state
from unisono_spec.contract.generation import MOST
from unisono_spec.contract.plain import build, read_json
from unisono_spec.contract.sampling import Sampling

KEY = "generation"
REMEDY = "give a state that unisono saved, or leave out what it says beside its arrays"


@dataclasses.dataclass(frozen=True)
class Continuation:
    """state: `[1, …]`, after the prompt and every generated id but the `unread` ones. sampling None: the file does not say how."""

    state: Arrays
    unread: tuple[int, ...] = ()
    n_generated: int = 0
    held: tuple[int, ...] = ()
    sampling: Sampling | None = None
    seen: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class _Said:
    unread: tuple[int, ...]
    n_generated: int
    seed: str
    held: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seen: tuple[int, ...] | None = None


def save_continuation(path: str | Path, config: Config, found: Continuation) -> None:
    """Write a state of one sequence and where its text stands, whole or not at all."""
    sampling = found.sampling or Sampling()
    how = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")}
    said = _Said(found.unread, found.n_generated, str(sampling.seed), found.held, **how, seen=found.seen)
    check_state(config, found.state, batch=1, source=str(path))
    save_state(path, config, found.state, {KEY: json.dumps(dataclasses.asdict(said))})


def load_continuation(path: str | Path, config: Config) -> Continuation:
    """Read what `save_continuation` wrote, or a state alone, for a model of `config`.

    Raises InputError where the file is of another model, holds several sequences, or says what cannot be.
    """
    other, state = load_state(path)
    if other != config:
        raise InputError(f"{path}: a state of another model: {_difference(other, config)}; give a state of this one")
    rows = {len(array) for array in state.values()}
    if rows != {1}:
        raise InputError(f"{path}: a state of {max(rows)} sequences; a text is one: save one row of it")
    text = read_metadata(path).get(KEY)
    if text is None:
        return Continuation(state)
    try:
        said = build(_Said, read_json(text, KEY, REMEDY), "")
        sampling = Sampling(said.temperature, said.top_k, said.top_p, _seed(said.seed), said.repetition_penalty)
        if not 0 <= said.n_generated <= MOST:
            raise InputError(f"n_generated: {shown(said.n_generated)}; it counts ids, 0 to 2**32")
        for ids in (said.unread, said.held, said.seen or ()):
            check_ids(np.array(ids, np.int64), config.vocab_size)  # pyright: ignore[reportAttributeAccessIssue]
    except InputError as error:
        raise InputError(f"{path}: its {KEY} says {error}") from error
    return Continuation(state, said.unread, said.n_generated, said.held, sampling, said.seen)


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise InputError(f"seed: {shown(text)}; it is the digits of an integer from 0 to 2**64 - 1")
    return int(text)


def _difference(found: Config, wanted: Config) -> str:
    if found.arch != wanted.arch:
        return f"{found.arch}, not {wanted.arch}"
    old: Mapping[str, object] = found.to_dict()
    new: Mapping[str, object] = wanted.to_dict()
    name = next(name for name in new if old.get(name) != new[name])
    return f"{name} is {shown(old.get(name))} there and {shown(new[name])} here"
