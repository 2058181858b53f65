"""pixels (B, 3, H, W) in [-1, 1] <-> image tokens (B, N): the discrete autoencoder, and its continuous sister.

In the terms of a VAE, encoder q(z|x) and decoder P(x|z) are trained on -log P(x|z) + KL(q, p). Here q puts all its
mass on one code per position and the prior p is uniform over the K codes, so the KL term is the constant N log K and
only the reconstruction term is left to train (van den Oord et al. 2017, section 3.2).

Structure and state-dict names follow VQGAN (Esser et al. 2021), whose published weights are one configuration.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle_demo.config import VQGANConfig
from dalle_demo.models.layers import Downsample, ResnetBlock, group_norm, swish


class AttentionBlock(nn.Module):
    """Single-head self-attention over the positions of a feature map."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        y = self.norm(x)
        q, k, v = (conv(y).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # (B, h*w, C)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y.transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    """The coarsest level: block, attention, block."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Upsample(nn.Module):
    """Double the side: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class FoldedUpsample(nn.Module):
    """Upsample as one transposed convolution: equal neighbours are multiplied once, 16 products for 36."""

    def __init__(self, upsample: Upsample):
        super().__init__()
        kernel = F.pad(upsample.conv.weight.transpose(0, 1).flip(2, 3), (1, 1, 1, 1))  # (C, C', 5, 5)
        rows = kernel[:, :, 1:] + kernel[:, :, :-1]
        self.weight = nn.Parameter(rows[..., 1:] + rows[..., :-1], requires_grad=False)  # (C, C', 4, 4)
        self.bias = upsample.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)


def fold_upsampling(decoder: "Decoder") -> None:
    """Replace each Upsample, for drawing: twice as fast, and equal but for rounding."""
    for level in decoder.up:
        if isinstance(getattr(level, "upsample", None), Upsample):
            level.upsample = FoldedUpsample(level.upsample)


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where the config asks for it."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, attention: bool):
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(channels_out) for _ in range(blocks if attention else 0))

    def steps(self) -> Iterator[nn.Module]:
        """Blocks in their order, for the caller to run: a method of this class would keep its input in memory."""
        for i, block in enumerate(self.block):
            yield block
            if self.attn:
                yield self.attn[i]


class Encoder(nn.Module):
    """Pixels -> z_e, one vector per token position."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        side = config.image_size // config.patch
        self.patch, self.from_zero = config.patch, config.from_zero
        self.conv_in = nn.Conv2d(3 * config.patch**2, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, config.blocks, side >> i in config.attention)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.vq_dim or widths[-1], 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C', h, w)."""
        pixels = (pixels + 1) / 2 if self.from_zero else pixels
        x = self.conv_in(F.pixel_unshuffle(pixels, self.patch))
        for level in self.down:
            for step in level.steps():
                x = step(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(swish(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents -> pixels; `up` is numbered fine to coarse, as in the published weights, and run in reverse."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.drawing_channels * m for m in config.multipliers]
        side = config.image_size // config.patch
        self.patch = config.patch
        self.conv_in = nn.Conv2d(config.vq_dim or config.channels * config.multipliers[-1], widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            coarser = widths[min(i + 1, len(widths) - 1)]
            level = Level(coarser, width, config.blocks + 1, side >> i in config.attention)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3 * config.patch**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C', h, w) -> (B, 3, H, W)."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            for step in level.steps():
                x = step(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        x = self.conv_out(swish(self.norm_out(x)))
        return F.pixel_shuffle(x, self.patch)


class FiniteScalarQuantizer(nn.Module):
    """Round each of C bounded dimensions to its own few levels; the codebook is implicit (Mentzer et al. 2023)."""

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        self.levels = levels

    def _levels_and_basis(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Levels of each dimension, and the weight of its digit in the token, both (C, 1, 1)."""
        levels = torch.tensor(self.levels, device=device)
        return levels.view(-1, 1, 1), (levels.cumprod(0) // levels).view(-1, 1, 1)

    def forward(
        self, z_e: Float[Tensor, "B C h w"]
    ) -> tuple[Float[Tensor, "B C h w"], Int[Tensor, "B N"], Float[Tensor, ""]]:
        """Return z_q in [-1, 1] with a straight-through gradient, the tokens, and a zero quantizer loss."""
        levels, basis = self._levels_and_basis(z_e.device)
        top = levels - 1
        unit = (torch.tanh(z_e.float()) + 1) / 2 * top  # 0 .. levels - 1
        index = torch.round(unit)
        rounded = unit + (index - unit).detach()
        tokens = (index.long() * basis).sum(1).flatten(1)
        return rounded / top * 2 - 1, tokens, z_e.new_zeros(())

    def lookup(self, image_tokens: Int[Tensor, "B h w"]) -> Float[Tensor, "B C h w"]:
        """Codes of a grid of tokens."""
        levels, basis = self._levels_and_basis(image_tokens.device)
        index = image_tokens[:, None] // basis % levels
        return index / (levels - 1) * 2 - 1


class VectorQuantizer(nn.Module):
    """Nearest entry of a learned codebook (van den Oord et al. 2017, equations 1 to 3)."""

    BETA = 0.25  # commitment weight of the paper

    def __init__(self, codebook_size: int, codebook_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)

    def forward(
        self, z_e: Float[Tensor, "B C h w"]
    ) -> tuple[Float[Tensor, "B C h w"], Int[Tensor, "B N"], Float[Tensor, ""]]:
        """Return z_q with a straight-through gradient, the tokens, and codebook loss + beta x commitment loss."""
        flat = z_e.flatten(2).transpose(1, 2)  # (B, N, C)
        codebook = self.embedding.weight
        distance = codebook.pow(2).sum(1) - 2 * flat @ codebook.T  # |z|^2 is the same for every entry
        tokens = distance.argmin(-1)
        z_q = self.lookup(tokens.view(-1, *z_e.shape[2:]))
        loss = F.mse_loss(z_q, z_e.detach()) + self.BETA * F.mse_loss(z_e, z_q.detach())
        return z_e + (z_q - z_e).detach(), tokens, loss

    def lookup(self, image_tokens: Int[Tensor, "B h w"]) -> Float[Tensor, "B C h w"]:
        """Codes of a grid of tokens."""
        return self.embedding(image_tokens).permute(0, 3, 1, 2)


class VQGAN(nn.Module):
    """Encoder, quantizer, decoder; without an encoder where only the other half was published."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        width = config.vq_dim or config.channels * config.multipliers[-1]
        if config.encoder:
            self.encoder = Encoder(config)
            self.quant_conv = nn.Conv2d(width, config.codebook_dim, 1)
        if config.quantizer == "fsq":
            self.quantizer = FiniteScalarQuantizer(config.levels)
        else:
            self.quantizer = VectorQuantizer(config.vq_size, config.vq_dim)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, width, 1)
        self.decoder = Decoder(config)

    def forward(
        self, pixels: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B 3 H W"], Int[Tensor, "B N"], Float[Tensor, ""]]:
        """Return the reconstruction, its tokens and the quantizer loss."""
        z_q, tokens, loss = self.quantizer(self.quant_conv(self.encoder(pixels)))
        return self.decode(z_q), tokens, loss

    def encode(self, pixels: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B N"]:
        """Pixels in [-1, 1] -> tokens, row by row."""
        return self.quantizer(self.quant_conv(self.encoder(pixels)))[1]

    def lookup(self, image_tokens: Int[Tensor, "B h w"]) -> Float[Tensor, "B C h w"]:
        """Tokens -> latents; a few rows of a picture can be looked up, and decoded, alone."""
        return self.quantizer.lookup(image_tokens)

    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Latents -> pixels, about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(latents))


class VAE(nn.Module):
    """Encoder q(z|x), a normal distribution, and decoder P(x|z) (Kingma & Welling 2013): VQGAN's, without codes.

    A change of the latents changes the picture a little, which codes do not promise: what a generator needs.
    """

    LOGVAR = (-8.0, 4.0)  # range of the log variance

    def __init__(self, config: VQGANConfig):
        super().__init__()
        width = config.channels * config.multipliers[-1]
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(width, 2 * config.latent_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_dim, width, 1)
        self.decoder = Decoder(config)

    def encode(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B C h w"]]:
        """Mean and log variance of q(z|x)."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, 1)
        return mean, logvar.clamp(*self.LOGVAR)

    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Latents -> pixels, about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(latents))
