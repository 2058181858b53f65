"""Texts and pictures meet in one space: embeddings have unit length, padding and company change none of them."""

import math

import pytest
import torch
from tiny import tiny_unclip_config

from dalle_demo.models.clip import CLIP, LOWEST_TEMPERATURE

CONFIG = tiny_unclip_config().clip


@pytest.fixture
def clip() -> CLIP:
    torch.manual_seed(1)
    return CLIP(CONFIG)


def states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, CONFIG.text_width, generator=torch.Generator().manual_seed(2))


def pixels(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_embeddings_of_both_have_unit_length(clip):
    text = clip.encode_text(states(3, 5), torch.ones(3, 5, dtype=torch.bool))
    image = clip.encode_image(pixels(3))
    assert text.shape == image.shape == (3, CONFIG.embed_dim)
    for embedding in (text, image):
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(3))
        assert embedding.std(0).min() > 0  # of other inputs, others


def test_text_is_the_mean_of_its_real_tokens(clip):
    """What stands at padding is computed by the text encoder and means nothing."""
    long = states(1, 7)
    mask = torch.tensor([[True] * 4 + [False] * 3])
    changed = torch.where(mask[:, :, None], long, 99.0)
    found = clip.encode_text(changed, mask)
    torch.testing.assert_close(found, clip.encode_text(long[:, :4], mask[:, :4]))
    by_hand = clip.text_projection(long[0, :4].mean(0))
    torch.testing.assert_close(found[0], by_hand / by_hand.norm())


def test_pictures_do_not_change_each_other(clip):
    several = clip.encode_image(pixels(4))
    for i in range(4):
        torch.testing.assert_close(clip.encode_image(pixels(4)[i : i + 1])[0], several[i])


def test_tower_takes_pictures_of_its_folds(clip):
    """Half the side at each level after the fold of `patch` pixels; the mean over what is left."""
    assert len(clip.image_tower.down) == len(CONFIG.widths) - 1
    assert clip.image_tower.conv_in.in_channels == 3 * CONFIG.patch**2
    assert clip.encode_image(torch.zeros(1, 3, 64, 48)).shape == (1, CONFIG.embed_dim)


def test_temperature_is_learned_and_bounded(clip):
    assert clip.scale.item() == pytest.approx(1 / 0.07)
    clip.log_scale.data.fill_(50.0)
    assert clip.scale.item() == pytest.approx(1 / LOWEST_TEMPERATURE)
    clip.log_scale.data.fill_(math.log(20))
    clip.scale.backward()
    assert clip.log_scale.grad.item() == pytest.approx(20)


def test_both_towers_learn(clip):
    loss = (clip.encode_text(states(3, 5), torch.ones(3, 5, dtype=torch.bool)) * clip.encode_image(pixels(3))).sum()
    loss.backward()
    for name, parameter in clip.named_parameters():
        if name != "log_scale":
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
