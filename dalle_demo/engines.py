"""GenerateParams -> updates with pictures: read this first, the whole way from prompt to pixels is `_draw`.

An engine owns what is scarce: the processor (one lock, a measured number of threads) and the number format.
"""

import copy
import os
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
from dalle_demo.images import to_pil
from dalle_demo.models.transformer import ImageDecoder
from dalle_demo.sampling import draw_uniforms, guide, sample
from dalle_demo.text import PAD
from dalle_demo.weights import Dalle, load_dalle

# From four rows on, matrix products give a row the same bits whatever its batch is (measured with MKL and oneDNN);
# under four they take other code paths. Short batches are filled up to it.
MIN_ROWS = 4
MEASURED_STEPS = 6


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


class DalleEngine:
    """Draws with a DALL-E model; may be called from many threads, and serves them one after another."""

    def __init__(self, model: Dalle, threads: int | None = None, dtype: torch.dtype | None = None):
        self.model = model
        self.config = model.config
        self._lock = threading.Lock()
        with torch.inference_mode():
            self.dtype = dtype or self._fastest_format()
            for module in (model.text_encoder, model.image_decoder, model.vqgan):
                module.to(self.dtype)
            self.threads = threads or self._fastest_threads()
            torch.set_num_threads(self.threads)
            self._uncond = self._encode("")

    @classmethod
    def load(cls, preset: str = "nano", threads: int | None = None, dtype: torch.dtype | None = None) -> "DalleEngine":
        """Engine for a preset or a folder of weights; raises WeightsError.

        Args:
            preset: name of a preset, or a folder.
            threads: processor threads, measured when None; another number rounds differently in the last bits.
            dtype: number format, measured when None.
        """
        return cls(load_dalle(preset), threads, dtype)

    @classmethod
    def like(cls, origin: Mapping[str, Any], preset: str | None = None) -> "DalleEngine":
        """Engine that draws what `origin`, read from a picture, drew: its model, format and number of threads.

        Raises ValueError when the weights at hand are other ones.
        """
        formats = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        threads = origin.get("threads")
        if not isinstance(threads, int) or not 1 <= threads <= 1024:
            raise ValueError(f"the picture's settings name {threads!r} threads")
        engine = cls.load(preset or str(origin.get("model")), threads, formats.get(origin.get("format")))
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
            "format": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
        }

    def params(self, prompt: str, **settings) -> GenerateParams:
        """Request with this model's own defaults where a setting is not given; raises ParamError."""
        return GenerateParams(prompt, **{**self.config.defaults, **settings})

    def left_out(self, prompt: str) -> str | None:
        """A sentence on what of the prompt the model cannot read, if anything."""
        length = self.config.text_encoder.length
        dropped = self.model.tokenizer.encode(prompt, length).dropped
        if not dropped:
            return None
        return f"The end of the prompt was left out: this model reads {length} tokens, it has {length + dropped}."

    def generate(self, params: GenerateParams, stop: threading.Event | None = None) -> Iterator[Update]:
        """Yield an update each time a row of tokens is finished, the last one with the finished pictures.

        Waits for its turn first. Closing the iterator, or setting `stop`, ends it within one step.
        """
        seed = params.seed if params.seed is not None else random.SystemRandom().randint(0, MAX_SEED - params.n)
        seeds = [seed + i for i in range(params.n)]
        stop = stop or threading.Event()
        while not self._lock.acquire(timeout=0.05):
            if stop.is_set():
                return
        try:
            torch.set_num_threads(self.threads)
            updates = self._draw(params, seeds)
            while not stop.is_set():
                with torch.inference_mode():  # not held across yields: the mode belongs to a thread
                    update = next(updates, None)
                if update is None:
                    break
                if update.images:
                    yield update
        finally:  # also when the iterator is closed
            self._lock.release()

    def _draw(self, params: GenerateParams, seeds: list[int]) -> Iterator[Update]:
        """Prompt to pixels; an update without images after each token, one with previews after each row."""
        length, row = self.config.image_decoder.length, self.config.vqgan.grid
        text = self._encode(params.prompt)
        step = self._guided_step(text, params.guidance_scale, params.n)
        uniforms = draw_uniforms(seeds, length)
        tokens = sample(step, uniforms, self.config.image_decoder.bos, params.temperature, params.top_k, params.top_p)
        for count, so_far in enumerate(tokens, start=1):
            if count == length:
                yield Update(count, length, self._finish(so_far), seeds)
            else:
                yield Update(count, length, [] if count % row else self._preview(so_far), seeds)

    def _encode(self, prompt: str) -> tuple[Float[Tensor, "1 T D"], Bool[Tensor, "1 T"]]:
        ids = self.model.tokenizer.batch([prompt], self.config.text_encoder.length)
        mask = ids != PAD
        return self.model.text_encoder(ids, mask), mask

    def _guided_step(
        self, text: tuple[Tensor, Tensor], scale: float, n: int
    ) -> Callable[[Int[Tensor, " B"], int], Float[Tensor, "B V"]]:
        """Step function over the codes: rows of the prompt and, with guidance, of the empty prompt in one batch."""
        decoder, codes = self.model.image_decoder, self.config.vqgan.codebook_size
        prompts = [text] if scale == 1 else [text, self._uncond]
        copies = max(n, -(-MIN_ROWS // len(prompts)))
        cache = decoder.prefill(*_repeat(prompts, copies))

        def step(image_tokens: Tensor, position: int) -> Tensor:
            filled = torch.cat([image_tokens, image_tokens[:1].expand(copies - n)])
            logits = decoder.step(filled.repeat(len(prompts)), position, cache)[:, :codes]
            if len(prompts) == 1:
                return logits[:n]
            cond, uncond = logits.float().chunk(2)
            return guide(cond[:n], uncond[:n], scale)

        return step

    def _preview(self, tokens: Int[Tensor, "B M"]) -> list[Image.Image]:
        missing = self.config.vqgan.tokens - tokens.shape[1]
        return to_pil(self._decode(F.pad(tokens, (0, missing), value=self.config.filler)))

    def _finish(self, tokens: Int[Tensor, "B N"]) -> list[Image.Image]:
        """Decode one picture at a time, since convolutions may round differently in another batch."""
        return [picture for row in tokens for picture in to_pil(self._decode(row[None]))]

    def _decode(self, tokens: Int[Tensor, "B N"]) -> Float[Tensor, "B 3 H W"]:
        latents = self.model.vqgan.lookup(tokens)
        return self.model.vqgan.decode(latents.to(self.dtype))

    def _fastest_format(self) -> torch.dtype:
        """fp32, or bf16 where the processor multiplies it and a decoding step gains by it."""
        decoder = self.model.image_decoder
        if not has_native_bf16():
            return torch.float32
        plain = _seconds_per_step(decoder, torch.float32)
        short = _seconds_per_step(copy.deepcopy(decoder).to(torch.bfloat16), torch.bfloat16)
        return torch.bfloat16 if short < plain else torch.float32

    def _fastest_threads(self) -> int:
        """Number of threads with the shortest step right now: on a busy machine fewer are faster."""
        timings = {}
        for threads in _thread_counts():
            torch.set_num_threads(threads)
            timings[threads] = _seconds_per_step(self.model.image_decoder, self.dtype)
        return min(timings, key=timings.get)


def has_native_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware; elsewhere it is emulated and slower than fp32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))


def _thread_counts() -> list[int]:
    """Powers of two up to the cores that this process may use, and their number itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({cores, *(2**i for i in range(cores.bit_length()) if 2**i <= cores)})


def _seconds_per_step(decoder: ImageDecoder, dtype: torch.dtype) -> float:
    """Seconds of the quickest of a few decoding steps of eight rows, that is four guided pictures."""
    text = torch.zeros(8, 4, decoder.text_width, dtype=dtype)
    cache = decoder.prefill(text, torch.ones(8, 4, dtype=torch.bool))
    tokens = torch.zeros(8, dtype=torch.long)
    timings = []
    for position in range(MEASURED_STEPS):
        start = time.perf_counter()
        decoder.step(tokens, position, cache)
        timings.append(time.perf_counter() - start)
    return min(timings)


def _repeat(prompts: list[tuple[Tensor, Tensor]], copies: int) -> tuple[Float[Tensor, "B T D"], Bool[Tensor, "B T"]]:
    """Stack prompts of different lengths, padded and masked, each `copies` times in a row."""
    longest = max(mask.shape[1] for _, mask in prompts)
    states, masks = [], []
    for state, mask in prompts:
        missing = longest - mask.shape[1]
        states.append(F.pad(state, (0, 0, 0, missing)).expand(copies, -1, -1))
        masks.append(F.pad(mask, (0, missing)).expand(copies, -1))
    return torch.cat(states), torch.cat(masks)
