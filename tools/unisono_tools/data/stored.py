"""Arrays in files, read and never mapped: a file that shrinks under a memory map kills its reader, where a read can say so.

What takes less than a share of the memory is read whole, once; it is an array like any other. More stays in its file.
"""

from __future__ import annotations

import itertools
import math
import os
import tokenize
from pathlib import Path
from typing import Any

import numpy as np
from unisono_spec.contract import InputError
from unisono_spec.contract.memory import memory

SHARE = 8  # of the memory, the part that one file may take
HEADER_ERRORS = (tokenize.TokenError, ValueError, TypeError, EOFError, SyntaxError, RecursionError, MemoryError, OverflowError)


class _Descriptor:
    """An open file, for as long as anything reads it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Stored:
    """An array `[N, …]` in a file. A slice is another of these; everything else that is asked for is read then."""

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> None:
        self.path, self.dtype, self.shape, self.offset = path, dtype, shape, offset
        self.file = _Descriptor(path)
        self.seen = self._stamp()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._part(start, max(start, stop)) if step == 1 else np.asarray(self)[index]
        if isinstance(index, tuple):
            return np.asarray(self[index[0]])[(slice(None), *index[1:])] if isinstance(index[0], slice) else np.asarray(self)[index]
        rows = np.asarray(index)
        if rows.dtype.kind not in "iu":
            return np.asarray(self)[index]
        flat, out = rows.reshape(-1), np.empty((rows.size, *self.shape[1:]), self.dtype)
        if rows.size and not (flat.min() >= -len(self) and flat.max() < len(self)):
            raise IndexError(f"row {flat.max()} of {len(self)}")
        flat = flat % max(1, len(self))
        # one read for each run of neighbours, as minibatches of sequences ask for
        bounds = [0, *(np.flatnonzero(np.diff(flat) != 1) + 1), rows.size] if rows.size else [0]
        for a, b in itertools.pairwise(bounds):
            out[a:b] = self._read(int(flat[a]), int(flat[b - 1]) + 1)
        return out.reshape((*rows.shape, *self.shape[1:]))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._read(0, len(self)).astype(self.dtype if dtype is None else dtype, copy=False)

    def astype(self, dtype: Any, copy: bool = True) -> Any:
        return self if not copy and np.dtype(dtype) == self.dtype else np.asarray(self).astype(dtype)

    def tobytes(self) -> bytes:
        return np.asarray(self).tobytes()

    def _part(self, start: int, stop: int) -> Stored:
        out = object.__new__(Stored)
        out.path, out.dtype, out.file, out.seen = self.path, self.dtype, self.file, self.seen
        out.shape, out.offset = (stop - start, *self.shape[1:]), self.offset + start * self.row
        return out

    def _read(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        view, at = out.reshape(-1).view(np.uint8).data, self.offset + start * self.row
        try:
            while view and (number := os.preadv(self.file.number, [view], at)):
                view, at = view[number:], at + number
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror}); restore it and run again") from error
        if view or self._stamp() != self.seen:
            raise InputError(f"{self.path}: changed while it was read; leave it alone, and run again")
        return out

    def _stamp(self) -> tuple[int, int]:
        found = os.fstat(self.file.number)
        return found.st_size, found.st_mtime_ns


def stored(path: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int = 0) -> Any:
    """The array that starts at byte `offset` of a file: read whole where that takes little of the memory."""
    try:
        found = Stored(path, dtype, shape, offset)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    return np.asarray(found) if found.size * dtype.itemsize <= memory() // SHARE else found


def read_npy(path: Path, remedy: str) -> Any:
    """The array in a .npy file of numbers; InputError, which ends in `remedy`, where it is not whole, or not such a file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; {remedy}")
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
            if reader is None:
                raise ValueError(f"version {version}")
            shape, fortran, dtype = reader(file)
            offset, size = file.tell(), path.stat().st_size
        if dtype.kind not in "fiub" or fortran or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{shape} of {dtype}{' by columns' if fortran else ''}")
        if math.prod(shape) * dtype.itemsize != size - offset:
            raise ValueError(f"truncated or too long: {size - offset} bytes for {shape} of {dtype}")
    except HEADER_ERRORS as error:
        raise InputError(f"{path}: not a .npy file that is read here ({' '.join(str(error).split())[:200]}); {remedy}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    return stored(path, dtype, shape, offset)
