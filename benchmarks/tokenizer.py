"""folder with a vqgan or vae -> what is left of held-out drawings after it: the most that a model on it can reach.

    python benchmarks/judge.py --data data/emoji                    # once
    python benchmarks/tokenizer.py --weights weights/nano --data data/emoji

The drawings are those that are held out in one style, as they are, on white. `top-1` and `top-5` are the judge's (see
quality.py) and `style` is whether it names the right one, before and after.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import judge as judging

from dalle_demo.checkpoints import load_part, read_config
from dalle_demo.data import pairs
from dalle_demo.evaluation.features import SIDE, Encoder
from dalle_demo.training.stages import plain_render, psnr, resize

CHUNK = 32


@torch.inference_mode()
def rebuilt(folder: Path, pixels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Pictures after encoder and decoder, and how many codes they use where there are codes."""
    if "vqgan" not in read_config(folder)["parts"]:
        vae = load_part(folder, "vae")
        return torch.cat([vae.decode(vae.encode(chunk)[0]) for chunk in pixels.split(CHUNK)]), {}
    vqgan = load_part(folder, "vqgan")
    ours, tokens, _ = zip(*(vqgan(chunk) for chunk in pixels.split(CHUNK)), strict=True)
    share = torch.bincount(torch.cat(tokens).flatten()).float().div(torch.cat(tokens).numel())
    return torch.cat(ours), {
        "codes": int((share > 0).sum()),
        "perplexity": torch.special.entr(share).sum().exp().item(),
    }


def seen(judge: judging.Judge, encoder: Encoder, pixels: Tensor, rows: list[dict]) -> dict[str, float]:
    """What the judge says of pictures of these rows."""
    levels = ((pixels + 1) * 127.5).round().clamp(0, 255).byte()
    features = encoder(list(levels.permute(0, 2, 3, 1).numpy()))
    ranks = judge.concept_ranks(features, [row["hex"] for row in rows])
    right = judge.style(features) == np.array([row["style"] for row in rows])
    return {"top-1": (ranks < 1).mean(), "top-5": (ranks < 5).mean(), "style": right.mean()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder with a vqgan or vae")
    parser.add_argument("--data", type=Path, required=True, help="folder written by `data emoji`")
    parser.add_argument("--judge", type=Path, default=judging.FOLDER, help="folder written by judge.py")
    options = parser.parse_args()
    data, encoder = pairs.load(options.data), Encoder()
    judge = judging.load(options.judge, data).judge
    held_out = np.array([i for i in pairs.split(data).styles if data.rows[i]["hex"] in set(judge.concepts)])
    rows, real = [data.rows[i] for i in held_out], plain_render(data, held_out, SIDE)
    parts = read_config(options.weights)["parts"]
    size = parts.get("vqgan", parts.get("vae"))["image_size"]
    ours, figures = rebuilt(options.weights, resize(real, size))
    ours = resize(ours, SIDE).clamp(-1, 1)
    figures |= {"psnr_db": psnr(ours, real), "l1": F.l1_loss(ours, real).item()}
    figures |= seen(judge, encoder, ours, rows)
    figures |= {f"{name} of the drawings": value for name, value in seen(judge, encoder, real, rows).items()}
    print(json.dumps({"drawings": len(rows)} | {name: round(float(value), 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
