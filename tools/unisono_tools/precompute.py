"""ξ of a whole corpus, computed once: Algorithm 1 of the CRAM paper trains f_θ on minibatches of positions drawn from it.

A folder holds `xi.npy` [N, code] float32, `ids.npy` (what ξ was computed from, and the targets), and `manifest.json`, which holds the
checksums of both. All are written aside; the manifest goes before they are put in place and comes after: without it the folder is
unfinished.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from unisono_spec.contract import Config, InputError
from unisono_spec.contract.aside import aside, cannot_be_written
from unisono_spec.contract.checks import check_ids
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.errors import shown
from unisono_spec.contract.files import write_bytes
from unisono_spec.contract.memory import check_fits
from unisono_spec.contract.plain import build, is_file, read_file, read_json
from unisono_spec.ops.elementwise import binary_digits, sigmoid

from unisono_tools.data.batches import positions
from unisono_tools.data.stored import read_npy

VERSION = 2
AGAIN = "run `unisono precompute` again"
BLOCK = 64  # tokens summed by one matmul
Progress = Callable[[int, int], None]  # positions done, positions in all


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What ξ was made from, and the SHA-256 of the files."""

    format: str
    version: int
    code: dict[str, Any]
    ids_sha256: str
    documents_sha256: str
    length: int
    width: int
    dtype: str
    xi_file: str = ""
    ids_file: str = ""

    @property
    def source(self) -> Manifest:
        """Without the files."""
        return dataclasses.replace(self, xi_file="", ids_file="")


@dataclasses.dataclass(frozen=True)
class PrecomputedCorpus:
    """xi `[N, code]` float32 and ids `[N]` (frames `[N, F]`), in their files where they are large; manifest: what they were made from."""

    folder: Path
    xi: np.ndarray
    ids: np.ndarray
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path, config: Config | None = None, ids: np.ndarray | None = None) -> PrecomputedCorpus:
        """Open what `precompute` wrote. With `config` or `ids`: InputError unless it was made for them."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        for name, digest in (("xi.npy", manifest.xi_file), ("ids.npy", manifest.ids_file)):
            if _file_sha256(folder / name) != digest:
                raise InputError(f"{folder}: {name} is not what its manifest says, truncated or damaged; {AGAIN}")
        xi, own = (read_npy(folder / name, AGAIN) for name in ("xi.npy", "ids.npy"))
        if list(xi.shape) != [manifest.length, manifest.width] or len(own) != len(xi) or xi.dtype != np.float32:
            raise InputError(f"{folder}: {xi.shape} of {xi.dtype} is not what its manifest says; {AGAIN}")
        corpus = cls(folder, xi, own, manifest)
        corpus.check(config, ids)
        return corpus

    def check(self, config: Config | None = None, ids: np.ndarray | None = None) -> None:
        """Raise InputError unless ξ was made for a config that sums the same codes, and from these ids."""
        if config is not None:
            made, wanted = self.manifest.code, _code(config)
            for name, value in wanted.items():
                if made.get(name) != value:
                    raise InputError(
                        f"{self.folder}: made with {name}={made.get(name)!r}, the config says {value!r}; run `unisono precompute`"
                    )
        if ids is not None and _sha256(ids) != self.manifest.ids_sha256:
            raise InputError(f"{self.folder}: made from another text or tokenizer; {AGAIN}")

    def batch(self, seed: int, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Minibatch `step` of positions: ξ [N, code] float32 and what follows it, [N] int64 (frames [N, F] float32)."""
        at = positions(len(self.xi), seed, step, batch_size)
        targets = self.ids[at + 1]
        return self.xi[at], targets.astype(np.int64 if targets.ndim == 1 else np.float32)


def precompute(
    config: Config,
    ids: np.ndarray,
    out_dir: str | Path,
    chunk: int = 1 << 17,
    progress: Progress | None = None,
    documents: np.ndarray | None = None,
) -> PrecomputedCorpus:
    """Stream ξ of `ids` to `out_dir` in constant memory, and open it. What already stands there and fits is kept.

    ids: [N] integers, or frames [N, F]; what lies in a file may be larger than memory.
    chunk: positions computed at once; changes nothing but the memory used.
    documents: where documents start, sorted; ξ starts anew there.

    Raises InputError where ξ depends on trained parameters, where ids are outside the vocabulary, or where the disk is full.
    """
    code, out = _code(config), Path(out_dir)
    assert isinstance(config, CRAMConfig)
    if chunk < 1:
        raise InputError(f"chunk: {chunk}; use a positive number of positions")
    if len(ids) < 2:
        raise InputError(f"ids: {len(ids)} positions; ξ needs a token and one that follows it, give a longer text")
    starts = np.unique(np.append(np.zeros(1, np.int64), [] if documents is None else documents)).astype(np.int64)
    if starts[0] < 0 or starts[-1] >= len(ids):
        raise InputError(f"documents: start at {starts[0]} … {starts[-1]} of {len(ids)} ids; give offsets of the same ids")
    made_of = Manifest(
        format="unisono precomputed ξ",
        version=VERSION,
        code=code,
        ids_sha256=_sha256(ids),
        documents_sha256=hashlib.sha256(starts.tobytes()).hexdigest(),
        length=len(ids),
        width=config.code_size,
        dtype="float32",
    )
    with contextlib.suppress(InputError):  # not there, of something else, or damaged: made anew
        if read_manifest(out).source == made_of:
            return PrecomputedCorpus.open(out, config)
    xi_path, ids_path, record = out / "xi.npy", out / "ids.npy", out / "manifest.json"
    with cannot_be_written(out):
        out.mkdir(parents=True, exist_ok=True)
        with aside(xi_path) as xi_draft, aside(ids_path) as ids_draft:
            with xi_draft.open("wb") as xi_file, ids_draft.open("wb") as ids_file:
                # written, not mapped: a full disk is then an error, where a memory map would be killed
                xi_sum = _Summed(xi_file, (len(ids), config.code_size), np.dtype(np.float32))
                ids_sum = _Summed(ids_file, ids.shape, ids.dtype)
                for start, xi in _stream(config, ids, starts, chunk):
                    xi_sum.write(xi.astype(np.float32).tobytes())
                    ids_sum.write(np.ascontiguousarray(ids[start : start + len(xi)]).tobytes())
                    if progress is not None:
                        progress(start + len(xi), len(ids))
                for file in (xi_file, ids_file):
                    file.flush()
                    os.fsync(file.fileno())
            record.unlink(missing_ok=True)
            os.replace(xi_draft, xi_path)
            os.replace(ids_draft, ids_path)
    whole = dataclasses.replace(made_of, xi_file=xi_sum.digest.hexdigest(), ids_file=ids_sum.digest.hexdigest())
    write_bytes(record, json.dumps(dataclasses.asdict(whole), indent=1, ensure_ascii=False).encode())
    return PrecomputedCorpus.open(out, config)


def read_manifest(folder: Path) -> Manifest:
    """What a folder holds; InputError where it is unfinished, damaged, or of another version."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise InputError(f"{folder}: no finished ξ in this folder; {AGAIN}")
    values = read_json(read_file(path, AGAIN), f"{folder}: its manifest is unreadable", AGAIN)
    if isinstance(values, dict) and values.get("version") != VERSION:
        raise InputError(f"{folder}: version {shown(values.get('version'))}, this unisono reads {VERSION}; {AGAIN}")
    try:
        return build(Manifest, values, "")
    except InputError as error:
        raise InputError(f"{folder}: its manifest is unreadable ({error}); {AGAIN}") from error


class _Summed:
    """A .npy file that is written in pieces, with the checksum of all of it."""

    def __init__(self, file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.file, self.digest = file, hashlib.sha256()
        header = io.BytesIO()
        fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, fields)
        self.write(header.getvalue())

    def write(self, data: bytes) -> None:
        self.digest.update(data)
        self.file.write(data)


def _file_sha256(path: Path) -> str:
    if not is_file(path):
        raise InputError(f"{path}: truncated or missing (no such file); {AGAIN}")
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: truncated or missing ({error.strerror}); {AGAIN}") from error


def _code(config: Config) -> dict[str, Any]:
    """The fields of `config` that ξ depends on."""
    if not isinstance(config, CRAMConfig) or config.scheme != "fixed":
        scheme = f"scheme={config.scheme!r}" if isinstance(config, CRAMConfig) else f"arch={config.arch!r}"
        raise InputError(f"{scheme}: ξ depends on trained parameters and is not precomputable; train on sequences, or use scheme='fixed'")
    if config.codes == "embedding":
        raise InputError(
            "codes='embedding': ξ depends on a trained embedding and is not precomputable; train on sequences, or use codes='binary'"
        )
    size = (
        {"code_bits": config.code_bits, "vocab_size": config.vocab_size} if config.codes == "binary" else {"frame_size": config.frame_size}
    )
    return {"codes": config.codes, **size, "decay": config.decay}


def _stream(config: CRAMConfig, ids: np.ndarray, starts: np.ndarray, chunk: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first position, ξ [n, code] float64) over the corpus; the state is handed from chunk to chunk and cut where a document starts."""
    table = None
    if config.codes == "binary":
        check_fits(8 * config.vocab_size * config.code_bits, "codes of the vocabulary", "use a smaller vocab_size")
        table = sigmoid(binary_digits(np.arange(config.vocab_size), config.code_bits, np.dtype(np.float64)))  # [V, code]
    elif ids.ndim != 2 or ids.shape[1] != config.frame_size:
        raise InputError(f"frames: shape {ids.shape}, the config's frame_size is {config.frame_size}; give [T, {config.frame_size}]")
    state = np.zeros(config.code_size)
    for begin in range(0, len(ids), chunk):
        piece = np.asarray(ids[begin : begin + chunk])
        if table is not None:
            check_ids(piece, config.vocab_size)
        u = (1 - config.decay) * (sigmoid(piece.astype(np.float64)) if table is None else table[piece])
        inner = starts[np.searchsorted(starts, begin) : np.searchsorted(starts, begin + len(piece))] - begin
        bounds = np.unique([0, *inner, len(piece)])
        for a, b in itertools.pairwise(bounds):
            u[a:b] = _decayed_sums(u[a:b], config.decay, np.zeros_like(state) if a in inner else state)
            state = u[b - 1].copy()
        yield begin, u


def _decayed_sums(u: np.ndarray, decay: float, state: np.ndarray) -> np.ndarray:
    """Σ_{j≤t} λ^{t−j} u_j + λ^{t+1} state, for u [T, D]: a matmul in blocks, then the same sum over the blocks' last rows."""
    age = np.arange(BLOCK)[:, None] - np.arange(BLOCK)
    weight = np.where(age >= 0, decay ** np.maximum(age, 0).astype(np.float64), 0)  # [C, C]
    fade = decay ** np.arange(1, BLOCK + 1, dtype=np.float64)[:, None]  # [C, 1]
    if len(u) <= BLOCK:
        return weight[: len(u), : len(u)] @ u + fade[: len(u)] * state
    whole = len(u) // BLOCK * BLOCK
    y = weight @ u[:whole].reshape(-1, BLOCK, u.shape[1])  # [blocks, C, D]
    carry = np.concatenate([state[None], _decayed_sums(y[:, -1], decay**BLOCK, state)])  # [blocks + 1, D]
    y += fade * carry[:-1, None]
    tail = _decayed_sums(u[whole:], decay, carry[-1]) if whole < len(u) else u[:0]
    return np.concatenate([y.reshape(whole, -1), tail])


def _sha256(ids: np.ndarray) -> str:
    """Of the values, whatever integer dtype holds them."""
    digest = hashlib.sha256(str(ids.shape).encode())
    for start in range(0, len(ids), 1 << 20):
        digest.update(np.ascontiguousarray(ids[start : start + (1 << 20)], "<i8" if ids.ndim == 1 else "<f4").tobytes())
    return digest.hexdigest()
