"""preset names and request settings -> checked values: every size of every model, every setting of a request.

A model is described by one frozen dataclass; `nano`, `mini` and `mega` are three values of the same classes. The
fields of `GenerateParams` and `UnclipParams` carry their label, help and range, from which the page's sliders and the
command line's flags are made, so a setting cannot exist in one place only.
"""

import dataclasses
import math
import random
import unicodedata
from dataclasses import dataclass, field
from typing import Any, Literal

MAX_SEED = 2**31 - 1
MAX_PROMPT = 1000  # characters; far beyond what any tokenizer here keeps
MAX_IMAGES = 16


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes of the picture tokenizer (Esser et al. 2021); `patch` > 1 folds pixels into channels first."""

    image_size: int
    channels: int
    multipliers: tuple[int, ...]  # channels of each level, fine to coarse, in units of `channels`
    blocks: int  # residual blocks per level of the encoder; the decoder has one more
    attention: tuple[int, ...] = ()  # sides of the feature maps that get attention after each block
    patch: int = 1
    quantizer: Literal["fsq", "vq", "kl"] = "vq"  # kl: no codes but a normal distribution, see models/vqgan.VAE
    levels: tuple[int, ...] = ()  # fsq only: values per dimension
    vq_size: int = 0  # vq only: entries of the codebook
    vq_dim: int = 0  # vq only: their width
    latent_dim: int = 0  # kl only: width of the latents
    decoder_channels: int = 0  # what `channels` is of the encoder, where the decoder has others
    encoder: bool = True  # without one, tokens become pixels and nothing else
    from_zero: bool = False  # the encoder was trained on pixels in [0, 1], which no change of weights undoes at borders

    @property
    def drawing_channels(self) -> int:
        """Channels of the decoder's levels, which `multipliers` multiply."""
        return self.decoder_channels or self.channels

    @property
    def downsample(self) -> int:
        """Pixels per token side."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.image_size // self.downsample

    @property
    def tokens(self) -> int:
        """Image tokens per picture, N."""
        return self.grid**2

    @property
    def codebook_size(self) -> int:
        """Number of codes, K."""
        return math.prod(self.levels) if self.quantizer == "fsq" else self.vq_size

    @property
    def codebook_dim(self) -> int:
        """Width of a code, C."""
        return {"fsq": len(self.levels), "vq": self.vq_dim, "kl": self.latent_dim}[self.quantizer]


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the bidirectional Transformer that reads the prompt."""

    vocab_size: int
    length: int  # text tokens, T; longer prompts are cut
    width: int
    layers: int
    heads: int
    glu_width: int
    ascii_only: bool = False  # emoji spelled out and other characters dropped, as DALL-E Mini reads prompts


@dataclass(frozen=True)
class ImageDecoderConfig:
    """Sizes of the autoregressive Transformer that writes image tokens."""

    vocab_size: int  # rows of the token table: the codes, BOS and, in mega, unused ones
    length: int  # image tokens, N
    bos: int  # the token fed at position 0
    text_width: int
    width: int
    layers: int
    heads: int
    glu_width: int


@dataclass(frozen=True)
class DalleConfig:
    """One DALL-E model: its three parts and the settings it is served with."""

    vqgan: VQGANConfig
    text_encoder: TextEncoderConfig
    image_decoder: ImageDecoderConfig
    defaults: dict[str, float] = field(default_factory=dict)  # of GenerateParams, chosen for this model


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of the image tower, and of the space where it meets the text encoder."""

    image_size: int
    patch: int  # pixels a side that are folded into channels first
    widths: tuple[int, ...]  # channels of each level, fine to coarse
    text_width: int
    embed_dim: int


@dataclass(frozen=True)
class PriorConfig:
    """Sizes of the residual MLP that turns noise into an image embedding."""

    embed_dim: int
    width: int
    blocks: int
    steps: int  # of the sampler


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of the generator, the discriminator and the noise encoder, which are trained together."""

    embed_dim: int
    noise_dim: int
    latent_dim: int
    grid: int  # positions per side of the latents
    width: int
    blocks: int
    channels: int  # of the grid that the blocks' output is spread over; twice as many after the first convolutions
    critic_width: int  # channels of discriminator and noise encoder


@dataclass(frozen=True)
class UnclipConfig:
    """One DALL-E 2 model: its CLIP, its own parts and the settings it is served with."""

    text_encoder: TextEncoderConfig
    clip: CLIPConfig
    vae: VQGANConfig
    prior: PriorConfig
    generator: GeneratorConfig
    defaults: dict[str, float] = field(default_factory=dict)  # of UnclipParams


_NANO_TEXT = TextEncoderConfig(vocab_size=8192, length=32, width=256, layers=4, heads=4, glu_width=512)


def _nano() -> DalleConfig:
    vqgan = VQGANConfig(
        image_size=128,
        patch=4,
        channels=32,
        decoder_channels=64,
        multipliers=(1, 2, 4),
        blocks=1,
        quantizer="fsq",
        levels=(8, 8, 6, 5, 8),
    )
    return DalleConfig(
        vqgan=vqgan,
        text_encoder=_NANO_TEXT,
        image_decoder=ImageDecoderConfig(
            vocab_size=vqgan.codebook_size + 1,
            length=vqgan.tokens,
            bos=vqgan.codebook_size,
            text_width=256,
            width=256,
            layers=6,
            heads=4,
            glu_width=768,
        ),
        defaults={"temperature": 0.5, "guidance_scale": 2.0},
    )


def _dalle_mini(text_vocab: int, image_vocab: int, width: int, layers: int, heads: int, glu_width: int) -> DalleConfig:
    """Sizes published with DALL-E Mini and Mega (Dayma et al. 2021); both share one VQGAN of 16x16 tokens."""
    vqgan = VQGANConfig(
        image_size=256,
        channels=128,
        multipliers=(1, 1, 2, 2, 4),
        blocks=2,
        attention=(16,),
        vq_size=16384,
        vq_dim=256,
        encoder=False,
    )
    text = TextEncoderConfig(text_vocab, 64, width, layers, heads, glu_width, ascii_only=True)
    image = ImageDecoderConfig(image_vocab + 1, vqgan.tokens, 16384, width, width, layers, heads, glu_width)
    defaults = {"n": 1, "temperature": 1.0, "top_k": 256, "guidance_scale": 10.0}
    return DalleConfig(vqgan, text, image, defaults)


def _unclip_nano() -> UnclipConfig:
    vae = dataclasses.replace(_nano().vqgan, quantizer="kl", levels=(), latent_dim=8, decoder_channels=0)
    return UnclipConfig(
        text_encoder=_NANO_TEXT,
        clip=CLIPConfig(image_size=128, patch=8, widths=(96, 192, 320), text_width=256, embed_dim=256),
        vae=vae,
        prior=PriorConfig(embed_dim=256, width=512, blocks=3, steps=8),
        generator=GeneratorConfig(
            embed_dim=256,
            noise_dim=64,
            latent_dim=vae.latent_dim,
            grid=vae.grid,
            width=1280,
            blocks=2,
            channels=32,
            critic_width=96,
        ),
        defaults={"guidance_scale": 1.5, "truncation": 0.8},
    )


# Beside the embedded presets: what an independent judge says of their pictures, and of real ones, by
# benchmarks/quality.py; all figures are in benchmarks/results/
PRESETS: dict[str, DalleConfig] = {
    "nano": _nano(),  # top-5 of common names 51 % (76), of concepts held out in a style 36 % (67), AuthPct 98 (44)
    "mini": _dalle_mini(50264, 16384, width=1024, layers=12, heads=16, glu_width=2730),
    "mega": _dalle_mini(50272, 16415, width=2048, layers=24, heads=32, glu_width=4096),
}
UNCLIP_PRESETS: dict[str, UnclipConfig] = {
    "unclip-nano": _unclip_nano(),  # 60 % (76), 42 % (67), AuthPct 93 (44)
}
CLIP_PRESET = "clip-nano"  # that the prompts of all models are compared by


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository; `size` in bytes of its tensors, where it is known: the file is a little larger."""

    path: str
    size: int | None = None
    needed: bool = True  # False: a repository may lack it


@dataclass(frozen=True)
class Source:
    """Where a preset comes from on the Hugging Face Hub."""

    repo: str
    files: dict[str, RemoteFile]  # by the name that each gets here
    form: Literal["min-dalle", "flax", "dalle_demo"]
    licence: str
    revision: str | None = None  # 40 hex digits; None is `main`, as it is at the first download
    vqgan: "Source | None" = None  # flax only: the repository of the picture tokenizer, kept in a folder of that name
    preset: str | None = None  # whose settings, and sizes unless the repository tells them, it has; None: its namesake


def _min_dalle(suffix: str, encoder: int, decoder: int) -> Source:
    """Files of kuprel/min-dalle."""
    files = {
        "vocab.json": RemoteFile(f"vocab{suffix}.json"),
        "merges.txt": RemoteFile(f"merges{suffix}.txt"),
        "encoder.pt": RemoteFile(f"encoder{suffix}.pt", encoder),
        "decoder.pt": RemoteFile(f"decoder{suffix}.pt", decoder),
        "detoker.pt": RemoteFile("detoker.pt", 186_839_564),
    }
    return Source("kuprel/min-dalle", files, "min-dalle", "Apache-2.0")


def _flax(preset: str) -> Source:
    """Files of the original DALL-E Mini or Mega, with the picture tokenizer's encoder, which only this form has."""
    model = {name: RemoteFile(name) for name in ("config.json", "flax_model.msgpack")}
    words = {name: RemoteFile(name, needed=False) for name in ("tokenizer.json", "vocab.json", "merges.txt")}
    revision = "e93a26e7707683d349bf5d5c41c5b0ef69b677a9"  # that dalle-mini names
    vqgan = Source("dalle-mini/vqgan_imagenet_f16_16384", model, "flax", "see its model card", revision)
    return Source(f"dalle-mini/dalle-{preset}", model | words, "flax", "Apache-2.0", vqgan=vqgan, preset=preset)


SOURCES: dict[str, Source] = {
    "mini": _min_dalle("_mini", 405_182_448, 470_484_976),
    "mega": _min_dalle("", 2_220_044_288, 2_954_997_760),
    "mini-flax": _flax("mini"),
    "mega-flax": _flax("mega"),
}

# What a checkpoint folder of each kind holds
PARTS = {"vqgan": VQGANConfig, "text_encoder": TextEncoderConfig, "image_decoder": ImageDecoderConfig}
CLIP_PARTS = {"text_encoder": TextEncoderConfig, "clip": CLIPConfig}
UNCLIP_PARTS = {
    "vae": VQGANConfig,
    "prior": PriorConfig,
    "generator": GeneratorConfig,
    "noise_encoder": GeneratorConfig,
    "discriminator": GeneratorConfig,
}


def part_config(name: str, values: dict[str, Any]) -> Any:
    """Config of one part from its JSON form; raises ValueError on a missing or unknown key."""
    kinds = PARTS | CLIP_PARTS | UNCLIP_PARTS
    try:
        return kinds[name](**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"config of {name!r}: {error}") from error


NO_NUMBER = "must be a number from {low} to {high}, not {value!r}"
OUT_OF_RANGE = "must be from {low} to {high}, not {value}"


class ParamError(ValueError):
    """A request setting that cannot be used; `field` names it, the message says what to do.

    `sentence` has the places of `values` in braces, for who says it in another language.
    """

    def __init__(self, field: str, sentence: str, **values: Any):
        super().__init__(f"{field}: {sentence.format(**values)}")
        self.field, self.sentence, self.values = field, sentence, values


def _number(default: float, low: float, high: float, step: float, label: str, help: str) -> Any:
    metadata = {"low": low, "high": high, "step": step, "label": label, "help": help}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Params:
    """What every request has. Raises ParamError, a ValueError that names the field, when a value cannot be used."""

    prompt: str
    n: int = _number(4, 1, MAX_IMAGES, 1, "Images", "How many pictures to draw at once.")
    seed: int | None = field(
        default=None,
        metadata={
            "low": 0,
            "high": MAX_SEED,
            "step": 1,
            "label": "Seed",
            "help": "The same seed, prompt and settings draw the same pictures again.",
        },
    )

    def __post_init__(self):
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ParamError("prompt", "type what to draw, for example “a red apple”")
        if len(self.prompt) > MAX_PROMPT:
            told = {"length": len(self.prompt), "most": MAX_PROMPT}
            raise ParamError("prompt", "has {length:,} characters; shorten it to at most {most:,}", **told)
        if any(unicodedata.category(c) == "Cs" for c in self.prompt):
            raise ParamError("prompt", "holds half a character, which no text file can; type it again")
        if not any(c.isalnum() or (c > "\x7f" and unicodedata.category(c)[0] == "S") for c in self.prompt):
            raise ParamError("prompt", "has no letter, digit or emoji; type what to draw")
        for spec in dataclasses.fields(self):
            if spec.name == "prompt" or (spec.name == "seed" and self.seed is None):
                continue
            object.__setattr__(self, spec.name, _checked(spec, getattr(self, spec.name)))
        last = MAX_SEED - self.drawn + 1
        if self.seed is not None and self.seed > last:
            raise ParamError(
                "seed", "must leave room for {drawn} pictures; use at most {last}", drawn=self.drawn, last=last
            )

    @property
    def drawn(self) -> int:
        """How many pictures are drawn, with seeds that follow each other."""
        return self.n

    def seeded(self) -> "Params":
        """The same with a seed, drawn where there is none."""
        if self.seed is not None:
            return self
        return dataclasses.replace(self, seed=random.SystemRandom().randint(0, MAX_SEED - self.drawn + 1))

    def alone(self) -> dict[str, Any]:
        """Settings with which a picture of this request is drawn alone, but for its seed."""
        return dataclasses.asdict(self) | {"n": 1}


@dataclass(frozen=True)
class GenerateParams(Params):
    """A request to a DALL-E model."""

    temperature: float = _number(
        1.0, 0.05, 2.0, 0.05, "Temperature", "Lower is safer and more alike, higher is wilder and more varied."
    )
    top_k: int = _number(0, 0, 16384, 1, "Top-k", "At each step choose among the k most likely pieces only; 0 is off.")
    top_p: float = _number(
        1.0, 0.05, 1.0, 0.01, "Top-p", "At each step drop the unlikely rest beyond this share of probability; 1 is off."
    )
    guidance_scale: float = _number(
        1.0, 1.0, 20.0, 0.1, "Guidance", "How hard to follow the prompt; 1 is off, too much coarsens the picture."
    )
    candidates: int = _number(
        0,
        0,
        MAX_IMAGES,
        1,
        "Candidates",
        "Draw so many and show those that fit the prompt best; 0 is off.",
    )

    def __post_init__(self):
        super().__post_init__()
        if 0 < self.candidates < self.n:
            raise ParamError("candidates", "must be at least the {n} pictures that are shown, or 0 for none", n=self.n)

    @property
    def drawn(self) -> int:
        """How many pictures are drawn, of which `n` are shown."""
        return self.candidates or self.n

    def alone(self) -> dict[str, Any]:
        """Settings with which a picture of this request is drawn alone, but for its seed."""
        return super().alone() | {"candidates": 0}


@dataclass(frozen=True)
class UnclipParams(Params):
    """A request to a DALL-E 2 model."""

    guidance_scale: float = _number(
        1.0, 1.0, 10.0, 0.1, "Guidance", "How hard the prior follows the prompt; 1 is off, too much makes all alike."
    )
    truncation: float = _number(
        1.0, 0.0, 1.0, 0.05, "Variety", "Scale of all noise: lower is safer, 0 draws the same picture for all seeds."
    )
    candidates: int = _number(
        2, 1, 16, 1, "Embeddings tried", "The prior draws so many for each picture; the nearest to the prompt is used."
    )


def is_whole(spec: dataclasses.Field) -> bool:
    """Whether a field of a request counts something."""
    return spec.type in (int, int | None)


def _checked(spec: dataclasses.Field, value: Any) -> int | float:
    """Number within the field's range, as int where the field counts; ParamError otherwise."""
    low, high = spec.metadata["low"], spec.metadata["high"]
    whole = is_whole(spec)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ParamError(spec.name, NO_NUMBER, low=low, high=high, value=str(value)[:40])
    if not low <= value <= high:  # also true of NaN
        raise ParamError(spec.name, OUT_OF_RANGE, low=low, high=high, value=short(value))
    if whole and value != int(value):
        raise ParamError(spec.name, "must be a whole number, not {value}", value=value)
    return int(value) if whole else float(value)


def short(number: float) -> str:
    """Number for a message; Python refuses to print integers of thousands of digits."""
    return f"{number:.12g}" if isinstance(number, float) or abs(number) < 10**12 else "a number far beyond"
