"""text embedding -> image embedding -> latents: DALL-E 2's prior, and a generator where that has a diffusion decoder.

The prior (Ramesh et al. 2022, section 2.2) is a rectified flow over CLIP's image embeddings. The generator maps noise
and an image embedding to latents of a VAE in one pass; the noise encoder says which noise gives a picture back.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dalle_demo.config import GeneratorConfig, PriorConfig
from dalle_demo.models.layers import ResnetBlock, group_norm, swish

FREQUENCIES = 32  # of the time's embedding


class PriorBlock(nn.Module):
    """Feed-forward layer around a shortcut, shifted and scaled by the condition (Peebles & Xie 2022)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Float[Tensor, "B D"], condition: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """(B, D) -> (B, D)."""
        scale, shift = self.modulation(condition).chunk(2, -1)
        return x + self.down(F.gelu(self.up(self.norm(x) * (1 + scale) + shift)))


class Prior(nn.Module):
    """Velocity of a straight path from noise to image embeddings (Liu et al. 2022), given the text's embedding.

    Embeddings of unit length are scaled to entries of about one, as noise has them. The embedding of zeros stands for
    no text.
    """

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.steps, self.scale = config.steps, math.sqrt(config.embed_dim)
        self.embed_input = nn.Linear(config.embed_dim, config.width)
        self.embed_text = nn.Linear(config.embed_dim, config.width)
        self.embed_time = nn.Linear(2 * FREQUENCIES, config.width)
        self.blocks = nn.ModuleList(PriorBlock(config.width) for _ in range(config.blocks))
        self.norm_out = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, config.embed_dim)

    def forward(
        self, x: Float[Tensor, "B E"], time: Float[Tensor, " B"], text: Float[Tensor, "B E"]
    ) -> Float[Tensor, "B E"]:
        """Velocity at `x`, the point of the path at `time`: 0 is noise, 1 an embedding."""
        frequencies = torch.exp(torch.linspace(0, math.log(100), FREQUENCIES, device=x.device))
        angles = time[:, None] * frequencies
        clock = self.embed_time(torch.cat([angles.sin(), angles.cos()], -1))
        condition = F.silu(clock + self.embed_text(text * self.scale))
        x = self.embed_input(x)
        for block in self.blocks:
            x = block(x, condition)
        return self.out(self.norm_out(x))

    def sample(
        self, text: Float[Tensor, "B E"], noise: Float[Tensor, "B E"], guidance_scale: float
    ) -> Float[Tensor, "B E"]:
        """Image embeddings of unit length, by Euler's steps with classifier-free guidance."""
        x, step = noise, 1 / self.steps
        for i in range(self.steps):
            time = torch.full_like(x[:, 0], i * step)
            if guidance_scale == 1:
                velocity = self(x, time, text)
            else:  # both in one batch, which reads the weights once
                both = self(torch.cat([x, x]), torch.cat([time, time]), torch.cat([text, torch.zeros_like(text)]))
                velocity, blind = both.chunk(2)
                velocity = blind + guidance_scale * (velocity - blind)
            x = x + step * velocity
        return F.normalize(x, dim=-1)


class GeneratorBlock(nn.Module):
    """Feed-forward layer around a shortcut."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """(B, D) -> (B, D)."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Generator(nn.Module):
    """Noise and image embedding -> latents: a residual MLP, whose output is spread over the grid and convolved.

    Nearly all weights are used once a picture and not once a position, so a picture costs 30 million operations.
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.grid, self.scale = config.grid, math.sqrt(config.embed_dim)
        self.embed_input = nn.Linear(config.embed_dim + config.noise_dim, config.width)
        self.blocks = nn.ModuleList(GeneratorBlock(config.width) for _ in range(config.blocks))
        self.norm_blocks = nn.LayerNorm(config.width)
        self.spread = nn.Linear(config.width, config.channels * config.grid**2)
        self.convolve = nn.Sequential(
            ResnetBlock(config.channels, 2 * config.channels), ResnetBlock(2 * config.channels, 2 * config.channels)
        )
        self.norm_out = group_norm(2 * config.channels)
        self.out = nn.Conv2d(2 * config.channels, config.latent_dim, 3, padding=1)

    def forward(self, noise: Float[Tensor, "B Z"], embedding: Float[Tensor, "B E"]) -> Float[Tensor, "B C h w"]:
        """Latents of one picture for each row."""
        x = self.embed_input(torch.cat([embedding * self.scale, noise], -1))
        for block in self.blocks:
            x = block(x)
        x = self.spread(self.norm_blocks(x)).unflatten(-1, (-1, self.grid, self.grid))
        return self.out(swish(self.norm_out(self.convolve(x))))


class NoiseEncoder(nn.Module):
    """Latents and image embedding -> mean and log variance of the noise that they came from, q(noise | x)."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        width, self.scale = config.critic_width, math.sqrt(config.embed_dim)
        self.conv_in = nn.Conv2d(config.latent_dim, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 4, stride=2, padding=1)
        self.block = ResnetBlock(width, width)
        self.norm_out = group_norm(width)
        self.hidden = nn.Linear(width * (config.grid // 2) ** 2 + config.embed_dim, 2 * width)
        self.out = nn.Linear(2 * width, 2 * config.noise_dim)

    def forward(
        self, latents: Float[Tensor, "B C h w"], embedding: Float[Tensor, "B E"]
    ) -> tuple[Float[Tensor, "B Z"], Float[Tensor, "B Z"]]:
        """Mean and log variance."""
        x = self.block(self.down(swish(self.conv_in(latents))))
        x = torch.cat([swish(self.norm_out(x)).flatten(1), embedding * self.scale], -1)
        mean, logvar = self.out(F.silu(self.hidden(x))).chunk(2, -1)
        return mean, logvar.clamp(-8, 4)
