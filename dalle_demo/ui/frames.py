"""values of the controls -> what is drawn from them: each section of the DALL-E 2 tab, without the page around it.

A `Scene` holds what each of its pictures is drawn from, so that any of them can be drawn alone, saved with its
settings, or gone on from.
"""

import base64
import dataclasses
import io
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

from PIL import Image

from dalle_demo import mixing
from dalle_demo.config import NO_NUMBER, OUT_OF_RANGE, ParamError, UnclipParams, short
from dalle_demo.engines import UnclipEngine
from dalle_demo.images import save_animation, save_png, slug
from dalle_demo.mixing import Seen
from dalle_demo.ui.strings import STYLES

GRID = 4  # pictures from words; variations in a row
ROWS = 3  # of variations, each further away than the one before
KEPT = 1000  # pictures that visitors can go on from, over all of them
KEPT_EACH = 16  # of these, of one visitor, whose page shows two
QUALITY = 92  # of JPEG; who saves a picture gets it as PNG
FRAME_MILLISECONDS = 80  # of a walk
RECENT = 16  # results of the prior, and of CLIP

# Slider -> lowest, highest, step and value. UnclipParams describes the others.
SLIDERS = {
    "share": (0.0, 1.0, 0.01, 0.5),
    "change_strength": (0.0, 0.6, 0.01, 0.3),  # beyond, there are no pictures that the generator knows
    "edit_strength": (0.0, 0.6, 0.01, 0.3),
    "distance": (0.0, 1.0, 0.01, 1.0),
    "blend": (0.0, 1.0, 0.01, 0.5),
    "frames": (8, 64, 8, 32),
}


class MissingError(ValueError):
    """Something that a section needs before it can draw; `key` is the sentence that asks for it."""

    def __init__(self, key: str):
        super().__init__(key)
        self.key = key


@dataclass(frozen=True)
class Source:
    """A picture that a visitor goes on from."""

    seen: Seen
    name: str  # its prompt, or its file's name


class Sources:
    """Pictures by a name that nobody can guess: the page that was told it is the only one that can ask for it.

    Of each visitor the KEPT_EACH that were asked for last are kept. Where all together have more than KEPT, one of
    whoever has most goes.
    """

    def __init__(self):
        self._kept: dict[str, tuple[str | None, Source]] = {}  # with the visitor, the one asked for longest ago first
        self._lock = threading.Lock()

    def keep(self, visitor: str | None, source: Source) -> str:
        """Name under which it can be had."""
        name = token_urlsafe(16)
        with self._lock:
            self._kept[name] = visitor, source
            counts = Counter(owner for owner, _ in self._kept.values())
            if counts[visitor] > KEPT_EACH:
                self._forget_oldest(visitor)
            elif len(self._kept) > KEPT:
                self._forget_oldest(max(counts, key=counts.__getitem__))
        return name

    def _forget_oldest(self, visitor: str | None) -> None:
        del self._kept[next(name for name, (owner, _) in self._kept.items() if owner == visitor)]

    def find(self, name: Any) -> Source:
        """The picture of a name, now the visitor's newest; raises MissingError when it was not kept."""
        try:
            with self._lock:
                self._kept[name] = self._kept.pop(name)
                return self._kept[name][1]
        except (KeyError, TypeError) as error:
            raise MissingError("picture_gone") from error


@dataclass(frozen=True)
class Scene:
    """Pictures that are shown together."""

    seen: list[Seen]
    requests: list[dict[str, Any]]  # settings of each, as its file tells them
    captions: Sequence[str] = ()
    texts: Sequence[str] = ()  # that the model has read

    def draw(self, engine: UnclipEngine, indices: Sequence[int] | None = None) -> list[Image.Image]:
        """All of the pictures, or some."""
        chosen = self.seen if indices is None else [self.seen[i] for i in indices]
        together = mixing.together(chosen)
        return engine.draw(together.embedding, together.noise)


@dataclass(frozen=True)
class Values:
    """What the page sends, which may be anything; what is read of it is checked."""

    given: Mapping[str, Any]
    sources: Sources = field(default_factory=Sources)

    @classmethod
    def of(cls, given: Any, sources: Sources) -> "Values":
        """Whatever was sent, where it is no table of names as well."""
        return cls(given if isinstance(given, dict) else {}, sources)

    def number(self, name: str) -> float:
        """Value of a slider."""
        value, (low, high, _, _) = self.given.get(name), SLIDERS[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ParamError(name, NO_NUMBER, low=low, high=high, value=str(value)[:40])
        if not low <= value <= high:
            raise ParamError(name, OUT_OF_RANGE, low=low, high=high, value=short(value))
        return float(value)

    def choice(self, name: str, choices: Iterable[str]) -> str:
        """One of several words."""
        value = self.given.get(name)
        if value not in list(choices):
            raise ParamError(name, "must be one of {all}, not {value!r}", all=", ".join(choices), value=str(value)[:40])
        return value

    def text(self, name: str) -> str:
        """Words of a box, which may be empty."""
        words = self.given.get(name) or ""
        if words == "" or (isinstance(words, str) and not words.strip()):
            return ""
        try:
            return UnclipParams(words).prompt
        except ParamError as error:
            raise ParamError(name, error.sentence, **error.values) from error

    def source(self, name: str, needed: str = "need_source") -> Source:
        """Picture that was chosen."""
        if not self.given.get(name):
            raise MissingError(needed)
        return self.sources.find(self.given[name])

    def seed(self) -> int:
        """Seed of the first of a row."""
        return UnclipParams("picture", GRID, self.given.get("seed")).seeded().seed

    def params(self, engine: UnclipEngine, prompt: str) -> UnclipParams:
        """Request for a grid."""
        settings = {name: self.given[name] for name in ("truncation", "guidance_scale", "seed") if name in self.given}
        return engine.params(self.styled(prompt), n=GRID, **settings).seeded()

    def styled(self, prompt: str) -> str:
        """Prompt that asks for the chosen style as the captions do that the model learned from."""
        if not self.given.get("style") or not prompt:
            return prompt
        style = self.choice("style", STYLES)
        chinese = any("\u4e00" <= character <= "\u9fff" for character in prompt)
        return f"{STYLES[style]}风格的{prompt}" if chinese else f"{prompt}, {style} style"


def words(engine: UnclipEngine, values: Values) -> Scene:
    """A grid of a prompt, blended with that of another, and moved as a text would be."""
    params = values.params(engine, values.text("prompt"))
    seen, more = _imagined(engine, params), {}
    if second := values.text("second"):
        more |= {"second_prompt": second, "share": values.number("share")}
        other = _imagined(engine, dataclasses.replace(params, prompt=values.styled(second)))
        seen = mixing.blend(seen, other, more["share"])
    if target := values.text("change_to"):
        more |= _change(values, "change")
        start, goal = (values.styled(more[name]) for name in ("from", "to"))
        seen = _moved(engine, seen, start or params.prompt, goal, more["strength"])
    requests = [params.alone() | more | {"seed": params.seed + i} for i in range(GRID)]
    return Scene(mixing.apart(seen), requests, texts=[params.prompt, *filter(None, (second, more.get("from"), target))])


def variations(engine: UnclipEngine, values: Values) -> Scene:
    """Rows of the same fresh noises and embeddings, each further from those of a picture."""
    source, furthest, first = values.source("source"), values.number("distance"), values.seed()
    seeds, distances = [first + i for i in range(GRID)], [furthest * row / ROWS for row in range(1, ROWS + 1)]
    fresh = engine.fresh(seeds)
    seen = [one for distance in distances for one in mixing.apart(mixing.vary(source.seen, fresh, distance))]
    requests = [
        _request(source.name, operation="variation", seed=seed, distance=distance)
        for distance in distances
        for seed in seeds
    ]
    return Scene(seen, requests, [f"{request['distance']:.2f}" for request in requests])


def blend(engine: UnclipEngine, values: Values) -> Scene:
    """Two pictures as the model sees them, and between them what lies there."""
    one = values.source("source", "need_source" if values.given.get("other") else "need_two")
    other = values.source("other", "need_other")
    shares = [0.0, values.number("blend"), 1.0]
    seen = [mixing.blend(one.seen, other.seen, share) for share in shares]
    requests = [_request(f"{one.name} + {other.name}", operation="blend", share=share) for share in shares]
    return Scene(seen, requests, [f"{share:.2f}" for share in shares])


def edit(engine: UnclipEngine, values: Values) -> Scene:
    """A picture as the model sees it, and moved as its text would be, or else towards what the other text shows."""
    source = values.source("source")
    if not (target := values.text("edit_to")):
        raise MissingError("need_change")
    change = _change(values, "edit")
    strengths = [0.0, change["strength"]]
    if change["from"]:
        seen = [_moved(engine, source.seen, change["from"], target, strength) for strength in strengths]
    else:
        goal = _imagined(engine, engine.params(target, n=1, seed=0)).embedding[0]
        seen = [Seen(mixing.slerp(source.seen.embedding, goal, value), source.seen.noise) for value in strengths]
    requests = [_request(source.name, operation="text diff", **change | {"strength": value}) for value in strengths]
    texts = [*filter(None, (change["from"], target))]
    return Scene(seen, requests, [f"{strength:.2f}" for strength in strengths], texts)


def walk(engine: UnclipEngine, values: Values) -> Scene:
    """All frames of a walk, each of which would be saved as what begins it."""
    params, count = values.params(engine, values.text("prompt")), int(values.number("frames"))
    request = params.alone() | {"operation": "walk", "frames": count, "seed": params.seed}
    return Scene(mixing.apart(engine.walk(params, count)), [request] * count, texts=[params.prompt])


SECTIONS: dict[str, Callable[[UnclipEngine, Values], Scene]] = {
    "words": words,
    "variations": variations,
    "blend": blend,
    "edit": edit,
    "walk": walk,
}


def scene_of(engine: UnclipEngine, values: Values) -> Scene:
    """What the chosen section shows; raises ParamError or MissingError."""
    return SECTIONS[values.choice("section", SECTIONS)](engine, values)


def animation(pictures: Sequence[Image.Image]) -> bytes:
    """A walk as WebP."""
    with tempfile.TemporaryDirectory(prefix="dalle_demo-") as folder:
        return save_animation(pictures, Path(folder, "walk.webp"), FRAME_MILLISECONDS).read_bytes()


def jpeg(picture: Image.Image) -> bytes:
    """A frame, small and quick to make."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=QUALITY, subsampling=0)
    return stream.getvalue()


def png(engine: UnclipEngine, scene: Scene, index: int) -> bytes:
    """A picture of a scene as a file that remembers how it was made."""
    (picture,) = scene.draw(engine, [index])
    with tempfile.TemporaryDirectory(prefix="dalle_demo-") as folder:
        return save_png(picture, Path(folder, "picture.png"), scene.requests[index], engine.origin).read_bytes()


def file_name(request: Mapping[str, Any], suffix: str) -> str:
    """Name of a file to save: of what, how it was made, and the numbers that tell it from others made so."""
    numbers = [request[name] for name in ("seed", "distance", "share", "strength") if name in request]
    told = [str(request.get("operation", "")), *(f"{number:.2f}".removesuffix(".00") for number in numbers)]
    return f"{slug(request['prompt'])}-{slug(' '.join(told))}.{suffix}"


def data_url(data: bytes, kind: str) -> str:
    """Data as an address that holds them."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _change(values: Values, name: str) -> dict[str, Any]:
    """What a text diff is made of."""
    return {
        "from": values.text(f"{name}_from"),
        "to": values.text(f"{name}_to"),
        "strength": values.number(f"{name}_strength"),
    }


def _moved(engine: UnclipEngine, seen: Seen, start: str, goal: str, strength: float) -> Seen:
    """Pictures moved as from one text to another."""
    return mixing.text_diff(seen, _embedded(engine, start), _embedded(engine, goal), strength)


class Recent:
    """The last results of a function of an engine, which is not kept with them: a tuned one takes 60 MB."""

    def __init__(self, make: Callable[[UnclipEngine, Any], Any]):
        self._make, self._kept = make, {}

    def __call__(self, engine: UnclipEngine, value: Any) -> Any:
        """Result for an engine of the same weights, kept or made."""
        key = engine.model.sha256, engine.threads, value
        found = self._kept.pop(key, None)
        self._kept[key] = found = self._make(engine, value) if found is None else found
        if len(self._kept) > RECENT:
            self._kept.pop(next(iter(self._kept), None), None)
        return found


# Kept for the sliders that leave it as it is: the prior takes a quarter of a frame's time
_imagined = Recent(lambda engine, params: engine.imagine(params))
_embedded = Recent(lambda engine, text: engine.embed_text(text))


def _request(name: str, operation: str, **settings: Any) -> dict[str, Any]:
    """Settings of a picture that was made from pictures: what stands for a prompt is their name."""
    return {"prompt": name, "operation": operation} | settings
