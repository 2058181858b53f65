"""Winograd's convolutions draw what plain ones do, whatever the place in the picture."""

import dataclasses

import pytest
import torch
from tiny import tiny_config
from torch import nn

from dalle_demo import hardware
from dalle_demo.models import winograd
from dalle_demo.models.layers import ResnetBlock
from dalle_demo.models.vqgan import VQGAN
from dalle_demo.models.winograd import WinogradBlock

CPU = torch.device("cpu")


def make_block(channels: int) -> ResnetBlock:
    """Block in evaluation mode whose norms do something."""
    torch.manual_seed(0)
    block = ResnetBlock(channels, channels).eval().requires_grad_(False)
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias, 0.0, 0.3)
    return block


@pytest.mark.parametrize("tiles", [1, 7, 1000])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (12, 20), (32, 8)])
def test_block_computes_the_same_in_strips_of_any_size(monkeypatch, tiles, height, width):
    monkeypatch.setattr(winograd, "TILES", tiles)
    block = make_block(32)
    x = 3 + 2 * torch.randn(2, 32, height, width)
    plain = block.double()(x.double())
    ours = WinogradBlock(block.float())(x.clone())
    assert ours.shape == plain.shape
    assert (ours - plain).abs().max() < 1e-5 * plain.abs().max()


@pytest.mark.parametrize(("mean", "spread"), [(10, 1e-3), (30, 1e-2), (100, 1)])
def test_maps_that_are_nearly_flat_are_normed_as_exactly(mean, spread):
    block = make_block(128)
    x = mean + spread * torch.randn(1, 128, 64, 64)
    plain = block.double()(x.double())
    block.float()
    theirs, ours = ((result - plain).abs().max() for result in (block(x), WinogradBlock(block)(x.clone())))
    assert ours < 4 * theirs + 1e-5 * plain.abs().max()


def test_a_picture_has_the_same_bits_in_every_batch():
    block, x = WinogradBlock(make_block(16)), torch.randn(3, 16, 8, 8)
    together = block(x.clone())
    assert all(torch.equal(block(one[None].clone())[0], whole) for one, whole in zip(x, together, strict=True))


def test_the_finest_levels_of_a_wide_decoder_are_replaced_and_draw_the_same():
    torch.manual_seed(0)
    sizes = {"channels": 128, "multipliers": (1, 1, 1, 1), "blocks": 1, "patch": 1, "image_size": 32, "attention": ()}
    config = dataclasses.replace(tiny_config().vqgan, **sizes)
    vqgan = VQGAN(config).eval().requires_grad_(False)
    latents = torch.randn(1, config.codebook_dim, 4, 4)
    plain = vqgan.decode(latents)
    placed = hardware.place_vqgan(vqgan, "float32", CPU)
    kinds = [[type(block) for block in level.block] for level in placed.decoder.up]
    assert kinds == [[WinogradBlock] * 2] + [[ResnetBlock] * 2] * 3
    assert (placed.decode(latents) - plain).abs().max() < 1e-4 * plain.abs().max()
    assert torch.equal(hardware.place_vqgan(placed, "float32", CPU).decode(latents), placed.decode(latents))


def test_bf16_is_left_to_the_library():
    config = dataclasses.replace(tiny_config().vqgan, channels=128)
    placed = hardware.place_vqgan(VQGAN(config), "bfloat16", CPU)
    assert not any(isinstance(module, WinogradBlock) for module in placed.modules())
