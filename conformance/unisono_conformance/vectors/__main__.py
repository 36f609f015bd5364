"""`python -m unisono_conformance.vectors write | check`"""

from __future__ import annotations

import sys

from unisono_spec.contract.errors import InputError

from unisono_conformance.vectors import check, write


def main() -> int:
    verb = sys.argv[1] if len(sys.argv) == 2 else ""
    if verb not in ("write", "check"):
        print("usage: python -m unisono_conformance.vectors write | check", file=sys.stderr)
        return 2
    try:
        if verb == "write":
            write()
        print(f"{check()} vectors are what the manifest and the spec say")
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
