"""`python -m unisono_conformance.vectors write | check`"""

from __future__ import annotations

import sys

from unisono_spec.contract.errors import InputError

from unisono_conformance.vectors import FOLDER, check, write
from unisono_conformance.vectors.sampling import check_sampling, write_sampling


def main() -> int:
    verb = sys.argv[1] if len(sys.argv) == 2 else ""
    if verb not in ("write", "check"):
        print("usage: python -m unisono_conformance.vectors write | check", file=sys.stderr)
        return 2
    try:
        if verb == "write":
            write()
            write_sampling(FOLDER)
        print(f"{check()} vectors and {check_sampling(FOLDER)} choices of tokens are what the manifest and the spec say")
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
