"""picture -> colour of its background, its objects, their number, colour and places, measured by program.

These are the questions of GenEval (Ghosh et al. 2023) in a form that needs no detector, for drawings on a plain ground.
What is an object is decided by the ground: whatever differs from it and hangs together. Which thing an object is has to
be told by an encoder (evaluation/features.py). Pictures are (H, W, 3) uint8.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from dalle_demo.data.pairs import BACKGROUNDS, WHITE

GROUNDS = {"white": WHITE} | {name: colour for name, (_, colour) in BACKGROUNDS.items()}
# Where the hues of each colour begin, in degrees, up to the next; from 345 on it is red again
HUES = {"red": 0, "orange": 16, "yellow": 42, "green": 68, "blue": 170, "purple": 255, "pink": 300}
RED_AGAIN = 345
RING = 3 / 128  # of the picture's side: the border that is taken for ground
DIFFERENT = 40  # distance in RGB from which a pixel is not ground
FAR = 110  # distance in RGB from which a ground is none of the colours
PLAIN = 0.6  # share of the border that must be of one colour
COLOURLESS = 0.08  # mean chroma below which an object is black, white or gray
MIN_AREA = 0.2  # of the largest object's; smaller ones are crumbs
INSIDE = 0.5  # share of a box within another one from which both are one object
GRID = 64  # pixels a side on which objects are told apart


@dataclass(frozen=True)
class Box:
    """One object: its place in shares of the picture's side, and how many pixels of GRID x GRID are ink."""

    top: float
    left: float
    bottom: float
    right: float
    area: int

    def joined(self, other: "Box") -> "Box":
        """Box around both."""
        top, left = min(self.top, other.top), min(self.left, other.left)
        return Box(top, left, max(self.bottom, other.bottom), max(self.right, other.right), self.area + other.area)

    def overlap(self, other: "Box") -> float:
        """Share of the smaller box that lies within the larger one."""
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        width = min(self.right, other.right) - max(self.left, other.left)
        sizes = [(box.bottom - box.top) * (box.right - box.left) for box in (self, other)]
        return max(height, 0) * max(width, 0) / min(sizes)


def background(picture: np.ndarray) -> str | None:
    """Name of the ground's colour; None when the border is of several colours or of none that has a name here."""
    colour, plain = _ground(picture)
    name = min(GROUNDS, key=lambda name: _distance(colour, GROUNDS[name]))
    return name if plain >= PLAIN and _distance(colour, GROUNDS[name]) < FAR else None


def object_colour(picture: np.ndarray) -> str | None:
    """Name of the hue that most of the ink has, weighted by how colourful it is; None when it is colourless."""
    ink = picture[_ink(picture)].astype(np.float64) / 255
    if not len(ink):
        return None
    chroma = ink.max(1) - ink.min(1)
    if chroma.mean() < COLOURLESS:
        return None
    edges = [*HUES.values(), RED_AGAIN, 360]
    weights = np.histogram(_hue(ink, chroma), edges, weights=chroma)[0]
    weights[0] += weights[-1]
    return list(HUES)[weights[:-1].argmax()]


def objects(picture: np.ndarray) -> list[Box]:
    """Boxes of what stands on the ground, the largest first; parts within one another count as one, crumbs not."""
    boxes = sorted(_components(_ink(picture)), key=lambda box: -box.area)
    merged: list[Box] = []
    for box in boxes:
        host = next((i for i, other in enumerate(merged) if box.overlap(other) >= INSIDE), None)
        if host is None:
            merged.append(box)
        else:
            merged[host] = merged[host].joined(box)
    merged.sort(key=lambda box: -box.area)
    return [box for box in merged if box.area >= MIN_AREA * merged[0].area]


def count(picture: np.ndarray) -> int:
    """Number of objects."""
    return len(objects(picture))


def relation(first: Box, second: Box) -> str:
    """Where the first object is as seen from the second: left, right, above or below, whichever is the farthest."""
    down = first.top + first.bottom - second.top - second.bottom
    right = first.left + first.right - second.left - second.right
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "below" if down > 0 else "above"


def crop(picture: np.ndarray, box: Box) -> np.ndarray:
    """The object alone on a square of its own ground, as large as the drawings that an encoder was shown."""
    side = len(picture)
    top, left, bottom, right = (round(edge * side) for edge in (box.top, box.left, box.bottom, box.right))
    cut = picture[top:bottom, left:right]
    square = np.empty((max(cut.shape), max(cut.shape), 3), np.uint8)
    square[:] = _ground(picture)[0]
    y, x = (len(square) - cut.shape[0]) // 2, (len(square) - cut.shape[1]) // 2
    square[y : y + cut.shape[0], x : x + cut.shape[1]] = cut
    pixels = torch.from_numpy(square).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).round().byte().numpy()


def _ground(picture: np.ndarray) -> tuple[np.ndarray, float]:
    """Median colour of the border, and the share of the border that is of it."""
    width = max(1, round(RING * len(picture)))
    inner = np.ones(picture.shape[:2], bool)
    inner[width:-width, width:-width] = False
    ring = picture[inner].astype(np.float64)
    colour = np.median(ring, axis=0)
    return colour, float((_distance(ring, colour) < DIFFERENT).mean())


def _ink(picture: np.ndarray) -> np.ndarray:
    """Mask of the pixels that are not ground."""
    return _distance(picture.astype(np.float64), _ground(picture)[0]) >= DIFFERENT


def _distance(a: np.ndarray, b: np.ndarray | tuple[int, int, int]) -> np.ndarray:
    return np.sqrt(((a - np.asarray(b, np.float64)) ** 2).sum(-1))


def _hue(ink: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """Hue of each pixel in degrees; 0 where there is none, which has no weight."""
    red, green, blue = ink.T
    safe = np.where(chroma > 0, chroma, 1)
    top = ink.argmax(1)
    sixths = np.choose(top, [(green - blue) / safe % 6, (blue - red) / safe + 2, (red - green) / safe + 4])
    return 60 * sixths % 360


def _components(mask: np.ndarray) -> Iterator[Box]:
    """Boxes of the connected parts: the highest number of a part spreads through it, a pixel at a time."""
    ink = F.adaptive_max_pool2d(torch.from_numpy(mask)[None, None].float(), GRID)
    labels = torch.arange(1.0, GRID * GRID + 1).view_as(ink) * ink
    while True:
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * ink
        if torch.equal(spread, labels):
            break
        labels = spread
    for label in labels[labels > 0].unique():
        rows, columns = torch.where(labels[0, 0] == label)
        corners = (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
        yield Box(*(corner.item() / GRID for corner in corners), area=len(rows))
