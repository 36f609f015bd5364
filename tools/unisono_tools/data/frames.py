"""Recordings: frames of grey values, fetched or from a file."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from unisono_spec.contract import InputError, nearest
from unisono_spec.contract.aside import written
from unisono_spec.contract.plain import expanded

from unisono_tools.data import registry
from unisono_tools.data.cache import locked
from unisono_tools.data.stored import read_npy

SETS = tuple(name for name, entry in registry.SETS.items() if entry.kind == "frames")


@functools.lru_cache(maxsize=4)
def reduced(dataset: str, side: int, cache: Path) -> np.ndarray:
    """[T, side, side] float32: each pixel the mean of a square of the recording's. Smoothed in space alone."""
    array = _recording(dataset, cache)
    time, high, wide = array.shape
    if high != wide or high % side:
        raise InputError(f"data.task_options.side: {side}; the recording has {high} × {wide} pixels, use a divisor of a square one's side")
    step = high // side
    return array.reshape(time, side, step, side, step).mean((2, 4), dtype=np.float64).astype(np.float32)


def _recording(dataset: str, cache: Path) -> np.ndarray:
    """Frames [T, H, W]."""
    path = expanded(dataset)
    if dataset in SETS:
        (film,) = registry.fetch(dataset, cache)
        path = film.with_suffix(".npy")
        with locked(path):
            if not path.is_file():
                array = _tiff(film)
                with written(path) as file:
                    np.save(file, array)
    elif path.suffix != ".npy" or not path.is_file():
        raise InputError(f"data.task_options.dataset: {dataset!r} is neither a .npy file nor a known recording; {nearest(dataset, SETS)}")
    array = np.asarray(read_npy(path, "write frames [T, H, W] with numpy.save, without objects")[:])
    if array.ndim != 3 or array.dtype.kind not in "fiub" or not array.size:
        raise InputError(f"{path}: shape {array.shape} of {array.dtype}; frames are numbers [T, H, W], so reshape them and save again")
    if not np.isfinite(array).all():
        raise InputError(f"{path}: holds NaN or infinite values; replace them before training")
    return array


def _tiff(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as film:
        out = np.empty((getattr(film, "n_frames", 1), film.height, film.width), np.uint16)
        for i, frame in enumerate(out):
            film.seek(i)
            frame[:] = np.asarray(film)
    return out
