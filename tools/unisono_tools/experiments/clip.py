"""A recorded clip and how a model goes on with it: `python -m unisono_tools.experiments.clip RUN --output docs/results/clip`

RUN learned the task `video`. The model reads the recording up to a frame of the test part, and from then on its own frames: their means, or
draws from what it predicts. Written are the numbers, a page of them, frames side by side as a picture, and the first fifty as a GIF.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from unisono_spec.contract import Config, InputError
from unisono_spec.contract.files import write_bytes

from unisono_tools.backends import open_reader
from unisono_tools.backends.base import Reader
from unisono_tools.bench.report import about, ready
from unisono_tools.cli import guarded
from unisono_tools.experiments import figures
from unisono_tools.tasks import open_task
from unisono_tools.tasks.video import Video
from unisono_tools.train.checkpoint import model_file, training_of
from unisono_tools.train.task_datamodule import predicted

READ, WRITTEN = 50, 100  # frames of the test part that the model reads, and that it writes
HORIZONS = (1, 2, 5, 10, 20, 50, 100)
SHOWN = (1, 2, 5, 10, 20, 50)
SCALE, MILLISECONDS = 3, 100


def go_on(reader: Reader, frames: np.ndarray, number: int, random: np.random.Generator | None) -> np.ndarray:
    """`number` frames [number, F] after `frames` [N, F]: means of the predictions, or draws from them."""
    logits, state = reader.forward(frames[None].astype(np.float32), reader.init_state(1, len(frames) + number))
    found, last = [], logits[:, -1]
    for _ in range(number):
        frame = _next(reader.config, last, random)
        found.append(frame[0])
        last, state = reader.step(frame, state)
    return np.stack(found)


def _next(config: Config, logits: np.ndarray, random: np.random.Generator | None) -> np.ndarray:
    mean = predicted(config, logits).astype(np.float32)
    if random is None:
        return mean
    if config.predicts == "bernoulli":
        return (random.random(mean.shape) < mean).astype(np.float32)
    deviation = np.exp(0.5 * np.split(logits.astype(np.float64), 2, -1)[1])
    return (mean + deviation * random.standard_normal(mean.shape)).astype(np.float32)


def explained(found: np.ndarray, truth: np.ndarray, mean: float) -> float:
    """Share of the variance about the training mean."""
    return 1 - float(np.square(truth.astype(np.float64) - found).sum() / np.square(truth.astype(np.float64) - mean).sum())


def measure(reader: Reader, task: Video) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What each way explains of the frame at each horizon, averaged over starts; clips from the first start."""
    before, test = task.part("validation"), task.part("test")[1:]
    whole, mean, image = np.concatenate([before, test]), float(task.part("train").mean(dtype=np.float64)), task.part("train").mean(0)
    last = len(whole) - WRITTEN
    starts = range(len(before) + READ, last + 1, 10) if last >= len(before) + READ else ()
    if not starts:
        raise InputError(f"clip: {len(test)} frames of test are fewer than {READ} and {WRITTEN}; train on a longer recording")
    scores = {name: {h: [] for h in HORIZONS} for name in ("model", "persistence", "mean image")}
    clips: dict[str, np.ndarray] = {}
    for start in starts:
        truth = whole[start : start + WRITTEN]
        means = go_on(reader, whole[:start], WRITTEN, None)
        ways = {
            "model": means,
            "persistence": np.broadcast_to(whole[start - 1], truth.shape),
            "mean image": np.broadcast_to(image, truth.shape),
        }
        for name, frames in ways.items():
            for h in HORIZONS:
                scores[name][h].append((frames[h - 1], truth[h - 1]))
        if not clips:
            clips = {"recorded": truth, "means": means, "drawn": go_on(reader, whole[:start], WRITTEN, np.random.default_rng(0))}
    table = {
        name: {str(h): explained(np.array([a for a, _ in pairs]), np.array([b for _, b in pairs]), mean) for h, pairs in each.items()}
        for name, each in scores.items()
    }
    return {"starts": len(starts), "explained": table}, clips


def markdown(content: dict[str, Any]) -> str:
    lines = [
        "# A clip that a model goes on with",
        "",
        *(f"- {k}: {f'`{v}`' if k == 'command' else v}" for k, v in content["run"].items()),
        "",
    ]
    lines += [f"Share of the variance that is explained so many frames after the last that was read, over {content['starts']} starts:", ""]
    lines += ["| | " + " | ".join(map(str, HORIZONS)) + " |", "|---" * (1 + len(HORIZONS)) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{each[str(h)]:.3f}" for h in HORIZONS) + " |" for name, each in content["explained"].items()]
    lines += ["", "![recorded, means, drawn](clip-frames.png)", "", "![the same in time](clip-frames.gif)"]
    return "\n".join(lines) + "\n"


def _grey(clips: dict[str, np.ndarray], side: int) -> dict[str, np.ndarray]:
    """Values 0 to 255, one scale for all, from the recorded ones."""
    low, high = np.percentile(clips["recorded"], [1, 99.5])
    return {k: np.clip(255 * (v - low) / max(high - low, 1e-9), 0, 255).astype(np.uint8).reshape(-1, side, side) for k, v in clips.items()}


def draw(clips: dict[str, np.ndarray], side: int, path: Path) -> None:
    with figures.panels(path, len(SHOWN), 2 * len(SHOWN), 6.4) as axes:
        for axis, frame in zip(axes, SHOWN, strict=True):
            axis.imshow(np.concatenate([clip[frame - 1] for clip in _grey(clips, side).values()]), cmap="gray", vmin=0, vmax=255)
            axis.set_title(f"frame {frame}")
            axis.set_xticks([])
            axis.set_yticks([side * (i + 0.5) for i in range(len(clips))], list(clips) if frame == SHOWN[0] else [""] * len(clips))
            axis.tick_params(left=False)
            axis.grid(False)


def film(clips: dict[str, np.ndarray], side: int, path: Path) -> None:
    grey = _grey(clips, side)
    frames = [Image.fromarray(np.concatenate([clip[i] for clip in grey.values()], 1)) for i in range(max(SHOWN))]
    large = [frame.resize((frame.width * SCALE, frame.height * SCALE), Image.Resampling.NEAREST) for frame in frames]
    large[0].save(path, save_all=True, append_images=large[1:], duration=MILLISECONDS, loop=0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", help="folder of a run of the task video")
    parser.add_argument("--output", default="docs/results/clip", help="where the page goes, without its ending")
    parser.add_argument("--backend", default=None)
    options = parser.parse_args(argv)
    ready(parser, Path(options.output))
    path = model_file(Path(options.run))
    training = training_of(path)
    if training is None or training.data.task != "video":
        raise InputError(f"run: {options.run} did not learn the task video; give one that did")
    task_options = training.data.task_options
    task = open_task("video", task_options)
    assert isinstance(task, Video)
    found, clips = measure(open_reader(path, options.backend, "float32"), task)
    run = about("python -m unisono_tools.experiments.clip RUN", "CPU", "numpy", "torch", "jax")
    run["model"] = f"{training.model.preset} with {json.dumps(training.model.overrides)}, {path.parent.name} of {training.steps:,}"
    run["training"] = (
        f"batches of {training.batch_size} clips, learning rate {training.optimizer.lr:g}, task options {json.dumps(task_options)}"
    )
    content = {"run": run, **found}
    output = Path(options.output)
    write_bytes(output.with_suffix(".json"), json.dumps(content, indent=1).encode())
    write_bytes(output.with_suffix(".md"), markdown(content).encode())
    draw(clips, task.side, output.with_name(f"{output.name}-frames.png"))
    film(clips, task.side, output.with_name(f"{output.name}-frames.gif"))
    return 0


if __name__ == "__main__":
    raise SystemExit(guarded("clip", main))
