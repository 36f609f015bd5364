"""What one call reads: sequences, the state before them, and marks; sliced along time and batch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """`arrays` are [B, T, …] (a model's tokens; an op's x, s), `state` [B, …], reset and valid [B, T].

    params: a model's parameters; an op's arguments that all tokens share. dropout, noise: what training multiplies and adds, [B, T, …]
    each. state_given: whether a model is handed the state, or is to begin
    with its own, which `state` then is.
    """

    arrays: Arrays
    state: Arrays
    reset: np.ndarray | None = None
    valid: np.ndarray | None = None
    params: Arrays = dataclasses.field(default_factory=dict)
    dropout: tuple[np.ndarray, ...] | None = None
    noise: tuple[np.ndarray, ...] | None = None
    state_given: bool = True

    @property
    def batch(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def length(self) -> int:
        return next(iter(self.arrays.values())).shape[1]

    def replace(self, **changes: object) -> Inputs:
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]

    def part(self, start: int, stop: int, state: Arrays | None = None) -> Inputs:
        """Tokens start…stop−1, from `state` (default: this one's)."""
        return self._map(lambda a: a[:, start:stop], state=self.state if state is None else state)

    def times(self, index: Sequence[int]) -> Inputs:
        """The tokens at `index`, in that order."""
        return self._map(lambda a: a[:, list(index)], state=self.state)

    def rows(self, index: Sequence[int]) -> Inputs:
        """The batch rows at `index`."""
        pick = list(index)
        return self._map(lambda a: a[pick], state={name: a[pick] for name, a in self.state.items()})

    def absolute(self) -> Inputs:
        """Of an op: |arrays| from |state|."""
        return self.replace(
            arrays={name: np.abs(a) for name, a in self.arrays.items()}, state={name: np.abs(a) for name, a in self.state.items()}
        )

    def forgetting(self) -> Inputs:
        """With a state of NaN in rows whose first token is reset, which nothing may depend on; counters stay."""
        if self.reset is None:
            return self
        first = self.reset[:, 0]
        nan = {name: np.where(first.reshape(-1, *(1,) * (a.ndim - 1)), np.array(np.nan, a.dtype), a) for name, a in self.floats.items()}
        return self.replace(state={**self.state, **nan})

    @property
    def floats(self) -> Arrays:
        """Of the state."""
        return {name: a for name, a in self.state.items() if a.dtype.kind not in "iub"}

    def unmarked(self) -> Inputs:
        return self.replace(reset=None, valid=None)

    def _map(self, f, state: Arrays) -> Inputs:
        return self.replace(
            arrays={name: f(a) for name, a in self.arrays.items()},
            state=state,
            reset=None if self.reset is None else f(self.reset),
            valid=None if self.valid is None else f(self.valid),
            dropout=None if self.dropout is None else tuple(f(m) for m in self.dropout),
            noise=None if self.noise is None else tuple(f(m) for m in self.noise),
        )

    def key(self) -> bytes:
        """A digest of every value, for remembering what the spec says."""
        digest = hashlib.sha256(b"" if self.state_given else b"no state")
        for group in (self.arrays, self.state, self.params, {"reset": self.reset, "valid": self.valid}):
            for name, a in sorted(group.items()):
                digest.update(f"{name} {None if a is None else (a.shape, a.dtype)}".encode())
                digest.update(b"" if a is None else np.ascontiguousarray(a).tobytes())
        for drawn in (self.dropout, self.noise):
            digest.update(str(drawn and len(drawn)).encode() + b"".join(a.tobytes() for a in drawn or ()))
        return digest.digest()


def stack(rows: Sequence[Inputs]) -> Inputs:
    """One batch of several inputs of one length, with the parameters of the first."""
    first = rows[0]

    def joined(pick):
        return None if pick(first) is None else np.concatenate([pick(r) for r in rows])

    return first.replace(
        arrays={name: np.concatenate([r.arrays[name] for r in rows]) for name in first.arrays},
        state={name: np.concatenate([r.state[name] for r in rows]) for name in first.state},
        reset=joined(lambda r: r.reset),
        valid=joined(lambda r: r.valid),
        dropout=first.dropout and tuple(np.concatenate(masks) for masks in zip(*(r.dropout or () for r in rows), strict=True)),
        noise=first.noise and tuple(np.concatenate(drawn) for drawn in zip(*(r.noise or () for r in rows), strict=True)),
    )
