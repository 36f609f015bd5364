"""The one error that means "the input was wrong", whichever room notices it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input. The message names the field, the value found and the remedy."""


def nearest(word: object, valid: Iterable[str]) -> str:
    """A remedy for a misspelt `word`: the nearest valid name first, then all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Valid: {', '.join(names) or 'none'}"
