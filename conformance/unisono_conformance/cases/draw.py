"""What an example is drawn from: a small lattice of shapes, a seed, and a regime. Never elements."""

from __future__ import annotations

import dataclasses
import json
import zlib

import numpy as np

FARTHEST = 2**30  # a position of a running sequence: every digit of its tables is met, and tokens are left before int32 ends


def far(position: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """`position` [B] with the last row's anywhere."""
    return np.append(position[:-1], random.integers(0, FARTHEST, len(position[-1:])))


@dataclasses.dataclass(frozen=True, order=True)
class Draw:
    """Everything that an example is made of, besides its dtype. As JSON it is the reproduction of a failure."""

    case: str
    variant: str
    regime: str = "tame"
    batch: int = 2
    length: int = 8
    chunk_size: int = 3
    seed: int = 0
    given: str = ""  # which arguments, where the property varies them

    def generator(self, purpose: str) -> np.random.Generator:
        """A stream of its own for each purpose, so that asking for one array never moves another."""
        words = (self.case, self.variant, self.regime, self.batch, self.length, purpose)
        return np.random.Generator(np.random.Philox(key=[self.seed, zlib.crc32(repr(words).encode())]))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Draw:
        return cls(**json.loads(text))
