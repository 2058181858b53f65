"""3x3 convolution -> the same, but for rounding, with a quarter of its products: F(4x4, 3x3) of Lavin & Gray (2015).

Y = A^T [(G g G^T) * (B^T d B)] A, for kernels g, tiles d of 6x6 pixels that overlap by two, and 4x4 pixels Y. The
product in the middle is 36 matrix products over channels; the transforms at its sides pay on maps of many pixels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dalle_demo.models.layers import ResnetBlock

TILE = 4  # pixels of a side that a tile gives
TILES = 128  # that are transformed at once: they fit the processor's cache
LEVELS_LEFT, LEAST_CHANNELS = 3, 128  # coarse levels where nothing is gained, and channels for which something is
PIXELS = 4096  # whose squares are summed at once

INPUT = torch.tensor([  # B^T
    [4.0, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
])  # fmt: skip
KERNEL = torch.tensor([  # G
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
], dtype=torch.float64)  # fmt: skip
OUTPUT = torch.tensor([  # A^T
    [1.0, 1, 1, 1, 1, 0],
    [0, 1, -1, 2, -2, 0],
    [0, 1, 1, 4, 4, 0],
    [0, 1, -1, 8, -8, 1],
])  # fmt: skip


def use_winograd(decoder: nn.Module) -> None:
    """Replace blocks of a Decoder's finest levels, for drawing on a processor in fp32: equal but for rounding.

    It pays on maps of many pixels, and only there is the memory of larger kernels made up for. Measured on AVX2 alone.
    """
    for level in decoder.up[:-LEVELS_LEFT]:
        for i, block in enumerate(level.block):
            if isinstance(block, ResnetBlock) and block.conv1.in_channels == block.conv1.out_channels >= LEAST_CHANNELS:
                level.block[i] = WinogradBlock(block)


class WinogradBlock(nn.Module):
    """ResnetBlock without change of channels, in fp32, for drawing.

    Norm, swish, convolution and shortcut are done for one strip of tiles after another, while it is in the cache, and
    the output replaces the input: two feature maps are in memory at a time, where a ResnetBlock has three.
    """

    def __init__(self, block: ResnetBlock):
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.conv1, self.conv2 = WinogradConv(block.conv1), WinogradConv(block.conv2)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """h and w must be multiples of 4; x is overwritten when its memory is channels-last already."""
        x = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        for image in x:
            hidden = torch.zeros_like(image)
            self.conv1.add_to(hidden, image, *scale_and_shift(self.norm1, image))
            self.conv2.add_to(image, hidden, *scale_and_shift(self.norm2, hidden))
        return x.permute(0, 3, 1, 2)


class WinogradConv(nn.Module):
    """nn.Conv2d(C, C', 3, padding=1): kernels of 36 numbers instead of 9."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        weight = torch.einsum("ik,bakl,jl->ijab", KERNEL, conv.weight.double(), KERNEL)
        self.weight = nn.Parameter(weight.flatten(0, 1).float(), requires_grad=False)  # (36, C, C')
        self.bias = conv.bias

    def add_to(self, out: Float[Tensor, "h w D"], image: Float[Tensor, "h w C"], scale: Tensor, shift: Tensor) -> None:
        """Add the convolution of swish(scale x + shift) to `out`."""
        height, width, _ = image.shape
        across, rows = width // TILE, max(1, TILES * TILE // width)
        for top in range(0, height // TILE, rows):
            strip = out[TILE * top : TILE * (top + rows)]
            first, last = TILE * top - 1, TILE * top + len(strip) + 1  # pixels that the strip is made of
            pixels = image[max(first, 0) : last]
            pixels = F.silu(torch.addcmul(shift, pixels, scale), inplace=True)
            pixels = F.pad(pixels, (0, 0, 1, 1, int(first < 0), int(last > height)))
            strip = strip.view(-1, TILE, across, TILE, strip.shape[-1])
            strip += self._convolve(pixels).permute(2, 0, 3, 1, 4).add_(self.bias)

    def _convolve(self, pixels: Float[Tensor, "h w C"]) -> Float[Tensor, "4 4 n m D"]:
        """Convolve all tiles of a strip with its border, h = 4 n + 2 and w = 4 m + 2."""
        tiles = pixels.unfold(0, TILE + 2, TILE).unfold(1, TILE + 2, TILE)  # (n, m, C, 6, 6)
        rows, across, channels = tiles.shape[:3]
        tiles = transform(INPUT, tiles.permute(3, 4, 0, 1, 2).flatten(2))  # (6, 6, n m C)
        products = torch.bmm(tiles.view(-1, rows * across, channels), self.weight)  # (36, n m, D)
        return transform(OUTPUT, products.view(6, 6, -1)).view(TILE, TILE, rows, across, -1)


def transform(matrix: Float[Tensor, "i k"], tiles: Float[Tensor, "k k X"]) -> Float[Tensor, "i i X"]:
    """Multiply every tile with the matrix from the left and with its transpose from the right."""
    once = (matrix @ tiles.flatten(1)).view(len(matrix), *tiles.shape[1:])
    return torch.matmul(matrix, once)


def scale_and_shift(
    norm: nn.GroupNorm, image: Float[Tensor, "h w C"]
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """What a group norm multiplies this image's channels with, and what it adds to them."""
    pixels = image.flatten(0, 1)
    groups = norm.num_groups, -1
    count = pixels.numel() // norm.num_groups
    mean = pixels.sum(0).double().view(groups).sum(1, keepdim=True) / count
    centre = mean.float().expand(groups[0], len(norm.weight) // groups[0]).flatten()
    squares = sum((part - centre).square_().sum(0) for part in pixels.split(PIXELS))
    variance = squares.double().view(groups).sum(1, keepdim=True) / count
    scale = norm.weight.view(groups) * torch.rsqrt(variance + norm.eps)
    shift = norm.bias.view(groups) - mean * scale
    return scale.flatten().float(), shift.flatten().float()
