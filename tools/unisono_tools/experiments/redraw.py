"""The committed figures and tables, made again from the committed numbers: `python -m unisono_tools.experiments.redraw docs/results`"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unisono_spec.contract import InputError

from unisono_tools.bench import linear, report
from unisono_tools.cli import guarded
from unisono_tools.experiments import clip, compare, drawn, figures, scales, task_page

Content = dict[str, Any]


def _points(content: Content) -> list[linear.Point]:
    return [linear.Point(**point) for point in content["points"]]


def _attention(content: Content, path: Path) -> None:
    from unisono_tools.bench import attention  # which needs torch

    attention.plot(path, content)


def _attention_page(content: Content) -> str:
    from unisono_tools.bench import attention

    plotted = any(not case["tabled"] for case in content["cases"])
    gpu = "h100" if "H100" in content["run"]["device"] else "h200"
    return attention.markdown(content, f"kernels-attention-lengths-{gpu}.png" if plotted else "")


def _models(content: Content, path: Path) -> None:
    from unisono_tools.bench import models

    models.plot(path, content["training"])


def _models_page(picture: str) -> Callable[[Content], str]:
    def page(content: Content) -> str:
        from unisono_tools.bench import models

        return models.markdown(content, picture)

    return page


def _lengths_page(content: Content) -> str:
    from unisono_tools.bench import lengths

    return lengths.markdown(content)


def _lat_page(content: Content) -> str:
    from unisono_tools.bench import lat

    return lat.markdown(content)


def _lengths(content: Content, path: Path) -> None:
    from unisono_tools.bench import lengths

    lengths.plot(path, content)


# by the name of the file of numbers
FIGURES: dict[str, Callable[[Content, Path], object]] = {
    "compare-1m": compare.plot,
    "compare-1m-seeds": compare.plot,
    "kernels-attention-lengths-h100": _attention,
    "kernels-attention-lengths-h200": _attention,
    "kernels-h100": report.plot,
    "linear-1m-cpu": lambda content, path: linear.plot(path, _points(content)),
    "linear-cpu": lambda content, path: linear.plot(path, _points(content)),
    "lengths-h200": _lengths,
    "models-h100": _models,
    "models-h200": _models,
    "scales-infinityformer": lambda content, path: scales.plot(path, content),
}
TABLES: dict[str, Callable[[Content], str]] = {
    "kernels-h100": report.markdown,
    "kernels-attention-h100": _attention_page,
    "kernels-attention-h200": _attention_page,
    "kernels-attention-lengths-h100": _attention_page,
    "kernels-attention-lengths-h200": _attention_page,
    "linear-1m-cpu": lambda content: linear.markdown(content["run"], _points(content)),
    "linear-cpu": lambda content: linear.markdown(content["run"], _points(content)),
    "clip": clip.markdown,
    "tasks": task_page.markdown,
    "lat-cpu": _lat_page,
    "lat-h200": _lat_page,
    "lengths-h200": _lengths_page,
    "models-h100": _models_page("models-h100.png"),
    "models-h200": _models_page("models-h200.png"),
    "scales-infinityformer": scales.markdown,
}


def main(folder: Path, out: Path | None = None) -> list[Path]:
    """Write each figure and table beside its numbers, or into `out`; returns the files."""
    out, written, known = out or folder, [], sorted(folder.glob("*.json"))
    if not known:
        raise InputError(f"{folder}: holds no .json of results; give docs/results")
    for path in known:
        numbers, to = path.read_bytes(), out / path.name
        content = json.loads(numbers)
        made = list(drawn.write(content, out)) if "table" in content else []  # an experiment's page and figure
        table = _attention_page if path.stem.startswith("kernels-attention-drawn-") else TABLES.get(path.stem)
        if table is not None:
            made.append(to.with_suffix(".md"))
            made[-1].write_text(table(content), encoding="utf-8")
        if path.stem in FIGURES:
            made.append(to.with_suffix(".png"))
            FIGURES[path.stem](content, made[-1])
        for picture in made:
            if picture.suffix == ".png":
                figures.mark(picture, numbers)
        written += made
    return written


def _run() -> int:
    if len(sys.argv) not in (2, 3):
        raise InputError("give the folder of results, docs/results, and where to write if not there")
    print(*main(*map(Path, sys.argv[1:])), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(guarded("redraw", _run))
