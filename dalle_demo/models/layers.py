"""tensors -> tensors: blocks that two or more models are made of, of Transformers and of convolutions."""

import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups as published, fewer where that would leave under four channels a group."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=EPS)


def swish(x: Tensor) -> Tensor:
    """x sigmoid(x), in place where no gradient needs x: the finest feature maps take the most memory of all."""
    return F.silu(x, inplace=not x.requires_grad)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h, w)."""
        y = self.norm2(self.conv1(swish(self.norm1(x))))
        return self.conv2(swish(y)).add_(self.nin_shortcut(x))


class Downsample(nn.Module):
    """Halve the side with a strided convolution, padded right and below as in the published weights."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h/2, w/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class FeedForward(nn.Module):
    """Gated linear unit with a norm at either end: W2 LN(GELU(W0 LN x) * W1 LN x)."""

    def __init__(self, width: int, glu_width: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(width)
        self.gate_and_value = nn.Linear(width, 2 * glu_width, bias=False)
        self.norm_hidden = nn.LayerNorm(glu_width)
        self.out = nn.Linear(glu_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        gate, value = self.gate_and_value(self.norm_in(x)).chunk(2, -1)
        return self.out(self.norm_hidden(F.gelu(gate) * value))


def attend(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """softmax(Q K^T / sqrt(hd)) V, heads joined again: (B, nh, S, hd) -> (B, S, D)."""
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, normed before and after (NormFormer)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_in = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_out = nn.LayerNorm(width)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values (3, B, nh, S, hd)."""
        return self.qkv(self.norm_in(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def project_rows(self, x: Tensor, rows: int) -> Tensor:
        """Queries, keys and values (rows, 3, nh, 1, hd) of the first rows of (B, 1, D)."""
        return self.qkv(self.norm_in(x)).narrow(0, 0, rows).view(rows, 3, self.heads, 1, -1)

    def join(self, attended: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.norm_out(self.out(attended))

    def forward(self, x: Tensor, **options) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.join(attend(*self.project(x), **options))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each around a shortcut."""

    def __init__(self, width: int, heads: int, glu_width: int):
        super().__init__()
        self.self_attention = SelfAttention(width, heads)
        self.feed_forward = FeedForward(width, glu_width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.self_attention(x, attn_mask=mask)
        return x + self.feed_forward(x)


def init_weights(module: nn.Module) -> None:
    """Normal with a spread of 0.02, as in GPT and BART."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
