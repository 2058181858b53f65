"""captions, nouns without pictures -> a text encoder that knows what to show for both: the stage `words`.

A public sentence encoder says which captions a noun is near to, and CLIP's embedding of the noun is to be what lies
between theirs. Captions keep the embeddings they have, so prior and generator go on as they are. CLIP's own half of the
weights stays, and with it the space where words and pictures meet.
"""

import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dalle_demo.checkpoints import save_parts, stored_hash
from dalle_demo.data import pairs as pairs_data
from dalle_demo.data.scenes import Scenes
from dalle_demo.matching import embed_many, embed_texts
from dalle_demo.training.caches import digest, shared_cache
from dalle_demo.training.loop import Workers
from dalle_demo.training.losses import distillation_loss
from dalle_demo.training.stages import HELD_OUT_PHRASES, sample_rng, shuffled, style_captions, weighted
from dalle_demo.training.teacher import Nouns
from dalle_demo.training.unclip_stages import CLIPObjective, View
from dalle_demo.weights import clip_hashes, load_clip

WORD_SHARE = 0.5  # of samples; the others are captions, of drawings and of scenes
CHUNK = 256


class WordsStage:
    """Train a finished CLIP's text encoder on nouns of a file, one a line, and on captions."""

    def __init__(self, data: Path, clip: Path, words: Path, out: Path, workers: Workers, seed: int = 0):
        self.pairs, self.seed, self.clip_folder = pairs_data.load(data), seed, clip
        training, self.held_out, _ = pairs_data.split(self.pairs)
        self.training, self.scenes = weighted(self.pairs, training), Scenes(self.pairs, training)
        rows = [self.pairs.rows[i] for i in training]
        captions = sorted({text for row in rows for text in (row["name"], *row["keywords"])})
        self.nouns = Nouns(words, captions, pairs_data.unseen_words(self.pairs), out, workers)
        self.made_from = {
            "--data": self.pairs.fingerprint,
            "--seed": str(seed),
            "--words": self.nouns.fingerprint,
            "--clip": f"{stored_hash(clip, 'text_encoder')} {stored_hash(clip, 'clip')}",
        }
        self.model = load_clip(str(clip))
        styles = sorted({row["style"] for row in rows})
        self.forms = [*dict.fromkeys(pairs_data.TEMPLATES), *(f"{style} {{}}" for style in styles)]
        forms = out / f"forms-{digest(self.made_from)}.npy"
        self.embedded = shared_cache(forms, len(captions), self._embed_forms, workers)  # (C, forms, E)
        aside = np.random.default_rng(seed).random(len(self.nouns)) < HELD_OUT_PHRASES
        self.trained, self.kept_aside = np.flatnonzero(~aside), np.flatnonzero(aside)
        text_encoder = copy.deepcopy(self.model.text_encoder).train().requires_grad_(True)
        self.network = WordsObjective(CLIPObjective(text_encoder, self.model.clip))

    @torch.inference_mode()
    def _embed_forms(self, rows: range) -> np.ndarray:
        """CLIP's embeddings (B, forms, E) of captions in each of the forms."""
        texts = [form.format(self.nouns.captions[i]) for i in rows for form in self.forms]
        return embed_many(self.model, texts).unflatten(0, (len(rows), -1)).half().numpy()

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Ids (B, T) of nouns and captions, and the embeddings (B, E) that they are to have."""
        nouns, captions = (shuffled(side, self.seed, samples) for side in (self.trained, self.training))
        texts, targets = [], torch.empty(len(samples), self.embedded.shape[-1])
        asked = []
        for i, sample in enumerate(samples):
            rng = sample_rng(self.seed, sample)
            if rng.random() < WORD_SHARE:
                form = int(rng.integers(len(self.forms)))
                texts.append(self.forms[form].format(self.nouns.words[nouns[i]]))
                targets[i] = self._between(nouns[i], form)
            else:
                texts.append(View.draw(self.scenes, captions[i], rng).caption(self.pairs, rng))
                asked.append(i)
        if asked:
            targets[asked] = self._embed([texts[i] for i in asked])
        return {"text_ids": self._ids(texts), "target": targets}

    def _between(self, noun: int, form: int) -> Float[Tensor, " E"]:
        """What lies between the captions nearest to a noun."""
        near = torch.from_numpy(self.embedded[self.nouns.places[noun], form]).float()
        return F.normalize(self.nouns.shares[noun] @ near, dim=0)

    @torch.no_grad()
    def _embed(self, texts: list[str]) -> Float[Tensor, "B E"]:
        return embed_texts(self.model, texts)

    def _ids(self, texts: list[str]) -> Tensor:
        return self.model.tokenizer.batch(texts, self.model.text_config.length)

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Mean cosines to what is wanted: of nouns kept aside, of captions held out in a style, and of scenes."""
        rngs = [np.random.default_rng([self.seed, i]) for i in range(len(self.training[:CHUNK]))]
        scenes = [self.scenes.draw(i, rng).caption for i, rng in zip(self.training[:CHUNK], rngs, strict=True)]
        figures = {"validation_scenes": self._kept(network, scenes)}
        if len(self.kept_aside):
            wanted = torch.stack([self._between(i, 0) for i in self.kept_aside])
            ours = network.clip.encode_text(self._ids([self.nouns.words[i] for i in self.kept_aside]))
            figures["validation_nouns"] = (ours * wanted).sum(1).mean().item()
        if len(self.held_out):
            figures["validation_captions"] = self._kept(network, style_captions(self.pairs, self.held_out))
        return figures

    def _kept(self, network: nn.Module, texts: list[str]) -> float:
        """Mean cosine of embeddings to those from before the training."""
        return (network.clip.encode_text(self._ids(texts)) * self._embed(texts)).sum(1).mean().item()

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the text_encoder and clip parts and the tokenizer."""
        parts = {"text_encoder": network.clip.text_encoder, "clip": network.clip.clip}
        configs = {"text_encoder": self.model.text_config, "clip": self.model.config}
        earlier = clip_hashes(self.clip_folder)[1:]
        save_parts(folder, configs, parts, self.clip_folder / "tokenizer.json", continues=earlier)


class WordsObjective(nn.Module):
    """Cosine distance of texts' embeddings to those they are to have."""

    def __init__(self, clip: CLIPObjective):
        super().__init__()
        clip.clip.requires_grad_(False)
        self.clip = clip

    def forward(self, text_ids: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Losses of one batch."""
        return {"loss": distillation_loss(self.clip.encode_text(text_ids), target)}
