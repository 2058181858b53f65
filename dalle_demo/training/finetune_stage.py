"""prepared folder -> samples, figures and weights: what fine-tuning of either engine has in common.

What is learned from the pictures is encoded once, in several renders of each. Among the samples are drawings of the
base.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dalle_demo.checkpoints import stored_hash
from dalle_demo.data import pairs, uploads
from dalle_demo.images import from_pil, grid, to_pil
from dalle_demo.training.caches import digest, shared_cache
from dalle_demo.training.export import overall, read_log
from dalle_demo.training.loop import Plan, Workers
from dalle_demo.training.stages import COND_DROP_PROB, sample_rng, shuffled
from dalle_demo.turns import Engine
from dalle_demo.weights import Dalle, Unclip, find, name_of

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
    "apple", "pear", "peach", "cherries", "pineapple", "tomato", "corn", "onion", "broccoli", "avocado", "pancakes",
    "sandwich", "hamburger", "taco", "popcorn", "cookie", "doughnut", "chocolate bar", "honey", "tea", "beer", "pig",
    "cow", "sheep", "goat", "rabbit", "bear", "koala", "tiger", "elephant", "giraffe", "monkey", "snake", "turtle",
    "crocodile", "dolphin", "shark", "octopus", "crab", "snail", "bee", "ant", "spider", "owl", "eagle", "penguin",
    "duck", "peacock", "parrot", "truck", "ambulance", "taxi", "motorcycle", "helicopter", "ship", "anchor", "door",
    "bed", "couch", "mirror", "laptop", "camera", "television", "radio", "battery", "scissors", "pencil", "envelope",
    "package", "newspaper", "drum", "violin", "trumpet", "microphone", "basketball", "tennis", "trophy", "dice",
    "puzzle", "dress", "t-shirt", "jeans", "scarf", "glasses", "bag", "volcano", "desert", "island", "bridge", "tent",
    "church", "hospital", "school", "factory", "rain", "lightning", "tornado", "wave", "cactus", "palm", "tulip",
    "sunflower", "leaf", "baby", "boy", "girl", "fairy", "vampire", "zombie", "alien", "clown", "skull", "bone",
    "tooth", "brain", "ear", "nose", "mouth", "foot",
)  # fmt: skip
SHOWN = 8  # pictures in reconstruction.png
COMPARED = 64  # pictures that a validation reads at most


class FinetuneStage(ABC):
    """Train a finished model on a prepared folder; what turns pixels into latents or tokens stays as it is."""

    parts: ClassVar[tuple[str, ...]]  # of the base's checkpoint folder
    encoding: ClassVar[str]  # what pictures are turned into, one of DOINGS in watch.py
    unit: ClassVar[str]  # of the loss

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
        self.folder, self.base = find(settings.base), self.load(settings.base)
        self.config = self.base.config
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
        encoded = out / f"{self.encoding}-{digest(origin)}.npy"
        self.encoded = shared_cache(encoded, len(self.examples), self.encode, workers)  # (P, R, ...)
        self.kept = self.names_to_keep(self.examples)[:most_kept]
        kept = out / f"kept-{digest(origin | {'names': repr(self.kept)})}.npy"
        self.kept_encoded = shared_cache(kept, len(self.kept), self._draw_kept, workers)  # (K, ...)
        self.network = self._make_network()

    # what the engines differ in

    @staticmethod
    @abstractmethod
    def load(preset: str) -> Dalle | Unclip:
        """The base."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Pixels a side."""

    @abstractmethod
    def rebuild(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Pictures encoded and decoded again, by the base."""

    @abstractmethod
    def _encode(self, renders: Float[Tensor, "R 3 H W"]) -> np.ndarray:
        """What is learned of each render, (R, ...)."""

    @abstractmethod
    def names_to_keep(self, examples: list[uploads.Example]) -> list[str]:
        """Prompts of the base's own drawings, by `free_names`."""

    @abstractmethod
    def _draw_kept(self, rows: range) -> np.ndarray:
        """The same as `encode` has, (B, ...), of what the base draws for these names."""

    @abstractmethod
    def _make_network(self) -> nn.Module:
        """What `loop.Run` trains."""

    @abstractmethod
    def batch(self, samples: range) -> dict[str, Any]:
        """What the network is given, made of `choose`."""

    @abstractmethod
    def _loss(self, network: nn.Module, rows: np.ndarray) -> float:
        """Mean loss of these pictures as they are; the same weights have the same."""

    @abstractmethod
    def _write(self, network: nn.Module, folder: Path) -> None:
        """Write the whole model."""

    @abstractmethod
    def engine(self, network: nn.Module) -> Engine:
        """Engine that draws with what would be exported."""

    @abstractmethod
    def seconds_per_picture(self, engine: Engine) -> float:
        """How long it draws."""

    @property
    @abstractmethod
    def trained(self) -> str:
        """What the model card says is trained."""

    # what they share

    def _made_from(self) -> dict[str, str]:
        data = hashlib.sha256()
        for example in self.examples:
            data.update(f"{example.caption}\n".encode() + (self.out / "data" / example.file).read_bytes())
        base = " ".join(stored_hash(self.folder, part) for part in self.parts)
        return self.settings.lasting() | {"--data": data.hexdigest(), "--base": base}

    def _show_reconstruction(self) -> None:
        originals = to_pil(self.pixels(self.examples[:SHOWN]))
        with torch.inference_mode():
            ours = [to_pil(self.rebuild(from_pil([picture])))[0] for picture in originals]
        partial_file = self.out / "reconstruction.png.part"
        grid([*originals, *ours], len(originals)).save(partial_file, "PNG")
        partial_file.replace(self.out / "reconstruction.png")

    def pixels(self, examples: list[uploads.Example]) -> Float[Tensor, "B 3 H W"]:
        """Pictures as they are, in [-1, 1]."""
        return uploads.pixels(self.out / "data", examples, self.image_size)

    @torch.inference_mode()
    def encode(self, rows: range) -> np.ndarray:
        """What is learned of the renders of these pictures, (B, R, ...)."""
        blank = self._encode(torch.ones(1, 3, self.image_size, self.image_size))
        encoded = np.empty((len(rows), RENDERS, *blank.shape[1:]), blank.dtype)
        for place, i in enumerate(rows):
            self.tell(self.encoding, place, len(rows))
            encoded[place] = self._encode(self.renders(i))
        return encoded

    def renders(self, i: int) -> Float[Tensor, "R 3 H W"]:
        """What is encoded of a picture."""
        (picture,) = uploads.pictures(self.out / "data", [self.examples[i]], self.image_size)
        return vary(picture, RENDERS, sample_rng(self.settings.seed, i))

    def choose(self, samples: range) -> Iterator[tuple[str, np.ndarray, bool, np.random.Generator]]:
        """Caption, empty for some, what is encoded, whether it is the base's, and the source of randomness of each."""
        for sample, i in zip(samples, shuffled(self.training, self.settings.seed, samples), strict=True):
            rng = sample_rng(self.settings.seed, sample)
            caption, row = self.examples[i].caption, self.encoded[i, rng.integers(RENDERS)]
            of_base = rng.random() < KEPT_SHARE
            if of_base:
                kept = rng.integers(len(self.kept))
                caption, row = self.kept[kept], self.kept_encoded[kept]
            yield "" if rng.random() < COND_DROP_PROB else caption, row, of_base, rng

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Loss of pictures as they are: held out from training, and as many that are trained on."""
        seen = self.training[: len(self.held_out)]
        losses = {"validation_loss": self._loss(network, self.held_out), "seen_loss": self._loss(network, seen)}
        return losses | ({"stopped": 1} if self.stopped else {})

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the whole model and its card, if no checkpoint that counts was better."""
        if not self._is_best():
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(self._card(), encoding="utf-8")
        self._write(network, folder)

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

    def _card(self) -> str:
        settings, plan = self.settings, self.plan
        (*_, line) = read_log(self.out, "validation_loss")
        return CARD.format(
            base=name_of(self.folder),
            method=self.trained,
            training=len(self.training),
            held_out=self.held_out_pictures,
            captions="\n".join(f"- {example.caption}" for example in self.examples[:SHOWN]),
            plan=f"{line['step']} of {plan.steps} steps of {plan.batch}, learning rate {plan.learning_rate:g}",
            seed=settings.seed,
            loss=f"{line['validation_loss']:.3f} {self.unit}",
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
| loss | {loss}, on {on} |

Not measured: how often it copies its pictures, and what it forgot of {base}.
"""


def free_names(examples: list[uploads.Example], names: Sequence[str]) -> list[str]:
    """Names of which no word is in a caption; one in any case."""
    taken = {word for example in examples for word in re.findall(r"\w+", example.caption.lower())}
    return [name for name in names if not taken & set(re.findall(r"\w+", name.lower()))] or [names[0]]


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
