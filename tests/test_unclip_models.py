"""Parts of DALL-E 2: the prior's path ends at an embedding, and all others depend on all that they are given."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_unclip_config
from torch import nn

from dalle_demo.models.discriminator import LatentDiscriminator
from dalle_demo.models.unclip import Generator, NoiseEncoder, Prior
from dalle_demo.models.vqgan import VAE, fold_upsampling

CONFIG = tiny_unclip_config()
SIZES = CONFIG.generator


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(normal(*shape, seed=seed), dim=-1)


def latents(count: int, seed: int = 0) -> torch.Tensor:
    return normal(count, SIZES.latent_dim, SIZES.grid, SIZES.grid, seed=seed)


def spread(module: nn.Module) -> nn.Module:
    """Weights so large that all inputs matter."""
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            parameter.data.mul_(3)
    return module.eval()


@pytest.fixture
def prior() -> Prior:
    torch.manual_seed(1)
    return spread(Prior(CONFIG.prior))


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(2)
    return spread(Generator(SIZES))


@pytest.fixture
def noise_encoder() -> NoiseEncoder:
    torch.manual_seed(3)
    return spread(NoiseEncoder(SIZES))


@pytest.fixture
def critic() -> LatentDiscriminator:
    torch.manual_seed(4)
    return spread(LatentDiscriminator(SIZES))


@pytest.fixture
def vae() -> VAE:
    torch.manual_seed(5)
    return VAE(CONFIG.vae).eval()


# prior


def test_velocity_depends_on_point_time_and_text(prior):
    x, text = normal(1, 32), unit(1, 32)
    base = prior(x, torch.tensor([0.3]), text)
    assert base.shape == x.shape
    for other in (
        prior(x + 0.1, torch.tensor([0.3]), text),
        prior(x, torch.tensor([0.6]), text),
        prior(x, torch.tensor([0.3]), unit(1, 32, seed=5)),
    ):
        assert (other - base).abs().max() > 1e-3


def test_samples_are_found_on_the_path_of_the_velocity(prior, monkeypatch):
    """With the velocity of the straight path to a point, the steps end there whatever their number."""
    goal = unit(3, 32, seed=9) * prior.scale
    times = []

    def velocity(x, time, text):
        times.append(time[0].item())
        return (goal - x) / (1 - time[:, None])

    monkeypatch.setattr(prior, "forward", velocity)
    for steps in (1, 3, 8):
        prior.steps, _ = steps, times.clear()
        torch.testing.assert_close(prior.sample(unit(3, 32), normal(3, 32), 1.0), F.normalize(goal, dim=-1))
        assert times == pytest.approx([i / steps for i in range(steps)])


def test_samples_have_unit_length_and_are_of_their_noise_and_text(prior):
    text, noise = unit(4, 32), normal(4, 32)
    found = prior.sample(text, noise, 1.0)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(4))
    assert (prior.sample(text, normal(4, 32, seed=8), 1.0) - found).abs().max() > 1e-3
    assert (prior.sample(unit(4, 32, seed=8), noise, 1.0) - found).abs().max() > 1e-3
    for i in range(4):
        torch.testing.assert_close(prior.sample(text[i : i + 1], noise[i : i + 1], 1.0)[0], found[i])


def test_guidance_goes_away_from_what_is_drawn_without_text(prior):
    text, x = unit(2, 32), normal(2, 32)
    prior.steps = 1
    start = torch.zeros(2)
    blind, seeing = prior(x, start, torch.zeros_like(text)), prior(x, start, text)
    for scale in (1.0, 0.0, 3.5):
        expected = F.normalize(x + blind + scale * (seeing - blind), dim=-1)
        torch.testing.assert_close(prior.sample(text, x, scale), expected)


# generator and noise encoder


def test_latents_depend_on_noise_and_embedding(generator):
    noise, embedding = normal(2, SIZES.noise_dim), unit(2, SIZES.embed_dim)
    base = generator(noise, embedding)
    assert base.shape == (2, SIZES.latent_dim, SIZES.grid, SIZES.grid)
    assert (generator(noise + 0.1, embedding) - base).abs().max() > 1e-3
    assert (generator(noise, unit(2, SIZES.embed_dim, seed=7)) - base).abs().max() > 1e-3
    assert base[0].flatten(1).std(1).min() > 1e-3  # places differ
    for i in range(2):
        torch.testing.assert_close(generator(noise[i : i + 1], embedding[i : i + 1])[0], base[i])


def test_every_weight_of_the_generator_is_trained(generator):
    generator(normal(2, SIZES.noise_dim), unit(2, SIZES.embed_dim)).pow(2).sum().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_noise_encoder_reads_latents_and_embedding(noise_encoder):
    found, embedding = latents(2), unit(2, SIZES.embed_dim)
    mean, logvar = noise_encoder(found, embedding)
    assert mean.shape == logvar.shape == (2, SIZES.noise_dim)
    assert (noise_encoder(latents(2, seed=3), embedding)[0] - mean).abs().max() > 1e-3
    assert (noise_encoder(found, unit(2, SIZES.embed_dim, seed=3))[0] - mean).abs().max() > 1e-3
    _, extreme = noise_encoder(1e4 * found, embedding)
    assert -8 <= extreme.min() <= extreme.max() <= 4  # else its exponential overflows


# discriminator


def test_discriminator_reads_latents_and_embedding(critic):
    real, embedding = latents(3), unit(3, SIZES.embed_dim)
    scores = critic(real, embedding)
    assert scores.shape == (3,)
    assert (critic(latents(3, seed=3), embedding) - scores).abs().min() > 1e-4
    assert (critic(real, unit(3, SIZES.embed_dim, seed=3)) - scores).abs().min() > 1e-4


def test_discriminator_is_of_the_projection_kind(critic):
    """Linear in the embedding (Miyato & Koyama 2018): its part is a product with features of the latents."""
    real, a, b = latents(3), unit(3, SIZES.embed_dim), unit(3, SIZES.embed_dim, seed=3)
    none = critic(real, torch.zeros_like(a))
    torch.testing.assert_close(
        critic(real, 2 * a - b) - none, 2 * (critic(real, a) - none) - (critic(real, b) - none), atol=1e-4, rtol=1e-4
    )


# VAE


def test_vae_has_a_distribution_at_each_place(vae):
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, logvar = vae.encode(pixels)
    assert mean.shape == logvar.shape == (2, CONFIG.vae.latent_dim, CONFIG.vae.grid, CONFIG.vae.grid)
    assert vae.decode(mean).shape == pixels.shape
    low, high = VAE.LOGVAR
    _, extreme = vae.encode(1e6 * pixels)
    assert low <= extreme.min() <= extreme.max() <= high


def test_vae_trains_its_encoder_through_the_decoder(vae):
    mean, logvar = vae.train().encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    vae.decode(mean + torch.exp(logvar / 2) * normal(*mean.shape)).pow(2).mean().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("k.bias"):  # a constant added to all keys cancels in the softmax
            assert parameter.grad.abs().sum() > 0, name


def test_a_small_step_in_latents_is_a_small_step_in_pixels(vae):
    """What codes do not promise, and the generator needs."""
    here = latents(1)
    step = 1e-3 * latents(1, seed=1)
    near, far = (vae.decode(here + scale * step) - vae.decode(here) for scale in (1, 2))
    assert far.norm().item() == pytest.approx(2 * near.norm().item(), rel=0.05)
    assert math.isfinite(near.norm().item())


def test_folded_vae_draws_the_same(vae):
    here = latents(2)
    before = vae.decode(here)
    fold_upsampling(vae.decoder)
    torch.testing.assert_close(vae.decode(here), before, atol=1e-4, rtol=1e-4)
