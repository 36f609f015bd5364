"""What the spec said, kept between runs: most of the court's time is the spec's, and every implementation is asked for the same numbers.

One SQLite file, which several runs may read and write at once. Its name is a digest of the court's and the spec's code and of the
versions of NumPy and ml_dtypes, so that answers do not outlive what gave them. A file that cannot be read or written costs time only.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import sqlite3
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy
import unisono_spec
from unisono_spec.contract import InputError

Arrays = dict[str, np.ndarray]


class Store:
    """Named arrays by key, in `folder`. Answers of other code that lie there are deleted. Raises InputError where it cannot write."""

    def __init__(self, folder: Path) -> None:
        name = f"truth-{_code()}.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("truth-*.sqlite*"):
                if not old.name.startswith(name):
                    old.unlink(missing_ok=True)
            # a run may wait for another's write; answers can be had again, so nothing is forced to the disk
            self._rows = sqlite3.connect(folder / name, timeout=60, isolation_level=None)
            with contextlib.suppress(sqlite3.OperationalError):  # another run is just doing so
                self._rows.execute("PRAGMA journal_mode = WAL")
            self._rows.execute("PRAGMA synchronous = OFF")
            self._rows.execute("CREATE TABLE IF NOT EXISTS truth (key BLOB PRIMARY KEY, arrays BLOB)")
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"truth: {folder} cannot keep what the spec says ({error}); choose another folder") from error

    def ask(self, key: bytes, answer: Callable[[], Arrays]) -> Arrays:
        """The arrays under `key`; where there are none, those of `answer`, which are kept."""
        with contextlib.suppress(sqlite3.Error):
            row = self._rows.execute("SELECT arrays FROM truth WHERE key = ?", (key,)).fetchone()
            if row is not None:
                return safetensors.numpy.load(row[0])
        arrays = {name: np.asarray(a, order="C") for name, a in answer().items()}
        with contextlib.suppress(sqlite3.Error):
            self._rows.execute("INSERT OR IGNORE INTO truth VALUES (?, ?)", (key, safetensors.numpy.save(arrays)))
        return arrays

    def close(self) -> None:
        self._rows.close()


def _code() -> str:
    digest = hashlib.sha256(f"{np.__version__} {ml_dtypes.__version__} {platform.machine()}".encode())
    for root in (Path(str(unisono_spec.__file__)).parent, Path(__file__).parents[1]):
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
