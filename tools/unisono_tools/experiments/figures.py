"""One look for all figures, and the figures themselves. Each function writes one PNG and returns its path."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image
from PIL.PngImagePlugin import PngInfo

# Okabe & Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
CYCLE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)
# with Tol's muted ones, enough for any comparison; no two alike
MANY = (*CYCLE, "#000000", "#332288", "#882255", "#999933", "#44AA99", "#661100", "#DDAA33", "#AA4499")
GREY = "#6B6B6B"
NUMBERS = "sha256 of its numbers"
# One thing has one colour in every figure. Models also have markers of their own, since nine hues are more than an eye tells apart.
MODELS = {
    "mamba": (BLUE, "o"),
    "maru": (PURPLE, "s"),
    "based": (GREEN, "^"),
    "transformer": ("#000000", "D"),
    "s4d": ("#8C510A", "v"),
    "infinityformer": (ORANGE, "P"),
    "cram (fixed)": (VERMILION, "X"),
    "cram (adaptive)": ("#882255", "<"),
    "cram-plus": ("#332288", "h"),
    "lat": ("#44AA99", ">"),
    "linear transformer": ("#999933", "*"),
    "attention after a convolution": ("#661100", "p"),
    "lat after a convolution": (SKY, "d"),
    "attention with a head of its own": ("#AA4499", "p"),
}
OTHERS = ("p", "h", "d", "o", "s")  # markers of what has no look of its own
DTYPES = {"float64": "#000000", "float32": BLUE, "bfloat16": VERMILION, "float16": GREEN}
CONTESTANTS = {
    "unisono": (BLUE, "o"),
    "torch eager": (VERMILION, "s"),
    "torch eager cumsum": (VERMILION, "x"),
    "torch.compile": (GREEN, "^"),
    "jax associative_scan": (ORANGE, "D"),
    "jax cumsum": (ORANGE, "+"),
    "accelerated-scan warp": (PURPLE, "v"),
}
ATTENTIONS = {
    "unisono": (BLUE, "o"),
    "plain": (VERMILION, "s"),
    "torch.compile of plain": (GREEN, "^"),
    "fla chunk": (ORANGE, "D"),
    "fla fused_chunk": (PURPLE, "v"),
    "causal SDPA (softmax, quadratic)": ("#000000", "P"),
    "jax-linear-attention, no normaliser": ("#8C510A", "X"),
}

STYLE = {
    "axes.grid": True,
    "axes.labelcolor": "#333333",
    "axes.prop_cycle": cycler(color=CYCLE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "font.size": 10,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def look(name: str, number: int = 0) -> dict[str, Any]:
    """Colour and marker of a model or a contestant, by the beginning of its name; by its number where it has none of its own."""
    known = {**MODELS, **CONTESTANTS, **ATTENTIONS}
    found = known.get(name) or next((known[k] for k in sorted(known, key=len, reverse=True) if name.startswith((f"{k},", f"{k}  "))), None)
    turn, at = divmod(number, len(MANY))  # neighbours differ in both, those of one colour in the marker
    colour, marker = found or (MANY[at], OTHERS[(turn + at) % len(OTHERS)])
    return {"color": colour, "marker": marker}


@contextlib.contextmanager
def panels(path: str | Path, number: int, width: float, height: float, **options: Any) -> Iterator[list[Axes]]:
    """`number` axes side by side, in the house style; written to `path` at the end."""
    with mpl.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        drawing = Figure(figsize=(width, height), layout="constrained")
        yield list(drawing.subplots(1, number, squeeze=False, **options).flat)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path)


def mark(path: str | Path, numbers: bytes) -> None:
    """Write into a picture of which file's numbers it is, so that one that has fallen behind is found."""
    with Image.open(path) as image:
        said = PngInfo()
        said.add_text(NUMBERS, hashlib.sha256(numbers).hexdigest())
        image.save(path, pnginfo=said, optimize=True)


def marked(path: str | Path) -> str | None:
    """The digest of the numbers that a picture shows, as `mark` wrote it."""
    with Image.open(path) as image:
        return image.info.get(NUMBERS)


def legend_below(axes: Axes, columns: int) -> None:
    """One legend for all panels, under them, from what the first of them shows."""
    axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=9)


def _columns(names: Iterable[str]) -> int:
    """Of a legend under a figure that is ten inches wide: as many as there is room for."""
    return max(1, 160 // (7 + max(map(len, names))))


@contextlib.contextmanager
def figure(path: str | Path, title: str, width: float = 7.5, height: float = 4.5) -> Iterator[Axes]:
    """Axes to draw on, in the house style; written to `path` at the end."""
    with mpl.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        drawing = Figure(figsize=(width, height), layout="constrained")
        axes = drawing.add_subplot()
        axes.set_title(title, pad=10)
        yield axes
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path)


def loss_curve(
    path: str | Path,
    steps: Sequence[int],
    losses: Sequence[float],
    validation: Sequence[tuple[int, float]] = (),
    baselines: Mapping[str, float] | None = None,
    unit: str = "bits per byte",
    title: str = "Training",
) -> Path:
    """Loss against step: the minibatches' (thin), their running mean, validation as points, baselines as dashed lines."""
    x, y = np.asarray(steps, float), np.asarray(losses, float)
    with figure(path, title) as axes:
        axes.plot(x, y, color=SKY, linewidth=0.7, alpha=0.5, label="minibatch")
        window = max(1, len(y) // 50)
        if window > 1:
            mean = np.convolve(y, np.ones(window) / window, "valid")
            axes.plot(x[window - 1 :], mean, color=BLUE, linewidth=1.8, label=f"mean of {window} minibatches")
        if validation:
            axes.plot(*np.array(validation, float).T, "o-", color=VERMILION, markersize=4, linewidth=1, label="validation")
        for i, (name, value) in enumerate((baselines or {}).items()):
            # labels alternate sides, so that near values do not cover one another
            axes.axhline(value, color=GREY, linewidth=0.9, linestyle="--")
            side = i % 2
            axes.annotate(
                f"{name} {value:.2f}",
                (1 - side * 0.72, value),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=GREY,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
            )
        shown = [*y[len(y) // 20 :], *(v for _, v in validation), *(baselines or {}).values()]
        shown = [v for v in shown if np.isfinite(v)]
        if shown:
            axes.set_ylim(0.95 * min(shown), 1.05 * max(shown))
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.legend(loc="upper right")
    return Path(path)


def dependency(path: str | Path, matrix: np.ndarray, title: str = "What each output depends on") -> Path:
    """matrix [T, T]: how much output t changes with input j, on a logarithmic scale; zeros stay white."""
    with figure(path, title, 6.4, 5.4) as axes:
        shown = np.ma.masked_less_equal(matrix, 0)
        top = float(matrix.max()) if matrix.max() > 0 else 1.0
        image = axes.imshow(shown, cmap="cividis", norm=LogNorm(max(float(shown.min() or top), 1e-16 * top), top), interpolation="nearest")
        axes.grid(visible=False)
        axes.set_xlabel("input position j")
        axes.set_ylabel("output position t")
        bar = axes.figure.colorbar(image, ax=axes, shrink=0.85)
        bar.set_label("|∂ logits$_t$ / ∂ input$_j$|")
    return Path(path)


def dependencies(path: str | Path, matrices: Mapping[str, np.ndarray], title: str) -> Path:
    """matrices: by name, [T, T] as for `dependency`; each relative to its largest, on one scale."""
    columns = min(3, len(matrices))
    rows = -(-len(matrices) // columns)
    with mpl.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        drawing = Figure(figsize=(2.6 * columns + 1, 2.7 * rows + 0.5), layout="constrained")
        drawing.suptitle(title, fontweight="bold", fontsize=9 if columns == 1 else None)
        panels = drawing.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        image = None
        for axes in panels.flat[len(matrices) :]:
            axes.set_visible(False)
        for axes, (name, matrix) in zip(panels.flat, matrices.items(), strict=False):
            shown = np.ma.masked_less_equal(matrix / (matrix.max() or 1.0), 0)
            image = axes.imshow(shown, cmap="cividis", norm=LogNorm(1e-6, 1, clip=True), interpolation="nearest")
            axes.grid(visible=False)
            axes.set_title(name, fontsize=10)
        drawing.supxlabel("input position j", fontsize=10)
        drawing.supylabel("output position t", fontsize=10)
        if image is not None:
            drawing.colorbar(image, ax=panels, shrink=0.6, extend="min").set_label("|∂ logits$_t$ / ∂ input$_j$|, of the largest")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path)
    return Path(path)


def reach(
    path: str | Path, reaches: Mapping[str, np.ndarray], limit: int, title: str = "How far back one input bit changes the state"
) -> Path:
    """reaches: by dtype, tokens [trials] until a changed bit leaves no trace; `limit` means that it never did."""
    with figure(path, title, 7.5, 3.6) as axes:
        names = list(reaches)
        middle = [float(np.median(reaches[name])) for name in names]
        spread = np.array([(m - reaches[n].min(), reaches[n].max() - m) for m, n in zip(middle, names, strict=True)], float).T
        bars = axes.barh(
            names,
            middle,
            xerr=spread,
            color=[DTYPES.get(name, GREY) for name in names],
            height=0.6,
            error_kw={"ecolor": GREY, "capsize": 3, "lw": 1},
        )
        right = max(float(r.max()) for r in reaches.values())
        for bar, name, value in zip(bars, names, middle, strict=True):
            text = f"≥ {limit}" if value >= limit else f"{value:.0f}"
            where = min(float(reaches[name].max()), right) + 0.015 * right
            axes.text(where, bar.get_y() + bar.get_height() / 2, text, va="center", fontweight="bold")
        axes.set_xlim(0, 1.12 * right)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("tokens (median; whiskers: least and most)")
        axes.set_ylabel("arithmetic of the state")
    return Path(path)


def decoding(path: str | Path, accuracy: Mapping[str, np.ndarray], title: str = "Input bits read back from ξ") -> Path:
    """accuracy: by dtype, share of bits decoded right [age]; ½ is chance."""
    with figure(path, title, 7.5, 3.8) as axes:
        for (name, share), style in zip(accuracy.items(), ("-", "--", "-.", ":"), strict=False):
            axes.plot(np.arange(len(share)), share, style, color=DTYPES.get(name, GREY), linewidth=2, label=name)
        axes.axhline(0.5, color=GREY, linewidth=0.9, linestyle="--")
        axes.text(0, 0.51, "chance", fontsize=8, color=GREY)
        axes.set_ylim(0.4, 1.03)
        axes.set_xlabel("age of the token (0: the newest)")
        axes.set_ylabel("share decoded right")
        axes.legend(title="ξ held in", loc="center", bbox_to_anchor=(0.62, 0.55))
    return Path(path)


def against(path: str | Path, lines: Mapping[str, Sequence[tuple[float, float, float, float]]], x: str, y: str, title: str) -> Path:
    """lines: by name, points (x, y, the least and the most that y was), of which x is logarithmic and y from 0 to 1."""
    with figure(path, title, 10, 5.5) as axes:
        for number, (name, points) in enumerate(lines.items()):
            xs, ys, low, high = zip(*points, strict=True)
            axes.plot(xs, ys, **look(name, number), linewidth=1.5, markersize=5, label=name)
            axes.vlines(xs, low, high, color=look(name, number)["color"], linewidth=4, alpha=0.35)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:g}Ki" if n >= 1024 else f"{n:g}")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        legend_below(axes, _columns(lines))
    return Path(path)


def curves(
    path: str | Path,
    lines: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]],
    baselines: Mapping[str, float],
    x: str,
    y: str,
    title: str,
) -> Path:
    """lines: by name, x, y, and the least and the most that y was (or nothing), a shade; baselines: dashed levels."""
    columns = _columns(lines)
    with figure(path, title, 10, 5 + 0.2 * math.ceil(len(lines) / columns)) as axes:
        for number, (name, (xs, ys, low, high)) in enumerate(lines.items()):
            axes.plot(xs, ys, **look(name, number), linewidth=1.5, markersize=4.5, label=name)
            if len(low):
                axes.fill_between(xs, low, high, color=look(name, number)["color"], alpha=0.18, linewidth=0)
        for name, value in baselines.items():
            axes.axhline(value, color=GREY, linewidth=0.9, linestyle=":")
            # at the right, where curves have fallen below
            axes.annotate(
                name,
                (1, value),
                (-3, 2),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=GREY,
            )
        ends = [float(line[1][-1]) for line in lines.values()]
        highest = max(float(max(line[1])) for line in lines.values())
        axes.set_ylim(0.95 * min([*ends, *baselines.values()]), min(1.1 * highest, max(2.2 * min(ends), 1.2 * max(ends))))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        legend_below(axes, columns)
    return Path(path)
