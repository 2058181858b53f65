"""preset -> contact sheet: fixed prompts, four pictures each at default settings, seeds 0 to 3, none picked.

python benchmarks/samples.py --preset nano --out weights/nano/samples.png           # ten common nouns
python benchmarks/samples.py --preset nano --out weights/nano/sheet.png --all       # 64 prompts of all kinds
"""

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dalle_demo.engines import engine_for
from dalle_demo.images import grid

PROMPTS = ("apple", "cat", "car", "house", "pizza", "heart", "sun", "tree", "robot", "ghost")
SHEET = (
    *("dog", "fish", "flower", "banana", "strawberry", "ice cream", "rocket", "airplane", "bicycle", "boat", "moon"),
    *("star", "book", "key", "umbrella", "guitar", "clock", "crown", "smiling face", "baby", "butterfly", "frog"),
    *("penguin", "snake"),
    *("flat dog", "3d dog", "outlined dog", "shaded dog", "glossy cake", "minimal cake", "cartoon cake", "retro cake"),
    *("a blue apple", "a green heart", "a purple car", "a pink tree", "a yellow fish", "a red house"),
    *("a cat on a blue background", "a star on a black background", "a pizza on a green background"),
    *("two apples", "three stars", "four hearts", "one dog", "a small car", "a big sun"),
    *("a cat to the left of a dog", "a star above a house", "an apple to the right of a banana", "a fish below a boat"),
    *("puppy", "automobile", "blossom", "kitten", "dwelling"),
    *("狗", "小猫", "汽车", "蓝色的心", "红苹果", "月亮", "两个苹果", "黄色背景的房子"),
)  # fmt: skip
GLOSSES = {  # for the caption, whose font has no Chinese
    "狗": "zh: dog", "小猫": "zh: kitten", "汽车": "zh: car", "蓝色的心": "zh: blue heart", "红苹果": "zh: red apple",
    "月亮": "zh: moon", "两个苹果": "zh: two apples", "黄色背景的房子": "zh: house on yellow",
}  # fmt: skip
FIRST_SEED, N, CAPTION = 0, 4, 26


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano", help="preset, or folder with weights")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--all", action="store_true", help=f"{len(SHEET)} prompts of all kinds instead of ten nouns")
    options = parser.parse_args()
    engine = engine_for(options.preset).load(options.preset)
    tiles = []
    for prompt in SHEET if options.all else PROMPTS:
        (last,) = engine.generate(engine.params(prompt, n=N, seed=FIRST_SEED), previews=False)
        tiles.append(caption(grid(last.images, 2), GLOSSES.get(prompt, prompt)))
    grid(tiles, 8 if options.all else 5, gap=12).save(options.out)
    print(options.out)


def caption(picture: Image.Image, text: str) -> Image.Image:
    """Picture with its prompt above it."""
    tile = Image.new("RGB", (picture.width, picture.height + CAPTION), "white")
    tile.paste(picture, (0, CAPTION))
    ImageDraw.Draw(tile).text((4, 2), text, fill="black", font=ImageFont.load_default(18))
    return tile


if __name__ == "__main__":
    main()
