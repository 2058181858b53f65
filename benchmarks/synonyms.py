"""clip-nano -> how often it knows what to show for a synonym: the prompts of quality.py, without drawing anything.

    python benchmarks/synonyms.py --data data/emoji

Each concept is the mean embedding of its drawings that training sees. Writes results/synonyms-PRESET.json.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dalle_demo.data import pairs
from dalle_demo.matching import embed_texts
from dalle_demo.training.unclip_stages import embed_drawings
from dalle_demo.weights import load_clip

HERE = Path(__file__).resolve().parent


@torch.inference_mode()
def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="clip-nano", help="a CLIP, or folder with weights")
    parser.add_argument("--data", type=Path, required=True, help="folder written by `data emoji`")
    parser.add_argument("--out", type=Path, help="JSON; results/synonyms-PRESET.json when left out")
    options = parser.parse_args()
    data, clip = pairs.load(options.data), load_clip(options.preset)
    training = pairs.split(data).training
    codes = sorted({data.rows[i]["hex"] for i in training})
    place = {code: number for number, code in enumerate(codes)}
    concepts = torch.zeros(len(codes), clip.config.embed_dim)
    drawings = embed_drawings(clip.clip, data, training, clip.config.image_size)
    concepts.index_add_(0, torch.tensor([place[data.rows[i]["hex"]] for i in training]), drawings)
    prompts = json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))["synonyms"]["prompts"]
    asked = [one for one in prompts if one["hex"] in place]
    near = embed_texts(clip, [one["prompt"] for one in asked]) @ F.normalize(concepts, dim=1).T
    own = near[range(len(asked)), [place[one["hex"]] for one in asked]]
    ranks = (near > own[:, None]).sum(1)
    figures = {"preset": clip.name, "data": data.fingerprint, "synonyms": len(asked), "concepts": len(codes)}
    figures |= {f"top{k}": round((ranks < k).float().mean().item(), 3) for k in (1, 5)}
    out = options.out or HERE / "results" / f"synonyms-{clip.name}.json"
    out.write_text(json.dumps(figures) + "\n", encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
