"""The picture tokenizer: codes mean what the quantizer chose, gradients pass it, and names fit published weights."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config

from dalle_demo.config import PRESETS, VQGANConfig
from dalle_demo.models.vqgan import (
    VQGAN,
    AttentionBlock,
    FiniteScalarQuantizer,
    ResnetBlock,
    VectorQuantizer,
)

CONFIGS = {
    "fsq": tiny_config().vqgan,
    "vq": tiny_config(quantizer="vq", levels=(), vq_size=40, vq_dim=8).vqgan,
    "attention": tiny_config(attention=(8, 4), blocks=2, patch=1, multipliers=(1, 2, 2, 2)).vqgan,
    "wide": tiny_config(decoder_channels=24).vqgan,
    "patch": tiny_config(patch=8, multipliers=(2,)).vqgan,
}


@pytest.fixture(params=CONFIGS)
def config(request) -> VQGANConfig:
    return CONFIGS[request.param]


@pytest.fixture
def vqgan(config) -> VQGAN:
    torch.manual_seed(1)
    model = VQGAN(config)
    if config.quantizer == "vq":
        model.quantizer.embedding.weight.data.normal_()  # the small values at the start are hard to tell apart
    return model


@pytest.fixture
def pixels(config) -> torch.Tensor:
    return torch.rand(3, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(2)) * 2 - 1


def as_grid(tokens: torch.Tensor) -> torch.Tensor:
    """(B, N) of a square picture -> (B, h, w)."""
    return tokens.unflatten(1, (int(tokens.shape[1] ** 0.5), -1))


def test_shapes(vqgan, config, pixels):
    ours, tokens, loss = vqgan(pixels)
    assert ours.shape == pixels.shape
    assert tokens.shape == (3, config.tokens)
    assert loss.shape == ()
    assert tokens.dtype == torch.long
    assert 0 <= tokens.min() <= tokens.max() < config.codebook_size
    assert len(tokens.unique()) > 1
    assert vqgan.lookup(as_grid(tokens)).shape == (3, config.codebook_dim, config.grid, config.grid)


def test_lookup_of_tokens_is_what_the_decoder_saw(vqgan, pixels):
    z_q, tokens, _ = vqgan.quantizer(vqgan.quant_conv(vqgan.encoder(pixels)))
    assert torch.equal(vqgan.encode(pixels), tokens)
    torch.testing.assert_close(vqgan.lookup(as_grid(tokens)), z_q, atol=1e-6, rtol=0)
    torch.testing.assert_close(vqgan.decode(vqgan.lookup(as_grid(tokens))), vqgan(pixels)[0], atol=1e-5, rtol=0)


def test_tokens_are_in_raster_order(vqgan, config):
    """Changing one code changes the picture mostly at its own place: row by row from the top left."""
    tokens = torch.zeros(1, config.tokens, dtype=torch.long)
    for place in (1, config.grid):
        other = tokens.clone().scatter_(1, torch.tensor([[place]]), config.codebook_size - 1)
        changed = (vqgan.lookup(as_grid(other)) != vqgan.lookup(as_grid(tokens)))[0].any(0).nonzero().tolist()
        assert changed == [[place // config.grid, place % config.grid]]


def test_gradient_passes_the_quantizer_straight_through(vqgan, pixels):
    """Every parameter is trained by the reconstruction alone, but for a codebook, which has a loss of its own."""
    ours, _, _ = vqgan(pixels)
    F.l1_loss(ours, pixels).backward()
    for name, parameter in vqgan.named_parameters():
        if name != "quantizer.embedding.weight":
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            if not name.endswith("k.bias"):  # a constant added to all keys cancels in the softmax
                assert parameter.grad.abs().sum() > 0, name


def test_vq_gradient_is_the_identity():
    z_e = torch.randn(2, 8, 4, 4, requires_grad=True)
    z_q, _, _ = VectorQuantizer(40, 8)(z_e)
    weight = torch.randn_like(z_q)
    (z_q * weight).sum().backward()
    torch.testing.assert_close(z_e.grad, weight)


def test_fsq_gradient_is_that_of_the_bound():
    """Rounding is skipped: z_q moves as tanh does."""
    z_e = torch.randn(2, 3, 4, 4, requires_grad=True)
    z_q, _, loss = FiniteScalarQuantizer((5, 4, 3))(z_e)
    z_q.sum().backward()
    torch.testing.assert_close(z_e.grad, 1 - torch.tanh(z_e.detach()) ** 2)
    assert loss.item() == 0


def test_vq_takes_the_nearest_entry_and_its_two_losses():
    quantizer = VectorQuantizer(40, 8)
    quantizer.embedding.weight.data.normal_()
    z_e = torch.randn(2, 8, 4, 4)
    z_q, tokens, loss = quantizer(z_e)
    flat = z_e.permute(0, 2, 3, 1).reshape(2, 16, 8)
    distances = torch.cdist(flat, quantizer.embedding.weight.expand(2, -1, -1))
    assert torch.equal(tokens, distances.argmin(-1))
    error = (z_q - z_e).pow(2).mean()
    torch.testing.assert_close(loss, error + 0.25 * error)


def test_vq_losses_pull_the_right_side():
    """The codebook moves with weight 1, the encoder with the commitment weight: equations 1 to 3, not swapped."""
    quantizer = VectorQuantizer(1, 1)
    quantizer.embedding.weight.data.fill_(1.0)
    z_e = torch.zeros(1, 1, 1, 1, requires_grad=True)
    quantizer(z_e)[2].backward()
    assert quantizer.embedding.weight.grad.item() == pytest.approx(2.0)
    assert z_e.grad.item() == pytest.approx(-0.5)


@pytest.mark.parametrize("levels", [(8, 8, 6, 5, 8), (5, 4, 3), (2, 2), (3,)])
def test_every_fsq_code_comes_back(levels):
    """tokens -> codes -> something the encoder could have said -> the same tokens and codes."""
    quantizer = FiniteScalarQuantizer(levels)
    size = torch.tensor(levels).prod().item()
    side = -(-(size**0.5) // 1)
    tokens = torch.arange(int(side) ** 2)[None] % size
    codes = quantizer.lookup(as_grid(tokens))
    assert codes.abs().max() == 1
    z_q, again, _ = quantizer(torch.atanh(codes.clamp(-0.999, 0.999)))
    assert torch.equal(again, tokens)
    torch.testing.assert_close(z_q, codes, atol=1e-6, rtol=0)
    assert len(codes.flatten(2).transpose(1, 2).reshape(-1, len(levels)).unique(dim=0)) == size


def test_fsq_levels_are_evenly_spaced():
    codes = FiniteScalarQuantizer((5, 4)).lookup(torch.arange(16).view(1, 4, 4))[0].flatten(1)
    assert codes[0].unique().tolist() == pytest.approx([-1, -0.5, 0, 0.5, 1])
    assert codes[1].unique().tolist() == pytest.approx([-1, -1 / 3, 1 / 3, 1])


def test_every_vq_entry_comes_back():
    quantizer = VectorQuantizer(49, 8)
    quantizer.embedding.weight.data.normal_()
    tokens = torch.arange(49)[None]
    z_q, again, loss = quantizer(quantizer.lookup(as_grid(tokens)))
    assert torch.equal(again, tokens)
    assert torch.equal(z_q, quantizer.lookup(as_grid(tokens)))
    assert loss.item() == 0


def test_blocks_are_residual():
    """With the last convolution at zero each block passes its input on."""
    x = torch.randn(2, 16, 4, 4)
    for block, last in ((ResnetBlock(16, 16), "conv2"), (AttentionBlock(16), "proj_out")):
        torch.nn.init.zeros_(getattr(block, last).weight)
        torch.nn.init.zeros_(getattr(block, last).bias)
        torch.testing.assert_close(block(x), x)


def test_attention_block_by_the_formula():
    torch.manual_seed(0)
    block, x = AttentionBlock(16), torch.randn(2, 16, 3, 5)
    y = F.group_norm(x, 4, block.norm.weight, block.norm.bias, 1e-6).flatten(2)  # (B, C, P)
    q, k, v = (
        torch.einsum("oc,bcp->bop", conv.weight[:, :, 0, 0], y) + conv.bias[:, None]
        for conv in (block.q, block.k, block.v)
    )
    weights = (torch.einsum("bcp,bcs->bps", q, k) / 16**0.5).softmax(-1)
    attended = torch.einsum("bps,bcs->bcp", weights, v)
    out = torch.einsum("oc,bcp->bop", block.proj_out.weight[:, :, 0, 0], attended) + block.proj_out.bias[:, None]
    torch.testing.assert_close(block(x), x + out.view_as(x), atol=1e-5, rtol=1e-5)


def published_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the detokenizer that min-dalle published, written out from its documentation."""
    names = {"decoder.conv_in": (512, 256, 3), "decoder.conv_out": (3, 128, 3), "post_quant_conv": (256, 256, 1)}
    norms = {"decoder.norm_out": 128}

    def resnet(at: str, channels_in: int, channels_out: int) -> None:
        norms.update({f"{at}.norm1": channels_in, f"{at}.norm2": channels_out})
        names[f"{at}.conv1"] = (channels_out, channels_in, 3)
        names[f"{at}.conv2"] = (channels_out, channels_out, 3)
        if channels_in != channels_out:
            names[f"{at}.nin_shortcut"] = (channels_out, channels_in, 1)

    def attention(at: str) -> None:
        norms[f"{at}.norm"] = 512
        names.update({f"{at}.{name}": (512, 512, 1) for name in ("q", "k", "v", "proj_out")})

    resnet("decoder.mid.block_1", 512, 512)
    attention("decoder.mid.attn_1")
    resnet("decoder.mid.block_2", 512, 512)
    for level, (wide, narrow) in enumerate([(128, 128), (256, 128), (256, 256), (512, 256), (512, 512)]):
        for block in range(3):
            resnet(f"decoder.up.{level}.block.{block}", wide if block == 0 else narrow, narrow)
            if level == 4:
                attention(f"decoder.up.4.attn.{block}")
        if level > 0:
            names[f"decoder.up.{level}.upsample.conv"] = (narrow, narrow, 3)
    shapes = {f"{name}.weight": (*shape, shape[2]) for name, shape in names.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in names.items()}
    shapes |= {f"{name}.{kind}": (width,) for name, width in norms.items() for kind in ("weight", "bias")}
    return shapes | {"embedding.weight": (16384, 256)}


def test_names_and_shapes_of_the_published_detokenizer():
    with torch.device("meta"):
        vqgan = VQGAN(PRESETS["mini"].vqgan)
    ours = {name.removeprefix("quantizer."): tuple(value.shape) for name, value in vqgan.state_dict().items()}
    ours = {name: shape for name, shape in ours.items() if not name.startswith(("encoder.", "quant_conv."))}
    assert ours == published_names()


def test_nano_halves_and_restores_the_side():
    config = PRESETS["nano"].vqgan
    with torch.device("meta"):
        vqgan = VQGAN(config)
        pixels = torch.empty(1, 3, config.image_size, config.image_size)
        assert vqgan.encoder(pixels).shape[2:] == (config.grid, config.grid)
        codes = torch.empty(1, config.codebook_dim, config.grid, config.grid)
        assert vqgan.decode(codes).shape == pixels.shape


def test_a_vqgan_without_encoder_only_decodes(config, vqgan, pixels):
    half = VQGAN(dataclasses.replace(config, encoder=False)).eval()
    names = set(half.state_dict())
    assert names == {name for name in vqgan.state_dict() if not name.startswith(("encoder.", "quant_conv."))}
    half.load_state_dict({name: value for name, value in vqgan.state_dict().items() if name in names})
    tokens = vqgan.encode(pixels)
    assert torch.equal(half.decode(half.lookup(as_grid(tokens))), vqgan.decode(vqgan.lookup(as_grid(tokens))))
