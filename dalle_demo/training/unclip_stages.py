"""data set folder -> batches and losses: what the four stages of the DALL-E 2 engine train, in the order they are run.

vae: pixels -> latents -> pixels. clip: captions and pixels -> embeddings. prior: text embedding -> image embedding.
unclip: noise and image embedding -> latents, against a discriminator.
Sample number i of a run is made from (seed, i) alone, as in stages.py.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from dalle_demo.checkpoints import load_part, load_tokenizer, save_parts, stored_config, stored_hash
from dalle_demo.config import UnclipConfig, VQGANConfig
from dalle_demo.data import pairs as pairs_data
from dalle_demo.data.pairs import WHITE, Pairs
from dalle_demo.data.scenes import Scenes
from dalle_demo.matching import embed_texts
from dalle_demo.models.clip import CLIP
from dalle_demo.models.discriminator import LatentDiscriminator
from dalle_demo.models.transformer import TextEncoder
from dalle_demo.models.unclip import Generator, NoiseEncoder, Prior
from dalle_demo.models.vqgan import VAE
from dalle_demo.text import PAD
from dalle_demo.training.caches import digest, shared_cache
from dalle_demo.training.loop import Workers
from dalle_demo.training.losses import (
    adaptive_weight,
    contrastive_loss,
    discriminator_loss,
    flow_matching_loss,
    generator_loss,
    gradient_penalty,
    kl_divergence,
)
from dalle_demo.training.stages import (
    COND_DROP_PROB,
    SCENE_SHARE,
    VALIDATION_BATCH,
    ReconstructionObjective,
    VQGANStage,
    begin_from,
    plain_render,
    psnr,
    resize,
    sample_rng,
    shuffled,
    some_renders,
    style_captions,
    weighted,
)
from dalle_demo.weights import load_clip

VAE_KL_WEIGHT = 1e-3  # of the mean over latents, beside the mean over pixels
ZOOM, SHIFT = (0.75, 1.05), 0.1  # of drawings that are moved; a shift of 1 is half a side
MOVED_SHARE = 0.5  # of drawings; the others are seen as they are
VIEWS = 4  # of each drawing that prior and generator see, made once: as it is, moved, and two scenes
CAPTIONS = 8  # of each view that the prior reads; few enough for their embeddings to be kept
NOISE_KL_WEIGHT = 1e-3  # of the sum over the noise's dimensions, beside the mean over latents
ADVERSARIAL_WEIGHT = 0.8  # of the discriminator's pull, where the reconstruction's is 1
# Samples that are rebuilt only, in a third of the time, before pictures are drawn freely as well, for CLIP and the
# discriminator to judge: until the generator has learned shapes the discriminator wins at once and teaches nothing
ADVERSARIAL_FROM = 4_800_000
GRADIENT_PENALTY = 5.0
EMBEDDING_WEIGHT = 0.2  # of the distance to CLIP's embedding of the real picture
DRAWN_SHARE = 0.5  # of a batch for which a picture is drawn freely, beside the rebuilt ones
DECODED = 4  # of those that each process decodes, to compare embeddings
EMBEDDING_NOISE = 0.4  # at most, beside an embedding's length of 1: those that the prior draws are not exact either
CROWD = 4  # samples of one embedding whose distances are watched


class VAEStage(VQGANStage):
    """Train the continuous autoencoder, beginning from the VQGAN's encoder and decoder where their sizes agree."""

    def __init__(self, data: Path, config: VQGANConfig, vqgan: Path, seed: int = 0):
        self.start = load_part(vqgan, "vqgan")
        super().__init__(data, config, seed)
        self.made_from["--vqgan"] = stored_hash(vqgan, "vqgan")

    def objective(self) -> nn.Module:
        """Network to train."""
        vae = VAE(self.config)
        begin_from(vae.encoder, self.start.encoder)
        begin_from(vae.decoder, self.start.decoder)
        return VAEObjective(vae)

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Those of the VQGAN, and the noise (B, C, h, w) of the posterior."""
        shape = (self.config.latent_dim, self.config.grid, self.config.grid)
        noise = [sample_rng(self.seed + 2, i).standard_normal(shape, dtype=np.float32) for i in samples]
        return super().batch(samples) | {"noise": torch.from_numpy(np.stack(noise))}

    def validate(self, network: nn.Module) -> dict[str, float]:
        """PSNR of held-out drawings in dB, and the spread of their latents; nothing without any."""
        if not len(self.held_out):
            return {}
        latents, _ = network.vae.encode(self.held_out)
        figures = {"validation_psnr": psnr(network.vae.decode(latents), self.held_out)}
        return figures | {"validation_spread": latents.std().item()}

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the vae part."""
        save_parts(folder, {"vae": self.config}, {"vae": network.vae})


class VAEObjective(ReconstructionObjective):
    """-log P(x|z) as for the VQGAN, plus KL(q(z|x), N(0, 1)), weighted low: the latents are to be smooth, not few."""

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor, top: int, left: int) -> dict[str, Tensor]:
        """Losses of one batch."""
        mean, logvar = self.vae.encode(pixels)
        ours = self.vae.decode(mean + torch.exp(logvar / 2) * noise)
        losses = self.compare(ours.float(), pixels, top, left)
        kl = kl_divergence(mean, logvar).mean() / mean[0].numel()
        return losses | {"loss": losses["loss"] + VAE_KL_WEIGHT * kl, "kl": kl}


class CLIPStage:
    """Train text encoder and image tower to find each other's pictures and captions."""

    def __init__(self, data: Path, config: UnclipConfig, text: Path, seed: int = 0):
        self.pairs = pairs_data.load(data)
        training, *held_out = pairs_data.split(self.pairs)
        self.training = weighted(self.pairs, training)
        self.held_out = dict(zip(("styles", "concepts"), held_out, strict=True))
        self.config, self.seed, self.text_folder = config, seed, text
        if stored_config(text, "text_encoder") != config.text_encoder:
            raise ValueError(f"{text} holds a text_encoder of other sizes than --preset")
        self.made_from = {
            "--data": self.pairs.fingerprint,
            "--preset": repr(config.clip),
            "--seed": str(seed),
            "--text": stored_hash(text, "text_encoder"),
        }
        self.tokenizer = load_tokenizer(text)
        self.scenes = Scenes(self.pairs, training)
        torch.manual_seed(seed)
        text_encoder = load_part(text, "text_encoder").train().requires_grad_(True)
        self.network = CLIPObjective(text_encoder, CLIP(config.clip))

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Caption ids (B, T) and pixels (B, 3, H, W)."""
        return self.paired(*self.views(samples))

    def views(self, samples: range) -> tuple[list["View"], list[np.random.Generator]]:
        """What these samples show, and their sources of randomness."""
        indices = shuffled(self.training, self.seed, samples)
        rngs = [sample_rng(self.seed, sample) for sample in samples]
        return [View.draw(self.scenes, i, rng) for i, rng in zip(indices, rngs, strict=True)], rngs

    def paired(self, views: list["View"], rngs: list[np.random.Generator]) -> dict[str, Tensor]:
        """A caption of each view, and its pixels."""
        captions = [view.caption(self.pairs, rng) for view, rng in zip(views, rngs, strict=True)]
        ids = self.tokenizer.batch(captions, self.config.text_encoder.length)
        pixels = render_views(self.scenes, views)
        return {"text_ids": ids, "pixels": resize(pixels, self.config.clip.image_size)}

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Retrieval both ways among held-out drawings, captioned by style and name; ties count as misses."""
        figures = {}
        for name, indices in self.held_out.items():
            if not len(indices):
                continue
            captions = style_captions(self.pairs, indices)
            image = embed_drawings(network.clip, self.pairs, indices, self.config.clip.image_size)
            text = network.encode_text(self.tokenizer.batch(captions, self.config.text_encoder.length))
            near = text @ image.T
            figures[f"{name}_image_top1"] = retrieval(near, 1)
            figures[f"{name}_image_top5"] = retrieval(near, 5)
            figures[f"{name}_text_top1"] = retrieval(near.T, 1)
            figures[f"{name}_text_top5"] = retrieval(near.T, 5)
        return figures

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the text_encoder and clip parts and the tokenizer."""
        parts = {"text_encoder": network.text_encoder, "clip": network.clip}
        configs = {"text_encoder": self.config.text_encoder, "clip": self.config.clip}
        save_parts(folder, configs, parts, self.text_folder / "tokenizer.json")


class CLIPObjective(nn.Module):
    """Symmetric InfoNCE over the batch of one process."""

    def __init__(self, text_encoder: TextEncoder, clip: CLIP):
        super().__init__()
        self.text_encoder = text_encoder
        self.clip = clip

    def encode_text(self, text_ids: Tensor) -> Float[Tensor, "B E"]:
        """Embeddings of captions."""
        mask = text_ids != PAD
        return self.clip.encode_text(self.text_encoder(text_ids, mask), mask)

    def forward(self, text_ids: Tensor, pixels: Tensor) -> dict[str, Tensor]:
        """Losses of one batch."""
        text, image = self.encode_text(text_ids), self.clip.encode_image(pixels)
        return {"loss": contrastive_loss(text.float(), image.float(), self.clip.scale), "scale": self.clip.scale}


def retrieval(near: Float[Tensor, "B B"], k: int) -> float:
    """Share of rows in which fewer than k others are at least as near as the row's own."""
    own = near.diagonal()[:, None]
    return ((near >= own).sum(1) <= k).float().mean().item()


def embed_drawings(clip: CLIP, pairs: Pairs, indices: np.ndarray, size: int) -> Float[Tensor, "B E"]:
    """Embeddings of drawings as they are, of which there must be one at least."""
    chunks = np.array_split(indices, math.ceil(len(indices) / VALIDATION_BATCH))
    return torch.cat([clip.encode_image(plain_render(pairs, chunk, size)) for chunk in chunks])


class View:
    """One way to see a drawing: as it is, moved, or in a scene, whose caption goes with it."""

    def __init__(self, index: int, zoom: float = 1.0, shift: tuple[float, float] = (0.0, 0.0), scene: Any = None):
        self.index, self.zoom, self.shift, self.scene = index, zoom, shift, scene

    @classmethod
    def draw(cls, scenes: Scenes, index: int, rng: np.random.Generator) -> "View":
        """Any of them."""
        if rng.random() < SCENE_SHARE:
            return cls.composed(scenes, index, rng)
        return cls.moved(index, rng) if rng.random() < MOVED_SHARE else cls(index)

    @classmethod
    def moved(cls, index: int, rng: np.random.Generator) -> "View":
        """Drawing at another place and size."""
        x, y = rng.uniform(-SHIFT, SHIFT, size=2)
        return cls(index, rng.uniform(*ZOOM), (x, y))

    @classmethod
    def composed(cls, scenes: Scenes, index: int, rng: np.random.Generator) -> "View":
        """Scene about the drawing."""
        return cls(index, scene=scenes.draw(index, rng))

    def caption(self, pairs: Pairs, rng: np.random.Generator) -> str:
        """A caption of it."""
        return self.scene.caption if self.scene else pairs_data.caption(pairs.rows[self.index], rng)


def render_views(scenes: Scenes, views: list[View]) -> Float[Tensor, "B 3 S S"]:
    """Pixels in [-1, 1] at the drawings' own size."""
    composed = [i for i, view in enumerate(views) if view.scene]
    single = [i for i, view in enumerate(views) if not view.scene]
    side = scenes.pairs.images.shape[1]
    pixels = torch.empty(len(views), 3, side, side)
    if composed:
        pixels[composed] = scenes.render([views[i].scene for i in composed])
    if single:
        zoom = torch.tensor([views[i].zoom for i in single], dtype=torch.float32)
        shift = torch.tensor([views[i].shift for i in single], dtype=torch.float32)
        pictures = scenes.pairs.pictures(np.array([views[i].index for i in single]))
        white = torch.tensor([WHITE] * len(single), dtype=torch.float32)
        pixels[single] = pairs_data.render(pictures, white, zoom, shift)
    return pixels


class EmbeddedViews:
    """VIEWS of every drawing that is trained on, with CLIP's embeddings of them, computed once.

    They are kept beside the run folder, where the next stage finds them.
    """

    def __init__(self, data: Path, config: UnclipConfig, clip: Path, out: Path, workers: Workers, seed: int):
        self.pairs = pairs_data.load(data)
        self.config, self.seed = config, seed
        training, self.held_out, _ = pairs_data.split(self.pairs)
        self.rows = np.searchsorted(training, weighted(self.pairs, training))  # of `training`, some of them repeated
        self.drawings, self.scenes = training, Scenes(self.pairs, training)
        self.made_from = {
            "--data": self.pairs.fingerprint,
            "--seed": str(seed),
            "--clip": f"{stored_hash(clip, 'text_encoder')} {stored_hash(clip, 'clip')}",
        }
        self.model = load_clip(str(clip))
        self.clip = self.model.clip
        self.trained_with = {"clip_part": stored_hash(clip, "clip")}  # `train words` changes the other part only
        cache = out.parent / f"embeddings-{digest(self.made_from | {'views': str(VIEWS)})}.npy"
        self.embeddings = shared_cache(cache, len(training), self._embed, workers)  # (P, VIEWS, E)

    def view(self, row: int, number: int) -> View:
        """One of the views of a drawing, the same each time."""
        index, rng = int(self.drawings[row]), np.random.default_rng([self.seed, row, number])
        if number == 0:
            return View(index)
        return View.moved(index, rng) if number == 1 else View.composed(self.scenes, index, rng)

    def render(self, row: int) -> Tensor:
        """Pixels (VIEWS, 3, H, W) of a drawing's views."""
        pixels = render_views(self.scenes, [self.view(row, number) for number in range(VIEWS)])
        return resize(pixels, self.config.vae.image_size)

    @torch.inference_mode()
    def _embed(self, rows: range) -> np.ndarray:
        size = self.config.clip.image_size
        return np.stack([self.clip.encode_image(resize(self.render(row), size)).half().numpy() for row in rows])

    def choose(self, samples: range) -> tuple[np.ndarray, list[np.random.Generator], np.ndarray]:
        """Rows, sources of randomness and numbers of the views of these samples."""
        rows = shuffled(self.rows, self.seed, samples)
        rngs = [sample_rng(self.seed, sample) for sample in samples]
        return rows, rngs, np.array([rng.integers(VIEWS) for rng in rngs])


class PriorStage:
    """Train the prior on embeddings of captions and pictures."""

    def __init__(self, data: Path, config: UnclipConfig, clip: Path, out: Path, workers: Workers, seed: int = 0):
        self.views = EmbeddedViews(data, config, clip, out, workers, seed)
        self.made_from, self.config = self.views.made_from | {"--preset": repr(config.prior)}, config
        torch.manual_seed(seed)
        self.network = PriorObjective(Prior(config.prior))
        pairs, held_out = self.views.pairs, self.views.held_out
        self.captions, self.held_out = style_captions(pairs, held_out), None
        self._embedded: dict[str, Tensor] = {}
        if len(held_out):
            with torch.no_grad():
                self.held_out = embed_drawings(self.views.clip, pairs, held_out, config.clip.image_size)

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Embeddings of captions and pictures (B, E), noise to begin from (B, E) and times (B,)."""
        rows, rngs, numbers = self.views.choose(samples)
        choices = [rng.integers(CAPTIONS) for rng in rngs]
        captions = [self._caption(*choice) for choice in zip(rows, numbers, choices, strict=True)]
        text = self._embed(captions)
        text[[rng.random() < COND_DROP_PROB for rng in rngs]] = 0
        return prior_batch(text, torch.from_numpy(self.views.embeddings[rows, numbers]).float(), rngs)

    def _caption(self, row: int, number: int, choice: int) -> str:
        """One of the captions of a view, the same each time."""
        rng = np.random.default_rng([self.views.seed, row, number, choice])
        return self.views.view(row, number).caption(self.views.pairs, rng)

    @torch.no_grad()
    def _embed(self, captions: list[str]) -> Float[Tensor, "B E"]:
        """Embeddings in half precision, which are kept: the text encoder takes ten times as long as the prior."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._embedded]
        if new:
            self._embedded.update(zip(new, embed_texts(self.views.model, new).half(), strict=True))
        return torch.stack([self._embedded[caption] for caption in captions]).float()

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Cosine of what is drawn for held-out captions to the picture's embedding, and how often it is the nearest."""
        if self.held_out is None:
            return {}
        image, text = self.held_out, embed_texts(self.views.model, self.captions)
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
        near = network.prior.sample(text, noise, 1.0) @ image.T
        text_near = (text * image).sum(1).mean().item()
        return {
            "validation_cosine": near.diagonal().mean().item(),
            "validation_top1": retrieval(near, 1),
            "validation_top5": retrieval(near, 5),
            "text_cosine": text_near,
        }

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the prior part."""
        save_parts(folder, {"prior": self.config.prior}, {"prior": network.prior}, **self.views.trained_with)


def prior_batch(
    text: Float[Tensor, "B E"], image: Float[Tensor, "B E"], rngs: Sequence[np.random.Generator]
) -> dict[str, Tensor]:
    """Embeddings, with noise (B, E) and times (B,) of each sample's own."""
    noise = np.stack([rng.standard_normal(image.shape[1], dtype=np.float32) for rng in rngs])
    time = torch.tensor([rng.random() for rng in rngs], dtype=torch.float32)
    return {"text": text, "image": image, "noise": torch.from_numpy(noise), "time": time}


class PriorObjective(nn.Module):
    """Rectified flow from noise to embeddings."""

    def __init__(self, prior: Prior):
        super().__init__()
        self.prior = prior

    def forward(self, text: Tensor, image: Tensor, noise: Tensor, time: Tensor) -> dict[str, Tensor]:
        """Losses of one batch."""
        end = image * self.prior.scale
        point = noise + time[:, None] * (end - noise)
        return {"loss": flow_matching_loss(self.prior(point, time, text), noise, end)}


class UnclipStage:
    """Train the generator on the views' latents, with a noise encoder and against a discriminator."""

    def __init__(
        self, data: Path, config: UnclipConfig, clip: Path, vae: Path, out: Path, workers: Workers, seed: int = 0
    ):
        self.views = EmbeddedViews(data, config, clip, out, workers, seed)
        self.config, self.seed = config, seed
        self.vae: VAE = load_part(vae, "vae")
        origin = self.views.made_from | {"--vae": stored_hash(vae, "vae")}
        self.made_from = origin | {"--preset": repr(config.generator)}
        cache = out.parent / f"latents-{digest(origin | {'views': str(VIEWS)})}.npy"
        self.latents = shared_cache(cache, len(self.views.drawings), self._encode, workers)  # (P, VIEWS, C, h, w)
        torch.manual_seed(seed)
        self.network = UnclipObjective(config, self.vae, self.views.clip)
        self.held_out = some_renders(self.views.pairs, self.views.held_out, config.vae.image_size)

    @torch.inference_mode()
    def _encode(self, rows: range) -> np.ndarray:
        return np.stack([self.vae.encode(self.views.render(row))[0].half().numpy() for row in rows])

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Latents (B, C, h, w) and embeddings (B, E) of pictures; noise (B, Z) to draw from, and of the posterior."""
        rows, rngs, numbers = self.views.choose(samples)
        embeddings = torch.from_numpy(self.views.embeddings[rows, numbers]).float()
        latents = torch.from_numpy(self.latents[rows, numbers]).float()
        given = generator_batch(latents, embeddings, self.config.generator.noise_dim, rngs)
        return given | {"contested": samples.start >= ADVERSARIAL_FROM}

    def validate(self, network: nn.Module) -> dict[str, float]:
        """On held-out pictures: what the noise encoder and generator make of them, fit and variety of free samples."""
        if not len(self.held_out):
            return {}
        latents, _ = self.vae.encode(self.held_out)
        embedding = self.views.clip.encode_image(resize(self.held_out, self.config.clip.image_size))
        mean, logvar = network.noise_encoder(latents, embedding)
        ours = network.generator(mean, embedding)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(CROWD, *mean.shape, generator=generator)
        crowd = torch.stack([network.generator(one, embedding) for one in noise])  # (CROWD, B, C, h, w)
        pixels = resize(self.vae.decode(crowd[0]), self.config.clip.image_size)
        fit = (self.views.clip.encode_image(pixels) * embedding).sum(1).mean().item()
        apart = torch.pdist(crowd.flatten(2).transpose(0, 1).flatten(0, 1)[: CROWD * 8]).mean().item()
        alike = torch.stack([torch.pdist(one) for one in crowd.flatten(2).transpose(0, 1)]).mean().item()
        return {
            "validation_l1": F.l1_loss(ours, latents).item(),
            "validation_kl": kl_divergence(mean, logvar).mean().item(),
            "validation_fit": fit,  # cosine of CLIP's embeddings, asked for and drawn
            "validation_variety": alike / apart,  # distance within an embedding beside that between any
        }

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the parts that are trained together, and the vae."""
        names = ("generator", "noise_encoder", "discriminator")
        parts = {name: getattr(network, name) for name in names} | {"vae": self.vae}
        configs = dict.fromkeys(names, self.config.generator) | {"vae": self.config.vae}
        save_parts(folder, configs, parts, **self.views.trained_with)


def generator_batch(
    latents: Float[Tensor, "B C h w"], embeddings: Float[Tensor, "B E"], size: int, rngs: Sequence[np.random.Generator]
) -> dict[str, Tensor]:
    """Latents, embeddings exact and with an error, noise (B, size) to draw from, and that of the posterior."""
    noise = torch.from_numpy(np.stack([rng.standard_normal((2, size), dtype=np.float32) for rng in rngs]))
    error = np.stack([rng.standard_normal(embeddings.shape[1], dtype=np.float32) for rng in rngs])
    most = torch.tensor([rng.uniform(0, EMBEDDING_NOISE) for rng in rngs], dtype=torch.float32)[:, None]
    near = F.normalize(embeddings + most * torch.from_numpy(error) / embeddings.shape[1] ** 0.5, dim=-1)
    given = {"latents": latents, "shown": embeddings, "embedding": near}
    return given | {"noise": noise[:, 0], "posterior": noise[:, 1]}


class UnclipObjective(nn.Module):
    """A conditional VAE whose decoder is a GAN's generator (Bao et al. 2017, CVAE-GAN).

    Reconstruction from the noise that the noise encoder finds, and KL of that noise to a normal distribution; later
    also CLIP's embedding of pictures drawn freely beside the one asked for, and the hinge loss of those pictures.
    """

    def __init__(self, config: UnclipConfig, vae: VAE, clip: CLIP, adversarial_weight: float = ADVERSARIAL_WEIGHT):
        super().__init__()
        self.adversarial_weight = adversarial_weight
        self.generator = Generator(config.generator)
        self.noise_encoder = NoiseEncoder(config.generator)
        self.discriminator = LatentDiscriminator(config.generator)
        self._fixed = (vae, clip)  # in a tuple: no part of checkpoints and averages
        self._size = config.clip.image_size

    def forward(
        self, latents: Tensor, shown: Tensor, embedding: Tensor, noise: Tensor, posterior: Tensor, contested: bool
    ) -> dict[str, Tensor]:
        """Losses of one batch; one backward pass serves both players, each of whom sees the other as it is.

        `shown` are CLIP's embeddings of the pictures, `embedding` is what the generator is given.
        """
        mean, logvar = self.noise_encoder(latents, embedding)
        found, kl = mean + torch.exp(logvar / 2) * posterior, kl_divergence(mean, logvar).mean()
        if not contested:  # the discriminator takes part with nothing, since all processes must use all weights
            reconstruction = F.l1_loss(self.generator(found, embedding), latents)
            loss = reconstruction + NOISE_KL_WEIGHT * kl + 0 * self.discriminator(latents[:1], embedding[:1]).sum()
            return {"loss": loss, "reconstruction": reconstruction, "kl": kl}
        few = max(1, round(DRAWN_SHARE * len(latents)))
        asked = embedding[:few]
        both = self.generator(torch.cat([found, noise[:few]]), torch.cat([embedding, asked]))
        rebuilt, drawn = both.split([len(latents), few])
        reconstruction = F.l1_loss(rebuilt, latents)
        distance = self._distance(drawn, shown[:few])
        losses = {"reconstruction": reconstruction, "kl": kl, "embedding": distance}
        loss = reconstruction + NOISE_KL_WEIGHT * kl + EMBEDDING_WEIGHT * distance
        judge = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        adversarial = generator_loss(functional_call(self.discriminator, judge, (drawn, asked)))
        weight = self.adversarial_weight * adaptive_weight(reconstruction, adversarial, both)
        real = latents.requires_grad_()
        scores = self.discriminator(real, embedding)
        critic = discriminator_loss(scores, self.discriminator(drawn.detach(), asked))
        penalty = gradient_penalty(scores, real)
        loss = loss + weight * adversarial + critic + GRADIENT_PENALTY * penalty
        named = {"adversarial": adversarial, "weight": weight, "discriminator": critic, "penalty": penalty}
        return losses | named | {"loss": loss}

    def _distance(self, latents: Tensor, embedding: Tensor) -> Tensor:
        """One minus the cosine between CLIP's embeddings of some of these pictures and those asked for."""
        vae, clip = self._fixed
        ours = clip.encode_image(resize(vae.decode(latents[:DECODED]), self._size))
        return 1 - F.cosine_similarity(ours, embedding[:DECODED]).mean()
