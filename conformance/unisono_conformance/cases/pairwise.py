"""Rows of config fields in which every pair of values of every two fields occurs (pairwise coverage)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def pairwise(fields: Mapping[str, Sequence[Any]], valid: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The fewest rows that a greedy choice finds. `valid` rejects combinations that the config rejects.

    The fields' lattices are small, so all rows are listed and the one that covers most pairs is taken, again and again.
    """
    rows = [row for values in itertools.product(*fields.values()) if valid(row := dict(zip(fields, values, strict=True)))]
    pairs = [set(itertools.combinations(sorted((name, repr(value)) for name, value in row.items()), 2)) for row in rows]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        chosen.append(rows[best])
    return chosen
