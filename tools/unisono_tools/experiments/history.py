"""What a run has logged, as one picture: loss, learning rate, gradient, speed, and what its weights say of themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from unisono_spec.contract import InputError

from unisono_tools.experiments.figures import GREY, MANY, STYLE
from unisono_tools.train.logs import NAME, read

# what is logged → its panel's title, and whether its axis is logarithmic
SINGLE = {
    "lr": ("Learning rate", False),
    "gradient_norm": ("Gradient's norm, before clipping", True),
    "rate": ("Tokens a second", False),
    "loss_scale": ("Loss scale of float16", True),
}
FAMILIES = {"decay": "Decays λ, by layer and scale", "gate": "Gates, by layer", "load": "Use of each bank, by layer and bank"}
RUNNING = 0.98  # decay of the mean that is drawn over the losses
Row = dict[str, Any]


def plot(run: Path, path: Path) -> Path:
    """Write the picture of the run in folder `run` to `path`; InputError where it has logged nothing."""
    rows = read(run / NAME)
    if not any("loss" in row for row in rows):
        raise InputError(f"{run}: {NAME} holds no step; give the folder of a run that has trained")
    singles = [name for name in SINGLE if any(name in row for row in rows)]
    families = {
        kind: names for kind in FAMILIES if (names := sorted({name for row in rows for name in row if name.startswith(f"{kind}.")}))
    }
    with mpl.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        corpora = sorted({name.removeprefix("loss.") for row in rows for name in row if name.startswith("loss.")})
        number = 1 + bool(corpora) + len(singles) + len(families)
        columns = 2 if number <= 4 else 3
        lines = -(-number // columns)
        drawing = Figure(figsize=(5.2 * columns, 3.3 * lines), layout="constrained")
        panels: Iterable[Axes] = iter(drawing.subplots(lines, columns, squeeze=False).flat)
        _losses(next(panels), rows)  # pyright: ignore[reportArgumentType]
        if corpora:
            _corpora(next(panels), rows, corpora)  # pyright: ignore[reportArgumentType]
        for name in singles:
            _curve(next(panels), rows, name, *SINGLE[name])  # pyright: ignore[reportArgumentType]
        for kind, names in families.items():
            _family(next(panels), rows, kind, names)  # pyright: ignore[reportArgumentType]
        for empty in panels:
            empty.set_axis_off()
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path)
    return path


def _points(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(row["step"], row[name]) for row in rows if name in row]
    return np.array([step for step, _ in found]), np.array([value for _, value in found], np.float64)


def _line(axes: Axes, points: tuple[np.ndarray, np.ndarray], **how: Any) -> None:
    """A line; a dot where it would have one point, and show nothing."""
    axes.plot(*points, **how, **({"marker": "o", "markersize": 3} if len(points[0]) == 1 else {}))


def _losses(axes: Axes, rows: Sequence[Row]) -> None:
    steps, losses = _points(rows, "loss")
    _line(axes, (steps, losses), color=GREY, alpha=0.4, linewidth=0.8, label="training")
    if len(steps) > 1 / (1 - RUNNING):
        axes.plot(steps, _running(losses), color=MANY[0], label="running mean")
    validation = _points(rows, "validation_loss")
    if len(validation[0]):
        axes.plot(*validation, color=MANY[1], marker="o", markersize=3, label="validation")
    _named(axes, "Loss, nats a target")
    axes.legend()


def _running(losses: np.ndarray) -> list[float]:
    total, means = 0.0, []
    for i, loss in enumerate(losses):
        total = RUNNING * total + (1 - RUNNING) * loss
        means.append(total / (1 - RUNNING ** (i + 1)))
    return means


def _corpora(axes: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    """One colour a corpus: the running mean of its training loss, and its validation."""
    for i, name in enumerate(names):
        colour = MANY[i % len(MANY)]
        steps, losses = _points(rows, f"loss.{name}")
        _line(axes, (steps, np.array(_running(losses))), color=colour, label=name)
        axes.plot(*_points(rows, f"validation_loss.{name}"), color=colour, marker="o", markersize=3, linestyle=":")
    _named(axes, "Loss of each corpus, nats a target; dots: validation")
    axes.legend(fontsize=7)


def _curve(axes: Axes, rows: Sequence[Row], name: str, title: str, logarithmic: bool) -> None:
    _line(axes, _points(rows, name), color=MANY[0], linewidth=1)
    if logarithmic:
        axes.set_yscale("log")
    elif name == "rate":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter())
    _named(axes, title)


def _family(axes: Axes, rows: Sequence[Row], kind: str, names: Sequence[str]) -> None:
    """One colour a layer, one dash a scale or bank."""
    dashes = ("-", "--", ":", "-.")
    for name in names:
        _, layer, *rest = name.split(".")
        i = int(rest[0]) if rest else 0
        how = {"color": MANY[int(layer) % len(MANY)], "linestyle": dashes[i % 4], "linewidth": 1.2}
        _line(axes, _points(rows, name), **how, label=name.partition(".")[2])
    if kind == "decay":
        axes.set_yscale("logit")
    _named(axes, FAMILIES[kind])
    if len(names) <= 12:
        axes.legend(fontsize=7, ncols=3)


def _named(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
