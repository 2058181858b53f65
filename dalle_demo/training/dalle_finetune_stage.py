"""prepared folder -> tokens, batches and losses of the DALL-E engine.

Trained are adapters, or all weights, of its Transformers, and the VQGAN's decoder at fixed tokens, which learns how
edges and colours of the pictures look.
"""

import copy
import dataclasses
import math
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_demo.checkpoints import StoredPart, save_tensors
from dalle_demo.config import PARTS
from dalle_demo.data import uploads
from dalle_demo.engines import DalleEngine
from dalle_demo.hardware import formats, seconds_per_image
from dalle_demo.images import from_pil
from dalle_demo.models.packed import is_stored, read
from dalle_demo.models.transformer import ImageDecoder, TextEncoder
from dalle_demo.models.vqgan import VQGAN
from dalle_demo.text import PAD
from dalle_demo.training import lora
from dalle_demo.training.finetune_stage import KEPT, KEPT_SHARE, FinetuneStage, free_names
from dalle_demo.training.losses import token_losses
from dalle_demo.training.stages import DalleObjective, dalle_batch, disturb, sample_rng
from dalle_demo.weights import LARGE, Dalle, find, load_dalle

LARGE_KEPT = 16  # names of which large models draw one picture each
PIXELS_EVERY = 2  # samples of a process, one comes with a picture for the VQGAN's decoder
PICTURES_IN_MEMORY = 256  # whose renders are kept, 0.3 MB each at 128 pixels


class DalleFinetuneStage(FinetuneStage):
    """Train a DALL-E model to write the tokens of the pictures, and a small one to draw them from their tokens."""

    parts, encoding, unit = tuple(PARTS), "tokens", "nats a token"

    @staticmethod
    def load(preset: str) -> Dalle:
        """The base, whose VQGAN computes in fp32."""
        base = load_dalle(preset)
        base.vqgan.float()
        return base

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.config.vqgan.image_size

    def rebuild(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """What the tokenizer makes of pictures."""
        return self.base.vqgan(pixels)[0]

    def _encode(self, renders: Float[Tensor, "R 3 H W"]) -> np.ndarray:
        """Tokens (R, N), a render at a time."""
        return torch.cat([self.base.vqgan.encode(one[None]) for one in renders]).to(torch.int32).numpy()

    def names_to_keep(self, examples: list[uploads.Example]) -> list[str]:
        """Prompts of the base's own drawings; large models draw few, since each takes long."""
        names = free_names(examples, KEPT)
        return names[:LARGE_KEPT] if is_large(self.settings.base) else names

    def _draw_kept(self, rows: range) -> np.ndarray:
        """Tokens (B, N) of what the base draws now for these names."""
        # In the same format at each run, not in the one that is fastest just now, for the same weights
        form = formats(torch.device("cpu"))[0] if is_stored(self.base.image_decoder) else "float32"
        engine = DalleEngine(self._copy_of_base(), threads=torch.get_num_threads(), form=form, device="cpu")
        tokens = np.empty((len(rows), self.config.vqgan.tokens), np.int32)
        for place, i in enumerate(rows):
            self.tell("kept", place, len(rows))
            (last,) = engine.generate(engine.params(self.kept[i], n=1, seed=i), previews=False)
            with torch.inference_mode():
                tokens[place] = self.base.vqgan.encode(from_pil(last.images))[0].numpy()
        return tokens

    def _copy_of_base(self) -> Dalle:
        parts = {part: copy.deepcopy(getattr(self.base, part)) for part in PARTS}
        return dataclasses.replace(self.base, **parts)

    def _make_network(self) -> DalleObjective:
        large = is_stored(self.base.image_decoder)
        network = KeepingObjective(
            self.base.text_encoder, self.base.image_decoder, None if large else self._pixel_decoder()
        )
        torch.manual_seed(self.settings.seed)
        for part in self.settings.parts:
            module = getattr(network, part)
            read(module)
            module.float()
            if self.settings.method == "lora":
                lora.add(module, self.settings.rank)
            else:
                module.requires_grad_(True)
        if large:
            for layer in network.image_decoder.layers:  # whose activations are computed again instead of kept
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        return network.float()

    @torch.no_grad()
    def _pixel_decoder(self) -> VQGAN:
        """The base's VQGAN with a decoder to train, and what that is to draw from the tokens: renders and drawings."""
        self._pixels_of = lru_cache(PICTURES_IN_MEMORY)(self._levels_of)
        latents = self._latents(self.kept_encoded)
        self.kept_pixels = torch.cat([self.base.vqgan.decode(one) for one in latents.split(1)])
        vqgan = copy.deepcopy(self.base.vqgan).requires_grad_(False)
        for module in (vqgan.post_quant_conv, vqgan.decoder):
            module.requires_grad_(True)
        return vqgan

    def _levels_of(self, i: int) -> UInt8[Tensor, "R 3 H W"]:
        """Renders of a picture, a byte a channel."""
        return ((self.renders(i) + 1) * 127.5).round().clamp(0, 255).byte()

    def _latents(self, tokens: np.ndarray) -> Float[Tensor, "B C h w"]:
        grid = self.config.vqgan.grid
        return self.base.vqgan.lookup(torch.from_numpy(tokens).long().view(-1, grid, grid)).float()

    def batch(self, samples: range) -> dict[str, Tensor]:
        """What KeepingObjective takes: captions, tokens to predict, the noisy ones to predict them from, pictures."""
        captions, rows, of_base, rngs = zip(*self.choose(samples), strict=True)
        noisy = [disturb(row, self.config.vqgan, rng) for row, rng in zip(rows, rngs, strict=True)]
        batch = self._batch(captions, np.stack(rows), np.stack(noisy)) | {"of_base": torch.tensor(of_base)}
        return batch | (self._pictures(samples) if self.network.vqgan else {})

    def _pictures(self, samples: range) -> dict[str, Tensor]:
        """Latents (B, C, h, w) and pixels (B, 3, H, W) of renders, and of drawings of the base as it decodes them."""
        tokens, pixels = [], []
        for sample in samples[::PIXELS_EVERY]:
            rng = sample_rng(self.settings.seed + 1, sample)
            if rng.random() < KEPT_SHARE:
                kept = rng.integers(len(self.kept))
                tokens.append(self.kept_encoded[kept])
                pixels.append(self.kept_pixels[kept])
            else:
                i, render = int(rng.choice(self.training)), rng.integers(self.encoded.shape[1])
                tokens.append(self.encoded[i, render])
                pixels.append(self._pixels_of(i)[render] / 127.5 - 1)
        return {"latents": self._latents(np.stack(tokens)), "pixels": torch.stack(pixels)}

    def _batch(self, captions: list[str], tokens: np.ndarray, inputs: np.ndarray) -> dict[str, Tensor]:
        return dalle_batch(self.base.tokenizer.batch(captions, self.config.text_encoder.length), tokens, inputs)

    def _loss(self, network: nn.Module, rows: np.ndarray) -> float:
        total = 0.0
        for start in range(0, len(rows), self.plan.batch):
            chunk = rows[start : start + self.plan.batch]
            tokens = self.encoded[chunk, 0]
            losses = network(**self._batch([self.examples[i].caption for i in chunk], tokens, tokens))
            total += losses["loss"].item() * len(chunk)
        return total / len(rows)

    def _write(self, network: nn.Module, folder: Path) -> None:
        """Write the model with adapters merged, and the adapters beside it."""
        parts = {part: getattr(network, part) for part in self.settings.parts}
        states = {part: StoredPart(self.folder / "model.safetensors", part) for part in PARTS}
        for part, module in parts.items():
            states[part] = {key: value.half() for key, value in lora.merged_state(module).items()}
        changes = {}
        if network.vqgan:
            base = self.base.vqgan.state_dict()
            trained = [name for name, p in self.network.vqgan.named_parameters() if p.requires_grad]
            tuned = {name: network.vqgan.get_parameter(name).detach() for name in trained}
            states["vqgan"] = dict(states["vqgan"]) | {name: weight.half() for name, weight in tuned.items()}
            changes = {f"vqgan.{name}": weight - base[name] for name, weight in tuned.items()}
        configs = {part: getattr(self.config, part) for part in PARTS}
        if self.settings.method == "lora":
            lora.save(folder, parts, changes)
        save_tensors(folder, configs, states, self.folder / "tokenizer.json", defaults=self.config.defaults)

    def engine(self, network: nn.Module) -> DalleEngine:
        """Engine in the format preferred here, not in a measured one: a run that goes on must draw as it did before."""
        form = formats(torch.device("cpu"))[0]
        return DalleEngine(self.model(network), threads=torch.get_num_threads(), form=form, device="cpu")

    def seconds_per_picture(self, engine: DalleEngine) -> float:
        """Estimated, for one takes long."""
        return seconds_per_image(engine.config)

    @property
    def trained(self) -> str:
        """Method, and the parts that it is done to."""
        size = f"LoRA of rank {self.settings.rank}" if self.settings.method == "lora" else "all weights"
        decoder = ", and the VQGAN's decoder" if self.network.vqgan else ""
        return f"{size} of {' and '.join(self.settings.parts)}{decoder}"

    def model(self, network: nn.Module) -> Dalle:
        """What would be exported, for an engine to take apart."""
        vqgan = copy.deepcopy(network.vqgan or self.base.vqgan)
        modules = {"vqgan": vqgan.eval().requires_grad_(False)}
        for part, kind in (("text_encoder", TextEncoder), ("image_decoder", ImageDecoder)):
            module = getattr(network, part)
            if part not in self.settings.parts:
                modules[part] = copy.deepcopy(module)
                continue
            with torch.device("meta"):
                modules[part] = kind(getattr(self.config, part))
            modules[part].load_state_dict(lora.merged_state(module), assign=True)
            modules[part].eval().requires_grad_(False)
        return Dalle(self.out.name, "", self.config, self.base.tokenizer, **modules)


class KeepingObjective(DalleObjective):
    """-log P(image tokens | text) of the pictures; for drawings of the base, cross-entropy with what the base expects.

    That says more of the base at every token than the one that it drew (Li & Hoiem 2016). Trained on 19 badges, `nano`
    lost 8 % of its alignment on other names so, 18 % with the tokens as targets, and came closer to the badges
    (benchmarks/finetune.py). Without adapters the base is not there to be asked, and the tokens are the targets.

    Beside it, where there is a VQGAN, the distance (L1) of what its decoder draws to the pictures.
    """

    def __init__(self, text_encoder: TextEncoder, image_decoder: ImageDecoder, vqgan: VQGAN | None = None):
        super().__init__(text_encoder, image_decoder)
        self.vqgan = vqgan

    def forward(
        self,
        text_ids: Tensor,
        image_tokens: Tensor,
        inputs: Tensor,
        of_base: Tensor | None = None,
        latents: Tensor | None = None,
        pixels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of one batch; `of_base` (B,) marks drawings of the base, `pixels` are to be drawn from `latents`."""
        mask = text_ids != PAD
        logits = self.image_decoder(inputs, self.text_encoder(text_ids, mask), mask)
        losses = token_losses(logits, image_tokens)
        if of_base is not None and of_base.any() and lora.has_adapters(self):
            with torch.no_grad(), lora.left_out(self):
                ids, mask = text_ids[of_base], mask[of_base]
                wanted = self.image_decoder(inputs[of_base], self.text_encoder(ids, mask), mask).softmax(-1)
            losses = losses.masked_scatter(of_base, token_losses(logits[of_base], wanted.to(logits.dtype)))
        token_loss = losses.mean()
        if pixels is None:
            return {"loss": token_loss}
        apart = F.l1_loss(self.vqgan.decode(latents), pixels)
        return {"loss": token_loss + apart, "token_loss": token_loss, "pixels": apart}


def is_large(base: str) -> bool:
    """Whether the base's image decoder is one whose weights stay in their file until they are needed."""
    shapes = StoredPart(find(base) / "model.safetensors", "image_decoder").shapes
    return sum(map(math.prod, shapes.values())) > LARGE
