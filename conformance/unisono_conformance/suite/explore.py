"""The planned draws of an item as explicit examples, and more like them from hypothesis."""

from __future__ import annotations

import hypothesis
from hypothesis import strategies as st

from unisono_conformance.cases.draw import Draw
from unisono_conformance.plan import Item, Profile, draws, lattice, regimes, variants
from unisono_conformance.report.ledger import Ledger, judge_one


def strategy(item: Item, profile: Profile) -> st.SearchStrategy[Draw]:
    """Any config, regime and seed, on the property's small lattice of shapes: elements are never drawn."""
    case = item.case
    # in ci, configs that the planned draws do not have would each cost a compilation
    names = sorted(variants(item) if item.prop.rows and profile.exhaustive else case.defaults)
    return st.builds(
        lambda variant, regime, shape, seed: Draw(case.name, variant, regime, shape[0], shape[1], shape[2], seed),
        st.sampled_from(names),
        st.sampled_from(regimes(item)),
        st.sampled_from(lattice(item, profile)),
        st.integers(1, 2**16),
    )


def explore(item: Item, profile: Profile, ledger: Ledger) -> None:
    """Raises Disagreement at the first draw that fails; a planned one if any does."""

    def judged(draw: Draw) -> None:
        judge_one(item, draw, ledger)

    more = item.share.random
    phases = [hypothesis.Phase.explicit, *([hypothesis.Phase.generate, hypothesis.Phase.shrink] if more else [])]
    test = hypothesis.given(draw=strategy(item, profile))(judged)
    for draw in reversed(draws(item, profile)):
        test = hypothesis.example(draw=draw)(test)
    test = hypothesis.settings(
        max_examples=max(more, 1), derandomize=profile.derandomize, database=None, deadline=None, phases=phases,
        report_multiple_bugs=False, suppress_health_check=tuple(hypothesis.HealthCheck),  # pyright: ignore[reportArgumentType]
    )(test)  # fmt: skip
    test()
