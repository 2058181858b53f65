"""six small sets of unseen styles -> how much closer fine-tuning brings them, and what it forgets.

python benchmarks/finetune.py --emoji data/emoji --out runs/finetune

Icons of openly licensed sets are fetched with npm, none of them among those that nano was trained on. On each
one the command line is run as a user would. Then the tuned model and its base draw the captions that were trained on,
and other names; pictures are compared on what no training here uses, features of an EfficientNet-Lite2 and colours.
Beside the figures stands what the tuned tokenizer makes of the training pictures (of nano's, only the decoder is
trained). That is no strict ceiling: distances are means over all pairs, so drawings can be nearer.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dalle_demo.data import emoji, pairs, uploads
from dalle_demo.data.emoji import Source
from dalle_demo.engines import DalleEngine, Engine, engine_for
from dalle_demo.evaluation.features import PARTS, Encoder
from dalle_demo.images import from_pil, grid, to_pil
from dalle_demo.models.vqgan import VAE, VQGAN
from dalle_demo.training.export import read_log
from dalle_demo.training.finetune import FinetuneSettings, high_water
from dalle_demo.training.stages import plain_render

ROOT = Path(__file__).resolve().parent.parent
SAMPLES, SEED = 4, 1  # a prompt
LARGEST_LOSS = 0.1  # of alignment on unrelated prompts
LONGEST = 600  # seconds of a run
SHARE_WANTED = 0.9  # of prompts that are to come closer


@dataclass(frozen=True)
class Set:
    """Icons of one package, and how they are captioned."""

    source: Source
    caption: str
    icons: str
    ink: str = ""  # colour that replaces the icons' own
    paper: str = ""  # colour behind them

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Names of icons and captions."""
        return [(icon, self.caption.format(icon.replace("-", " "))) for icon in self.icons.split()]


def _set(package: str, version: str, licence: str, credit: str, caption: str, icons: str, **colours: str) -> Set:
    return Set(Source(f"@iconify-json/{package}", version, licence, credit, "", ""), caption, icons, **colours)


SETS = {
    "silhouette": _set(
        "game-icons", "1.2.4", "CC-BY-3.0", "game-icons.net contributors", "{} silhouette",
        "badger bat bee beaver butterfly camel cat chicken cow crab deer dolphin duck elephant frog goat hedgehog "
        "kangaroo koala lion monkey mouse octopus owl panda penguin pig rabbit",
    ),
    "chalk": _set(
        "game-icons", "1.2.4", "CC-BY-3.0", "game-icons.net contributors", "chalk drawing of {}",
        "acorn anvil backpack barrel boots bread broom cactus cherry compass crown dragonfly feather flamingo fox "
        "grapes helicopter hourglass igloo kite lantern mushroom padlock pumpkin",
        ink="#f2f0e6", paper="#2b4a3f",
    ),
    "blueprint": _set(
        "icon-park", "1.2.4", "Apache-2.0", "IconPark, ByteDance", "blueprint of {}",
        "airplane apple banana bear book bread cactus cake camera carrot castle cherry duck elephant fish ghost gift "
        "hamburger lamp rocket",
    ),
    "coin": _set(
        "cryptocurrency-color", "1.2.4", "CC0-1.0", "Christopher Downer", "coin of {}",
        "btc chat chips dash doge dot drop eth fair fuel fun game gold link ltc mana music nano neo pink safe sky trx "
        "xmr zec",
    ),
    "office": _set(
        "flat-color-icons", "1.2.3", "MIT", "Flat Color Icons, Icons8", "office icon of {}",
        "alarm-clock binoculars briefcase calculator calendar camera factory globe headset home key phone",
    ),
    "badge": _set(
        "streamline-kameleon-color", "1.2.2", "CC-BY-4.0", "Streamline Kameleon, Webalys", "badge of {}",
        "butterfly castle chicken crab donut drum hammer harp ladybug lamp laptop microwave motorbike mountain "
        "newspaper perfume rainbow robot strawberry truck wallet yacht",
    ),
}  # fmt: skip
UNRELATED = (
    "banana", "bicycle", "bread", "bus", "candle", "crown", "dog", "fire", "fish", "guitar", "hammer", "horse",
    "ice cream", "lemon", "maple leaf", "moai", "mushroom", "pizza", "potato", "rainbow", "ring", "rocket", "rose",
    "sailboat", "snowflake", "soccer ball", "strawberry", "tractor", "umbrella", "watermelon",
)  # fmt: skip


class Features:
    """Pictures (B, 3, H, W) in [-1, 1] -> vectors (B, F), whose product is the mean cosine of the encoder's parts."""

    def __init__(self):
        self._encoder = Encoder()

    def __call__(self, pixels: Tensor) -> Tensor:
        """Vectors of a batch."""
        found = torch.from_numpy(self._encoder([np.asarray(picture) for picture in to_pil(pixels)]))
        return torch.cat([F.normalize(part, dim=1) for part in found.split(PARTS, 1)], 1) / len(PARTS) ** 0.5


def main() -> None:
    """Run all sets and write one JSON, anew after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True, help="folder made by `data emoji`: unrelated drawings")
    parser.add_argument("--out", type=Path, required=True, help="folder for data, runs and sheets of samples")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--base", default="nano")
    parser.add_argument("--packages", type=Path, help="folder of npm packages unpacked earlier, instead of fetching")
    parser.add_argument("train", nargs="*", help="further flags of `train finetune`, after --")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    features, results = Features(), {}
    references = unrelated_references(options.emoji, features)
    base = engine_for(options.base).load(options.base)
    unrelated = alignment(draw(base, list(references)), references, features)
    for name in options.sets:
        results[name] = measure(name, options, base, features, references, unrelated)
        summary = {"base": options.base, "flags": options.train, "sets": results}
        summary["passed"] = [name for name, one in results.items() if one["passed"]]
        (options.out / "finetune.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))


def measure(
    name: str, options: argparse.Namespace, base: Engine, features: Features, references: dict, unrelated: float
) -> dict:
    """Figures of one set."""
    chosen, out = SETS[name], options.out / name
    build(chosen, out / "upload", options.packages)
    fresh = not (out / "run" / "settings.json").exists()
    seconds, peak = train(options.base, out / "upload", out / "run", options.train)
    data = out / "run" / "data"
    examples = uploads.load(data)
    side = (base.config.vqgan if isinstance(base, DalleEngine) else base.config.vae).image_size
    parts = uploads.split(examples, FinetuneSettings.read(out / "run").seed)
    training, held_out = ([examples[i] for i in part] for part in parts)
    pixels = [uploads.pixels(data, part, side) for part in (training, held_out)]
    known, targets = map(features, pixels)
    tuned = type(base).load(str(out / "run" / "weights"))
    ceiling = apart_each(features(reconstructed(tuned, pixels[0])).split(1), targets)
    prompts = [example.caption for example in training]
    before, after = draw(base, prompts), draw(tuned, prompts)
    save_sheet(out / "samples.png", before, after)
    apart = [apart_each(map(features, drawn.values()), targets) for drawn in (before, after)]
    share = float((apart[1] < apart[0]).mean())
    kept = alignment(draw(tuned, list(references)), references, features)
    return {
        "package": f"{chosen.source.package} {chosen.source.version}",
        "licence": chosen.source.licence,
        "credit": chosen.source.credit,
        "pictures": [len(training), len(held_out)],
        "seconds": round(seconds),
        "peak_gib": round(peak, 2),
        "fresh": fresh,  # else the seconds are not those of the whole run
        "validation_loss": [round(line["validation_loss"], 3) for line in read_log(out / "run", "validation_loss")],
        "distance_before_and_after": [round(float(one.mean()), 4) for one in apart],
        "distance_of_training_pictures": round(distance(known, targets), 4),
        "distance_of_their_reconstructions": round(float(ceiling.mean()), 4),
        "share_closer": round(share, 3),
        "share_closer_ceiling": round(float((ceiling < apart[0]).mean()), 3),
        "unrelated_before_and_after": [round(unrelated, 4), round(kept, 4)],
        "passed": fresh and seconds <= LONGEST and share >= SHARE_WANTED and kept >= (1 - LARGEST_LOSS) * unrelated,
    }


def build(chosen: Set, folder: Path, packages: Path | None) -> None:
    """Write a folder of PNG files with captions beside them, as somebody would upload it."""
    if packages is None:
        packages = folder.parent / "npm"
        if not (packages / chosen.source.folder).exists():
            packages.mkdir(parents=True, exist_ok=True)
            emoji.fetch(chosen.source, packages)
    folder.mkdir(parents=True, exist_ok=True)
    for icon, caption in chosen.pairs:
        colour(Image.fromarray(emoji.render((chosen.source, icon, ""), packages)), chosen).save(folder / f"{icon}.png")
        (folder / f"{icon}.txt").write_text(caption + "\n")


def colour(icon: Image.Image, chosen: Set) -> Image.Image:
    """An icon in the set's ink, on its paper."""
    shape = icon.getchannel("A")
    if chosen.ink:
        icon = Image.new("RGBA", icon.size, chosen.ink)
        icon.putalpha(shape)
    if chosen.paper:
        icon = Image.alpha_composite(Image.new("RGBA", icon.size, chosen.paper), icon)
    return icon


def train(base: str, data: Path, out: Path, flags: list[str]) -> tuple[float, float]:
    """Seconds and peak memory in GiB of a run by the command line; one that was broken off goes on."""
    command = [sys.executable, "-m", "dalle_demo", "train", "finetune", "--base", base, "--data", data, "--out", out]
    start, peak = time.monotonic(), 0
    run = subprocess.Popen([*map(str, command), "--resume", *flags], cwd=ROOT)
    while run.poll() is None:
        peak = max(peak, high_water(run.pid) or 0)
        time.sleep(0.5)
    if run.returncode:
        raise SystemExit(f"{out}: training failed")
    return time.monotonic() - start, peak / 2**30


def draw(engine: Engine, prompts: list[str]) -> dict[str, Tensor]:
    """Pixels (SAMPLES, 3, H, W) of each prompt, at the model's own settings."""
    drawn = {}
    for prompt in prompts:
        (last,) = engine.generate(engine.params(prompt, n=SAMPLES, seed=SEED), previews=False)
        drawn[prompt] = from_pil(last.images)
    return drawn


def save_sheet(path: Path, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """One prompt a row: the base's pictures on the left, those of the tuned model on the right."""
    rows = [picture for prompt in before for drawn in (before, after) for picture in to_pil(drawn[prompt])]
    grid(rows, 2 * SAMPLES).save(path)


def tokenizer(engine: Engine) -> VQGAN | VAE:
    """What a DALL-E model has for it, or a DALL-E 2 model in its place."""
    return engine.model.vqgan if isinstance(engine, DalleEngine) else engine.model.vae


@torch.inference_mode()
def reconstructed(engine: Engine, pixels: Tensor) -> Tensor:
    """What the tokenizer makes of pictures."""
    model, drawn = tokenizer(engine), []
    for one in pixels.split(1):
        drawn.append(model.decode(model.encode(one)[0]) if isinstance(model, VAE) else model(one)[0])
    return torch.cat(drawn).float()


def apart_each(drawn: Iterable[Tensor], targets: Tensor) -> np.ndarray:
    """`distance` of the samples of each prompt."""
    return np.array([distance(samples, targets) for samples in drawn])


def distance(samples: Tensor, targets: Tensor) -> float:
    """Mean cosine distance of all pairs."""
    return 1 - (samples @ targets.T).mean().item()


def unrelated_references(folder: Path, features: Features) -> dict[str, Tensor]:
    """Mean feature of the drawings of each unrelated name in the data that nano was trained on."""
    data = pairs.load(folder)
    references = {}
    for name in UNRELATED:
        rows = np.array([i for i, row in enumerate(data.rows) if row["name"] == name])
        if not len(rows):
            raise ValueError(f"{folder} has no drawing of {name!r}")
        pixels = plain_render(data, rows, data.images.shape[1])
        references[name] = F.normalize(features(pixels).mean(0), dim=0)
    return references


def alignment(drawn: dict[str, Tensor], references: dict[str, Tensor], features: Features) -> float:
    """How far samples are closer to drawings of their own name than of others: 1 than of all, 0 by chance."""
    names, table = list(references), torch.stack(list(references.values()))
    scores = []
    for prompt, pixels in drawn.items():
        near = features(pixels) @ table.T  # (SAMPLES, names)
        own = near[:, [names.index(prompt)]]
        scores.append(2 * (near < own).float().sum(1) / (len(names) - 1) - 1)
    return torch.cat(scores).mean().item()


if __name__ == "__main__":
    main()
