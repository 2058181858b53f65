"""data set -> judge: what tells quality.py which concept and style a picture shows, and features of the data set.

    python benchmarks/judge.py --data data/emoji

Concepts are learnt from OpenMoji and EmojiOne v1 (CC-BY-SA-4.0, fetched with npm), which no model here is trained on
and which stay out of the repository; styles from the training drawings. The folder, runs/judge, can be deleted.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dalle_demo.data import emoji, pairs
from dalle_demo.data.emoji import Source
from dalle_demo.evaluation.features import Encoder, Judge, fit_judge

FOLDER = Path(__file__).resolve().parent.parent / "runs" / "judge"
SETS = (
    Source("@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0", "OpenMoji", "openmoji", ""),
    Source("@iconify-json/emojione-v1", "1.2.3", "CC-BY-SA-4.0", "EmojiOne", "emojione-v1", ""),
)
CHUNK = 512


@dataclass(frozen=True)
class Reference:
    """The judge, and the features of every drawing of the data set, drawn plainly on white."""

    judge: Judge
    features: np.ndarray


def load(folder: Path, data: pairs.Pairs) -> Reference:
    """Read what `build` wrote for this data set; raises SystemExit when there is none."""
    path = folder / f"features-{data.fingerprint}.npy"
    if not path.exists() or not (folder / "judge.npz").exists():
        raise SystemExit(f"{folder} has no judge for this data set; run: python benchmarks/judge.py --data FOLDER")
    return Reference(Judge.load(folder / "judge.npz"), np.load(path).astype(np.float32))


def build(folder: Path, data: pairs.Pairs, packages: Path | None = None) -> dict:
    """Fit the judge and return how it does on drawings held out of training, the ceiling of what a model can reach.

    Args:
        folder: to write judge.npz and the features into.
        data: the data set.
        packages: unpacked npm packages; fetched when None.
    """
    encoder = Encoder()
    codes, drawings = foreign_drawings(packages)
    plain, moved = (encode(encoder, drawings, seed) for seed in (None, 0))
    features = encode(encoder, data.images)
    training, held_out, _ = pairs.split(data)
    styles = [data.rows[i]["style"] for i in training]
    judge = fit_judge(np.concatenate([plain, moved]), codes * 2, features[training], styles)
    judge.save(folder / "judge.npz")
    np.save(folder / f"features-{data.fingerprint}.npy", features.astype(np.float16))
    known = [i for i in held_out if data.rows[i]["hex"] in set(judge.concepts)]
    ranks = judge.concept_ranks(features[known], [data.rows[i]["hex"] for i in known])
    right = judge.style(features[held_out]) == [data.rows[i]["style"] for i in held_out]
    figures = {"concepts": len(judge.concepts), "held_out": len(known)}
    figures |= {"top1": (ranks < 1).mean(), "top5": (ranks < 5).mean(), "style": right.mean()}
    return {name: round(float(value), 3) for name, value in figures.items()}


def foreign_drawings(packages: Path | None) -> tuple[list[str], np.ndarray]:
    """Concept and cut-out of each drawing of SETS."""
    with tempfile.TemporaryDirectory() as scratch:
        if packages is None:
            packages = Path(scratch)
            for source in (emoji.NAMES, *SETS):
                emoji.fetch(source, packages)
        names, _ = emoji.read_names(packages)
        icons = [icon for source in SETS for icon in emoji.match_icons(source, packages, names)]
        drawn = [(names[icon[2]]["hex"], emoji.render(icon, packages)) for icon in icons]
    kept = [(code, picture) for code, picture in drawn if picture is not None]
    return [code for code, _ in kept], np.stack([picture for _, picture in kept])


def encode(encoder: Encoder, cutouts: np.ndarray, seed: int | None = None) -> np.ndarray:
    """Features of cut-outs on white; with a seed each is moved, shrunk and half of them are mirrored."""
    rng, parts = np.random.default_rng(seed), []
    for start in range(0, len(cutouts), CHUNK):
        chunk = torch.tensor(np.asarray(cutouts[start : start + CHUNK]))
        n = len(chunk)
        zoom, shift, flip = torch.ones(n), torch.zeros(n, 2), None
        if seed is not None:
            zoom = torch.tensor(rng.uniform(0.75, 1, n), dtype=torch.float32)
            shift = torch.tensor(rng.uniform(-0.1, 0.1, (n, 2)), dtype=torch.float32)
            flip = torch.tensor(rng.random(n) < 0.5)
        pixels = pairs.render(chunk, torch.full((n, 3), 255.0), zoom, shift, flip)
        levels = ((pixels + 1) * 127.5).round().clamp(0, 255).byte()
        parts.append(encoder(list(levels.permute(0, 2, 3, 1).numpy())))
    return np.concatenate(parts)


def main() -> None:
    """Build and print the ceiling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder written by `data emoji`")
    parser.add_argument("--packages", type=Path, help="unpacked npm packages, instead of fetching them")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    print(json.dumps(build(options.out, pairs.load(options.data), options.packages)))


if __name__ == "__main__":
    main()
