"""The court: properties that an implementation of an architecture must have, judged against the NumPy spec.

It knows no framework. `docs/conformance.md` lists the properties, derives the tolerances, and shows how to have your own
implementation judged. A room's own tests compare by `judge` and `tails`, and by what `numerics` derives.
"""

from unisono_conformance.judging import judge, numerics, tails

__all__ = ["judge", "numerics", "tails"]
