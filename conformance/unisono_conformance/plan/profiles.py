"""How much is tried."""

from __future__ import annotations

import dataclasses

from unisono_spec.contract.errors import InputError, nearest


@dataclasses.dataclass(frozen=True)
class Profile:
    """pairs: every dtype with every form, for every property. others: how often each property tries each config beside the defaults: under
    no dtype and form, under one of each, or under all. exhaustive: nothing is too dear (`savings`)."""

    name: str
    pairs: bool
    others: str  # "none", "once", "all"
    regimes: int  # regimes a default config is tried under, in turn; the others get one
    random: int  # examples that hypothesis adds
    long_length: int  # of P10
    exhaustive: bool = False
    derandomize: bool = True


# dev: while writing. ci: sized for the time budget of `nox -s tests`. deep: as long as it likes. meta: what sabotages must not survive.
PROFILES = {
    "dev": Profile("dev", pairs=False, others="none", regimes=2, random=0, long_length=2_000),
    "ci": Profile("ci", pairs=False, others="once", regimes=2, random=1, long_length=100_000),
    "deep": Profile("deep", pairs=True, others="all", regimes=99, random=60, long_length=1_000_000, exhaustive=True, derandomize=False),
    "meta": Profile("meta", pairs=True, others="none", regimes=99, random=0, long_length=300),
}


def profile(name: str) -> Profile:
    if name not in PROFILES:
        raise InputError(f"profile: {name!r} is unknown; {nearest(name, PROFILES)}")
    return PROFILES[name]
