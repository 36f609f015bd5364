"""ξ of a whole corpus, computed once: Algorithm 1 of the CRAM paper trains f_θ on minibatches of positions drawn from it.

A folder holds `xi.npy` [N, code] float32, `ids.npy` (what ξ was computed from, and the targets), and `manifest.json`, which is written
last: without it the folder is unfinished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from unisono_spec.contract import Config, InputError
from unisono_spec.contract.checks import check_ids
from unisono_spec.contract.cram import CRAMConfig
from unisono_spec.contract.files import write_bytes
from unisono_spec.ops.elementwise import binary_digits, sigmoid

from unisono_tools.data.batches import positions

VERSION = 1
BLOCK = 64  # tokens summed by one matmul
Progress = Callable[[int, int], None]  # positions done, positions in all


@dataclasses.dataclass(frozen=True)
class PrecomputedCorpus:
    """xi `[N, code]` float32 and ids `[N]` (frames `[N, F]`), both memory maps; manifest: what they were made from."""

    folder: Path
    xi: np.ndarray
    ids: np.ndarray
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path, config: Config | None = None, ids: np.ndarray | None = None) -> PrecomputedCorpus:
        """Open what `precompute` wrote. With `config` or `ids`: InputError unless it was made for them."""
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
        except FileNotFoundError as error:
            raise InputError(f"{folder}: no finished ξ in this folder; run `unisono precompute` again") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: its manifest is unreadable ({error}); run `unisono precompute` again") from error
        if manifest.get("version") != VERSION:
            raise InputError(f"{folder}: version {manifest.get('version')!r}, this unisono reads {VERSION}; run `unisono precompute` again")
        try:
            xi, own = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("xi", "ids"))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: truncated or missing ({error}); run `unisono precompute` again") from error
        if list(xi.shape) != [manifest["length"], manifest["width"]] or len(own) != len(xi) or xi.dtype != manifest["dtype"]:
            raise InputError(f"{folder}: {xi.shape} of {xi.dtype} is not what its manifest says; run `unisono precompute` again")
        corpus = cls(folder, xi, own, manifest)
        corpus.check(config, ids)
        return corpus

    def check(self, config: Config | None = None, ids: np.ndarray | None = None) -> None:
        """Raise InputError unless ξ was made for a config that sums the same codes, and from these ids."""
        if config is not None:
            made, wanted = self.manifest["code"], _code(config)
            for name, value in wanted.items():
                if made.get(name) != value:
                    raise InputError(
                        f"{self.folder}: made with {name}={made.get(name)!r}, the config says {value!r}; run `unisono precompute`"
                    )
        if ids is not None and _sha256(ids) != self.manifest["ids_sha256"]:
            raise InputError(f"{self.folder}: made from another text or tokenizer; run `unisono precompute` again")

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

    ids: [N] integers, or frames [N, F]; a memory map may be larger than memory.
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
    manifest = {
        "format": "unisono precomputed ξ",
        "version": VERSION,
        "code": code,
        "ids_sha256": _sha256(ids),
        "documents_sha256": hashlib.sha256(starts.tobytes()).hexdigest(),
        "length": len(ids),
        "width": config.code_size,
        "dtype": "float32",
    }
    record = out / "manifest.json"
    if record.is_file() and record.read_text() == _text(manifest):
        return PrecomputedCorpus.open(out, config)
    try:
        out.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        with (out / "xi.npy").open("wb") as xi_file, (out / "ids.npy").open("wb") as ids_file:
            # written, not mapped: a full disk is then an error, where a memory map would be killed
            _header(xi_file, (len(ids), config.code_size), np.dtype(np.float32))
            _header(ids_file, ids.shape, ids.dtype)
            for start, xi in _stream(config, ids, starts, chunk):
                xi_file.write(xi.astype(np.float32).tobytes())
                ids_file.write(np.ascontiguousarray(ids[start : start + len(xi)]).tobytes())
                if progress is not None:
                    progress(start + len(xi), len(ids))
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror}); free some space or choose another folder") from error
    write_bytes(record, _text(manifest).encode())
    return PrecomputedCorpus.open(out, config)


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
        table = sigmoid(binary_digits(np.arange(config.vocab_size), config.code_bits, np.dtype(np.float64)))  # [V, code]
    elif ids.ndim != 2 or ids.shape[1] != config.frame_size:
        raise InputError(f"frames: shape {ids.shape}, the config's frame_size is {config.frame_size}; give [T, {config.frame_size}]")
    state = np.zeros(config.code_size)
    for begin in range(0, len(ids), chunk):
        part = np.asarray(ids[begin : begin + chunk])
        if table is not None:
            check_ids(part, config.vocab_size)
        u = (1 - config.decay) * (sigmoid(part.astype(np.float64)) if table is None else table[part])
        inner = starts[np.searchsorted(starts, begin) : np.searchsorted(starts, begin + len(part))] - begin
        bounds = np.unique([0, *inner, len(part)])
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


def _header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})


def _text(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False)
