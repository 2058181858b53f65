"""preset -> how well it draws what is asked: fixed prompts and seeds, beside real pictures and shuffled prompts.

    python benchmarks/judge.py --data data/emoji                    # once
    python benchmarks/quality.py --preset nano --data data/emoji

Every figure stands between a ceiling, what the same measurement says of real pictures, and a floor, what it says when
the pictures are held against each other's prompts. The prompts are in prompts.json (written by prompts.py), which says
how many pictures of each are drawn, with seeds from 0 on and the preset's default settings. Writes
results/quality-PRESET.json and prints a table in Markdown. Run it on an idle machine.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import judge as judging
from scenes import PLACES, SIDES, compose, recolour

from dalle_demo.data import pairs
from dalle_demo.data.pairs import BACKGROUNDS, WHITE
from dalle_demo.engines import Engine, engine_for
from dalle_demo.evaluation import metrics, probes
from dalle_demo.evaluation.features import SIDE, Encoder

HERE = Path(__file__).resolve().parent
QUICK = 5  # --quick takes every fifth prompt, and one picture of each; coprime to the cycles in prompts.py


@dataclass(frozen=True)
class Shown:
    """A picture and what was asked for: an entry of prompts.json."""

    picture: np.ndarray
    asked: dict


@dataclass(frozen=True)
class Figure:
    """One line of the table; `floor` is None where shuffling prompts means nothing."""

    name: str
    n: int
    model: float
    ceiling: float
    floor: float | None


class Bench:
    """The data set, its judge, and the seeded choices of real pictures."""

    def __init__(self, data: pairs.Pairs, reference: judging.Reference):
        self.data, self.reference, self.encoder = data, reference, Encoder()
        self._known: dict[bytes, np.ndarray] = {}  # features by the pixels
        self.of_code: dict[str, list[int]] = {}
        for i, row in enumerate(data.rows):
            self.of_code.setdefault(row["hex"], []).append(i)

    def figures(self, group: str, shown: list[Shown]) -> list[Figure]:
        """All lines of one group of prompts."""
        real = self.real(group, [one.asked for one in shown])
        order = np.random.default_rng(0).permutation(len(shown))
        shuffled = [Shown(one.picture, shown[other].asked) for one, other in zip(shown, order, strict=True)]
        found = []
        for name, measure in self.measures(group).items():
            values = [measure(pictures) for pictures in (shown, real, shuffled)]
            for part, chosen in languages([one.asked for one in shown]).items():
                model, ceiling, floor = (float(value[chosen].mean()) for value in values)
                found.append(Figure(f"{name}{part}", int(chosen.sum()), model, ceiling, floor))
        return found + self.sets(group, shown, real)

    def measures(self, group: str) -> dict[str, Callable[[list[Shown]], np.ndarray]]:
        """Line -> what says of each picture whether it is right."""
        if group in ("background", "object_colour", "count"):
            probe, key = {
                "background": (probes.background, "background"),
                "object_colour": (probes.object_colour, "colour"),
                "count": (probes.count, "count"),
            }[group]
            return {group: lambda shown: np.array([probe(one.picture) == one.asked[key] for one in shown])}
        if group == "relation":
            return {group: self.relations}
        lines = {f"{group}: top-1": lambda shown: self.ranks(shown) < 1, f"{group}: top-5": lambda s: self.ranks(s) < 5}
        return lines | ({"style": self.styles} if group == "held_out" else {})

    def ranks(self, shown: list[Shown]) -> np.ndarray:
        """Rank of the concept asked for among all."""
        return self.reference.judge.concept_ranks(self.features(shown), [one.asked["hex"] for one in shown])

    def styles(self, shown: list[Shown]) -> np.ndarray:
        """Whether the style is the one asked for."""
        return self.reference.judge.style(self.features(shown)) == np.array([one.asked["style"] for one in shown])

    def features(self, shown: list[Shown]) -> np.ndarray:
        """Features of the pictures, computed once for each."""
        keys = [one.picture.tobytes() for one in shown]
        new = {key: one.picture for key, one in zip(keys, shown, strict=True) if key not in self._known}
        if new:
            self._known.update(zip(new, self.encoder(list(new.values())), strict=True))
        return np.stack([self._known[key] for key in keys])

    def relations(self, shown: list[Shown]) -> np.ndarray:
        """Whether the two largest objects, told apart by the judge, are on the sides asked for."""
        return np.array([self.relation(one) for one in shown])

    def relation(self, one: Shown) -> bool:
        """See `relations`; a picture with fewer than two objects is wrong."""
        boxes = probes.objects(one.picture)[:2]
        if len(boxes) < 2:
            return False
        judge = self.reference.judge
        crops = [Shown(probes.crop(one.picture, box), one.asked) for box in boxes]
        scores = judge.concept_scores(self.features(crops))
        place = {code: i for i, code in enumerate(judge.concepts)}
        first, second = place[one.asked["hex"]], place[one.asked["other"]]
        if scores[0, first] + scores[1, second] < scores[0, second] + scores[1, first]:
            boxes = boxes[::-1]
        return probes.relation(*boxes) == one.asked["relation"]

    def sets(self, group: str, shown: list[Shown], real: list[Shown]) -> list[Figure]:
        """Figures of whole sets of pictures."""
        if group == "held_out":
            return self.fidelity(shown, real)
        return [self.variety(shown)] if group == "names" and any(one.asked["copy"] for one in shown) else []

    def fidelity(self, shown: list[Shown], real: list[Shown]) -> list[Figure]:
        """One English picture of each held-out drawing against the drawings; ceiling: another style's drawing of it."""
        kept = [i for i, one in enumerate(shown) if not one.asked["copy"] and not one.asked.get("chinese")]
        ours, held_out = (
            self.reference.judge.embed(self.features([pictures[i] for i in kept])) for pictures in (shown, real)
        )
        embedded = self.reference.judge.embed(self.reference.features)
        training = pairs.split(self.data)[0]
        others = [self.other_style(shown[i].asked, set(training)) for i in kept]
        ceiling = embedded[others]
        found = []
        for name in ("precision", "recall", "density", "coverage", "kid"):
            measure = getattr(metrics, name)
            found.append(Figure(name, len(kept), measure(held_out, ours), measure(held_out, ceiling), None))
        values = [[figure.model for figure in found[:2]], [figure.ceiling for figure in found[:2]]]
        found.insert(2, Figure("F1", len(kept), *(metrics.f1(*pair) for pair in values), None))
        seen = embedded[training]
        real_share = float((metrics.nearest(held_out, seen)[0] < metrics.radii(held_out, 1)).mean())
        return [
            *found,
            Figure("AuthPct", len(kept), metrics.authpct(seen, ours), metrics.authpct(seen, held_out), None),
            Figure("C_T", len(kept), metrics.copying(seen, held_out, ours), 0.0, None),
            Figure("nearer to training", len(kept), metrics.nearer_training(seen, held_out, ours), real_share, None),
        ]

    def variety(self, shown: list[Shown]) -> Figure:
        """Mean distance of pictures of one prompt; ceiling: of all real drawings of the concept."""
        ours = self.reference.judge.embed(self.features(shown))
        embedded = self.reference.judge.embed(self.reference.features)
        prompts: dict[str, list[int]] = {}
        for i, one in enumerate(shown):
            prompts.setdefault(one.asked["hex"], []).append(i)
        drawn = [metrics.mean_pairwise_distance(ours[indices]) for indices in prompts.values()]
        real = [metrics.mean_pairwise_distance(embedded[self.of_code[code]]) for code in prompts]
        return Figure("variety within a prompt", len(prompts), float(np.mean(drawn)), float(np.nanmean(real)), None)

    def real(self, group: str, asked: list[dict]) -> list[Shown]:
        """Real pictures of what is asked: the held-out drawing itself, else a seeded choice among the styles."""
        rng = np.random.default_rng(1)
        return [Shown(self.real_picture(group, one, rng), one) for one in asked]

    def real_picture(self, group: str, asked: dict, rng: np.random.Generator) -> np.ndarray:
        """One of `real`."""
        if group == "held_out":
            index = next(i for i in self.of_code[asked["hex"]] if self.data.rows[i]["style"] == asked["style"])
            return compose([self.data.images[index]], PLACES[1])
        cutout = self.data.images[rng.choice(self.of_code[asked["hex"]])]
        if group == "relation":
            return compose(
                [cutout, self.data.images[rng.choice(self.of_code[asked["other"]])]], SIDES[asked["relation"]]
            )
        if group == "object_colour":
            cutout = recolour(cutout, asked["colour"])
        number = asked.get("count", 1)
        ground = BACKGROUNDS[asked["background"]][1] if group == "background" else WHITE
        return compose([cutout] * number, PLACES[number], ground)

    def other_style(self, asked: dict, training: set[int]) -> int:
        """A training drawing of the same concept in another style, the same one each time; any if there is none."""
        rng = np.random.default_rng(int(asked["hex"].split("-")[0], 16))
        options = [i for i in self.of_code[asked["hex"]] if i in training]
        return int(rng.choice(options or sorted(training)))


def languages(asked: list[dict]) -> dict[str, np.ndarray]:
    """Parts of a group: both languages apart where there are both."""
    chinese = np.array([bool(one.get("chinese")) for one in asked])
    return (
        {" (English)": ~chinese, " (Chinese)": chinese} if chinese.any() and (~chinese).any() else {"": chinese | True}
    )


def draw(engine: Engine, group: dict, quick: bool, **settings) -> list[Shown]:
    """Pictures of all prompts of a group, each the best of its own candidates, where there are any.

    `copy` marks all but the first of a prompt.
    """
    shown, count = [], 1 if quick else group["pictures"]
    candidates = settings.get("candidates")
    seeds, n = (range(0, count * candidates, candidates), 1) if candidates else ([0], count)
    for asked in group["prompts"][:: QUICK if quick else 1]:
        requests = [engine.params(asked["prompt"], n=n, seed=seed, **settings) for seed in seeds]
        updates = [list(engine.generate(params, previews=False)) for params in requests]
        pictures = [picture for (last,) in updates for picture in last.images]
        for number, picture in enumerate(pictures):
            shown.append(Shown(small(picture), asked | {"copy": number > 0}))
    return shown


def small(picture: Image.Image) -> np.ndarray:
    """Picture at the size of the drawings."""
    return np.array(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC) if picture.width != SIDE else picture)


def check_held_out(data: pairs.Pairs, prompts: list[dict]) -> None:
    """End the program when training sees a drawing that stands for those that it does not see."""
    held_out = {(data.rows[i]["hex"], data.rows[i]["style"]) for i in pairs.split(data)[1]}
    seen = sorted({(one["hex"], one["style"]) for one in prompts} - held_out)
    if seen:
        raise SystemExit(f"prompts.json: training sees {seen[:3]} of this data set; run benchmarks/prompts.py again")


def table(figures: list[Figure], title: str) -> str:
    """Markdown."""
    lines = [f"{title}\n", "| measure | N | model | real pictures | shuffled prompts |", "|---|---|---|---|---|"]
    for one in figures:
        floor = "" if one.floor is None else f"{one.floor:.3g}"
        lines.append(f"| {one.name} | {one.n} | {one.model:.3g} | {one.ceiling:.3g} | {floor} |")
    return "\n".join(lines)


def main() -> None:
    """Draw, measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    prompts = json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))
    parser.add_argument("--preset", default="nano", help="preset, or folder with weights")
    parser.add_argument("--data", type=Path, required=True, help="folder written by `data emoji`")
    parser.add_argument("--judge", type=Path, default=judging.FOLDER, help="folder written by judge.py")
    parser.add_argument("--rows", nargs="+", choices=list(prompts), default=list(prompts), help="groups of prompts")
    parser.add_argument("--quick", action="store_true", help=f"every {QUICK}th prompt, one picture each; says so")
    parser.add_argument("--candidates", type=int, help="draw so many for each picture, and measure the best")
    parser.add_argument(
        "--out", type=Path, help="JSON; results/quality-PRESET.json unless --quick, --rows or --candidates is given"
    )
    options = parser.parse_args()
    data = pairs.load(options.data)
    check_held_out(data, prompts["held_out"]["prompts"])
    bench = Bench(data, judging.load(options.judge, data))
    engine, start, figures = engine_for(options.preset).load(options.preset), time.monotonic(), []
    settings = {"candidates": options.candidates} if options.candidates else {}
    for group in options.rows:
        figures += bench.figures(group, draw(engine, prompts[group], options.quick, **settings))
    added = f"best of {options.candidates}; " if settings else ""
    left_out = "QUICK: a fifth of the prompts; " if options.quick else ""
    title = f"{engine.name}, {added}{left_out}data set {data.fingerprint}"
    print(table(figures, title))
    whole = not options.quick and not settings and len(options.rows) == len(prompts)
    out = options.out or (HERE / "results" / f"quality-{engine.name}.json" if whole else None)
    if out:
        lines = [vars(figure) for figure in figures]
        about = {
            **engine.origin,
            "settings": engine.config.defaults | settings,
            "data": data.fingerprint,
            "quick": options.quick,
        }
        seconds = round(time.monotonic() - start)
        out.write_text(json.dumps({**about, "seconds": seconds, "figures": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
