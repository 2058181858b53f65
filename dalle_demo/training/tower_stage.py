"""captions and drawings -> an image tower that tells more of them apart: the stage `tower`.

The text side of a finished CLIP stays, so every prompt keeps its embedding. And since it stays, the names of all
concepts can stand beside each drawing, not only the captions of its batch: that is what choosing among a few drawings
of one prompt asks for.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle_demo.checkpoints import save_parts, stored_hash
from dalle_demo.config import UnclipConfig
from dalle_demo.matching import embed_many
from dalle_demo.models.clip import CLIP
from dalle_demo.models.transformer import TextEncoder
from dalle_demo.training.losses import contrastive_loss, distillation_loss
from dalle_demo.training.stages import MIRRORED
from dalle_demo.training.unclip_stages import CLIPObjective, CLIPStage, View, embed_drawings
from dalle_demo.weights import clip_hashes, load_clip

LANGUAGES = ("name", "name_zh")
ERASED_SHARE, ERASED = 0.5, 0.5  # of single drawings; the longest side of what is hidden of them, as a share of theirs
KEPT = 32  # pictures of each process's share that are to stay where they were in CLIP's space
KEPT_WEIGHT = 5.0
NO_NAME = -100  # of scenes, and of drawings without a name in a language


class TowerStage(CLIPStage):
    """Train a finished CLIP's image tower on, beside fixed embeddings of captions and of all names."""

    def __init__(self, data: Path, config: UnclipConfig, clip: Path, seed: int = 0):
        super().__init__(data, config, clip, seed)
        text_hash = self.made_from.pop("--text")
        self.made_from["--clip"] = f"{text_hash} {stored_hash(clip, 'clip')}"
        model = load_clip(str(clip))
        rows = [self.pairs.rows[i] for i in self.training]
        self.names = [sorted({row[key] for row in rows} - {""}) for key in LANGUAGES]
        self.places = [{name: i for i, name in enumerate(names)} for names in self.names]
        with torch.no_grad():
            banks = [embed_many(model, names) for names in self.names]
        self.before = model.clip
        self.network = TowerObjective(model.text_encoder, load_clip(str(clip)).clip, banks)

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Caption ids (B, T), pixels (B, 3, H, W), places of their names in each language (B, 2), embeddings (K, E).

        These are the finished CLIP's, of the first pictures before anything was hidden of them.
        """
        views, rngs = self.views(samples)
        batch = self.paired(views, rngs)
        with torch.no_grad():
            batch["before"] = self.before.encode_image(batch["pixels"][:KEPT])
        for i, (view, rng) in enumerate(zip(views, rngs, strict=True)):
            if not view.scene:  # whose caption says what lies where
                batch["pixels"][i] = self._disguised(batch["pixels"][i], view, rng)
        return batch | {"names": torch.tensor([self._places(view) for view in views])}

    def _disguised(self, pixels: Float[Tensor, "3 H W"], view: View, rng: np.random.Generator) -> Tensor:
        """Drawing that may be mirrored, and may have a part hidden (Zhong et al. 2020)."""
        if self.pairs.rows[view.index]["group"] in MIRRORED and rng.random() < 0.5:
            pixels = pixels.flip(-1)
        if rng.random() < ERASED_SHARE:
            side = pixels.shape[-1]
            height, width = rng.integers(side // 8, int(side * ERASED), size=2)
            top, left = rng.integers(side - height), rng.integers(side - width)
            pixels = pixels.clone()
            pixels[:, top : top + height, left : left + width] = float(rng.uniform(-1, 1))
        return pixels

    def _places(self, view: View) -> list[int]:
        row = self.pairs.rows[view.index]
        found = [places.get(row[key], NO_NAME) for key, places in zip(LANGUAGES, self.places, strict=True)]
        return [NO_NAME] * len(found) if view.scene else found

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the text_encoder and clip parts and the tokenizer; models of the CLIP before go on with this one."""
        parts = {"text_encoder": network.text_encoder, "clip": network.clip}
        configs = {"text_encoder": self.config.text_encoder, "clip": self.config.clip}
        earlier = clip_hashes(self.text_folder)
        save_parts(folder, configs, parts, self.text_folder / "tokenizer.json", continues=earlier)

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Retrieval both ways, names found for drawings held out in a style, and how near these are to before."""
        figures = super().validate(network)
        indices = np.array([i for i in self.held_out["styles"] if self.pairs.rows[i]["name"] in self.places[0]])
        if not len(indices):
            return figures
        ours, before = (
            embed_drawings(clip, self.pairs, indices, self.config.clip.image_size)
            for clip in (network.clip, self.before)
        )
        near = ours @ network.bank_0.T
        own = near.gather(1, torch.tensor([[self.places[0][self.pairs.rows[i]["name"]]] for i in indices]))
        better = (near >= own).sum(1)
        figures |= {f"names_top{k}": (better <= k).float().mean().item() for k in (1, 5)}
        return figures | {"validation_kept": (ours * before).sum(1).mean().item()}


class TowerObjective(CLIPObjective):
    """Symmetric InfoNCE over the batch, a cross-entropy over all names in each language, and the distance to before."""

    def __init__(self, text_encoder: TextEncoder, clip: CLIP, banks: list[Float[Tensor, "K E"]]):
        super().__init__(text_encoder.requires_grad_(False), clip.train().requires_grad_(True))
        clip.text_projection.requires_grad_(False)
        for i, bank in enumerate(banks):
            self.register_buffer(f"bank_{i}", bank, persistent=False)
        self.languages = len(banks)

    def forward(
        self, text_ids: Tensor, pixels: Tensor, names: Int[Tensor, "B L"], before: Float[Tensor, "K E"]
    ) -> dict[str, Tensor]:
        """Losses of one batch."""
        text, image, scale = self.encode_text(text_ids).float(), self.clip.encode_image(pixels).float(), self.clip.scale
        banks = [getattr(self, f"bank_{i}") for i in range(self.languages)]
        named = [
            F.cross_entropy(scale * image @ bank.T, places, ignore_index=NO_NAME, reduction="sum")
            for bank, places in zip(banks, names.T, strict=True)
        ]
        losses = {
            "pairs": contrastive_loss(text, image, scale),
            "names": sum(named) / (names != NO_NAME).sum().clamp(min=1),  # of scenes alone there are none
            "moved": distillation_loss(image[: len(before)], before),
        }
        loss = losses["pairs"] + losses["names"] + KEPT_WEIGHT * losses["moved"]
        return {"loss": loss, **losses, "scale": scale}
