"""The court: properties that an implementation of an architecture must have, judged against the NumPy spec.

It knows no framework. `docs/conformance.md` lists the properties, derives the tolerances, and shows how to have your own
implementation judged: `judge_op` does so for one function. A room's own tests compare by `judge` and `tails`, and by what `numerics`
derives.
"""

from unisono_conformance.hearing import Verdict, judge_op
from unisono_conformance.judging import judge, numerics, tails

__all__ = ["Verdict", "judge", "judge_op", "numerics", "tails"]
