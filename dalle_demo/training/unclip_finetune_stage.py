"""prepared folder -> embeddings, latents, batches and losses of the DALL-E 2 engine, all of it but CLIP and VAE.

The prior learns which image embeddings belong to the captions. The generator and the noise encoder learn the pictures'
latents, against the discriminator that they were trained against, which goes on learning, too.
"""

import copy
import dataclasses
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dalle_demo.checkpoints import StoredPart, load_part, read_config, save_tensors
from dalle_demo.config import UNCLIP_PARTS, GeneratorConfig
from dalle_demo.data import uploads
from dalle_demo.engines import UnclipEngine
from dalle_demo.matching import embed_many
from dalle_demo.training.finetune_stage import KEPT, FinetuneStage, free_names
from dalle_demo.training.losses import flow_matching_loss
from dalle_demo.training.stages import resize
from dalle_demo.training.unclip_stages import PriorObjective, UnclipObjective, generator_batch, prior_batch
from dalle_demo.weights import DRAWING_PARTS, Unclip, load_unclip

KEPT_EACH = 4  # drawings of each name, each from an embedding of its own: they take milliseconds
# Of the discriminator's pull. With 0.8 the likeness to 20 pictures trained on grew by 0.10 and that to other names
# fell by 0.13; with 0.3 by 0.14 and by 0.07
ADVERSARIAL_WEIGHT = 0.3
TIMES = 16  # points of the prior's path at which a validation looks
TRIED = 4  # pictures drawn to see how long it takes
TRAINED = tuple(part for part in UNCLIP_PARTS if part != "vae")


class UnclipFinetuneStage(FinetuneStage):
    """Train a DALL-E 2 model on embeddings and latents of the pictures; CLIP and VAE stay as they are."""

    parts, encoding = tuple(UNCLIP_PARTS), "latents"
    unit = "(of the prior's flow, and of latents)"
    trained = f"all weights of {', '.join(TRAINED)}"
    load = staticmethod(load_unclip)

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.config.vae.image_size

    def _made_from(self) -> dict[str, str]:
        """With the CLIP, which is no part of the base's folder."""
        made_from = super()._made_from()
        return made_from | {"--base": f"{made_from['--base']} {self.base.clip.sha256}"}

    def rebuild(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """What the VAE makes of pictures."""
        return self.base.vae.decode(self.base.vae.encode(pixels)[0])

    def _encode(self, renders: Float[Tensor, "R 3 H W"]) -> np.ndarray:
        """Latents and CLIP's embedding of each render, side by side: (R, C h w + E)."""
        latents, _ = self.base.vae.encode(renders)
        return beside(latents, self.base.clip.clip.encode_image(resize(renders, self.config.clip.image_size)))

    def _split(self, rows: np.ndarray) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B E"]]:
        """Latents and embeddings of rows of `_encode`."""
        sizes: GeneratorConfig = self.config.generator
        latents, embeddings = torch.from_numpy(rows).split([rows.shape[1] - sizes.embed_dim, sizes.embed_dim], 1)
        return latents.unflatten(1, (-1, sizes.grid, sizes.grid)), embeddings.contiguous()

    def names_to_keep(self, examples: list[uploads.Example]) -> list[str]:
        """Prompts of the base's own drawings."""
        return free_names(examples, KEPT) * KEPT_EACH

    def _draw_kept(self, rows: range) -> np.ndarray:
        """Embeddings as the base's prior draws them for these names, latents as its generator does from those.

        Without guidance and truncation: what is to be kept is how they are distributed, not how they are shown.
        """
        engine = self._engine({})
        drawn = []
        for place, i in enumerate(rows):
            self.tell("kept", place, len(rows))
            seen = engine.imagine(
                engine.params(self.kept[i], n=1, seed=i, guidance_scale=1.0, truncation=1.0, candidates=1)
            )
            with torch.inference_mode():
                drawn.append(beside(self.base.generator(seen.noise, seen.embedding), seen.embedding))
        return np.concatenate(drawn) if drawn else np.empty((0, self.encoded.shape[-1]), self.encoded.dtype)

    @cached_property
    def texts(self) -> dict[str, Tensor]:
        """CLIP's embedding of each caption and each name; of the empty one zeros, as the prior wants it."""
        captions = list(dict.fromkeys([*self.kept, *(example.caption for example in self.examples if example.caption)]))
        with torch.no_grad():
            embeddings = embed_many(self.base.clip, captions)
        return dict(zip(captions, embeddings, strict=True)) | {"": torch.zeros_like(embeddings[0])}

    def _make_network(self) -> "TuningObjective":
        unclip = UnclipObjective(self.config, self.base.vae, self.base.clip.clip, ADVERSARIAL_WEIGHT)
        unclip.generator = copy.deepcopy(self.base.generator)
        unclip.noise_encoder = copy.deepcopy(self.base.noise_encoder)
        unclip.discriminator = load_part(self.folder, "discriminator")
        prior = PriorObjective(copy.deepcopy(self.base.prior))
        return TuningObjective(prior, unclip).train().requires_grad_(True)

    def batch(self, samples: range) -> dict[str, dict[str, Any]]:
        """What prior and generator are given."""
        captions, rows, _, rngs = zip(*self.choose(samples), strict=True)
        latents, embeddings = self._split(np.stack(rows))
        text, size = self._texts(captions), self.config.generator.noise_dim
        return {
            "prior": prior_batch(text, embeddings, rngs),
            "unclip": generator_batch(latents, embeddings, size, rngs) | {"contested": True},
        }

    def _texts(self, captions: Sequence[str]) -> Float[Tensor, "B E"]:
        return torch.stack([self.texts[caption] for caption in captions])

    def _loss(self, network: "TuningObjective", rows: np.ndarray) -> float:
        """Squared error of the prior's velocity, and distance of latents from those that the generator gives back."""
        latents, embeddings = self._split(self.encoded[rows, 0])
        mean, _ = network.unclip.noise_encoder(latents, embeddings)
        rebuilt = F.l1_loss(network.unclip.generator(mean, embeddings), latents)
        prior, text = network.prior.prior, self._texts([self.examples[i].caption for i in rows])
        noise = torch.randn(TIMES, *embeddings.shape, generator=torch.Generator().manual_seed(0))
        end, total = embeddings * prior.scale, 0.0
        for i, start in enumerate(noise):
            clock = torch.full((len(rows),), (i + 0.5) / TIMES)
            velocity = prior(start + clock[:, None] * (end - start), clock, text)
            total += flow_matching_loss(velocity, start, end).item()
        return rebuilt.item() + total / TIMES

    def _write(self, network: "TuningObjective", folder: Path) -> None:
        """Write the tuned parts, the base's vae, and the name of its CLIP."""
        modules = network.parts()
        states = {part: {key: value.half() for key, value in modules[part].state_dict().items()} for part in TRAINED}
        states["vae"] = StoredPart(self.folder / "model.safetensors", "vae")
        states = {part: states[part] for part in UNCLIP_PARTS}
        configs = {part: getattr(self.config, part, self.config.generator) for part in UNCLIP_PARTS}
        clip = read_config(self.folder)["clip"]
        save_tensors(folder, configs, states, clip=clip, defaults=self.config.defaults)

    def engine(self, network: "TuningObjective") -> UnclipEngine:
        """Engine with copies of the tuned parts."""
        return self._engine(network.parts())

    def _engine(self, tuned: dict[str, nn.Module]) -> UnclipEngine:
        """Engine of the base, but for these parts; of copies, since an engine changes what it is given."""
        parts = {part: tuned.get(part, getattr(self.base, part)) for part in DRAWING_PARTS}
        copies = {part: copy.deepcopy(module).eval().requires_grad_(False) for part, module in parts.items()}
        model: Unclip = dataclasses.replace(self.base, name=self.out.name, sha256="", **copies)
        return UnclipEngine(model, threads=torch.get_num_threads())

    def seconds_per_picture(self, engine: UnclipEngine) -> float:
        """Measured, since it takes milliseconds."""
        start = time.monotonic()
        list(engine.generate(engine.params("picture", n=TRIED, seed=0)))
        return (time.monotonic() - start) / TRIED


class TuningObjective(nn.Module):
    """The losses of the prior and those of the generator, which share no weights and are learned at once."""

    def __init__(self, prior: PriorObjective, unclip: UnclipObjective):
        super().__init__()
        self.prior = prior
        self.unclip = unclip

    def forward(self, prior: dict[str, Tensor], unclip: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of one batch."""
        flow, losses = self.prior(**prior)["loss"], self.unclip(**unclip)
        return losses | {"flow": flow, "loss": flow + losses["loss"]}

    def parts(self) -> dict[str, nn.Module]:
        """What is trained, by the names that checkpoint folders have for it."""
        return {"prior": self.prior.prior} | {part: getattr(self.unclip, part) for part in TRAINED if part != "prior"}


def beside(latents: Float[Tensor, "B C h w"], embeddings: Float[Tensor, "B E"]) -> np.ndarray:
    """Both in one array, which is kept in one file."""
    return torch.cat([latents.flatten(1), embeddings], 1).numpy()
