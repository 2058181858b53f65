"""pixels or latents -> scores, high where a picture looks real."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dalle_demo.config import GeneratorConfig
from dalle_demo.models.layers import ResnetBlock

GROUPS, SLOPE = 8, 0.2


class PatchDiscriminator(nn.Module):
    """Judges patches, not whole pictures: texture and edges (Isola et al. 2017), on pixels folded into channels."""

    def __init__(self, patch: int = 4, channels: int = 64):
        super().__init__()
        self.patch = patch
        self.conv_in = nn.Conv2d(3 * patch**2, channels, 3, padding=1)
        self.down_1 = nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1)
        self.norm_1 = nn.GroupNorm(GROUPS, 2 * channels)
        self.down_2 = nn.Conv2d(2 * channels, 2 * channels, 4, stride=2, padding=1)
        self.norm_2 = nn.GroupNorm(GROUPS, 2 * channels)
        self.conv_out = nn.Conv2d(2 * channels, 1, 3, padding=1)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 h w"]:
        """Scores of patches of 16 pixels and what lies around them."""
        x = F.leaky_relu(self.conv_in(F.pixel_unshuffle(pixels, self.patch)), SLOPE)
        x = F.leaky_relu(self.norm_1(self.down_1(x)), SLOPE)
        x = F.leaky_relu(self.norm_2(self.down_2(x)), SLOPE)
        return self.conv_out(x)


class LatentDiscriminator(nn.Module):
    """Judges latents of whole pictures, and whether they fit an embedding (projection: Miyato & Koyama 2018, eq. 3)."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        width = config.critic_width
        self.conv_in = nn.Conv2d(config.latent_dim, width, 3, padding=1)
        self.block_1 = ResnetBlock(width, width)
        self.down = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.block_2 = ResnetBlock(2 * width, 2 * width)
        self.out = nn.Linear(2 * width, 1)
        self.embed = nn.Linear(config.embed_dim, 2 * width, bias=False)

    def forward(self, latents: Float[Tensor, "B C h w"], embedding: Float[Tensor, "B E"]) -> Float[Tensor, " B"]:
        """Scores."""
        x = self.down(F.leaky_relu(self.block_1(self.conv_in(latents)), SLOPE))
        x = F.leaky_relu(self.block_2(x), SLOPE).mean((2, 3))
        return self.out(x)[:, 0] + (self.embed(embedding) * x).sum(1)
