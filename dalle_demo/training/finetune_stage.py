"""prepared folder -> batches and losses: what fine-tuning trains, and what it writes.

The pictures' tokens are computed once, by the frozen VQGAN, in several renders. Among them are drawings of the base.
"""

import copy
import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_demo.checkpoints import StoredPart, save_tensors, stored_hash
from dalle_demo.config import PARTS
from dalle_demo.data import pairs, uploads
from dalle_demo.engines import DalleEngine
from dalle_demo.images import from_pil, grid, to_pil
from dalle_demo.models.packed import is_stored, read
from dalle_demo.models.transformer import ImageDecoder, TextEncoder
from dalle_demo.training import lora
from dalle_demo.training.export import overall, read_log
from dalle_demo.training.loop import Plan, Workers
from dalle_demo.training.stages import (
    COND_DROP_PROB,
    DalleObjective,
    dalle_batch,
    digest,
    disturb,
    sample_rng,
    shared_cache,
    shuffled,
)
from dalle_demo.weights import Dalle, find, load_dalle

if TYPE_CHECKING:
    from dalle_demo.training.finetune import FinetuneSettings

RENDERS = 6  # of each picture
ZOOM, SHIFT = (0.85, 1.1), 0.08  # of pictures with a white border; a shift of 1 is half a side
BLEED_ZOOM = (1.0, 1.15)  # of those that reach it
# Prior preservation (Ruiz et al. 2023): this share of the samples are drawings of the base itself, by those of these
# names of which no word is in a caption, so that it does not forget what it could draw
KEPT_SHARE = 0.4
KEPT = (
    "cat", "bird", "butterfly", "lion", "frog", "whale", "tree", "flower", "sun", "moon", "star", "cloud", "mountain",
    "car", "train", "airplane", "house", "castle", "heart", "robot", "ghost", "smiling face", "woman", "man", "hand",
    "eye", "key", "book", "clock", "shoe", "hat", "cake", "cheese", "egg", "carrot", "grapes", "coffee", "phone",
    "chair", "knife",
)  # fmt: skip
KEPT_EACH, LARGE_KEPT = 2, 16  # drawings of each name; of all names together for large models
SHOWN = 8  # pictures in reconstruction.png
COMPARED = 64  # pictures that a validation reads at most


class FinetuneStage:
    """Train adapters, or all weights, of a finished model on a prepared folder; the VQGAN stays as it is."""

    def __init__(
        self,
        settings: "FinetuneSettings",
        plan: Plan,
        out: Path,
        workers: Workers,
        most_kept: int | None = None,
        tell: Callable[[str, int, int], None] = lambda key, done, total: None,  # as Watch.preparing
    ):
        self.settings, self.plan, self.out, self.tell = settings, plan, out, tell
        self.stopped = False  # on request, for good: the checkpoint that follows is one of those that may be the best
        self.tell("model", 0, 0)
        self.folder, self.base = find(settings.base), load_dalle(settings.base)
        self.config, self.vqgan = self.base.config, self.base.vqgan.float()
        self.examples = uploads.load(out / "data")
        self.training, held_out = (np.array(side, int) for side in uploads.split(self.examples, settings.seed))
        if not len(self.training):
            raise ValueError(f"{settings.data} has no picture with a caption; write captions first")
        self.held_out_pictures = len(held_out)  # with few pictures none
        self.held_out = held_out[:COMPARED] if self.held_out_pictures else self.training[:COMPARED]
        self.made_from = self._made_from()
        if workers.rank == 0:
            self._show_reconstruction()
        origin = {name: self.made_from[name] for name in ("--data", "--base", "--seed")} | {"renders": str(RENDERS)}
        tokens = out / f"tokens-{digest(origin)}.npy"
        self.tokens = shared_cache(tokens, len(self.examples), self.tokenise, workers)  # (P, R, N)
        self.kept = names_to_keep(self.examples, is_stored(self.base.image_decoder))[:most_kept]
        kept = out / f"kept-{digest(origin | {'names': repr(self.kept)})}.npy"
        self.kept_tokens = shared_cache(kept, len(self.kept), self._draw_kept, workers)  # (K, N)
        self.network = self._make_network()

    def _made_from(self) -> dict[str, str]:
        data = hashlib.sha256()
        for example in self.examples:
            data.update(f"{example.caption}\n".encode() + (self.out / "data" / example.file).read_bytes())
        base = " ".join(stored_hash(self.folder, part) for part in PARTS)
        return self.settings.lasting() | {"--data": data.hexdigest(), "--base": base}

    def _show_reconstruction(self) -> None:
        """What the tokenizer makes of the pictures is the best that any training can reach."""
        originals = to_pil(self.pixels(self.examples[:SHOWN]))
        with torch.inference_mode():
            ours = [to_pil(self.vqgan(from_pil([picture]))[0])[0] for picture in originals]
        partial_file = self.out / "reconstruction.png.part"
        grid([*originals, *ours], len(originals)).save(partial_file, "PNG")
        partial_file.replace(self.out / "reconstruction.png")

    def pixels(self, examples: list[uploads.Example]) -> Float[Tensor, "B 3 H W"]:
        """Pictures as they are, in [-1, 1]."""
        return uploads.pixels(self.out / "data", examples, self.config.vqgan.image_size)

    @torch.inference_mode()
    def tokenise(self, rows: range) -> np.ndarray:
        """Tokens (B, R, N) of the renders of these pictures."""
        tokens = []
        for done, i in enumerate(rows):
            self.tell("tokens", done, len(rows))
            (picture,) = uploads.pictures(self.out / "data", [self.examples[i]], self.config.vqgan.image_size)
            renders = vary(picture, RENDERS, sample_rng(self.settings.seed, i))
            tokens.append(torch.cat([self.vqgan.encode(one[None]) for one in renders]).to(torch.int32).numpy())
        return np.stack(tokens) if tokens else np.empty((0, RENDERS, self.config.vqgan.tokens), np.int32)

    def _draw_kept(self, rows: range) -> np.ndarray:
        """Tokens (B, N) of what the base draws now for these names."""
        # Small models in the same format at each run, not in the one that is fastest just now, for the same weights
        form = None if is_stored(self.base.image_decoder) else "float32"
        engine = DalleEngine(self._copy_of_base(), threads=torch.get_num_threads(), form=form, device="cpu")
        tokens = np.empty((len(rows), self.config.vqgan.tokens), np.int32)
        for place, i in enumerate(rows):
            self.tell("kept", place, len(rows))
            (last,) = engine.generate(engine.params(self.kept[i], n=1, seed=i), previews=False)
            with torch.inference_mode():
                tokens[place] = self.vqgan.encode(from_pil(last.images))[0].numpy()
        return tokens

    def _copy_of_base(self) -> Dalle:
        parts = {part: copy.deepcopy(getattr(self.base, part)) for part in PARTS}
        return dataclasses.replace(self.base, **parts)

    def _make_network(self) -> DalleObjective:
        network = DalleObjective(self.base.text_encoder, self.base.image_decoder)
        torch.manual_seed(self.settings.seed)
        large = is_stored(network.image_decoder)
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

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Caption ids (B, T), tokens to predict and the noisy tokens to predict them from, both (B, N)."""
        captions, tokens, noisy = [], [], []
        for sample, i in zip(samples, shuffled(self.training, self.settings.seed, samples), strict=True):
            rng = sample_rng(self.settings.seed, sample)
            caption, row = self.examples[i].caption, self.tokens[i, rng.integers(RENDERS)]
            if rng.random() < KEPT_SHARE:
                kept = rng.integers(len(self.kept))
                caption, row = self.kept[kept], self.kept_tokens[kept]
            captions.append("" if rng.random() < COND_DROP_PROB else caption)
            tokens.append(row)
            noisy.append(disturb(row, self.config.vqgan, rng))
        return self._batch(captions, np.stack(tokens), np.stack(noisy))

    def _batch(self, captions: list[str], tokens: np.ndarray, inputs: np.ndarray) -> dict[str, Tensor]:
        return dalle_batch(self.base.tokenizer.batch(captions, self.config.text_encoder.length), tokens, inputs)

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Loss in nats a token of pictures as they are: held out from training, and as many that are trained on."""
        seen = self.training[: len(self.held_out)]
        losses = {"validation_loss": self._loss(network, self.held_out), "seen_loss": self._loss(network, seen)}
        return losses | ({"stopped": 1} if self.stopped else {})

    def _loss(self, network: nn.Module, rows: np.ndarray) -> float:
        total = 0.0
        for start in range(0, len(rows), self.plan.batch):
            chunk = rows[start : start + self.plan.batch]
            tokens = self.tokens[chunk, 0]
            losses = network(**self._batch([self.examples[i].caption for i in chunk], tokens, tokens))
            total += losses["loss"].item() * len(chunk)
        return total / len(rows)

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the whole model, adapters merged, if no checkpoint that counts was better."""
        if not self._is_best():
            return
        parts = {part: getattr(network, part) for part in self.settings.parts}
        states = {part: StoredPart(self.folder / "model.safetensors", part) for part in PARTS}
        for part, module in parts.items():
            states[part] = {key: value.half() for key, value in lora.merged_state(module).items()}
        configs = {part: getattr(self.config, part) for part in PARTS}
        folder.mkdir(parents=True, exist_ok=True)
        if self.settings.method == "lora":
            lora.save(folder, parts)
        (folder / "README.md").write_text(self._card(), encoding="utf-8")
        save_tensors(folder, configs, states, self.folder / "tokenizer.json", defaults=self.config.defaults)

    def _is_best(self) -> bool:
        """Of what was saved in between only the first is kept: whoever pauses a run gets the weights of others."""
        *before, now = read_log(self.out, "validation_loss")
        rivals = [overall(line) for line in before if 0 < line["step"] < now["step"] and self.counts(line)]
        better = not rivals or overall(now) < min(rivals)
        return now["step"] > 0 and better and (self.counts(now) or not rivals)

    def counts(self, line: Mapping[str, Any]) -> bool:
        """Whether a line of the log is of a checkpoint that may be the best: planned, or the last of a stopped run."""
        planned = line["step"] % self.plan.checkpoint_steps == 0 or line["step"] == self.plan.steps
        return planned or "stopped" in line

    def model(self, network: nn.Module) -> Dalle:
        """What would be exported, for an engine to take apart."""
        modules = {"vqgan": copy.deepcopy(self.vqgan)}
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

    def _card(self) -> str:
        settings, plan = self.settings, self.plan
        (*_, line) = read_log(self.out, "validation_loss")
        size = f"LoRA of rank {settings.rank}" if settings.method == "lora" else "all weights"
        return CARD.format(
            base=settings.base,
            method=f"{size} of {' and '.join(settings.parts)}",
            training=len(self.training),
            held_out=self.held_out_pictures,
            captions="\n".join(f"- {example.caption}" for example in self.examples[:SHOWN]),
            plan=f"{line['step']} of {plan.steps} steps of {plan.batch}, learning rate {plan.learning_rate:g}",
            seed=settings.seed,
            loss=f"{line['validation_loss']:.3f}",
            on="held-out pictures"
            if self.held_out_pictures
            else "pictures trained on, there were too few to hold any out",
        )


CARD = """---
license: other
license_name: fill-in
tags: [text-to-image, dall-e, pytorch, fine-tuned]
library_name: dalle_demo
---

# A {base} of dalle_demo, fine-tuned

Loads with `python -m dalle_demo generate PROMPT --preset FOLDER --out DIR`.

## Licence

Fill in: who made the pictures, under which licence, and that you may pass on what was trained on them. What holds for
{base} holds for this model too.

## Data

{training} pictures with captions for training, {held_out} held out. Some of the captions:

{captions}

## Training

| what | |
|---|---|
| base | {base} |
| trained | {method} |
| steps | {plan} |
| seed | {seed} |
| loss | {loss} nats a token, on {on} |

Not measured: how often it copies its pictures, and what it forgot of {base}.
"""


def names_to_keep(examples: list[uploads.Example], large: bool) -> list[str]:
    """Prompts of the base's own drawings, none of which has a word in common with a caption."""
    taken = {word for example in examples for word in re.findall(r"\w+", example.caption.lower())}
    names = [name for name in KEPT if not taken & set(name.split())] or [KEPT[0]]
    return names[:LARGE_KEPT] if large else names * KEPT_EACH


def vary(picture: UInt8[Tensor, "S S 3"], count: int, rng: np.random.Generator) -> Float[Tensor, "R 3 S S"]:
    """A picture as it is, and moved and zoomed a little on white; one that reaches the border only so that it does."""
    border = torch.cat([picture[0], picture[-1], picture[:, 0], picture[:, -1]]).amin(1)
    bleeds = (border < 250).float().mean().item() > 0.1
    zoom = rng.uniform(*(BLEED_ZOOM if bleeds else ZOOM), size=count).astype(np.float32)
    reach = zoom[:, None] - 1 if bleeds else SHIFT
    shift = (rng.uniform(-1, 1, size=(count, 2)) * reach).astype(np.float32)
    zoom[0], shift[0] = 1, 0
    opaque = torch.cat([picture, torch.full_like(picture[..., :1], 255)], -1).expand(count, -1, -1, -1)
    return pairs.render(opaque, torch.full((count, 3), 255.0), torch.from_numpy(zoom), torch.from_numpy(shift))
