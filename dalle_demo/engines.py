"""prompt and settings -> updates with pictures: read this first, the whole way to pixels is `_draw` of either engine.

An engine owns what is scarce: the processor (one lock, a measured number of threads) and the number format.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from dalle_demo import mixing
from dalle_demo.config import CLIP_PRESET, MAX_SEED, GenerateParams, ParamError, UnclipParams
from dalle_demo.hardware import (
    fastest_format,
    fastest_threads,
    give_back_memory,
    pick_device,
    pixel_type,
    place_text_encoder,
    place_transformer,
    place_vqgan,
    quickest_threads,
    seconds_of,
)
from dalle_demo.images import to_pil
from dalle_demo.matching import best, embed_image, embed_text, fitted
from dalle_demo.mixing import Seen
from dalle_demo.models.transformer import ImageDecoder
from dalle_demo.sampling import draw_uniforms, guide, sample
from dalle_demo.text import PAD
from dalle_demo.turns import Engine, Update
from dalle_demo.weights import Clip, Dalle, Unclip, WeightsError, is_unclip, load_clip, load_dalle, load_unclip

PREVIEW_SHARE = 0.3
CHUNK = 4  # pictures that a DALL-E 2 model draws at once: always as many, so that none depends on how many are wanted
NO_CLIP = "must be 0: {clip}, which compares pictures with prompts, is missing or damaged"
NOT_READ = "must be 0: {clip}, which compares pictures with prompts, reads nothing of this prompt"


class DalleEngine(Engine):
    """Draws with a DALL-E model, token by token."""

    request = GenerateParams
    sampler = "autoregressive"

    def __init__(
        self,
        model: Dalle,
        threads: int | None = None,
        form: str | None = None,
        device: str | torch.device | None = None,
    ):
        super().__init__(model)
        self.device = torch.device(device) if device else pick_device()
        self._clip: Clip | None = None
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
    def _place(cls, origin: Mapping[str, Any]) -> dict[str, str]:
        return {"form": str(origin.get("format")), "device": str(origin.get("device", "cpu"))}

    @property
    def steps(self) -> int:
        """Tokens of a picture."""
        return self.config.image_decoder.length

    def _draw(self, params: GenerateParams, seeds: list[int], previews: bool) -> Iterator[Update]:
        """Prompt to pixels; an update without images after each token, one with previews after each row.

        Rows for which a preview would take too long have that of an earlier one.
        """
        clip = self._judge(params.prompt) if params.candidates else None
        length, row = self.config.image_decoder.length, self.config.vqgan.grid
        ration, preview = Ration(self.config.vqgan.grid), []
        text = self._encode(params.prompt)
        step = self._guided_step(text, params.guidance_scale, len(seeds))
        uniforms = draw_uniforms(seeds, length)
        drawn = sample(step, uniforms, self.config.image_decoder.bos, params.temperature, params.top_k, params.top_p)
        likelihood = torch.zeros(len(seeds))
        for count, so_far in enumerate(drawn, start=1):
            if clip:
                likelihood += step.log_probability(so_far[:, -1]) / length
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
            yield Update(length, length, [] if clip or len(pictures) < len(seeds) else pictures, seeds)
        if clip:
            yield Update(length, length, *best(clip, params.prompt, pictures, seeds, params.n, likelihood))

    def _judge(self, prompt: str) -> Clip:
        """The CLIP that tells how near pictures are to a prompt, which it must be able to read."""
        if self._clip is None:
            try:
                self._clip = load_clip()
            except WeightsError as error:
                raise ParamError("candidates", NO_CLIP, clip=CLIP_PRESET) from error
        if self._clip.tokenizer.encode(prompt, self._clip.text_config.length).empty:
            raise ParamError("candidates", NOT_READ, clip=CLIP_PRESET)
        return self._clip

    def _encode(self, prompt: str) -> tuple[Float[Tensor, "1 T D"], Bool[Tensor, "1 T"]]:
        ids = self.model.tokenizer.batch([prompt], self.config.text_encoder.length).to(self.device)
        mask = ids != PAD
        return self.model.text_encoder(ids, mask), mask

    def _guided_step(self, text: tuple[Tensor, Tensor], scale: float, n: int) -> "GuidedStep":
        prompts = [text] if scale == 1 else [text, self._uncond]
        return GuidedStep(self.model.image_decoder, prompts, scale, n, self.config.vqgan.codebook_size, self.device)

    def _preview(self, tokens: Int[Tensor, " M"]) -> Image.Image:
        """Picture of the rows that are finished, white below."""
        pixels = self._decode(tokens)
        return to_pil(F.pad(pixels, (0, 0, 0, self.config.vqgan.image_size - pixels.shape[2]), value=1.0))[0]

    def _decode(self, tokens: Int[Tensor, " M"]) -> Float[Tensor, "1 3 H W"]:
        grid = tokens.view(1, -1, self.config.vqgan.grid).to(self.device)
        return self.model.vqgan.decode(self.model.vqgan.lookup(grid).to(pixel_type(self.format)))


class GuidedStep:
    """Step function over the codes: rows of the prompt and, with guidance, of the empty prompt in one batch."""

    def __init__(
        self,
        decoder: ImageDecoder,
        prompts: list[tuple[Tensor, Tensor]],
        scale: float,
        n: int,
        codes: int,
        device: torch.device,
    ):
        self._decoder, self._rows, self._scale, self._codes, self._device = decoder, len(prompts), scale, codes, device
        self._cache = decoder.prefill(*_stack(prompts), n)

    def __call__(self, image_tokens: Int[Tensor, " B"], position: int) -> Float[Tensor, "B V"]:
        """Logits of a position given the token before it."""
        before = image_tokens.repeat(self._rows).to(self._device)
        logits = self._decoder.step(before, position, self._cache)[:, : self._codes]
        if self._rows == 1:
            self._of_prompt = logits
            return logits
        self._of_prompt, of_none = logits.float().chunk(2)
        return guide(self._of_prompt, of_none, self._scale)

    def log_probability(self, tokens: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """log p(token | prompt, tokens before) of what was chosen at the last position, without guidance."""
        logits = self._of_prompt.float().log_softmax(-1)
        return logits.gather(1, tokens[:, None].to(self._device))[:, 0].cpu()


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


class UnclipEngine(Engine):
    """Draws with a DALL-E 2 model, in one pass; always on the processor and in fp32, which takes milliseconds."""

    request = UnclipParams
    sampler = "flow and GAN"
    format, device = "float32", torch.device("cpu")

    def __init__(self, model: Unclip, threads: int | None = None):
        super().__init__(model)
        place_vqgan(model.vae, self.format, self.device)
        sizes = self.config.generator
        with torch.inference_mode():
            blank = torch.zeros(CHUNK, sizes.embed_dim), torch.zeros(CHUNK, sizes.noise_dim)
            self.threads = threads or quickest_threads(lambda: seconds_of(lambda: self._pixels(*blank)))

    @classmethod
    def load(
        cls,
        preset: str = "unclip-nano",
        threads: int | None = None,
        change: Callable[[Unclip], Unclip] = lambda model: model,
    ) -> "UnclipEngine":
        """Engine for a preset or a folder of weights; raises WeightsError.

        Args:
            preset: name of a preset, or a folder.
            threads: processor threads, measured when None; another number rounds differently in the last bits.
            change: what is done to the loaded model.
        """
        return cls(change(load_unclip(preset)), threads)

    @property
    def steps(self) -> int:
        """Those of the prior."""
        return self.config.prior.steps

    def embed_text(self, prompt: str) -> Float[Tensor, " E"]:
        """CLIP's embedding of a prompt."""
        with self._turn():
            return embed_text(self.model.clip, prompt)

    def invert(self, picture: Image.Image) -> Seen:
        """What the generator would draw any picture from, about."""
        with self._turn():
            embedding = embed_image(self.model.clip, picture)
            latents, _ = self.model.vae.encode(fitted(picture, self.config.vae.image_size))
            mean, _ = self.model.noise_encoder(latents, embedding[None])
            return Seen(embedding, mean[0])

    def imagine(self, params: UnclipParams) -> Seen:
        """What the pictures of a request are drawn from, `n` of them."""
        params = params.seeded()
        with self._turn():
            return self._imagine(params, [params.seed + i for i in range(params.n)])

    def draw(self, embeddings: Float[Tensor, "B E"], noise: Float[Tensor, "B Z"]) -> list[Image.Image]:
        """A picture of each row."""
        with self._turn():
            return to_pil(in_chunks(self._pixels, embeddings, noise))

    def walk(self, params: UnclipParams, frames: int) -> Seen:
        """What a closed walk through noise is drawn from: the first picture of a request, the next seed's, and back."""
        params = params.seeded()
        seeds = [params.seed, params.seed + 1]
        with self._turn():
            _, ends = self._choose(params, self._starts(params, seeds))
            embedding, _ = self._choose(params, mixing.loop(*ends, frames)[:, None])
        return Seen(embedding, mixing.loop(*self.noise(seeds), frames) * params.truncation)

    def noise(self, seeds: Sequence[int]) -> Float[Tensor, "B Z"]:
        """The generator's noise of each seed."""
        return _normal(seeds, self.config.generator.noise_dim)

    def fresh(self, seeds: Sequence[int]) -> Seen:
        """Embedding and noise of each seed, of no picture in particular."""
        embeddings = _normal([MAX_SEED + 1 + seed for seed in seeds], self.config.generator.embed_dim)
        return Seen(F.normalize(embeddings, dim=-1), self.noise(seeds))

    def _draw(self, params: UnclipParams, seeds: list[int], previews: bool) -> Iterator[Update]:
        """Prompt to pixels; an update without images after each chunk but the last."""
        seen, pictures = self._imagine(params, seeds), []
        for embeddings, noise in zip(seen.embedding.split(CHUNK), seen.noise.split(CHUNK), strict=True):
            pictures += to_pil(in_chunks(self._pixels, embeddings, noise))
            finished = len(pictures) == len(seeds)
            yield Update(len(pictures), len(seeds), pictures if finished else [], seeds)

    def _imagine(self, params: UnclipParams, seeds: list[int]) -> Seen:
        """Image embeddings from the prior, the nearest to the prompt of each seed's candidates, and noise."""
        embedding, _ = self._choose(params, self._starts(params, seeds))
        return Seen(embedding, self.noise(seeds) * params.truncation)

    def _starts(self, params: UnclipParams, seeds: Sequence[int]) -> Float[Tensor, "B K E"]:
        """Noise that the prior begins each seed's candidates from."""
        shape = params.candidates, self.config.prior.embed_dim
        return _normal([MAX_SEED + 1 + seed for seed in seeds], *shape)  # other ones than `noise`'s

    def _choose(
        self, params: UnclipParams, starts: Float[Tensor, "B K E"]
    ) -> tuple[Float[Tensor, "B E"], Float[Tensor, "B E"]]:
        """The embedding nearest to the prompt of those that the prior draws from each K noises, and its noise."""
        text = embed_text(self.model.clip, params.prompt)

        def choose(starts: Float[Tensor, "B K E"]) -> Float[Tensor, "B 2 E"]:
            rows = starts.flatten(0, 1)
            drawn = self.model.prior.sample(text.expand(len(rows), -1), rows * params.truncation, params.guidance_scale)
            drawn = drawn.unflatten(0, starts.shape[:2])
            best = (drawn * text).sum(-1).argmax(1)
            return torch.stack([both[torch.arange(len(both)), best] for both in (drawn, starts)], 1)

        return in_chunks(choose, starts).unbind(1)

    def _pixels(self, embeddings: Float[Tensor, "B E"], noise: Float[Tensor, "B Z"]) -> Float[Tensor, "B 3 H W"]:
        return self.model.vae.decode(self.model.generator(noise, embeddings))


def _normal(seeds: Sequence[int], *shape: int) -> Tensor:
    """Normal numbers (B, *shape) of each seed's own."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def engine_for(preset: str) -> type[Engine]:
    """The engine that draws with a preset or a folder of weights; raises WeightsError."""
    return UnclipEngine if is_unclip(preset) else DalleEngine


def engine_of(origin: Mapping[str, Any]) -> type[Engine]:
    """The engine that drew a picture of this origin."""
    return UnclipEngine if origin.get("sampler") == UnclipEngine.sampler else DalleEngine


def in_chunks(run: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Outputs of `run`, which is given CHUNK rows of each tensor at a time, at last with zeros for those that lack.

    In a batch of always the same size a row has the same bits whatever the others are, and wherever it stands.
    """
    outputs = []
    for parts in zip(*(tensor.split(CHUNK) for tensor in rows), strict=True):
        missing = CHUNK - len(parts[0])
        full = [torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) for part in parts]
        outputs.append(run(*full)[: CHUNK - missing])
    return torch.cat(outputs)
