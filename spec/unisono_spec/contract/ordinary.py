"""Arrays of NumPy's that compute by rules of their own, which no room takes."""

from __future__ import annotations

import numpy as np

from unisono_spec.contract.errors import InputError


def check_ordinary(name: str, array: object) -> None:
    """Raise InputError on a masked array, whose mask would be ignored, and on a matrix, in which a third axis damages memory."""
    if isinstance(array, (np.ma.MaskedArray, np.matrix)):
        kind = type(array).__name__
        raise InputError(f"{name}: a {kind}, which computes by rules of its own; give np.asarray of it, and what is masked by valid")
