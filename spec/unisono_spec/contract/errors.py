"""The one error that means "the input was wrong", whichever room notices it."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input. The message names the field, the value found and the remedy."""


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def shown(value: object, length: int = 60) -> str:
    """`value` as a message shows it: short, on one line, whatever it is."""
    try:
        text = " ".join(_short.repr(value).split())
    except (RecursionError, ValueError):  # integers of thousands of digits have no repr
        return f"a {type(value).__name__}"
    return text if len(text) <= length else f"{text[: length - 1]}…"


def nearest(word: object, valid: Iterable[str]) -> str:
    """A remedy for a misspelt `word`: the nearest valid name first, then all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(word if isinstance(word, str) else shown(word), names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Valid: {', '.join(names) or 'none'}"
