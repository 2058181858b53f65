"""cut-outs and their places -> pictures of which it is known what they show: the real rows of quality.py."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dalle_demo.data.pairs import WHITE, lay, place

PLACES = {  # of each object, as many as are counted: (zoom, right, down), 1 is half a side
    1: ((1.0, 0.0, 0.0),),
    2: ((0.45, -0.5, 0.0), (0.45, 0.5, 0.0)),
    3: ((0.42, -0.5, 0.45), (0.42, 0.5, 0.45), (0.42, 0.0, -0.5)),
    4: ((0.42, -0.5, -0.5), (0.42, 0.5, -0.5), (0.42, -0.5, 0.5), (0.42, 0.5, 0.5)),
}
SIDES = {  # where the first of two objects is
    "left": ((0.45, -0.5, 0.0), (0.45, 0.5, 0.0)),
    "right": ((0.45, 0.5, 0.0), (0.45, -0.5, 0.0)),
    "above": ((0.45, 0.0, -0.5), (0.45, 0.0, 0.5)),
    "below": ((0.45, 0.0, 0.5), (0.45, 0.0, -0.5)),
}
HUE_OF = {"red": 0, "orange": 28, "yellow": 52, "green": 120, "blue": 215, "purple": 280, "pink": 325}  # degrees


def compose(
    cutouts: Sequence[np.ndarray], places: Sequence[tuple[float, float, float]], colour: tuple[int, int, int] = WHITE
) -> np.ndarray:
    """Lay RGBA cut-outs (S, S, 4) at their places on a ground: (S, S, 3) uint8."""
    canvas = torch.tensor(colour, dtype=torch.float32)[None, :, None, None]
    for cutout, (zoom, right, down) in zip(cutouts, places, strict=True):
        ink = place(torch.tensor(cutout)[None], torch.tensor([zoom]), torch.tensor([[right, down]]))
        canvas = lay(ink, canvas)
    return canvas[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def recolour(cutout: np.ndarray, colour: str) -> np.ndarray:
    """Turn all hues of an RGBA cut-out alike, so that the most common one becomes `colour`."""
    hsv = np.array(Image.fromarray(cutout[:, :, :3]).convert("HSV"))
    weight = hsv[:, :, 1].astype(float) * hsv[:, :, 2] * cutout[:, :, 3]
    common = np.bincount(hsv[:, :, 0].ravel() // 8, weight.ravel(), minlength=32).argmax() * 8 + 4
    hsv[:, :, 0] += np.uint8((round(HUE_OF[colour] / 360 * 256) - common) % 256)  # wraps around as hues do
    return np.dstack([np.array(Image.fromarray(hsv, "HSV").convert("RGB")), cutout[:, :, 3]])
