"""Text encoder and image decoder: the formulas, the masks, and the cache that must not change a logit."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config

from dalle_demo.models.transformer import EncoderLayer, ImageDecoder, TextEncoder, attend

CONFIG = tiny_config()
LENGTH = CONFIG.image_decoder.length


def spread(module: torch.nn.Module) -> torch.nn.Module:
    """Random weights large enough that nothing is close to nothing; norms get scales and shifts too."""
    rng = torch.Generator().manual_seed(5)
    for name, parameter in module.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = centre + 0.3 * torch.randn(parameter.shape, generator=rng)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def decoder() -> ImageDecoder:
    return spread(ImageDecoder(CONFIG.image_decoder))


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return spread(TextEncoder(CONFIG.text_encoder))


def texts(*lengths: int, padded: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random text states with as many real tokens in each row as asked for."""
    rng = torch.Generator().manual_seed(6)
    states = torch.randn(len(lengths), padded, CONFIG.image_decoder.text_width, generator=rng)
    return states, torch.arange(padded) < torch.tensor(lengths)[:, None]


def image_tokens(batch: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(7)
    return torch.randint(CONFIG.vqgan.codebook_size, (batch, LENGTH), generator=rng)


def formula_attention(q, k, v, mask=None):
    """softmax(Q K^T / sqrt(d)) V with every head and row written out; (B, S, D) with `heads` taken from q."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return weights @ v


def formula_norm(x, norm):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def formula_gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def test_attention_by_the_formula():
    q, k, v = torch.randn(3, 2, 4, 7, 8)
    mask = torch.rand(2, 1, 7, 7) > 0.3
    mask |= torch.eye(7, dtype=torch.bool)  # no row without anything to look at
    expected = formula_attention(q, k, v, mask)
    joined = torch.cat([expected[:, head] for head in range(4)], -1)  # heads side by side, first head first
    torch.testing.assert_close(attend(q, k, v, attn_mask=mask), joined, atol=1e-5, rtol=1e-5)


def test_encoder_layer_by_the_formula():
    config = CONFIG.text_encoder
    layer = spread(EncoderLayer(config.width, config.heads, config.glu_width))
    x = torch.randn(2, 9, config.width)
    mask = torch.arange(9) < torch.tensor([[9], [5]])

    attention, glu = layer.self_attention, layer.feed_forward
    projected = formula_norm(x, attention.norm_in) @ attention.qkv.weight.T
    q, k, v = (
        projected[..., : config.width],
        projected[..., config.width : -config.width],
        projected[..., -config.width :],
    )
    size = config.width // config.heads
    heads = [
        formula_attention(*(part[..., i * size : (i + 1) * size] for part in (q, k, v)), mask[:, None])
        for i in range(config.heads)
    ]
    y = x + formula_norm(torch.cat(heads, -1) @ attention.out.weight.T, attention.norm_out)
    z = formula_norm(y, glu.norm_in)
    gate, value = glu.gate_and_value.weight[: config.glu_width], glu.gate_and_value.weight[config.glu_width :]
    hidden = formula_norm(formula_gelu(z @ gate.T) * (z @ value.T), glu.norm_hidden)
    y = y + hidden @ glu.out.weight.T
    torch.testing.assert_close(layer(x, mask[:, None, None]), y, atol=1e-4, rtol=1e-4)


def test_decoder_layer_by_the_formula(decoder):
    """Both attentions of a decoder layer, the causal mask and the order of its three shortcuts."""
    config, layer = CONFIG.image_decoder, decoder.layers[0]
    x = torch.randn(1, LENGTH, config.width)
    states, mask = texts(4, padded=6)
    size = config.width // config.heads

    def multi_head(q, k, v, allowed):
        parts = [[part[..., i * size : (i + 1) * size] for part in (q, k, v)] for i in range(config.heads)]
        return torch.cat([formula_attention(*head, allowed) for head in parts], -1)

    own, cross, glu = layer.self_attention, layer.cross_attention, layer.feed_forward
    qkv = (formula_norm(x, own.norm_in) @ own.qkv.weight.T).split(config.width, -1)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    y = x + formula_norm(multi_head(*qkv, causal) @ own.out.weight.T, own.norm_out)
    q = formula_norm(y, cross.norm_in) @ cross.q.weight.T
    k, v = (states @ cross.kv.weight.T).split(config.width, -1)
    y = y + formula_norm(multi_head(q, k, v, mask[:, None]) @ cross.out.weight.T, cross.norm_out)
    gate, value = (formula_norm(y, glu.norm_in) @ glu.gate_and_value.weight.T).split(config.glu_width, -1)
    y = y + formula_norm(formula_gelu(gate) * value, glu.norm_hidden) @ glu.out.weight.T
    torch.testing.assert_close(layer(x, states, mask[:, None, None]), y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lengths", [(5,), (1, 5), (6, 2, 3, 1)])
def test_cached_logits_equal_uncached_at_every_position(decoder, lengths):
    states, mask = texts(*lengths, padded=6)
    tokens = image_tokens(len(lengths))
    expected = decoder(tokens, states, mask)
    cache = decoder.prefill(states, mask)
    previous = torch.full((len(lengths),), CONFIG.image_decoder.bos)
    for position in range(LENGTH):
        found = decoder.step(previous, position, cache)
        torch.testing.assert_close(found, expected[:, position], atol=1e-5, rtol=1e-5)
        previous = tokens[:, position]


def test_a_token_changes_nothing_up_to_itself(decoder):
    states, mask = texts(4, padded=6)
    tokens = image_tokens(1)
    before = decoder(tokens, states, mask)
    for t in range(LENGTH):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % CONFIG.vqgan.codebook_size
        after = decoder(changed, states, mask)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        if t + 1 < LENGTH:  # it is read one position later, and remembered from there on
            assert ((after - before)[0, t + 1 :].abs().amax(-1) > 1e-4).all()


def test_the_last_token_is_never_read(decoder):
    states, mask = texts(4, padded=6)
    tokens = image_tokens(2)
    tokens[1, :-1] = tokens[0, :-1]
    logits = decoder(tokens, states.expand(2, -1, -1), mask.expand(2, -1))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)


def test_text_matters_and_padding_does_not(decoder):
    states, mask = texts(4, padded=4)
    tokens = image_tokens(1)
    expected = decoder(tokens, states, mask)
    for junk in (0.0, 100.0):
        padded = F.pad(states, (0, 0, 0, 5), value=junk), F.pad(mask, (0, 5))
        torch.testing.assert_close(decoder(tokens, *padded), expected, atol=1e-5, rtol=1e-5)
    for place in range(4):
        other = states.clone()
        other[0, place] += 1
        assert (decoder(tokens, other, mask) - expected).abs().max() > 1e-3


def test_encoder_ignores_padding(encoder):
    rng = torch.Generator().manual_seed(8)
    ids = torch.randint(4, 300, (1, 6), generator=rng)
    expected = encoder(ids, torch.ones_like(ids, dtype=torch.bool))
    for junk in (1, 77):
        longer = F.pad(ids, (0, 5), value=junk)
        states = encoder(longer, torch.arange(11)[None] < 6)
        torch.testing.assert_close(states[:, :6], expected, atol=1e-5, rtol=1e-5)


def test_encoder_looks_both_ways_and_knows_the_order(encoder):
    ids = torch.arange(10, 16)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    before = encoder(ids, mask)
    for place in range(6):
        changed = ids.clone()
        changed[0, place] = 99
        assert ((encoder(changed, mask) - before)[0].abs().amax(-1) > 1e-4).all()
    assert not torch.allclose(encoder(ids.flip(1), mask).flip(1), before, atol=1e-3)


def test_each_row_of_a_batch_is_alone(decoder, encoder):
    ids = torch.randint(4, 300, (3, 7), generator=torch.Generator().manual_seed(9))
    mask = torch.arange(7) < torch.tensor([[7], [3], [1]])
    states, tokens = encoder(ids, mask), image_tokens(3)
    logits = decoder(tokens, states, mask)
    for i in range(3):
        alone = encoder(ids[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(alone, states[i : i + 1], atol=1e-5, rtol=1e-5)
        one = decoder(tokens[i : i + 1], alone, mask[i : i + 1])
        torch.testing.assert_close(one, logits[i : i + 1], atol=1e-4, rtol=1e-4)


def test_every_parameter_is_trained():
    torch.manual_seed(0)
    encoder, decoder = TextEncoder(CONFIG.text_encoder), ImageDecoder(CONFIG.image_decoder)
    ids, tokens = torch.randint(4, 300, (2, CONFIG.text_encoder.length)), image_tokens(2)
    mask = torch.ones_like(ids, dtype=torch.bool)
    F.cross_entropy(decoder(tokens, encoder(ids, mask), mask).flatten(0, 1), tokens.flatten()).backward()
    for module in (encoder, decoder):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_no_projection_has_a_bias(decoder, encoder):
    """As published; a bias would be a tensor that no published file holds."""
    names = [name for module in (decoder, encoder) for name, _ in module.named_parameters()]
    assert all("norm" in name for name in names if name.endswith("bias"))
