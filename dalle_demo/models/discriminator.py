"""pixels (B, 3, H, W) -> a score per patch (B, 1, h, w), high where a picture looks real."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

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
