"""What tasks hold and what trivial predictors reach: `python -m unisono_tools.experiments.task_page --output docs/results/tasks`

Writes a page, its numbers, and a picture of each task beside them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from rich.console import Console
from unisono_spec.contract.files import write_bytes

from unisono_tools.bench.report import about, ready
from unisono_tools.experiments import figures
from unisono_tools.tasks import Examples, Task, open_task
from unisono_tools.tasks.base import SPLITS

# name of a line → task, what differs from its defaults, examples judged (0: all of a data set)
LINES: dict[str, tuple[str, dict[str, Any], int]] = {
    "listops": ("listops", {}, 2000),
    "text": ("text", {}, 0),
    "retrieval": ("retrieval", {}, 2000),
    "image": ("image", {}, 0),
    "pathfinder": ("pathfinder", {}, 1000),
    "path-x": ("pathfinder", {"side": 128}, 400),
    "mqar": ("mqar", {}, 1000),
    "phonebook": ("phonebook", {}, 1000),
    "copying": ("copying", {}, 1000),
    "dna": ("dna", {}, 0),
    "dna, E. coli": ("dna", {"dataset": "ecoli"}, 0),
    "video": ("video", {}, 0),
    "video, events": ("video", {"form": "events"}, 0),
}
PICTURES = {name: (task, options) for name, (task, options, _) in LINES.items() if "," not in name}
SEEN = 512  # training examples that a picture counts
SHOWN = 3  # of them as text
WIDTH, ROWS = 115, 5  # letters of a text that are shown


def measure(task: Task, number: int) -> dict[str, Any]:
    """Sizes of the splits, and what the trivial predictors reach on test."""
    sizes = {split: {s: [task.length(s), task.size(split, s)] for s in task.settings(split)} for split in SPLITS}
    return {"metric": task.metric or "bits", "source": task.source, "sizes": sizes, "baselines": task.baselines("test", number or 10**9)}


def markdown(content: dict[str, Any]) -> str:
    """The page."""
    lines = ["# Tasks, and what a predictor reaches that knows nothing of order", ""]
    lines += [f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in content["run"].items()]
    lines += [
        "",
        "On test: accuracy and exact answers, shares of the variance that are explained, bits a base. A least-squares classifier of counts",
    ]
    lines += ["(bags) or of pixels is fitted on up to 10,000 training examples, its ridge chosen by validation.", ""]
    lines += ["| task | examples: train, validation, test | setting | tokens | metric | trivial predictors |", "|---|---|---|---|---|---|"]
    for name, found in content["tasks"].items():
        many = {split: "/".join(_size(size) for _, size in settings.values()) for split, settings in found["sizes"].items()}
        many = {split: "∞" if set(text) <= set("∞/") else text for split, text in many.items()}
        for i, (setting, (length, _)) in enumerate(found["sizes"]["test"].items()):
            first = [f"`{name}`", ", ".join(many.values())] if not i else ["", ""]
            scores = ", ".join(f"{what} {score:.4f}" for what, score in found["baselines"][setting].items())
            lines.append("| " + " | ".join([*first, setting, f"{length:,}", found["metric"], scores]) + " |")
    lines += ["", "Each with three of its examples or more, what it asks for, and how long it is or where it asks:", ""]
    lines += [f"![{name}](task-{name}.png)\n" for name in PICTURES]
    return "\n".join(lines).rstrip() + "\n"


def _size(size: int | None) -> str:
    return "∞" if size is None else f"{size:,}"


def draw(task: Task, path: Path, title: str) -> Path:
    """Some training examples, the shares of what is asked, and lengths or the places where it is asked."""
    setting = max(task.settings("train"), key=task.length)
    size = task.size("train", setting)
    found = task.examples("train", setting, np.arange(min(SEEN, size or SEEN)))
    with figures.panels(path, 3, 14, 4.2, width_ratios=(2, 1, 1)) as (examples, asked, lengths):
        examples.set_axis_off()
        examples.set_title(f"{title} ({setting})")
        if task.frame_size or task.pictured:
            _images(examples, task, found)
        else:
            _texts(examples, task, found)
        _values(asked, task, found)
        _places(lengths, found)
    return path


def _images(axes: Axes, task: Task, found: Examples) -> None:
    """Eight of them side by side in two rows, with their classes; of a video, every twelfth frame of a clip."""
    if task.frame_size:
        side = round(task.frame_size**0.5)
        images = found.inputs[0].reshape(-1, side, side)[:: max(1, len(found.inputs[0]) // 8)][:8]
        said = "frames of one clip, from left to right"
    else:
        side = round(found.inputs.shape[1] ** 0.5)
        images, said = found.inputs[:8].reshape(-1, side, side), "classes: " + " ".join(map(str, found.targets[found.scored][:8]))
    grid = np.full((2 * side + 1, 4 * side + 3), images.max(), float)
    for i, image in enumerate(images):
        top, left = (i // 4) * (side + 1), (i % 4) * (side + 1)
        grid[top : top + side, left : left + side] = image
    axes.imshow(grid, cmap="gray", interpolation="nearest")
    axes.text(0, -0.04, said, transform=axes.transAxes, va="top", fontsize=9)


def _texts(axes: Axes, task: Task, found: Examples) -> None:
    """The beginning and the end of the first ones, and what is asked of them."""
    for i in range(SHOWN):
        valid = slice(None) if found.valid is None else found.valid[i]
        text, answers = task.shown(found.inputs[i][valid]), found.targets[i][found.scored[i]]
        answer = str(answers[0]) if task.by_class else task.shown(answers)
        half = WIDTH * ROWS // 2
        text = text if len(text) <= 2 * half else f"{text[: half - 20]} … {text[-half + 20 :]}"
        text = "".join(c if c.isprintable() else "·" for c in text)
        lines = [text[j : j + WIDTH] for j in range(0, len(text), WIDTH)]
        answer = answer if len(answer) <= WIDTH - 10 else f"{answer[: WIDTH - 10]} …"
        top = 1 - i / SHOWN
        style = {"family": "monospace", "fontsize": 6, "transform": axes.transAxes, "va": "top", "parse_math": False}
        axes.text(0, top, "\n".join(lines), **style)
        axes.text(0, top, "\n" * len(lines) + f"→ {answer}", **{**style, "color": figures.VERMILION})


def _values(axes: Axes, task: Task, found: Examples) -> None:
    axes.set_title("what is asked")
    values = found.targets[found.scored].ravel()
    if task.frame_size:
        axes.hist(values, bins=60, log=True)
        axes.set_xlabel("value of a pixel")
        return
    kinds, counts = np.unique(values, return_counts=True)
    if len(kinds) > 64:
        axes.hist(values, bins=50)
        axes.set_xlabel("id")
        return
    axes.bar(np.arange(len(kinds)), counts / counts.sum())
    step = math.ceil(len(kinds) / 16)
    names = [str(k) if task.by_class else task.shown(np.array([k])) for k in kinds]
    axes.set_xticks(np.arange(len(kinds))[::step], names[::step])
    axes.set_ylabel("share")


def _places(axes: Axes, found: Examples) -> None:
    lengths = np.full(len(found.inputs), found.inputs.shape[1]) if found.valid is None else found.valid.sum(1)
    if len(np.unique(lengths)) > 1:
        axes.set_title("lengths")
        axes.hist(lengths, bins=40)
        axes.set_xlabel("tokens")
    elif found.scored[:, :-1].any():
        axes.set_title("where it is asked")
        axes.plot(found.scored.mean(0), ".", markersize=3)
        axes.set_xlabel("place")
        axes.set_ylabel("share of examples")
        axes.set_ylim(bottom=0)
    else:
        axes.set_title("what is read")
        axes.hist(found.inputs.ravel(), bins=64, log=True)
        axes.set_xlabel("id")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", default="docs/results/tasks", help="where the page goes, without its ending")
    parser.add_argument("--only", nargs="*", default=list(LINES), help="lines to measure; others keep what the file has")
    parser.add_argument("--pictures", nargs="*", default=list(PICTURES), help="pictures to draw")
    options, console = parser.parse_args(argv), Console(soft_wrap=True)
    output = Path(options.output)
    ready(parser, output)
    numbers = output.with_suffix(".json")
    kept = json.loads(numbers.read_text())["tasks"] if numbers.is_file() else {}
    run = about("python -m unisono_tools.experiments.task_page", "CPU", "numpy", "unisono")
    for name in options.only:
        task, differs, number = LINES[name]
        kept[name] = measure(open_task(task, differs), number)
        console.print(name, kept[name]["baselines"])
        content = {"run": run, "tasks": {line: kept[line] for line in LINES if line in kept}}
        write_bytes(numbers, json.dumps(content, indent=1).encode())
        output.with_suffix(".md").write_text(markdown(content), encoding="utf-8")
    for name in options.pictures:
        task, differs = PICTURES[name]
        console.print(draw(open_task(task, differs), output.parent / f"task-{name}.png", name))


if __name__ == "__main__":
    main()
