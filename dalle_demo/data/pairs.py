"""data set folder -> Pairs: pictures with alpha, their captions, and renders of them made afresh from a seed."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

WHITE = (255, 255, 255)
BACKGROUNDS = {  # name -> (Chinese name, RGB)
    "red": ("红色", (229, 57, 53)),
    "orange": ("橙色", (255, 152, 0)),
    "yellow": ("黄色", (255, 235, 59)),
    "green": ("绿色", (67, 160, 71)),
    "blue": ("蓝色", (66, 165, 245)),
    "purple": ("紫色", (142, 36, 170)),
    "pink": ("粉色", (248, 187, 208)),
    "gray": ("灰色", (158, 158, 158)),
    "black": ("黑色", (33, 33, 33)),
}
TEMPLATES = ("{}", "{}", "a {}", "a picture of a {}", "an emoji of a {}")
STYLE_TEMPLATES = ("{style} {name}", "{name}, {style} style", "a {style} {name}")
CHINESE_SHARE = 1 / 3  # of captions
HELD_OUT = Path(__file__).with_name("held_out.json")  # written by benchmarks/split.py


@dataclass(frozen=True)
class Pairs:
    """`images` is a memory map of (N, S, S, 4) uint8 RGBA with straight alpha; `rows[i]` describes image i."""

    images: np.ndarray
    rows: list[dict]
    fingerprint: str  # changes with any caption and with the number of pictures

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.rows)

    def pictures(self, indices: np.ndarray) -> UInt8[Tensor, "B S S 4"]:
        """Copy the pictures of `indices` into one tensor."""
        return torch.from_numpy(self.images[np.asarray(indices)])


def load(folder: Path) -> Pairs:
    """Read a folder written by `data emoji`; raises FileNotFoundError or ValueError that says what is wrong."""
    for name in ("images.npy", "pairs.jsonl"):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder / name} is missing; build it with: python -m dalle_demo data emoji --out {folder}"
            )
    images = np.load(folder / "images.npy", mmap_mode="r")
    text = (folder / "pairs.jsonl").read_bytes()
    rows = [json.loads(line) for line in text.splitlines()]
    if len(images) != len(rows) or images.ndim != 4 or images.shape[3] != 4:
        raise ValueError(f"{folder}: {images.shape} pictures and {len(rows)} captions do not belong together")
    return Pairs(images, rows, hashlib.sha256(text).hexdigest()[:12])


class Split(NamedTuple):
    """Indices of drawings."""

    training: np.ndarray
    styles: np.ndarray  # of a concept that training sees in other styles
    concepts: np.ndarray  # that training does not see at all


def split(pairs: Pairs) -> Split:
    """Sides of all drawings; a drawing's side follows from its emoji and style alone, by a file."""
    held_out = json.loads(HELD_OUT.read_text())
    concepts, styles = set(held_out["concepts"]), set(held_out["styles"])
    unknown = np.array([row["hex"] in concepts for row in pairs.rows], bool)
    other = np.array([f"{row['hex']}/{row['style']}" in styles for row in pairs.rows], bool)
    return Split(np.flatnonzero(~unknown & ~other), np.flatnonzero(other & ~unknown), np.flatnonzero(unknown))


def unseen_words(pairs: Pairs) -> set[str]:
    """What no noun may be that training is told beside captions: names of held-out concepts, benchmarks' words."""
    held_out = json.loads(HELD_OUT.read_text())
    return {*held_out["words"], *(row["name"] for row in pairs.rows if row["hex"] in held_out["concepts"])}


def caption(row: dict, rng: np.random.Generator) -> str:
    """Draw one caption: name, keywords or the emoji itself; English or Chinese; with or without style words."""
    chinese = rng.random() < CHINESE_SHARE and bool(row["name_zh"])
    name = _name(row, chinese, rng)
    if not chinese:
        return phrase(name, row["style"], rng)
    return f"{row['style_zh']}风格的{name}" if rng.random() < 0.5 else name


def phrase(name: str, style: str, rng: np.random.Generator) -> str:
    """Draw one English caption of what is named, with or without style words."""
    if rng.random() < 0.5:
        return _pick(STYLE_TEMPLATES, rng).format(style=style, name=name)
    return _pick(TEMPLATES, rng).format(name)


def _name(row: dict, chinese: bool, rng: np.random.Generator) -> str:
    name, keywords = (row["name_zh"], row["keywords_zh"]) if chinese else (row["name"], row["keywords"])
    draw = rng.random()
    if draw < 0.08 and keywords:
        return _pick(keywords, rng)
    if draw < 0.16 and keywords:
        return f"{name}, {_pick(keywords, rng)}, {_pick(keywords, rng)}"
    if draw < 0.20:
        return row["emoji"]
    return name


def _pick(options: tuple | list, rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]


def all_captions(pairs: Pairs) -> list[tuple[str, str]]:
    """Every distinct (text, English meaning): names, keywords, emoji, styles and backgrounds, both languages.

    Chinese names and keywords carry the English name of the same emoji as their meaning.
    """
    texts: dict[str, str] = {}
    for row in pairs.rows:
        texts.update({word: word for word in (row["name"], *row["keywords"])})
        styled = f"{row['style']} {row['name']}"
        texts[styled] = styled
    for row in pairs.rows:
        for word in (row["emoji"], row["name_zh"], *row["keywords_zh"]):
            texts.setdefault(word, row["name"])
    for background, (chinese, _) in BACKGROUNDS.items():
        phrase = f"on a {background} background"
        texts |= {phrase: phrase, f"{chinese}背景": phrase}
    texts.pop("", None)
    return sorted(texts.items())


def place(
    pictures: UInt8[Tensor, "B S S 4"],
    zoom: Float[Tensor, " B"],
    shift: Float[Tensor, "B 2"],
    flip: Tensor | None = None,
) -> Float[Tensor, "B 4 S S"]:
    """Scale each cut-out by `zoom` and move it by `shift` (1 is half a side); returns RGBA in 0..255 and 0..1.

    Colours are premultiplied, so that edges blend without dark fringes.
    """
    x = pictures.permute(0, 3, 1, 2).float()
    alpha = x[:, 3:] / 255
    turn = torch.zeros(len(x), 2, 3)
    turn[:, 0, 0] = 1 / zoom if flip is None else torch.where(flip, -1 / zoom, 1 / zoom)
    turn[:, 1, 1] = 1 / zoom
    turn[:, :, 2] = -shift / zoom[:, None]
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    return F.grid_sample(torch.cat([x[:, :3] * alpha, alpha], 1), grid, align_corners=False)


def lay(ink: Float[Tensor, "B 4 S S"], below: Float[Tensor, "B 3 #S #S"]) -> Float[Tensor, "B 3 S S"]:
    """Lay placed cut-outs over opaque colours, 0..255."""
    return ink[:, :3] + below * (1 - ink[:, 3:])


def render(
    pictures: UInt8[Tensor, "B S S 4"],
    colours: Float[Tensor, "B 3"],
    zoom: Float[Tensor, " B"],
    shift: Float[Tensor, "B 2"],
    flip: Tensor | None = None,
) -> Float[Tensor, "B 3 S S"]:
    """Lay each cut-out, placed as `place` says, on its background colour (0..255).

    Returns pixels in [-1, 1].
    """
    return lay(place(pictures, zoom, shift, flip), colours[:, :, None, None]) / 127.5 - 1
