"""GenerateParams -> updates with pictures: read this first, the whole way from prompt to pixels is `_draw`.

An engine owns what is scarce: the processor (one lock, a measured number of threads) and the number format.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from dalle_demo.config import MAX_SEED, GenerateParams
from dalle_demo.hardware import (
    fastest_format,
    fastest_threads,
    give_back_memory,
    pick_device,
    pixel_type,
    place_text_encoder,
    place_transformer,
    place_vqgan,
)
from dalle_demo.images import to_pil
from dalle_demo.sampling import draw_uniforms, guide, sample
from dalle_demo.text import PAD, spelled
from dalle_demo.weights import Dalle, load_dalle

PREVIEW_SHARE = 0.3
LEFT_OUT = {
    "nothing_read": "This model reads English only, and nothing of this prompt: the pictures have nothing to do "
    "with it.",
    "unread": "This model left out characters that it cannot read ({unread}).",
    "cut": "This model left out the end of the prompt (it has {tokens} tokens, {length} are read).",
    "unread_and_cut": "This model left out characters that it cannot read ({unread}) and the end of the prompt (it has "
    "{tokens} tokens, {length} are read).",
}


@dataclass(frozen=True)
class Update:
    """State of a request after `step` of `total` tokens; `images` always has its full length."""

    step: int
    total: int
    images: list[Image.Image]
    seeds: list[int]

    @property
    def final(self) -> bool:
        """Whether these are the finished pictures."""
        return self.step == self.total


@dataclass(frozen=True)
class LeftOut:
    """What of a prompt a model does not read: one of LEFT_OUT, and the values that it wants; in English as a str."""

    key: str
    unread: str  # characters
    tokens: int  # of the prompt
    length: int  # tokens of which are read

    def __str__(self):
        return LEFT_OUT[self.key].format(**vars(self))


class DalleEngine:
    """Draws with a DALL-E model; may be called from many threads, and serves them one after another."""

    def __init__(
        self,
        model: Dalle,
        threads: int | None = None,
        form: str | None = None,
        device: str | torch.device | None = None,
    ):
        self.model = model
        self.config = model.config
        self.device = torch.device(device) if device else pick_device()
        self._lock = threading.Lock()
        with torch.inference_mode():
            self.format = form or fastest_format(self.config.image_decoder, self.device)
            place_transformer(model.image_decoder, self.format, self.device)
            place_text_encoder(model.text_encoder, self.format, self.device)
            place_vqgan(model.vqgan, self.format, self.device)
            self.threads = threads or fastest_threads(model.image_decoder, self.format, self.device)
            torch.set_num_threads(self.threads)
            self._uncond = self._encode("")
        give_back_memory()

    @classmethod
    def load(
        cls,
        preset: str = "nano",
        threads: int | None = None,
        form: str | None = None,
        device: str | None = None,
        change: Callable[[Dalle], Dalle] = lambda model: model,
    ) -> "DalleEngine":
        """Engine for a preset or a folder of weights; raises WeightsError, and ValueError for an unknown format.

        Args:
            preset: name of a preset, or a folder.
            threads: processor threads, measured when None; another number rounds differently in the last bits.
            form: number format of the weights, one of hardware.FORMATS, measured when None.
            device: "cpu", "cuda" or "mps"; a graphics card if there is one when None.
            change: what is done to the loaded model before it is placed on the device.
        """
        return cls(change(load_dalle(preset)), threads, form, pick_device(device))

    @classmethod
    def like(cls, origin: Mapping[str, Any], preset: str | None = None) -> "DalleEngine":
        """Engine that draws what `origin`, read from a picture, drew: its model, device, format and number of threads.

        Raises ValueError when the weights at hand are other ones.
        """
        threads = origin.get("threads")
        if not isinstance(threads, int) or not 1 <= threads <= 1024:
            raise ValueError(f"the picture's settings name {threads!r} threads")
        place = {"form": str(origin.get("format")), "device": str(origin.get("device", "cpu"))}
        engine = cls.load(preset or str(origin.get("model")), threads, **place)
        if engine.origin["weights"] != origin.get("weights"):
            raise ValueError(
                f"the picture was drawn by other weights than these of {engine.name}; give --preset FOLDER"
            )
        return engine

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.model.name

    @property
    def origin(self) -> dict[str, str | int]:
        """What is stored in pictures about how they came about, beside the request."""
        return {
            "model": self.name,
            "weights": self.model.sha256[:12],
            "steps": self.config.image_decoder.length,
            "format": self.format,
            "device": self.device.type,
            "threads": self.threads,
        }

    def params(self, prompt: str, **settings) -> GenerateParams:
        """Request with this model's own defaults where a setting is not given; raises ParamError."""
        return GenerateParams(prompt, **{**self.config.defaults, **settings})

    def left_out(self, prompt: str) -> LeftOut | None:
        """What of the prompt the model cannot read, if anything."""
        length = self.config.text_encoder.length
        encoded = self.model.tokenizer.encode(prompt, length)
        if encoded.empty and prompt.strip():
            key = "nothing_read"
        elif encoded.unread and encoded.dropped:
            key = "unread_and_cut"
        elif encoded.unread or encoded.dropped:
            key = "unread" if encoded.unread else "cut"
        else:
            return None
        return LeftOut(key, spelled(encoded.unread), length + encoded.dropped, length)

    def generate(
        self, params: GenerateParams, stop: threading.Event | None = None, previews: bool = True
    ) -> Iterator[Update]:
        """Yield an update each time a row of tokens is finished, the last one with the finished pictures.

        Waits for its turn first. Closing the iterator, or setting `stop`, ends it within one step. Without `previews`
        there is the last update only.
        """
        seed = params.seed if params.seed is not None else random.SystemRandom().randint(0, MAX_SEED - params.n)
        seeds = [seed + i for i in range(params.n)]
        stop = stop or threading.Event()
        while not self._lock.acquire(timeout=0.05):
            if stop.is_set():
                return
        try:
            updates = self._draw(params, seeds, previews)
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

    def _draw(self, params: GenerateParams, seeds: list[int], previews: bool) -> Iterator[Update]:
        """Prompt to pixels; an update without images after each token, one with previews after each row.

        Rows for which a preview would take too long have that of an earlier one.
        """
        length, row = self.config.image_decoder.length, self.config.vqgan.grid
        ration, preview = Ration(self.config.vqgan.grid), []
        text = self._encode(params.prompt)
        step = self._guided_step(text, params.guidance_scale, params.n)
        uniforms = draw_uniforms(seeds, length)
        drawn = sample(step, uniforms, self.config.image_decoder.bos, params.temperature, params.top_k, params.top_p)
        for count, so_far in enumerate(drawn, start=1):
            if count == length:
                break
            if previews and count % row == 0 and ration.allows(count // row):
                start = time.monotonic()
                preview = [self._preview(tokens) for tokens in so_far]
                ration.spend(count // row, time.monotonic() - start)
            yield Update(count, length, [] if count % row else preview, seeds)
        del step, drawn  # with the cache, which decoding has better use for
        give_back_memory()
        pictures = []
        for tokens in so_far:  # one at a time: convolutions may round differently in another batch
            pictures += to_pil(self._decode(tokens))
            yield Update(length, length, pictures if len(pictures) == params.n else [], seeds)

    def _encode(self, prompt: str) -> tuple[Float[Tensor, "1 T D"], Bool[Tensor, "1 T"]]:
        ids = self.model.tokenizer.batch([prompt], self.config.text_encoder.length).to(self.device)
        mask = ids != PAD
        return self.model.text_encoder(ids, mask), mask

    def _guided_step(
        self, text: tuple[Tensor, Tensor], scale: float, n: int
    ) -> Callable[[Int[Tensor, " B"], int], Float[Tensor, "B V"]]:
        """Step function over the codes: rows of the prompt and, with guidance, of the empty prompt in one batch."""
        decoder, codes = self.model.image_decoder, self.config.vqgan.codebook_size
        prompts = [text] if scale == 1 else [text, self._uncond]
        cache = decoder.prefill(*_stack(prompts), n)

        def step(image_tokens: Tensor, position: int) -> Tensor:
            logits = decoder.step(image_tokens.repeat(len(prompts)).to(self.device), position, cache)[:, :codes]
            return logits if len(prompts) == 1 else guide(*logits.float().chunk(2), scale)

        return step

    def _preview(self, tokens: Int[Tensor, " M"]) -> Image.Image:
        """Picture of the rows that are finished, white below."""
        pixels = self._decode(tokens)
        return to_pil(F.pad(pixels, (0, 0, 0, self.config.vqgan.image_size - pixels.shape[2]), value=1.0))[0]

    def _decode(self, tokens: Int[Tensor, " M"]) -> Float[Tensor, "1 3 H W"]:
        grid = tokens.view(1, -1, self.config.vqgan.grid).to(self.device)
        return self.model.vqgan.decode(self.model.vqgan.lookup(grid).to(pixel_type(self.format)))


class Ration:
    """Says when to make a preview, so that all of them take about PREVIEW_SHARE of the time that the tokens take.

    A preview of r rows costs r times what one of a row does. Made every g of R rows, they cost R^2 / 2g of that.
    """

    def __init__(self, rows: int):
        self._rows, self._last, self._gap = rows, 0, 0.0
        self._start, self._spent = time.monotonic(), 0.0

    def allows(self, rows: int) -> bool:
        """Whether to make one when this many rows are finished; the first is always made."""
        return rows - self._last >= self._gap

    def spend(self, rows: int, seconds: float) -> None:
        """Note what a preview cost."""
        self._spent, self._last = self._spent + seconds, rows
        tokens = time.monotonic() - self._start - self._spent  # seconds
        self._gap = (seconds / rows) * self._rows / (2 * PREVIEW_SHARE * max(tokens / rows, 1e-9))


def _stack(prompts: list[tuple[Tensor, Tensor]]) -> tuple[Float[Tensor, "P T D"], Bool[Tensor, "P T"]]:
    """Stack prompts of different lengths, padded and masked."""
    longest = max(mask.shape[1] for _, mask in prompts)
    states = [F.pad(state, (0, 0, 0, longest - state.shape[1])) for state, _ in prompts]
    masks = [F.pad(mask, (0, longest - mask.shape[1])) for _, mask in prompts]
    return torch.cat(states), torch.cat(masks)
