"""The committed figures and tables, made again from the committed numbers: `python -m unisono_tools.experiments.redraw docs/results`"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unisono_tools.bench import linear, report
from unisono_tools.experiments import compare

NUMBERS = "sha256 of its numbers"
Content = dict[str, Any]


def _points(content: Content) -> list[linear.Point]:
    return [linear.Point(**point) for point in content["points"]]


# by the name of the file of numbers
FIGURES: dict[str, Callable[[Content, Path], object]] = {
    "compare-1m": compare.plot,
    "kernels-h100": report.plot,
    "linear-cpu": lambda content, path: linear.plot(path, _points(content)),
}
TABLES: dict[str, Callable[[Content], str]] = {
    "kernels-h100": report.markdown,
    "linear-cpu": lambda content: linear.markdown(content["run"], _points(content)),
}


def main(folder: Path, out: Path | None = None) -> list[Path]:
    """Write each figure and table beside its numbers, or into `out`; returns the files."""
    out, written = out or folder, []
    for name, draw in FIGURES.items():
        path, numbers = out / f"{name}.png", (folder / f"{name}.json").read_bytes()
        draw(json.loads(numbers), path)
        _mark(path, numbers)
        written.append(path)
    for name, table in TABLES.items():
        path = out / f"{name}.md"
        path.write_text(table(json.loads((folder / f"{name}.json").read_bytes())), encoding="utf-8")
        written.append(path)
    return written


def _mark(path: Path, numbers: bytes) -> None:
    """Write into the picture which numbers it shows."""
    with Image.open(path) as image:
        said = PngInfo()
        said.add_text(NUMBERS, hashlib.sha256(numbers).hexdigest())
        image.save(path, pnginfo=said, optimize=True)


def shown(path: Path) -> str | None:
    """The digest of the numbers that a picture shows."""
    with Image.open(path) as image:
        return image.info.get(NUMBERS)


if __name__ == "__main__":
    print(*main(*map(Path, sys.argv[1:3])), sep="\n")
