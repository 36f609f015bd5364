"""`python -m unisono_conformance.plan [PAGE]`: the table of what is dear, printed or written into PAGE (docs/conformance.md)."""

from __future__ import annotations

import sys
from pathlib import Path

from unisono_spec.contract.errors import InputError
from unisono_spec.contract.files import write_bytes

from unisono_conformance.plan.savings import table

BEGIN, END = "<!-- plan: begin -->", "<!-- plan: end -->"


def written(text: str) -> str:
    """`text` with today's table between the marks. Raises InputError where there are none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"page: lacks {BEGIN} and {END}; put both where the table shall stand")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    if len(sys.argv) == 1:
        print(table())
        return 0
    page = Path(sys.argv[1])
    try:
        write_bytes(page, written(page.read_text("utf-8")).encode())
    except (OSError, InputError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
