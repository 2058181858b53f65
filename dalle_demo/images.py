"""pixels (B, 3, H, W) in [-1, 1] <-> PIL pictures, grids and PNG files that remember how they were made."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, PngImagePlugin
from torch import Tensor

CHUNK = "dalle_demo"  # name of the PNG text chunk that holds the whole request as JSON


def to_pil(pixels: Float[Tensor, "B 3 H W"]) -> list[Image.Image]:
    """Round pixels in [-1, 1] (clipped) to 8-bit RGB pictures."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def from_pil(pictures: Sequence[Image.Image]) -> Float[Tensor, "B 3 H W"]:
    """Inverse of `to_pil` for RGB pictures of one size."""
    stacked = torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def square(picture: Image.Image) -> Image.Image:
    """RGB picture on white, padded to a square about its middle."""
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(picture.convert("RGBA"), ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas.convert("RGB")


def grid(pictures: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Lay pictures of one size out row by row on white, in about a square unless `columns` is given."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def save_png(picture: Image.Image, path: Path, request: Mapping[str, Any], origin: Mapping[str, Any]) -> Path:
    """Write a PNG with two text chunks: `parameters`, as AUTOMATIC1111 writes it, and `dalle_demo`, as JSON.

    Args:
        picture: what to write.
        path: where; written under a temporary name first.
        request: the fields of its parameters that make this one picture again.
        origin: what drew it, as told by the engine.
    """
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("parameters", describe(request, origin, picture.size))
    chunks.add_itxt(CHUNK, json.dumps({**origin, "request": dict(request)}, ensure_ascii=False))
    partial = path.with_name(path.name + ".part")
    picture.save(partial, "PNG", pnginfo=chunks)
    partial.replace(path)
    return path


def save_each(
    pictures: Sequence[Image.Image],
    seeds: Sequence[int],
    request: Mapping[str, Any],
    origin: Mapping[str, Any],
    stem: Path,
) -> list[Path]:
    """Write pictures as `stem`-SEED.png, each with the settings that draw it alone: a request's, and its seed."""
    paths = [stem.with_name(f"{stem.name}-{seed}.png") for seed in seeds]
    for picture, seed, path in zip(pictures, seeds, paths, strict=True):
        save_png(picture, path, {**request, "n": 1, "seed": seed}, origin)
    return paths


def save_animation(pictures: Sequence[Image.Image], path: Path, milliseconds: int) -> Path:
    """Write pictures of one size as a WebP that shows them one after another, for ever."""
    partial = path.with_name(path.name + ".part")
    frames = {"save_all": True, "append_images": pictures[1:], "duration": milliseconds, "loop": 0}
    pictures[0].save(partial, "WEBP", quality=90, **frames)
    partial.replace(path)
    return path


def describe(request: Mapping[str, Any], origin: Mapping[str, Any], size: tuple[int, int]) -> str:
    """Prompt and settings in the lines that AUTOMATIC1111 and its successors show and read back."""
    settings = {
        "Steps": origin["steps"],
        "Sampler": origin["sampler"],
        "CFG scale": request.get("guidance_scale"),  # of a picture that was made from pictures there is none
        "Seed": request.get("seed"),
        "Size": f"{size[0]}x{size[1]}",
        "Model": origin["model"],
    }
    told = ("prompt", "n", "seed", "guidance_scale")
    settings |= {name.replace("_", "-").capitalize(): value for name, value in request.items() if name not in told}
    lines = [f"{name}: {value}" for name, value in settings.items() if value is not None]
    return f"{request['prompt']}\n{', '.join(lines)}"


def slug(prompt: str) -> str:
    """Letters and digits of a prompt, short enough for a file name, in any script."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "picture"


def read_request(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Request and origin stored by `save_png`; raises ValueError when the file holds none.

    The request may be of another version, with settings that GenerateParams does not have.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            origin = json.loads(picture.text[CHUNK])
        request = dict(origin.pop("request"))
        if "prompt" not in request or not request.keys() & {"seed", "operation"}:  # which made it out of pictures
            raise KeyError("prompt")
        return request, dict(origin)
    except (OSError, AttributeError, KeyError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} holds no settings of a picture made here") from error
