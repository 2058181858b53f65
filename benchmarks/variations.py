"""unclip-nano -> whether variations of held-out pictures show those pictures, and differ; and the ends of blends.

    python benchmarks/judge.py --data data/emoji                    # once
    python benchmarks/variations.py --data data/emoji

200 drawings that training has not seen are varied as in the page. The judge of quality.py, which no training here
uses, says which of the 200 each variation is nearest to. Writes results/variations-PRESET.json.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import judge as judging
from scenes import PLACES, compose

from dalle_demo import mixing
from dalle_demo.data import pairs
from dalle_demo.engines import UnclipEngine
from dalle_demo.evaluation import metrics
from dalle_demo.evaluation.features import Encoder
from dalle_demo.mixing import Seen

PICTURES, EACH = 200, 4
DISTANCES = (0.3, 0.6, 1.0)  # from near to as far as the page goes


def main() -> None:
    """Draw, measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="unclip-nano", help="preset, or folder with weights")
    parser.add_argument("--data", type=Path, required=True, help="folder written by `data emoji`")
    parser.add_argument("--judge", type=Path, default=judging.FOLDER, help="folder written by judge.py")
    parser.add_argument("--out", type=Path, help="JSON; results/variations-PRESET.json when left out")
    options = parser.parse_args()
    data = pairs.load(options.data)
    judge, encoder = judging.load(options.judge, data).judge, Encoder()
    engine = UnclipEngine.load(options.preset)
    sources = [compose([data.images[i]], PLACES[1]) for i in held_out(data)]
    embedded, seen = judge.embed(encoder(sources)), [engine.invert(Image.fromarray(source)) for source in sources]
    figures = {"preset": engine.name, "weights": engine.model.sha256[:12], "data": data.fingerprint}
    figures |= {"pictures": len(sources), "each": EACH}
    for distance in DISTANCES:
        drawn = [np.array(picture) for one in seen for picture in varied(engine, one, distance)]
        figures[f"distance_{distance}"] = compare(judge.embed(encoder(drawn)), embedded)
    figures["ends_of_blends_are_exact"] = ends(engine, seen[: 2 * EACH])
    out = options.out or Path(__file__).parent / "results" / f"variations-{engine.name}.json"
    out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


def held_out(data: pairs.Pairs) -> np.ndarray:
    """Drawings that training does not see: a seeded choice of both kinds."""
    unseen = np.concatenate(pairs.split(data)[1:])
    return np.sort(np.random.default_rng(0).choice(unseen, PICTURES, replace=False))


def varied(engine: UnclipEngine, source: Seen, distance: float) -> list[Image.Image]:
    """EACH variations of one picture."""
    seen = mixing.vary(source, engine.fresh(range(EACH)), distance)
    return engine.draw(seen.embedding, seen.noise)


def compare(drawn: np.ndarray, sources: np.ndarray) -> dict[str, float]:
    """Figures of variations, EACH of a source, as embeddings (N EACH, W) and (N, W)."""
    own = np.repeat(np.arange(len(sources)), EACH)
    apart = metrics.distances(drawn, sources)
    mine = apart[np.arange(len(drawn)), own]
    further = apart[own[:, None] != np.arange(len(sources))].reshape(len(drawn), -1)
    within = np.mean([metrics.mean_pairwise_distance(drawn[own == i]) for i in range(len(sources))])
    figures = {
        "nearer_than_to_the_mean_other": (mine < further.mean(1)).mean(),
        "nearer_than_to_another": (mine[:, None] < further).mean(),
        "nearer_than_to_all_others": (mine < further.min(1)).mean(),
        "apart_of_one_source": within / metrics.mean_pairwise_distance(sources),
    }
    return {name: round(float(value), 4) for name, value in figures.items()}


def ends(engine: UnclipEngine, seen: list[Seen]) -> bool:
    """Whether blends of shares 0 and 1 are, to the bit, what the two pictures alone give."""
    for one, other in zip(seen[::2], seen[1::2], strict=True):
        all_four = mixing.together([one, other, mixing.blend(one, other, 0.0), mixing.blend(one, other, 1.0)])
        pictures = [picture.tobytes() for picture in engine.draw(all_four.embedding, all_four.noise)]
        if pictures[:2] != pictures[2:]:
            return False
    return True


if __name__ == "__main__":
    main()
