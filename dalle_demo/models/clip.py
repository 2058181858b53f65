"""text states and pixels -> embeddings (B, E) of unit length in one space: the dual encoder (Radford et al. 2021)."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dalle_demo.config import CLIPConfig
from dalle_demo.models.layers import Downsample, ResnetBlock, group_norm, swish

FIRST_TEMPERATURE, LOWEST_TEMPERATURE = 0.07, 0.01  # of the paper, section 2.5


class ImageTower(nn.Module):
    """Pixels -> one vector: residual blocks at falling resolution, then the mean over positions."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.patch = config.patch
        first, *_, last = config.widths
        self.conv_in = nn.Conv2d(3 * config.patch**2, first, 3, padding=1)
        self.block_in = ResnetBlock(first, first)
        self.down = nn.ModuleList(nn.Sequential(Downsample(a), ResnetBlock(a, b)) for a, b in pairwise(config.widths))
        self.norm_out = group_norm(last)
        self.out = nn.Linear(last, config.embed_dim)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E"]:
        """Vectors, not yet of unit length."""
        x = self.block_in(self.conv_in(F.pixel_unshuffle(pixels, self.patch)))
        for level in self.down:
            x = level(x)
        return self.out(swish(self.norm_out(x)).mean((2, 3)))


class CLIP(nn.Module):
    """Projections of both towers into one space; the text encoder is a part of its own."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.image_tower = ImageTower(config)
        self.text_projection = nn.Linear(config.text_width, config.embed_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor([-math.log(FIRST_TEMPERATURE)]))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """One over the temperature, at most as in the paper."""
        return self.log_scale[0].clamp(max=-math.log(LOWEST_TEMPERATURE)).exp()

    def encode_text(self, text_states: Float[Tensor, "B T D"], text_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B E"]:
        """Embedding of the mean state of real tokens, of which an empty prompt has one, its end."""
        mask = text_mask[:, :, None]
        mean = (text_states * mask).sum(1) / mask.sum(1)
        return F.normalize(self.text_projection(mean), dim=-1)

    def encode_image(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B E"]:
        """Embedding of pictures in [-1, 1]."""
        return F.normalize(self.image_tower(pixels), dim=-1)
