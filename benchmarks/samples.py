"""preset -> contact sheet: ten common nouns, four pictures each at default settings, seeds 0 to 3, none picked.

python benchmarks/samples.py --preset nano --out weights/nano/samples.png
"""

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dalle_demo import DalleEngine
from dalle_demo.images import grid

PROMPTS = ("apple", "cat", "car", "house", "pizza", "heart", "sun", "tree", "robot", "ghost")
FIRST_SEED, N, COLUMNS, CAPTION = 0, 4, 5, 26


def main() -> None:
    """Draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano", help="preset, or folder with weights")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    options = parser.parse_args()
    engine = DalleEngine.load(options.preset)
    tiles = []
    for prompt in PROMPTS:
        (last,) = engine.generate(engine.params(prompt, n=N, seed=FIRST_SEED), previews=False)
        tiles.append(caption(grid(last.images, 2), prompt))
    grid(tiles, COLUMNS, gap=12).save(options.out)
    print(options.out)


def caption(picture: Image.Image, text: str) -> Image.Image:
    """Picture with its prompt above it."""
    tile = Image.new("RGB", (picture.width, picture.height + CAPTION), "white")
    tile.paste(picture, (0, CAPTION))
    ImageDraw.Draw(tile).text((4, 2), text, fill="black", font=ImageFont.load_default(18))
    return tile


if __name__ == "__main__":
    main()
