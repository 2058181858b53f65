"""model -> what every engine is: one request at a time with its seeds, and the way back from a finished picture."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image

from dalle_demo.config import Params
from dalle_demo.text import in_other_scripts, spelled
from dalle_demo.weights import Dalle, Unclip, WeightsError

LEFT_OUT = {
    "nothing_read": "This model reads English only, and nothing of this prompt: the pictures have nothing to do "
    "with it.",
    "unread": "This model left out characters that it cannot read ({unread}).",
    "cut": "This model left out the end of the prompt (it has {tokens} tokens, {length} are read).",
    "unread_and_cut": "This model left out characters that it cannot read ({unread}) and the end of the prompt (it has "
    "{tokens} tokens, {length} are read).",
    "unfamiliar": "This model reads English and Chinese; it may not know words in other letters.",
    "unfamiliar_and_cut": "This model reads English and Chinese; it may not know words in other letters, and left out "
    "the end of the prompt (it has {tokens} tokens, {length} are read).",
}


@dataclass(frozen=True)
class Update:
    """State of a request after `step` of `total` steps.

    `images` are all that are being drawn. The last update has the `n` that were asked for: where there were more
    candidates, those nearest to the prompt, and how near, the nearest first.
    """

    step: int
    total: int
    images: list[Image.Image]
    seeds: list[int]
    scores: list[float] | None = None  # cosines of CLIP's embeddings

    @property
    def final(self) -> bool:
        """Whether these are the finished pictures."""
        return self.step == self.total


@dataclass(frozen=True)
class LeftOut:
    """What of a prompt a model does not read, or know: one of LEFT_OUT, and its values; in English as a str."""

    key: str
    unread: str  # characters
    tokens: int  # of the prompt
    length: int  # tokens of which are read

    def __str__(self):
        return LEFT_OUT[self.key].format(**vars(self))


class Engine(ABC):
    """What both engines share: turns, seeds, and the way back from a picture; may be called from many threads."""

    request: ClassVar[type[Params]]
    sampler: ClassVar[str]  # how pictures come about
    format: str  # of numbers
    device: torch.device
    threads: int

    def __init__(self, model: Dalle | Unclip):
        self.model = model
        self.config = model.config
        self._lock = threading.Lock()

    @classmethod
    @abstractmethod
    def load(cls, preset: str, threads: int | None = None) -> "Engine":
        """Engine for a preset or a folder of weights; raises WeightsError."""

    @classmethod
    def like(cls, origin: Mapping[str, Any], preset: str | None = None) -> "Engine":
        """Engine that draws what `origin`, read from a picture, drew: its model, device, format and number of threads.

        Raises ValueError when the weights at hand are other ones.
        """
        threads = origin.get("threads")
        if not isinstance(threads, int) or not 1 <= threads <= 1024:
            raise ValueError(f"the picture's settings name {threads!r} threads")
        try:
            engine = cls.load(preset or str(origin.get("model")), threads, **cls._place(origin))
        except WeightsError as error:
            raise WeightsError(str(error) if preset else f"{error}; a model of your own: --preset FOLDER") from error
        if engine.origin["weights"] != origin.get("weights"):
            raise ValueError(
                f"the picture was drawn by other weights than these of {engine.name}; give --preset FOLDER"
            )
        return engine

    @classmethod
    def _place(cls, origin: Mapping[str, Any]) -> dict[str, str]:
        """What else of an origin `load` wants to know."""
        return {}

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.model.name

    @property
    @abstractmethod
    def steps(self) -> int:
        """What other programs call the steps of a sampler."""

    @property
    def origin(self) -> dict[str, str | int]:
        """What is stored in pictures about how they came about, beside the request."""
        return {
            "model": self.name,
            "weights": self.model.sha256[:12],
            "sampler": self.sampler,
            "steps": self.steps,
            "format": self.format,
            "device": self.device.type,
            "threads": self.threads,
        }

    def params(self, prompt: str, **settings) -> Params:
        """Request with this model's own defaults where a setting is not given; raises ParamError."""
        return self.request(prompt, **{**self.config.defaults, **settings})

    def left_out(self, prompt: str) -> LeftOut | None:
        """What of the prompt the model cannot read, or was never taught, if anything."""
        length = self.config.text_encoder.length
        encoded = self.model.tokenizer.encode(prompt, length)
        if encoded.empty and prompt.strip():
            key = "nothing_read"
        elif encoded.unread and encoded.dropped:
            key = "unread_and_cut"
        elif encoded.unread:
            key = "unread"
        elif not self.config.text_encoder.ascii_only and in_other_scripts(prompt):  # in the bytes of which it has ids
            key = "unfamiliar_and_cut" if encoded.dropped else "unfamiliar"
        elif encoded.dropped:
            key = "cut"
        else:
            return None
        return LeftOut(key, spelled(encoded.unread), length + encoded.dropped, length)

    def generate(self, params: Params, stop: threading.Event | None = None, previews: bool = True) -> Iterator[Update]:
        """Yield updates, the last one with the finished pictures; a DALL-E model shows each row of tokens before.

        Waits for its turn first. Closing the iterator, or setting `stop`, ends it within one step. Without `previews`
        there is the last update only. Raises ParamError for settings that cannot be used with these weights.
        """
        params = params.seeded()
        stop = stop or threading.Event()
        while not self._lock.acquire(timeout=0.05):
            if stop.is_set():
                return
        try:
            updates = self._draw(params, [params.seed + i for i in range(params.drawn)], previews)
            while not stop.is_set():
                torch.set_num_threads(self.threads)  # it holds for one thread, and each update may come from another
                with torch.inference_mode():  # not held across yields: the mode belongs to a thread
                    update = next(updates, None)
                if update is None:
                    break
                if update.images:
                    yield update
        finally:  # also when the iterator is closed
            self._lock.release()

    @abstractmethod
    def _draw(self, params: Params, seeds: list[int], previews: bool) -> Iterator[Update]:
        """Prompt to pixels, a step at a time; updates without images are not shown."""

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for the processor, for what is done in one step."""
        with self._lock, torch.inference_mode():
            torch.set_num_threads(self.threads)
            yield
