"""Pathfinder (Linsley et al. 2018, section 3; Houtkamp & Roelfsema 2010), as Tay et al. 2021, section 2.2, read it pixel by pixel.

Two long dashed contours, distractors, and two discs: one at the start of a contour, the other at its own end (class 1) or at the end of
the other (class 0), a fair coin. `side=128` is Path-X. What is asked at the last pixel is the class. Which image is drawn hangs on this
generator, not on the published files; `folder` reads those. Of paddles by themselves the published script has none and the class below it
as many as there is room for; here are a few.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from unisono_spec.contract import InputError
from unisono_spec.contract.plain import expanded

from unisono_tools.tasks.base import Drawn, Examples, classified

PADDLES = 14  # of each of the two contours
RETRIES = 2  # of a paddle that does not fit, before the two contours are begun anew
REDRAWN = 4  # of a distractor that does not fit, before it is left out
PLACES = 100  # where it may begin that are looked at
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
PUBLISHED = 200_000
SCALE = 2  # pixels that are drawn to one of the image


@dataclasses.dataclass(frozen=True)
class Style:
    """Lengths in pixels of the image. apart: between the starts of the two contours.

    margins: about each paddle, one of them an image. continuity: how sharply a turn is held against it. distractors: contours of `links`
    paddles each; singles: paddles by themselves. contrast, clutter: light of the two contours and of all others, that of the discs being 1.
    tries: of the two contours, at once.
    """

    padding: int
    margins: tuple[float, ...]
    paddle: float
    thickness: float
    marker: float
    continuity: float
    contrast: float
    clutter: float
    apart: float
    distractors: int
    links: int
    singles: int
    tries: int


# LRA's parameters of Linsley et al.'s generator. That multiplies the contrasts of paddles and contours, 0.75 and 2, for the two contours,
# and has the latter alone for distractors; 14 / 3 and 35 / 4 are quotients of integers
STYLES = {
    32: Style(1, (1,), 2, 0.5, 1.5, 1.0, 1.5, 2.0, 7, 5, 4, 4, 512),
    128: Style(1, (2, 3), 5, 1.5, 3, 1.8, 0.9, 0.9, 20, 8, 4, 8, 256),
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
    block_size = together = 4  # each takes a few hundredths of a second, of Path-X a tenth

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
    base, found = expanded(folder), []
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
    label, canvas = int(random.integers(2)), Canvas(style, side, float(random.choice(style.margins)), random)
    contours = canvas.contours()
    short = [canvas.distractor(links) for links, number in ((style.links, style.distractors), (1, style.singles)) for _ in range(number)]
    own = int(random.integers(2))
    markers = contours[own, 0, :2], contours[own if label else 1 - own, -1, 2:]
    return canvas.image(contours.reshape(-1, 4), np.concatenate(short), np.array(markers)), label


class Shapes:
    """Paddles by their directions, which are those of the pixels on a circle about a pivot; all lengths in pixels.

    A paddle's head is a pixel of the circle, whose radius is its length and a margin; it points away from the pivot.
    """

    def __init__(self, style: Style, margin: float) -> None:
        reach = style.paddle + margin
        around = np.arange(4 * math.ceil(2 * math.pi * reach)) * (math.pi / 2 / math.ceil(2 * math.pi * reach))
        self.heads = np.unique(np.rint(reach * _towards(around)).astype(int), axis=0)  # from the pivot, [K, 2]
        self.angles = np.arctan2(*self.heads.T)
        self.feet = -style.paddle * _towards(self.angles)  # from the head, as all that follows
        self.pivots = np.rint(margin * _towards(self.angles)).astype(int)  # of the next one, a margin beyond
        turns = np.abs(np.angle(np.exp(1j * (self.angles - self.angles[:, None]))))
        self.weights = np.cos(np.minimum(style.continuity * turns, math.pi / 2)) ** 2  # of a direction after another, [K, K]
        self.under = np.rint(np.linspace(0, 1, 2 * math.ceil(style.paddle) + 1)[:, None] * self.feet[:, None]).astype(int)
        # two paddles are apart by two margins, as each has one of its own
        clear = 2 * margin + style.thickness
        window = np.arange(-math.ceil(style.paddle / 2 + clear), math.ceil(style.paddle / 2 + clear) + 1)
        at = np.stack(np.meshgrid(window, window, indexing="ij"), -1) + np.rint(self.feet / 2).astype(int)[:, None, None]
        along = np.clip((at * self.feet[:, None, None]).sum(-1) / style.paddle**2, 0, 1)
        near = np.square(at - along[..., None] * self.feet[:, None, None]).sum(-1) <= clear**2
        # the pixels that are near, the last again where there are fewer than of another direction, [K, P, 2]
        places = np.minimum(np.arange(near.sum((1, 2)).max()), near.sum((1, 2))[:, None] - 1)
        self.near = np.stack([pixels[near_one][place] for pixels, near_one, place in zip(at, near, places, strict=True)])


shapes = functools.lru_cache(Shapes)


class Canvas:
    """Where paddles may still lie. Many contours are tried at once, the first that fits is kept.

    A paddle is kept as the pixel of its head and its direction, (y, x, k), and given as (y, x) of its foot, then of its head.
    """

    def __init__(self, style: Style, side: int, margin: float, random: np.random.Generator) -> None:
        self.style, self.side, self.margin, self.random, self.shapes = style, side, margin, random, shapes(style, margin)
        self.edge = math.ceil(2 * (style.paddle + margin))  # beyond it no pixel is looked at
        border = self.edge + math.ceil(style.padding + margin)
        self.width = side + 2 * self.edge
        self.taken = np.ones((self.width,) * 2, bool)
        self.taken[border:-border, border:-border] = False
        # pixels by one number: of what is far from a head as far from its number
        strides = np.array([self.width, 1])
        self.heads, self.under, self.near = (at @ strides for at in (self.shapes.heads, self.shapes.under, self.shapes.near))

    def contours(self) -> np.ndarray:
        """The two long ones, [2, PADDLES, 4]. They start apart and grow in turn; where one finds no room both begin anew.

        The first paddle lies in the middle: nowhere nearer to the border than twice the distance of the starts.
        """
        apart, tries = self.style.apart, self.style.tries
        low, high = self.edge + math.floor(2 * apart), self.edge + math.ceil(self.side - 1 - 2 * apart)
        while True:
            first = np.concatenate([self.random.integers(low, high + 1, (tries, 2)), self._directions(tries)], 1)
            feet = self.ends(first)[:, :2]
            middle = ((low <= feet) & (feet <= high)).all(1)
            second = self._directions(middle.sum())
            feet = feet[middle] + apart * _towards(self.random.uniform(0, 2 * math.pi, len(second)))
            heads = np.rint(feet - self.shapes.feet[second[:, 0]]).astype(int)
            found = self._grown(np.stack([first[middle], np.concatenate([heads, second], 1)], 1), PADDLES)
            if found is not None:
                return found

    def distractor(self, links: int) -> np.ndarray:
        """A contour of so many paddles anywhere, [links, 4]; [0, 4] where a few tries find no room."""
        free = np.argwhere(~self.taken)
        if len(free):
            heads = free[self.random.integers(len(free), size=(1 + REDRAWN, PLACES))]
            first = np.concatenate([heads, np.broadcast_to(self._directions(1 + REDRAWN)[:, None], (*heads.shape[:2], 1))], -1)
            fits = self._fits(first, self.taken[None], np.zeros(first.shape[:2], int))
            first = np.take_along_axis(first, fits.argmax(1)[:, None, None], 1)[fits.any(1)]
            found = self._grown(first, links)
            if found is not None:
                return found[0]
        return np.zeros((0, 4))

    def ends(self, paddles: np.ndarray) -> np.ndarray:
        """(y, x) of the feet, then of the heads, of paddles [..., 3]."""
        heads = paddles[..., :2].astype(float)
        return np.concatenate([heads + self.shapes.feet[paddles[..., 2]], heads], -1)

    def _grown(self, first: np.ndarray, links: int) -> np.ndarray | None:
        """Contours [C, links, 4] of the first of the tries [N, C, 3] that has room for all, a paddle of each in turn."""
        tries, contours = first.shape[:2]
        paddles = np.zeros((tries, contours, links, 3), int)
        # by try and contour, row by row: what blocks the next paddle, all but the contour's own last one, beside which it begins
        blocked = np.broadcast_to(self.taken, (tries * contours, *self.taken.shape)).copy()
        alive = np.arange(tries)
        for link in range(links):
            for i in range(contours):
                row = alive * contours + i
                if link:
                    following, fits = self.following(paddles[alive, i, link - 1], blocked, row)
                else:
                    following = first[alive, i]
                    fits = self._fits(following, blocked, row)
                alive = alive[fits]
                paddles[alive, i, link] = following[fits]
                for j in range(contours):
                    if j != i:
                        self._take(blocked, alive * contours + j, paddles[alive, i, link])
                    elif link:
                        self._take(blocked, alive * contours + i, paddles[alive, i, link - 1])
        if not len(alive):
            return None
        found = paddles[alive[0]]
        for paddle in found.reshape(-1, 1, 3):
            self._take(self.taken[None], np.zeros(1, int), paddle)
        return self.ends(found)

    def following(self, last: np.ndarray, blocked: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Paddles after the `last` ones [N, 3], and which fit where blocked[rows] has room.

        A turn by Δθ has weight cos²(min(c |Δθ|, 90°)) where the head is free.
        """
        pivots = last[:, :2] + self.shapes.pivots[last[:, 2]]
        taken = blocked.reshape(-1)[self._numbers(pivots, rows)[:, None] + self.heads]
        weights = np.cumsum(~taken * self.shapes.weights[last[:, 2]], 1)
        found, fits = np.zeros_like(last), np.zeros(len(last), bool)
        for _ in range(1 + RETRIES):
            random = self.random.random((len(last), 1))
            (left,) = np.nonzero(~fits & (weights[:, -1] > 1e-4))
            drawn = (weights[left] > weights[left, -1:] * random[left]).argmax(1)
            paddles = np.concatenate([pivots[left] + self.shapes.heads[drawn], drawn[:, None]], 1)
            fitting = self._fits(paddles, blocked, rows[left])
            found[left[fitting]], fits[left[fitting]] = paddles[fitting], True
        return found, fits

    def _directions(self, number: int) -> np.ndarray:
        """[number, 1]."""
        return self.random.integers(len(self.shapes.angles), size=(number, 1))

    def _numbers(self, places: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Of pixels (y, x) [..., 2] of the canvases `rows` [...], among those of all canvases."""
        return (rows * self.width + places[..., 0]) * self.width + places[..., 1]

    def _fits(self, paddles: np.ndarray, blocked: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Whether paddles [..., 3] lie where blocked[rows] has room."""
        at = self._numbers(paddles, rows)[..., None] + self.under[paddles[..., 2]]
        return np.logical_not(blocked.reshape(-1)[at].any(-1))

    def _take(self, blocked: np.ndarray, rows: np.ndarray, paddles: np.ndarray) -> None:
        """Block in blocked[rows] what is near to paddles [N, 3]."""
        blocked.reshape(-1)[self._numbers(paddles, rows)[:, None] + self.near[paddles[:, 2]]] = True

    def image(self, long: np.ndarray, short: np.ndarray, markers: np.ndarray) -> np.ndarray:
        """Contours, distractors [N, 4] and discs [2, 2], each made smaller by Lanczos's filter; the brightest pixel has 255."""
        from PIL import Image, ImageDraw

        size, thick, layers = self.side * SCALE, round(self.style.thickness * SCALE), []
        discs = np.concatenate([markers - self.style.marker, markers + self.style.marker], 1)
        for light, shapes in ((self.style.contrast, long), (self.style.clutter, short), (1, discs)):
            canvas = Image.new("L", (size, size))
            pen = ImageDraw.Draw(canvas)
            for y0, x0, y1, x1 in (shapes - self.edge + 0.5) * SCALE - 0.5:  # middles of pixels
                if shapes is discs:
                    pen.ellipse((x0, y0, x1, y1), fill=255)
                else:
                    pen.line((x0, y0, x1, y1), fill=255, width=thick)
            layers.append(light * np.asarray(canvas.resize((self.side, self.side), Image.Resampling.LANCZOS), float))
        image = np.maximum.reduce(layers)
        return np.rint(255 * image / image.max()).astype(np.uint8)


def _towards(angles: np.ndarray) -> np.ndarray:
    """Unit vectors (y, x)."""
    return np.stack([np.sin(angles), np.cos(angles)], -1)


TASK = Pathfinder
