"""The status tables of the README and of docs/status.md, from the reports that `python -m nox -s tests` leaves in build/reports.

python .ci/status.py build/reports
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from unisono_spec.contract import ARCHITECTURES
from unisono_spec.contract.errors import InputError
from unisono_spec.contract.files import write_bytes

ROOMS = {"spec": "NumPy", "jax": "JAX", "torch": "PyTorch", "torch-triton": "Triton", "onnx": "ONNX"}  # by the report's file
BEGIN, END = "<!-- status: begin -->", "<!-- status: end -->"
Lines = list[dict[str, Any]]


def read(folder: Path) -> dict[str, Lines]:
    """The lines of every room's report. Raises InputError where one is missing or was not made in full."""
    out = {}
    for room in ROOMS:
        path = folder / f"{room}.json"
        if not path.is_file():
            raise InputError(f"{path}: no such report; run python -m nox -s tests")
        report = json.loads(path.read_text("utf-8"))
        if report["unmet"] or report["profile"] == "dev":
            raise InputError(f"{path}: not the whole judgement ({report['profile']}, unmet: {report['unmet']}); run python -m nox -s tests")
        if any(line["outcome"] == "died" for line in report["lines"]):
            raise InputError(f"{path}: not the whole judgement, it ended within an item or still goes on; run python -m nox -s tests")
        out[room] = report["lines"]
    return out


def rooms_table(found: dict[str, Lines]) -> str:
    """Architecture × room: examples, and the worst share of the error budget."""
    rows = [[f"`{arch}`", *(_cell([line for line in lines if line["arch"] == arch]) for lines in found.values())] for arch in ARCHITECTURES]
    return _markdown(["", *ROOMS.values()], rows)


def properties_table(found: dict[str, Lines]) -> str:
    """Property × architecture: in which rooms it holds."""
    every = [line for lines in found.values() for line in lines]
    titles = {line["property"]: line["title"] for line in every}
    labels = sorted(titles, key=lambda p: (int("".join(c for c in p if c.isdigit())), p))

    def rooms(arch: str, label: str) -> str:
        return " ".join(name[0] for room, name in ROOMS.items() if _holds(found[room], arch, label)) or "·"

    rows = [[label, titles[label], *(rooms(arch, label) for arch in ARCHITECTURES)] for label in labels]
    return _markdown(["", "property", *(f"`{arch}`" for arch in ARCHITECTURES)], rows)


def _holds(lines: Lines, arch: str, label: str) -> bool:
    mine = [line for line in lines if line["arch"] == arch and line["property"] == label]
    return bool(mine) and all(line["outcome"] == "passed" for line in mine)


def _cell(lines: Lines) -> str:
    if not lines:
        return "·"
    failed = sum(line["outcome"] != "passed" for line in lines)
    if failed:
        return f"{failed} of {len(lines)} fail"
    return f"{sum(line['examples'] for line in lines)} examples, {max(line['worst'] for line in lines):.0%}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def between(text: str, table: str, path: Path) -> str:
    """`text` with `table` between the markers. Raises InputError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"{path}: lacks {BEGIN} and {END}; put both where the table shall stand")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python .ci/status.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reports", type=Path)
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--page", type=Path, default=Path("docs/status.md"))
    options = parser.parse_args()
    try:
        found = read(options.reports)
        for path, table in ((options.readme, rooms_table(found)), (options.page, properties_table(found))):
            write_bytes(path, between(path.read_text("utf-8"), table, path).encode())
    except InputError as error:
        print(f"status: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
