"""drawings -> composed scenes with true captions: colours, counts, relations and sizes, made afresh from a seed."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dalle_demo.data.pairs import BACKGROUNDS, CHINESE_SHARE, STYLE_TEMPLATES, WHITE, Pairs, lay, place

if TYPE_CHECKING:
    import inflect

HUES = {"red": 2, "orange": 28, "yellow": 52, "green": 125, "blue": 212, "purple": 278, "pink": 330}  # degrees
LIGHT = {"orange", "yellow", "pink"}  # not these colours unless they are bright
PALE = {"pink"}
COUNTS = ((1, "one", "一个"), (2, "two", "两个"), (3, "three", "三个"), (4, "four", "四个"))
PLACES = {  # of as many equal things: centres, in half sides from the middle, and zoom
    1: (((0.0, 0.0),), 0.8),
    2: (((-0.5, 0.0), (0.5, 0.0)), 0.46),
    3: (((0.0, -0.48), (-0.5, 0.48), (0.5, 0.48)), 0.44),
    4: (((-0.5, -0.5), (0.5, -0.5), (-0.5, 0.5), (0.5, 0.5)), 0.44),
}
RELATIONS = {  # place of the first thing
    "to the left of": ("在{}的左边", (-0.5, 0.0)),
    "to the right of": ("在{}的右边", (0.5, 0.0)),
    "above": ("在{}的上面", (0.0, -0.5)),
    "below": ("在{}的下面", (0.0, 0.5)),
}
SIZES = {"small": ("小小的", 0.4), "big": ("很大的", 1.0)}
JITTER = 0.06
KINDS = ("background", "hue", "count", "relation", "size")
KIND_SHARES = (0.2, 0.25, 0.2, 0.25, 0.1)
STYLED_SHARE = 0.3
COLOUR_WORDS = {*HUES, "white", "black", "brown", "gray", "grey", "gold", "golden", "silver", "dark", "light"}
COLOUR_CHARACTERS = set("红橙黄绿蓝紫粉黑白棕灰金银")
MINIMUM_SATURATION, COLOURED_SHARE, CONCENTRATION = 0.3, 0.5, 0.9


@dataclass(frozen=True)
class Item:
    """One drawing of a scene."""

    index: int
    zoom: float
    shift: tuple[float, float]  # in half sides
    turn: int = 0  # of its hue, degrees
    colour: str = ""  # that it is turned to


@dataclass(frozen=True)
class Scene:
    """What to draw, and what it is called."""

    items: tuple[Item, ...]
    background: str | None
    caption: str


class Scenes:
    """Draws scenes from the drawings of `indices`."""

    def __init__(self, pairs: Pairs, indices: Sequence[int]):
        self.pairs = pairs
        self.by_style: dict[str, list[int]] = {}
        for i in indices:
            self.by_style.setdefault(pairs.rows[i]["style"], []).append(int(i))
        self.hues = {int(i): hue for i in indices if (hue := main_hue(pairs.images[i])) is not None}

    def draw(self, index: int, rng: np.random.Generator) -> Scene:
        """Scene about a drawing; one with a colour only where the drawing has a single one."""
        kind = rng.choice(KINDS, p=KIND_SHARES)
        chinese = rng.random() < CHINESE_SHARE and bool(self.pairs.rows[index]["name_zh"])
        if kind == "hue" and index not in self.hues:
            kind = "background"
        scene = getattr(self, f"_{kind}")(index, chinese, rng)
        if rng.random() < STYLED_SHARE:
            row = self.pairs.rows[index]
            template = str(rng.choice(STYLE_TEMPLATES[:2]))
            caption = f"{row['style_zh']}风格的{scene.caption}" if chinese else re.sub("^an? ", "", scene.caption)
            caption = caption if chinese else template.format(style=row["style"], name=caption)
            return dataclasses.replace(scene, caption=caption)
        return scene

    def _background(self, index: int, chinese: bool, rng: np.random.Generator) -> Scene:
        colour = str(rng.choice(list(BACKGROUNDS)))
        name = self._name(index, chinese)
        caption = f"{BACKGROUNDS[colour][0]}背景的{name}" if chinese else f"{a(name)} on {a(colour)} background"
        return Scene((Item(index, 0.85, jitter(rng)),), colour, caption)

    def _hue(self, index: int, chinese: bool, rng: np.random.Generator) -> Scene:
        colour = str(rng.choice(list(HUES)))
        name = self._name(index, chinese)
        plain = name if chinese else " ".join(word for word in name.split() if word not in COLOUR_WORDS)
        if (chinese and set(name) & COLOUR_CHARACTERS) or not plain:
            return self._background(index, chinese, rng)
        item = Item(index, 0.95, jitter(rng), round(HUES[colour] - self.hues[index]), colour)
        return Scene((item,), None, f"{BACKGROUNDS[colour][0]}的{plain}" if chinese else a(f"{colour} {plain}"))

    def _count(self, index: int, chinese: bool, rng: np.random.Generator) -> Scene:
        number, english, characters = COUNTS[rng.integers(len(COUNTS))]
        centres, zoom = PLACES[number]
        items = tuple(Item(index, zoom, moved(centre, rng)) for centre in centres)
        name = self._name(index, chinese)
        return Scene(items, None, f"{characters}{name}" if chinese else f"{english} {plural(name, number)}")

    def _relation(self, index: int, chinese: bool, rng: np.random.Generator) -> Scene:
        style = self.by_style[self.pairs.rows[index]["style"]]
        other = style[rng.integers(len(style))]
        relation = str(rng.choice(list(RELATIONS)))
        characters, (x, y) = RELATIONS[relation]
        items = (Item(index, 0.46, moved((x, y), rng)), Item(other, 0.46, moved((-x, -y), rng)))
        first, second = self._name(index, chinese), self._name(other, chinese)
        caption = f"{first}{characters.format(second)}" if chinese else f"{a(first)} {relation} {a(second)}"
        return Scene(items, None, caption)

    def _size(self, index: int, chinese: bool, rng: np.random.Generator) -> Scene:
        size = str(rng.choice(list(SIZES)))
        characters, zoom = SIZES[size]
        name = self._name(index, chinese)
        item = Item(index, zoom, moved((0.0, 0.0), rng, 0.3 if size == "small" else 0.0))
        return Scene((item,), None, f"{characters}{name}" if chinese else a(f"{size} {name}"))

    def _name(self, index: int, chinese: bool) -> str:
        row = self.pairs.rows[index]
        return (chinese and row["name_zh"]) or row["name"]

    def render(self, scenes: Sequence[Scene]) -> Float[Tensor, "B 3 S S"]:
        """Pixels in [-1, 1]; later items lie above earlier ones."""
        grounds = [BACKGROUNDS[scene.background][1] if scene.background else WHITE for scene in scenes]
        side = self.pairs.images.shape[1]
        pixels = torch.tensor(grounds, dtype=torch.float32)[:, :, None, None].repeat(1, 1, side, side)
        for layer in range(max(len(scene.items) for scene in scenes)):
            rows = [i for i, scene in enumerate(scenes) if len(scene.items) > layer]
            items = [scenes[i].items[layer] for i in rows]
            drawings = np.stack([turned(self.pairs.images[item.index], item) for item in items])
            zoom, shift = torch.tensor([item.zoom for item in items]), torch.tensor([item.shift for item in items])
            pixels[rows] = lay(place(torch.from_numpy(drawings), zoom, shift), pixels[rows])
        return pixels / 127.5 - 1


def jitter(rng: np.random.Generator) -> tuple[float, float]:
    """Small shift."""
    return moved((0.0, 0.0), rng)


def moved(centre: tuple[float, float], rng: np.random.Generator, most: float = JITTER) -> tuple[float, float]:
    """Centre moved by at most `most` either way."""
    x, y = np.asarray(centre) + rng.uniform(-most, most, size=2)
    return float(x), float(y)


def main_hue(rgba: np.ndarray) -> float | None:
    """Hue in degrees of a drawing that is mostly of one; None of others."""
    small = Image.fromarray(np.ascontiguousarray(rgba[::4, ::4, :3])).convert("HSV")
    hue, saturation, value = np.moveaxis(np.asarray(small, dtype=np.float32), 2, 0)
    opaque = rgba[::4, ::4, 3] > 128
    coloured = opaque & (saturation > 255 * MINIMUM_SATURATION) & (value > 50)
    if coloured.sum() < COLOURED_SHARE * max(opaque.sum(), 1):
        return None
    mean = np.exp(2j * np.pi * hue[coloured] / 256).mean()
    return float(np.degrees(np.angle(mean)) % 360) if abs(mean) > CONCENTRATION else None


def turned(rgba: np.ndarray, item: Item) -> np.ndarray:
    """Drawing with its hues turned as the item asks."""
    if not item.colour:
        return rgba
    hsv = np.array(Image.fromarray(np.ascontiguousarray(rgba[..., :3])).convert("HSV"))
    hsv[..., 0] = (hsv[..., 0].astype(np.int32) + round(item.turn * 256 / 360)) % 256
    if item.colour in LIGHT:
        hsv[..., 2] = 255 - (255 - hsv[..., 2]) // 3
    if item.colour in PALE:
        hsv[..., 1] = hsv[..., 1] // 2
    return np.concatenate([np.asarray(Image.fromarray(hsv, "HSV").convert("RGB")), rgba[..., 3:]], 2)


@cache
def _english() -> "inflect.engine":
    import inflect  # for the embedded model's data only

    return inflect.engine()


@cache
def a(name: str) -> str:
    """Name with its article."""
    return _english().a(name)


@cache
def plural(name: str, number: int) -> str:
    """Name of so many things."""
    already = name.endswith("s") and not name.endswith(("ss", "us"))  # shorts, grapes
    return name if number == 1 or already else _english().plural_noun(name, number)
