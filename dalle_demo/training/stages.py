"""data set folder -> batches and losses: what each of the four stages trains, in the order they are run.

vqgan: pixels -> tokens -> pixels. sharpen: tokens -> pixels, against a discriminator. text: phrases -> vectors of a
public sentence encoder. dalle: captions -> tokens.
Sample number i of a run is made from (seed, i) alone, whatever process makes it; only the place of the perceptual crop
is drawn once for all samples of a process.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from dalle_demo.checkpoints import load_part, load_tokenizer, save_parts, stored_config, stored_hash
from dalle_demo.config import DalleConfig, TextEncoderConfig, VQGANConfig
from dalle_demo.data import pairs as pairs_data
from dalle_demo.data.pairs import WHITE, Pairs, render
from dalle_demo.data.scenes import Scenes
from dalle_demo.models.discriminator import PatchDiscriminator
from dalle_demo.models.transformer import ImageDecoder, TextEncoder
from dalle_demo.models.vqgan import VQGAN
from dalle_demo.text import PAD, Tokenizer
from dalle_demo.training.caches import digest, shared_cache
from dalle_demo.training.loop import Workers
from dalle_demo.training.losses import (
    PerceptualLoss,
    adaptive_weight,
    discriminator_loss,
    distillation_loss,
    generator_loss,
    token_loss,
)
from dalle_demo.training.teacher import TEACHER_WIDTH, Nouns, teach

PERCEPTUAL_WEIGHT = 0.1
PERCEPTUAL_CROP = 64  # pixels
ADVERSARIAL_WEIGHT = 0.1  # of the discriminator's pull, where the other losses' is 1
COND_DROP_PROB = 0.1  # captions replaced by the empty one, which guidance needs
# At most these shares of a sample's input tokens are replaced by neighbours in code space, and by any codes. Sampling
# makes mistakes that training must have seen. And a decoder that can trust the tokens before knows a picture by them,
# down to the shades of its white border, and learns pictures by heart without reading the caption.
NEARBY, ANYWHERE = 0.6, 0.4
VALIDATION_BATCH = 64
HELD_OUT_PHRASES = 0.03
LESS_SEEN = {"people-body"}  # 388 near-identical variants of persons: drawn a quarter as often as everything else
NOUN_SHARE = 0.2  # of plain drawings that are captioned by a noun near to their name, where nouns are given
AS_DRAWN = 0.5  # of the pictures that a VQGAN is trained on; the others vary
SCENE_SHARE = 0.4  # of samples composed afresh; the others are drawings
# Of these, half are moved and zoomed a little, and some mirrored, so that no tokens can be learnt by heart;
# the tokens of the other half, drawings as they are, are computed once.
MOVED_SHARE = 0.5
ZOOMS, SHIFT = (0.85, 1.0), 0.06  # of a moved drawing; the shift in half sides
MIRRORED = {"animals-nature", "food-drink"}  # whose drawings mean the same in a mirror


def sample_rng(seed: int, sample: int) -> np.random.Generator:
    """The one source of randomness of a sample."""
    return np.random.default_rng([seed, sample])


def shuffled(indices: np.ndarray, seed: int, samples: range) -> np.ndarray:
    """Entries of `indices` for these sample numbers: a new permutation in each pass over the data."""
    chosen = np.empty(len(samples), dtype=np.int64)
    for i, sample in enumerate(samples):
        epoch, place = divmod(sample, len(indices))
        chosen[i] = indices[_permutation(len(indices), seed, epoch)[place]]
    return chosen


_permutations: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    key = (length, seed, epoch)
    if key not in _permutations:
        _permutations.clear()
        _permutations[key] = np.random.default_rng([seed, epoch]).permutation(length)
    return _permutations[key]


class VQGANStage:
    """Train the picture tokenizer.

    Half of the pictures are what an image decoder learns to draw, plain drawings and scenes; the others are drawings
    whose place, size, colour and background vary.

    Args:
        earlier: checkpoint folder of a VQGAN to begin from, whose weights are taken where the sizes agree.
    """

    def __init__(self, data: Path, config: VQGANConfig, seed: int = 0, earlier: Path | None = None):
        self.pairs = pairs_data.load(data)
        self.training, held_out, _ = pairs_data.split(self.pairs)
        self.config, self.seed = config, seed
        self.made_from = {"--data": self.pairs.fingerprint, "--preset": repr(config), "--seed": str(seed)}
        torch.manual_seed(seed)
        self.network = self.objective()
        if earlier:
            begin_from(self.network.vqgan, load_part(earlier, "vqgan"))
        self.made_from["--earlier"] = stored_hash(earlier, "vqgan") if earlier else ""
        self.scenes = Scenes(self.pairs, self.training)
        self.held_out = some_renders(self.pairs, held_out, config.image_size)

    def objective(self) -> nn.Module:
        """Network to train."""
        return VQGANObjective(VQGAN(self.config))

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Pixels (B, 3, H, W), and where the perceptual crop lies."""
        indices = shuffled(self.training, self.seed, samples)
        rngs = [sample_rng(self.seed, sample) for sample in samples]
        pixels = [self._picture(rng, i) for rng, i in zip(rngs, indices, strict=True)]
        spare = max(1, self.config.image_size - PERCEPTUAL_CROP + 1)
        top, left = rngs[0].integers(spare, size=2).tolist()
        return {"pixels": torch.cat(pixels), "top": top, "left": left}

    def _picture(self, rng: np.random.Generator, index: int) -> Float[Tensor, "1 3 H W"]:
        """Drawing as it is, scene about it, or varied drawing."""
        if rng.random() >= AS_DRAWN:
            pixels = self._varied(rng, index)
        elif rng.random() < SCENE_SHARE:
            pixels = self.scenes.render([self.scenes.draw(index, rng)])
        else:
            return plain_render(self.pairs, np.array([index]), self.config.image_size)
        return resize(pixels, self.config.image_size)

    def _varied(self, rng: np.random.Generator, index: int) -> Float[Tensor, "1 3 S S"]:
        colour = np.float32(WHITE if rng.random() < 0.5 else rng.integers(256, size=3))
        zoom, shift = rng.uniform(0.7, 1.1, size=1), rng.uniform(-0.15, 0.15, size=(1, 2))
        flip = rng.random(1) < 0.5
        places = (torch.from_numpy(np.float32(value)) for value in (colour[None], zoom, shift))
        pixels = render(self.pairs.pictures(np.array([index])), *places, torch.from_numpy(flip))
        return pixels[:, rng.permutation(3)] if rng.random() < 0.2 else pixels  # swapped channels: new hues

    def validate(self, network: nn.Module) -> dict[str, float]:
        """PSNR of held-out drawings in dB, and how much of the codebook they use; nothing without any."""
        if not len(self.held_out):
            return {}
        ours, tokens, _ = network.vqgan(self.held_out)
        usage = torch.bincount(tokens.flatten(), minlength=self.config.codebook_size) / tokens.numel()
        perplexity = torch.exp(-(usage * torch.log(usage.clamp(min=1e-9))).sum()).item()
        return {"validation_psnr": psnr(ours, self.held_out), "validation_code_perplexity": perplexity}

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the vqgan part."""
        save_parts(folder, {"vqgan": self.config}, {"vqgan": network.vqgan})


@torch.no_grad()
def begin_from(network: nn.Module, earlier: nn.Module) -> None:
    """Copy the weights whose sizes agree, and the dimensions of codes that there were, which come first."""
    weights = network.state_dict()
    for name, before in earlier.state_dict().items():
        if name.startswith("quant_conv.") and before.shape[1:] == weights[name].shape[1:]:
            kept = min(len(before), len(weights[name]))
            weights[name][:kept] = before[:kept]
        elif name in weights and weights[name].shape == before.shape:
            weights[name].copy_(before)


class ReconstructionObjective(nn.Module):
    """-log P(x|z) as a Laplace (L1) term, plus the perceptual distance."""

    def __init__(self):
        super().__init__()
        self._perceptual = (PerceptualLoss(PERCEPTUAL_CROP),)  # in a tuple: no part of checkpoints and averages

    def compare(self, ours: Tensor, pixels: Tensor, top: int, left: int) -> dict[str, Tensor]:
        """Losses of reconstructions."""
        pixel = F.l1_loss(ours, pixels)
        perceptual = self._perceptual[0](ours, pixels, top, left)
        return {"loss": pixel + PERCEPTUAL_WEIGHT * perceptual, "pixel": pixel, "perceptual": perceptual}


class VQGANObjective(ReconstructionObjective):
    """That, plus the quantizer's own loss."""

    def __init__(self, vqgan: VQGAN):
        super().__init__()
        self.vqgan = vqgan

    def forward(self, pixels: Tensor, top: int, left: int) -> dict[str, Tensor]:
        """Losses of one batch."""
        ours, _, quantizer = self.vqgan(pixels)
        losses = self.compare(ours.float(), pixels, top, left)
        return losses | {"loss": losses["loss"] + quantizer}


class SharpenStage(VQGANStage):
    """Train the decoder of a finished VQGAN on, at fixed tokens, against a discriminator.

    What L1 averages into a blur becomes an edge. The tokens of every picture stay, so an image decoder that was trained
    on them draws with the new VQGAN as it did with the old one.
    """

    def __init__(self, data: Path, config: VQGANConfig, vqgan: Path, seed: int = 0):
        super().__init__(data, config, seed)
        if stored_config(vqgan, "vqgan") != config:
            raise ValueError(f"{vqgan} holds a vqgan of other sizes than --preset")
        self.made_from["--vqgan"] = stored_hash(vqgan, "vqgan")
        self.network = SharpenObjective(load_part(vqgan, "vqgan"))


class SharpenObjective(VQGANObjective):
    """VQGANObjective's comparison plus the adversarial loss, and the discriminator's own beside it."""

    def __init__(self, vqgan: VQGAN):
        super().__init__(vqgan.train().requires_grad_(True))
        for fixed in (vqgan.encoder, vqgan.quant_conv):
            fixed.requires_grad_(False)
        self.discriminator = PatchDiscriminator()

    def forward(self, pixels: Tensor, top: int, left: int) -> dict[str, Tensor]:
        """Losses of one batch; one backward pass serves both players, each of whom sees the other as it is."""
        with torch.no_grad():
            z_q = self.vqgan.quantizer(self.vqgan.quant_conv(self.vqgan.encoder(pixels)))[0]
        ours = self.vqgan.decode(z_q).float()
        losses = self.compare(ours, pixels, top, left)
        judge = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        adversarial = generator_loss(functional_call(self.discriminator, judge, (ours,)))
        weight = ADVERSARIAL_WEIGHT * adaptive_weight(losses["loss"], adversarial, ours)
        critic = discriminator_loss(self.discriminator(pixels), self.discriminator(ours.detach()))
        loss = losses["loss"] + weight * adversarial + critic
        return losses | {"loss": loss, "adversarial": adversarial, "weight": weight, "discriminator": critic}


def weighted(pairs: Pairs, indices: np.ndarray) -> np.ndarray:
    """Indices, those of LESS_SEEN once and all others four times."""
    often = [i for i in indices if pairs.rows[i]["group"] not in LESS_SEEN]
    return np.sort(np.concatenate([indices, *3 * [often]])).astype(np.int64)


def drawings_by_name(pairs: Pairs, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of each name's drawings."""
    found: dict[str, list[int]] = {}
    for i in indices:
        found.setdefault(pairs.rows[i]["name"], []).append(i)
    return {name: np.array(drawings) for name, drawings in found.items()}


def style_captions(pairs: Pairs, indices: np.ndarray) -> list[str]:
    """Captions by style and name."""
    return [f"{pairs.rows[i]['style']} {pairs.rows[i]['name']}" for i in indices]


def psnr(ours: Tensor, real: Tensor) -> float:
    """Peak signal-to-noise ratio of pixels in [-1, 1], in dB."""
    return 10 * math.log10(4 / F.mse_loss(ours.clamp(-1, 1), real).item())


def some_renders(pairs: Pairs, indices: np.ndarray, size: int) -> Tensor | tuple[()]:
    """About VALIDATION_BATCH pictures as they are, or nothing; from all sets, which lie one after another."""
    chosen = indices[:: max(1, len(indices) // VALIDATION_BATCH)]
    return plain_render(pairs, chosen, size) if len(chosen) else ()


def plain_render(pairs: Pairs, indices: np.ndarray, size: int) -> Tensor:
    """Pictures as they are, on white."""
    count = len(indices)
    white = torch.full((count, 3), 255.0)
    return resize(render(pairs.pictures(indices), white, torch.ones(count), torch.zeros(count, 2)), size)


def resize(pixels: Tensor, size: int) -> Tensor:
    """Square pixels to another side."""
    if pixels.shape[-1] == size:
        return pixels
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)


class TextStage:
    """Train the text encoder on phrases alone: its mean state must land where a public sentence encoder puts them.

    Chinese names and keywords carry the vector of the emoji's English name, so both languages share one space.
    """

    def __init__(self, data: Path, config: TextEncoderConfig, out: Path, workers: Workers, seed: int = 0):
        pairs = pairs_data.load(data)
        phrases = pairs_data.all_captions(pairs)
        self.config, self.seed = config, seed
        self.made_from = {"--data": pairs.fingerprint, "--preset": repr(config), "--seed": str(seed)}
        self.texts = [text for text, _ in phrases]
        self.tokenizer_path = out / f"tokenizer-{digest(self.made_from)}.json"
        if workers.rank == 0 and not self.tokenizer_path.exists():
            Tokenizer.train(self.texts, config.vocab_size).save(self.tokenizer_path)
        workers.wait()
        self.tokenizer = Tokenizer.from_file(self.tokenizer_path)
        self.vectors = torch.from_numpy(
            shared_cache(
                out / f"teacher-{digest(self.made_from)}.npy",
                len(phrases),
                lambda rows: teach([phrases[i][1] for i in rows]),
                workers,
            )
        )
        held_out = np.random.default_rng(seed).random(len(phrases)) < HELD_OUT_PHRASES
        self.training = np.flatnonzero(~held_out)
        self.held_out = np.flatnonzero(held_out)
        torch.manual_seed(seed)
        self.network = TextObjective(TextEncoder(config))

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Ids (B, T) of phrases and the teacher's vectors (B, E)."""
        indices = shuffled(self.training, self.seed, samples)
        return self._batch([self.texts[i] for i in indices], indices)

    def _batch(self, texts: list[str], indices: np.ndarray) -> dict[str, Tensor]:
        return {"text_ids": self.tokenizer.batch(texts, self.config.length), "teacher": self.vectors[indices]}

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Mean cosine to the teacher on phrases that are never trained on; nothing without any."""
        if not len(self.held_out):
            return {}
        losses = network(**self._batch([self.texts[i] for i in self.held_out], self.held_out))
        return {"validation_cosine": 1 - losses["loss"].item()}

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the text_encoder part and its tokenizer."""
        parts = {"text_encoder": network.text_encoder}
        save_parts(folder, {"text_encoder": self.config}, parts, self.tokenizer_path)


class TextObjective(nn.Module):
    """Cosine distance between the projected mean state and the teacher's sentence vector (Hinton et al. 2015)."""

    def __init__(self, text_encoder: TextEncoder):
        super().__init__()
        self.text_encoder = text_encoder
        self.project = nn.Linear(text_encoder.embed_tokens.embedding_dim, TEACHER_WIDTH)

    def forward(self, text_ids: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Losses of one batch."""
        mask = text_ids != PAD
        states = self.text_encoder(text_ids, mask) * mask[:, :, None]
        mean = states.sum(1) / mask.sum(1, keepdim=True)
        return {"loss": distillation_loss(self.project(mean).float(), teacher)}


class DalleStage:
    """Train the image decoder, and the text encoder along with it: captions -> image tokens of a finished VQGAN.

    Args:
        decoder: checkpoint folder of the image decoder to go on with, if any; its codes may have fewer FSQ dimensions.
        freeze_text: leave the text encoder as it is, with what it knows beyond these captions.
        words: text file with a noun a line, some of which stand in the place of names that they are near to.
    """

    def __init__(
        self,
        data: Path,
        config: DalleConfig,
        vqgan: Path,
        text: Path,
        out: Path,
        workers: Workers,
        seed: int = 0,
        decoder: Path | None = None,
        freeze_text: bool = False,
        words: Path | None = None,
    ):
        self.pairs = pairs_data.load(data)
        training, self.held_out, _ = pairs_data.split(self.pairs)
        self.training = weighted(self.pairs, training)
        self.config, self.seed, self.text_folder = config, seed, text
        for folder, part in [(vqgan, "vqgan"), (text, "text_encoder")]:
            if stored_config(folder, part) != getattr(config, part):
                raise ValueError(f"{folder} holds a {part} of other sizes than --preset")
        begun = continued(decoder, config) if decoder else None
        self.made_from = {
            "--data": self.pairs.fingerprint,
            "--preset": repr(config.image_decoder),
            "--seed": str(seed),
            "--vqgan": stored_hash(vqgan, "vqgan"),
            "--text": stored_hash(text, "text_encoder"),
            "--decoder": stored_hash(decoder, "image_decoder") if decoder else "",
            "--freeze-text": str(freeze_text),
        }
        self.drawings = drawings_by_name(self.pairs, training)
        unseen = pairs_data.unseen_words(self.pairs)
        self.nouns = Nouns(words, sorted(self.drawings), unseen, out, workers) if words else None
        self.made_from["--words"] = self.nouns.fingerprint if words else ""
        self.vqgan: VQGAN = load_part(vqgan, "vqgan")
        self.tokenizer = load_tokenizer(text)
        self.scenes = Scenes(self.pairs, self.training)
        cache = out / f"tokens-{digest({name: self.made_from[name] for name in ('--data', '--vqgan')})}.npy"
        self.tokens = shared_cache(cache, len(self.pairs), self._tokenise, workers)  # (P, N)
        torch.manual_seed(seed)
        image_decoder = begun or ImageDecoder(config.image_decoder)
        text_encoder = load_part(text, "text_encoder").train().requires_grad_(not freeze_text)
        self.network = DalleObjective(text_encoder, image_decoder.train().requires_grad_(True))

    def _tokenise(self, rows: range) -> np.ndarray:
        """Tokens (B, N) of the given drawings as they are."""
        chunks = [np.array(rows[start : start + 32]) for start in range(0, len(rows), 32)]
        size = self.config.vqgan.image_size
        return np.concatenate([self._encode(plain_render(self.pairs, chunk, size)) for chunk in chunks])

    @torch.inference_mode()
    def _encode(self, pixels: Tensor) -> np.ndarray:
        return self.vqgan.encode(resize(pixels, self.config.vqgan.image_size)).to(torch.int32).numpy()

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Caption ids (B, T), tokens to predict and the noisy tokens to predict them from, both (B, N)."""
        indices = shuffled(self.training, self.seed, samples)
        drawn = [self._sample(sample_rng(self.seed, sample), i) for sample, i in zip(samples, indices, strict=True)]
        captions, rows, noisy = zip(*drawn, strict=True)
        return self._batch(list(captions), np.stack(rows), np.stack(noisy))

    def _sample(self, rng: np.random.Generator, index: int) -> tuple[str, np.ndarray, np.ndarray]:
        """Caption, tokens and disturbed tokens of one sample."""
        if rng.random() < SCENE_SHARE:
            scene = self.scenes.draw(index, rng)
            caption, tokens = scene.caption, self._encode(self.scenes.render([scene]))[0]
        elif self.nouns and rng.random() < NOUN_SHARE:
            noun, name = self.nouns.draw(rng)
            index = rng.choice(self.drawings[name])
            caption, tokens = pairs_data.phrase(noun, self.pairs.rows[index]["style"], rng), self._drawing(index, rng)
        else:
            caption, tokens = pairs_data.caption(self.pairs.rows[index], rng), self._drawing(index, rng)
        caption = "" if rng.random() < COND_DROP_PROB else caption
        return caption, tokens, disturb(tokens, self.config.vqgan, rng)

    def _drawing(self, index: int, rng: np.random.Generator) -> np.ndarray:
        """Tokens (N,) of a drawing, as it is or moved."""
        if rng.random() >= MOVED_SHARE:
            return self.tokens[index]
        zoom, shift = rng.uniform(*ZOOMS, size=1), rng.uniform(-SHIFT, SHIFT, size=(1, 2))
        mirrored = rng.random(1) < (0.5 if self.pairs.rows[index]["group"] in MIRRORED else 0)
        white, zoom, shift = (torch.from_numpy(np.float32(value)) for value in ([WHITE], zoom, shift))
        picture = self.pairs.pictures(np.array([index]))
        return self._encode(render(picture, white, zoom, shift, torch.from_numpy(mirrored)))[0]

    def _batch(self, captions: list[str], tokens: np.ndarray, inputs: np.ndarray) -> dict[str, Tensor]:
        return dalle_batch(self.tokenizer.batch(captions, self.config.text_encoder.length), tokens, inputs)

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Loss in nats a token on drawings held out in one style, captioned by style and name; nothing without any."""
        if not len(self.held_out):
            return {}
        captions, total = style_captions(self.pairs, self.held_out), 0.0
        for start in range(0, len(captions), VALIDATION_BATCH):  # of all together, logits take 0.7 GB
            chunk = slice(start, start + VALIDATION_BATCH)
            tokens = self.tokens[self.held_out[chunk]]
            total += network(**self._batch(captions[chunk], tokens, tokens))["loss"].item() * len(tokens)
        return {"validation_loss": total / len(captions)}

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the whole model."""
        config = self.config
        save_parts(
            folder,
            {"vqgan": config.vqgan, "text_encoder": config.text_encoder, "image_decoder": config.image_decoder},
            {"vqgan": self.vqgan, "text_encoder": network.text_encoder, "image_decoder": network.image_decoder},
            self.text_folder / "tokenizer.json",
            defaults=config.defaults,
        )


def continued(folder: Path, config: DalleConfig) -> ImageDecoder:
    """Image decoder of a folder, with rows for the codes of FSQ dimensions that come after those it knows.

    Its own dimensions keep their place in a token, so token k has the weights of the token k mod K there was: it is as
    likely as that one, spread over the digits that are new.
    """
    decoder, stored = load_part(folder, "image_decoder"), stored_config(folder, "image_decoder")
    levels, sizes = stored_config(folder, "vqgan").levels, {"vocab_size": stored.vocab_size, "bos": stored.bos}
    fits = stored == dataclasses.replace(config.image_decoder, **sizes) and levels == config.vqgan.levels[: len(levels)]
    if not fits or not (levels or stored == config.image_decoder):
        raise ValueError(f"{folder} holds an image_decoder of other sizes than --preset")
    if stored == config.image_decoder:
        return decoder
    rows = torch.cat([torch.arange(config.vqgan.codebook_size) % stored.bos, torch.tensor([stored.bos])])
    weights = decoder.state_dict()
    weights |= {name: weights[name][rows] for name in ("embed_tokens.weight", "lm_head.weight")}
    grown = ImageDecoder(config.image_decoder)
    grown.load_state_dict(weights)
    return grown


def dalle_batch(text_ids: Tensor, tokens: np.ndarray, inputs: np.ndarray) -> dict[str, Tensor]:
    """What DalleObjective takes: caption ids (B, T), tokens to predict and those to predict from, both (B, N)."""
    return {
        "text_ids": text_ids,
        "image_tokens": torch.tensor(tokens).long(),
        "inputs": torch.tensor(inputs).long(),
    }


def disturb(tokens: np.ndarray, config: VQGANConfig, rng: np.random.Generator) -> np.ndarray:
    """Tokens (N,) of which some are replaced by neighbours in code space (fsq), and some by any codes."""
    draw, anywhere, nearby = rng.random(tokens.shape), rng.uniform(0, ANYWHERE), rng.uniform(0, NEARBY)
    disturbed = np.where(draw < anywhere, rng.integers(config.codebook_size, size=tokens.shape), tokens)
    if config.quantizer == "vq":  # whose codes have no order
        return disturbed
    return np.where((anywhere <= draw) & (draw < anywhere + nearby), neighbours(tokens, config.levels, rng), disturbed)


def neighbours(tokens: np.ndarray, levels: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """FSQ tokens with one of their digits moved by one step, or left where it is at the end of its range."""
    dimension = rng.integers(len(levels), size=tokens.shape)
    basis, size = np.cumprod([1, *levels[:-1]])[dimension], np.array(levels)[dimension]
    digit = tokens // basis % size
    moved = np.clip(digit + rng.choice([-1, 1], size=tokens.shape), 0, size - 1)
    return tokens + (moved - digit) * basis


class DalleObjective(nn.Module):
    """-log P(image tokens | text)."""

    def __init__(self, text_encoder: TextEncoder, image_decoder: ImageDecoder):
        super().__init__()
        self.text_encoder = text_encoder
        self.image_decoder = image_decoder

    def forward(self, text_ids: Tensor, image_tokens: Tensor, inputs: Tensor) -> dict[str, Tensor]:
        """Losses of one batch; `inputs` are the tokens to predict from, `image_tokens` those to predict."""
        mask = text_ids != PAD
        logits = self.image_decoder(inputs, self.text_encoder(text_ids, mask), mask)
        return {"loss": token_loss(logits, image_tokens)}
