"""One property on one draw, as a failure message asks for: `python -m unisono_conformance.replay --impl … --property … --draw …`."""

from __future__ import annotations

import argparse

from unisono_spec.contract.errors import InputError

from unisono_conformance import adapter, plan
from unisono_conformance.adapter import Target
from unisono_conformance.cases.draw import Draw
from unisono_conformance.judging.judge import Disagreement
from unisono_conformance.judging.trial import Died
from unisono_conformance.properties import find


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m unisono_conformance.replay", description=__doc__)
    for name, default in (("impl", None), ("property", None), ("draw", None), ("dtype", None), ("form", None), ("device", "cpu")):
        parser.add_argument(f"--{name}", required=default is None, default=default)
    parser.add_argument("--implementation", default="plain")
    parser.add_argument("--profile", default="ci")
    options = parser.parse_args()
    try:
        exhaustive = plan.profile(options.profile).exhaustive
        how = (options.dtype, options.form, options.device, options.implementation)
        target = Target(adapter.load(options.impl), *how, exhaustive=exhaustive, impl=options.impl)
        trial = find(options.property).judge(target, Draw.from_json(options.draw))
    except (InputError, Disagreement, Died) as error:
        print(error)
        return 2 if isinstance(error, InputError) else 1
    print(f"{options.property} holds here; the worst error took {trial.worst:.0%} of its budget")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
