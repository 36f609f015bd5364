"""Pathfinder (Linsley et al. 2018, section 3; Houtkamp & Roelfsema 2010), as Tay et al. 2021, section 2.2, read it pixel by pixel.

Two long dashed contours, distractors, and two discs: one at the start of a contour, the other at its own end (class 1) or at the end of
the other (class 0), a fair coin. `side=128` is Path-X. What is asked at the last pixel is the class. Which image is drawn hangs on this
generator, not on the published files; `folder` reads those.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
from unisono_spec.contract import InputError

from unisono_tools.tasks.base import Drawn, Examples, classified

PADDLES = 14  # of each of the two contours
RETRIES = 2  # of a paddle that does not fit, before the image is begun anew
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
PUBLISHED = 200_000


@dataclasses.dataclass(frozen=True)
class Style:
    """Lengths in pixels of the image. apart: between the starts of the two contours. scale: pixels of the canvas to one of the image.

    distractors: contours of `links` paddles each; singles: paddles by themselves. continuity: how sharply a turn is held against it.
    """

    padding: int
    margin: float
    paddle: float
    thickness: float
    marker: float
    continuity: float
    contrast: float
    apart: float
    distractors: int
    links: int
    singles: int
    scale: int


STYLES = {
    32: Style(1, 1, 2, 0.5, 1.5, 1.0, 0.75, 7, 5, 4, 4, 2),
    128: Style(2, 3, 5, 1.5, 3, 1.8, 0.9, 20, 7, 5, 8, 1),
}


@dataclasses.dataclass(frozen=True)
class Pathfinder(Drawn):
    """One setting, `images`."""

    side: int = 32
    """32, or 128: Path-X."""
    images: int = PUBLISHED
    """In all: eight tenths train, one validates, one tests."""
    folder: str = ""
    """A copy of the published files, LRA's pathfinder32 or pathfinder128/curv_contour_length_14, instead of the generator."""

    name = "pathfinder"
    source = "arXiv:2011.04006"
    by_class = pictured = True
    block_size = together = 4  # each takes a few hundredths of a second

    def __post_init__(self) -> None:
        if self.side not in STYLES:
            raise InputError(f"data.task_options.side: {self.side}; use one of {', '.join(map(str, STYLES))}")
        if self.images < 10:
            raise InputError(f"data.task_options.images: {self.images}; use 10 or more")

    @property
    def vocab_size(self) -> int:
        return 256

    def settings(self, split: str) -> dict[str, float]:
        return {"images": 1.0}

    def length(self, setting: str) -> int:
        return self.side**2

    def size(self, split: str, setting: str) -> int | None:
        return int(SHARES[split] * (len(published(self.folder)) if self.folder else self.images))

    def block(self, setting: str, random: np.random.Generator, split: str) -> Examples:
        drawn = [draw(STYLES[self.side], self.side, random) for _ in range(self.block_size)]
        return classified(np.stack([image.reshape(-1) for image, _ in drawn]), np.array([label for _, label in drawn]))

    def examples(self, split: str, setting: str, numbers: np.ndarray, seed: int = 0) -> Examples:
        if not self.folder:
            return super().examples(split, setting, numbers, seed)
        files = published(self.folder)
        first = {"train": 0, "validation": 0.8, "test": 0.9}[split]
        chosen = [files[int(first * len(files)) + int(n)] for n in numbers]
        return classified(np.stack([_read(path, self.side) for path, _ in chosen]), np.array([label for _, label in chosen]))


@functools.lru_cache(maxsize=4)
def published(folder: str) -> tuple[tuple[str, int], ...]:
    """Paths and labels of the images that the files below metadata/ list, in an order that only their names decide.

    Each line has folder, file, number and label (Linsley et al.'s generator).
    """
    base, found = Path(folder).expanduser(), []
    for listing in sorted((base / "metadata").glob("*.npy")):
        for line in listing.read_text("utf-8").splitlines():
            parts = line.split()
            if len(parts) < 4 or parts[3] not in ("0", "1"):
                raise InputError(f"{listing}: {line[:60]!r} is no line of it (folder, file, number, label, …); restore the file")
            path = base / parts[0] / parts[1]
            if not path.resolve().is_relative_to(base.resolve()):
                raise InputError(f"{listing}: {parts[0]}/{parts[1]} lies outside {base}; restore the file")
            found.append((str(path), int(parts[3])))
    if len(found) < 10:
        raise InputError(f"data.task_options.folder: {folder!r} has no images in LRA's layout (metadata/*.npy, imgs/); name its folder")
    order = np.random.default_rng(0).permutation(len(found))  # neighbours were drawn by one process, with one label each
    return tuple(found[i] for i in order)


def _read(path: str, side: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: no image that can be read ({error}); restore the file") from error
    if grey.shape != (side, side):
        raise InputError(f"{path}: {grey.shape[1]} × {grey.shape[0]} pixels, expected {side} × {side}; set side, or name another folder")
    return grey.reshape(-1)


def draw(style: Style, side: int, random: np.random.Generator) -> tuple[np.ndarray, int]:
    """An image [side, side] of grey values 0–255, and its class."""
    label = int(random.integers(2))
    while True:
        canvas = _Canvas(style, side, random)
        contours = canvas.contours()
        if contours is None:
            continue
        kept = all(canvas.snake(style.links) is not None for _ in range(style.distractors))
        if kept and all(canvas.snake(1) is not None for _ in range(style.singles)):
            break
    own = int(random.integers(2))
    start, end = contours[own][0], contours[own if label else 1 - own][1]
    return canvas.image((start, end)), label


class _Canvas:
    """What has been drawn so far, in pixels of the canvas; `taken` is where nothing may be drawn any more."""

    def __init__(self, style: Style, side: int, random: np.random.Generator) -> None:
        self.style, self.side, self.random = style, side, random
        self.scale, self.size = style.scale, side * style.scale
        self.length, self.margin = style.paddle * style.scale, style.margin * style.scale
        self.paddles: list[tuple[float, float, float, float]] = []
        border = round(style.padding * style.scale)
        self.taken = np.ones((self.size, self.size), bool)
        self.taken[border : self.size - border, border : self.size - border] = False
        self.grid = np.stack(np.meshgrid(np.arange(self.size), np.arange(self.size), indexing="ij"), -1).astype(float)

    def contours(self) -> list[tuple[tuple[float, float], tuple[float, float]]] | None:
        """Start and end of the two long ones; None where they found no room."""
        first = self.snake(PADDLES)
        if first is None:
            return None
        for _ in range(20):
            angle, apart = self.random.uniform(0, 2 * math.pi), self.style.apart * self.scale
            start = first[0][0] + apart * math.sin(angle), first[0][1] + apart * math.cos(angle)
            second = self.snake(PADDLES, start)
            if second is not None:
                return [first, second]
        return None

    def snake(self, links: int, start: tuple[float, float] | None = None) -> tuple[tuple[float, float], tuple[float, float]] | None:
        """Draw a contour of so many paddles; where it begins and ends. None, and nothing drawn, where there is no room."""
        for _ in range(1 if start else 1 + 10 * RETRIES):
            drawn = self._grown(links, start)
            if drawn is not None:
                self.paddles += drawn
                mask = np.zeros_like(self.taken)
                for paddle in drawn:
                    mask |= self._near(paddle, self.margin)
                self.taken |= mask
                return drawn[0][:2], drawn[-1][2:]
        return None

    def _grown(self, links: int, start: tuple[float, float] | None) -> list[tuple[float, float, float, float]] | None:
        if start is None:
            free = np.argwhere(~self.taken)
            if not len(free):
                return None
            start = tuple(free[self.random.integers(len(free))].astype(float))
        angle = self.random.uniform(0, 2 * math.pi)
        first = (*start, start[0] + self.length * math.sin(angle), start[1] + self.length * math.cos(angle))
        near = np.zeros_like(self.taken)  # to its own paddles, but for the last one
        if not self._fits(first, near):
            return None
        paddles = [first]
        while len(paddles) < links:
            for _ in range(1 + RETRIES):
                following = self._next(paddles[-1])
                if following is not None and self._fits(following, near):
                    near |= self._near(paddles[-1], self.margin)
                    paddles.append(following)
                    break
            else:
                return None
        return paddles

    def _next(self, last: tuple[float, float, float, float]) -> tuple[float, float, float, float] | None:
        """The head of a paddle lies on a circle about the tip of the last one; a turn by Δθ has weight cos²(min(c |Δθ|, 90°))."""
        reach = self.length + self.margin
        heading = math.atan2(last[2] - last[0], last[3] - last[1])
        number = max(8, math.ceil(2 * math.pi * reach))
        turns = np.linspace(-math.pi, math.pi, number, endpoint=False)
        weight = np.cos(np.minimum(self.style.continuity * np.abs(turns), math.pi / 2)) ** 2
        at = np.rint([last[2] + reach * np.sin(heading + turns), last[3] + reach * np.cos(heading + turns)]).astype(int)
        inside = ((at >= 0) & (at < self.size)).all(0)
        weight = np.where(inside & ~self.taken[tuple(np.where(inside, at, 0))], weight, 0)
        if weight.sum() < 1e-9:
            return None
        angle = heading + turns[self.random.choice(number, p=weight / weight.sum())]
        y, x = last[2] + self.margin * math.sin(angle), last[3] + self.margin * math.cos(angle)
        return y, x, y + self.length * math.sin(angle), x + self.length * math.cos(angle)

    def _fits(self, paddle: tuple[float, float, float, float], near: np.ndarray) -> bool:
        """Whether it lies on the canvas, apart from all that is drawn, and from what is `near` to its own contour."""
        ends = np.array(paddle)
        if ends.min() < 0 or ends.max() > self.size - 1:
            return False
        return not (self._near(paddle, 0) & (self.taken | near)).any()

    def _near(self, paddle: tuple[float, float, float, float], distance: float) -> np.ndarray:
        """Pixels within half a thickness and `distance` of a paddle."""
        a, b = np.array(paddle[:2]), np.array(paddle[2:])
        reach = max(0.5, self.style.thickness * self.scale / 2) + distance
        low, high = np.floor(np.minimum(a, b) - reach).astype(int), np.ceil(np.maximum(a, b) + reach).astype(int) + 1
        low, high = np.maximum(low, 0), np.minimum(high, self.size)
        out = np.zeros_like(self.taken)
        part = self.grid[low[0] : high[0], low[1] : high[1]] - a
        along = np.clip((part @ (b - a)) / max(1e-9, (b - a) @ (b - a)), 0, 1)
        out[low[0] : high[0], low[1] : high[1]] = np.square(part - along[..., None] * (b - a)).sum(-1) <= reach**2
        return out

    def image(self, markers: tuple[tuple[float, float], ...]) -> np.ndarray:
        """Drawn, and made smaller by Lanczos's filter."""
        from PIL import Image, ImageDraw

        canvas = Image.new("L", (self.size, self.size))
        pen, grey = ImageDraw.Draw(canvas), round(255 * self.style.contrast)
        for y0, x0, y1, x1 in self.paddles:
            pen.line((x0, y0, x1, y1), fill=grey, width=max(1, round(self.style.thickness * self.scale)))
        radius = self.style.marker * self.scale
        for y, x in markers:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if self.scale > 1:
            canvas = canvas.resize((self.side, self.side), Image.Resampling.LANCZOS)
        return np.asarray(canvas)


TASK = Pathfinder
