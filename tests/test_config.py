"""Settings of a request are checked one by one; the published models have the published sizes."""

import dataclasses
import json
import math

import pytest
import torch

from dalle_demo.checkpoints import CLASSES
from dalle_demo.config import (
    CLIP_PARTS,
    MAX_IMAGES,
    MAX_PROMPT,
    MAX_SEED,
    PARTS,
    PRESETS,
    UNCLIP_PARTS,
    UNCLIP_PRESETS,
    GenerateParams,
    ParamError,
    UnclipParams,
    part_config,
)
from dalle_demo.models.transformer import ImageDecoder, TextEncoder
from dalle_demo.models.vqgan import VQGAN

KINDS = (GenerateParams, UnclipParams)
NUMERIC = [
    pytest.param(kind, spec, id=f"{kind.__name__}.{spec.name}")
    for kind in KINDS
    for spec in dataclasses.fields(kind)
    if spec.name != "prompt"
]
COUNTS = [case for case in NUMERIC if case.values[1].type in (int, int | None)]


def refuse(field: str, kind: type = GenerateParams, **settings) -> str:
    """Message of the ParamError that these settings raise, which must name `field`."""
    with pytest.raises(ParamError) as caught:
        kind(**({"prompt": "a red apple"} | settings))
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "spec"), NUMERIC)
@pytest.mark.parametrize(
    "bad",
    [math.nan, math.inf, -math.inf, "4", "", "４", b"4", [4], {}, True, False, 4j, 10**400],
    ids=lambda bad: ascii(bad)[:8],
)
def test_refuses_what_is_no_number(kind, spec, bad):
    refuse(spec.name, kind, **{spec.name: bad})


@pytest.mark.parametrize(("kind", "spec"), NUMERIC)
def test_refuses_none_except_as_blank_seed(kind, spec):
    if spec.name == "seed":
        assert kind("a red apple", seed=None).seed is None
    else:
        refuse(spec.name, kind, **{spec.name: None})


@pytest.mark.parametrize(("kind", "spec"), NUMERIC)
def test_bounds_are_inclusive(kind, spec):
    low, high = spec.metadata["low"], spec.metadata["high"]
    for value in (low, high):
        assert getattr(kind("a red apple", **({"n": 1} | {spec.name: value})), spec.name) == value
    for value in (low - 1, high + 1, math.nextafter(low, -math.inf), math.nextafter(high, math.inf)):
        message = refuse(spec.name, kind, **({"n": 1} | {spec.name: value}))
        assert spec.type not in (int, float) or str(high) in message or "whole" in message


@pytest.mark.parametrize("n", [0, -1, 1000, MAX_IMAGES + 1])
def test_number_of_pictures(n):
    assert str(MAX_IMAGES) in refuse("n", n=n)


@pytest.mark.parametrize(("kind", "spec"), COUNTS)
def test_counts_are_whole_numbers(kind, spec):
    value = getattr(kind("a red apple", **{spec.name: 4.0}), spec.name)
    assert value == 4
    assert type(value) is int
    assert "whole" in refuse(spec.name, kind, **{spec.name: 4.5})


def test_other_numbers_become_floats():
    assert type(GenerateParams("a red apple", guidance_scale=3).guidance_scale) is float


def test_every_number_describes_its_control():
    for _, spec in (case.values for case in NUMERIC):
        assert {"low", "high", "step", "label", "help"} <= set(spec.metadata), spec.name
        assert spec.default is None or spec.metadata["low"] <= spec.default <= spec.metadata["high"]


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " ",
        "\n\t \u3000",
        "\x00\x01\x1f\x7f",
        "!?… —",
        "...",
        "“”",
        "，。！？",
        "\ufe0f",
        "\ufeff",
        "\u200b\u200d",
        None,
        7,
        b"cat",
    ],
    ids=ascii,
)
def test_refuses_prompts_that_say_nothing(prompt):
    refuse("prompt", prompt=prompt)


def test_refuses_long_prompts_with_both_numbers():
    message = refuse("prompt", prompt="a" * 10_000)
    assert "10,000" in message
    assert f"{MAX_PROMPT:,}" in message
    assert GenerateParams("a" * MAX_PROMPT).prompt == "a" * MAX_PROMPT


@pytest.mark.parametrize("prompt", ["🍕", "❤️", "👨‍👩‍👧", "⌚", "一只小狗", "狗", "ωmega", "a", "7", "кот", "→"])
def test_accepts_any_script_and_lone_emoji(prompt):
    assert GenerateParams(prompt).prompt == prompt


def test_seed_leaves_room_for_the_last_picture():
    assert GenerateParams("a cat", n=4, seed=MAX_SEED - 3).seed == MAX_SEED - 3
    assert str(MAX_SEED - 3) in refuse("seed", n=4, seed=MAX_SEED - 2)
    assert GenerateParams("a cat", n=1, seed=MAX_SEED).seed == MAX_SEED


@pytest.mark.parametrize("kind", KINDS)
def test_both_kinds_of_request_check_prompt_and_seed(kind):
    refuse("prompt", kind, prompt="…")
    refuse("seed", kind, n=4, seed=MAX_SEED - 2)


def test_candidates_are_at_least_the_pictures_shown_or_none():
    assert "4" in refuse("candidates", n=4, candidates=3)
    assert GenerateParams("a cat", n=4).drawn == 4
    for candidates in (4, 9):
        assert GenerateParams("a cat", n=4, candidates=candidates).drawn == candidates
    assert UnclipParams("a cat", n=4, candidates=2).drawn == 4  # of the prior, for each picture


def test_seed_leaves_room_for_the_last_candidate():
    assert GenerateParams("a cat", n=1, seed=MAX_SEED - 7, candidates=8).seed == MAX_SEED - 7
    refuse("seed", n=1, seed=MAX_SEED - 6, candidates=8)
    assert all(GenerateParams("a cat", n=1, candidates=16).seeded().seed <= MAX_SEED - 15 for _ in range(20))


def test_a_blank_seed_is_drawn_once():
    params = GenerateParams("a cat").seeded()
    assert params.seeded() is params
    assert params == GenerateParams("a cat", seed=params.seed)
    assert len({GenerateParams("a cat").seeded().seed for _ in range(9)}) > 1


def test_settings_of_one_picture_draw_no_candidates_beside_it():
    settings = {"prompt": "a cat", "seed": 3, "guidance_scale": 2.0}
    alone = GenerateParams(n=4, candidates=8, top_k=9, **settings).alone()
    assert GenerateParams(**alone) == GenerateParams(n=1, top_k=9, **settings)
    alone = UnclipParams(n=4, candidates=3, **settings).alone()
    assert UnclipParams(**alone) == UnclipParams(n=1, candidates=3, **settings)


def test_params_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerateParams("a cat").n = 2


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json(preset):
    for part, kind in PARTS.items():
        config = getattr(PRESETS[preset], part)
        assert type(config) is kind
        assert part_config(part, json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("preset", UNCLIP_PRESETS)
def test_unclip_presets_survive_json_and_fit(preset):
    whole = UNCLIP_PRESETS[preset]
    for part, kind in (CLIP_PARTS | UNCLIP_PARTS).items():
        config = getattr(whole, part, whole.generator)
        assert type(config) is kind
        assert part_config(part, json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert whole.prior.embed_dim == whole.generator.embed_dim == whole.clip.embed_dim
    assert (whole.generator.latent_dim, whole.generator.grid) == (whole.vae.codebook_dim, whole.vae.grid)
    assert whole.clip.text_width == whole.text_encoder.width
    UnclipParams("a cat", **whole.defaults)


def test_config_from_json_is_strict():
    values = dataclasses.asdict(PRESETS["nano"].vqgan)
    with pytest.raises(ValueError, match="colour"):
        part_config("vqgan", values | {"colour": 1})
    del values["channels"]
    with pytest.raises(ValueError, match="channels"):
        part_config("vqgan", values)
    with pytest.raises(ValueError, match="diffuser"):
        part_config("diffuser", {})


@pytest.mark.parametrize("preset", PRESETS)
def test_parts_of_a_preset_fit_each_other(preset):
    config = PRESETS[preset]
    vqgan, decoder = config.vqgan, config.image_decoder
    assert decoder.length == vqgan.tokens == vqgan.grid**2
    assert vqgan.grid * vqgan.downsample == vqgan.image_size
    assert vqgan.codebook_size <= decoder.bos < decoder.vocab_size
    assert decoder.text_width == config.text_encoder.width
    for part in (config.text_encoder, decoder):
        assert part.width % part.heads == 0


def count(module: torch.nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("preset", "encoder", "decoder"),
    [("mini", 202_591_224, 235_242_488), ("mega", 1_110_022_144, 1_477_498_880)],
)
def test_published_transformers(preset, encoder, decoder):
    """Sizes of the published files, which leave out the scale of every norm that was trained without one."""
    config = PRESETS[preset]
    layers, width, glu = config.text_encoder.layers, config.text_encoder.width, config.text_encoder.glu_width
    feed_forward_and_attention = 2 * width + glu  # norms before attention, and at both ends of the GLU
    with torch.device("meta"):
        text, image = TextEncoder(config.text_encoder), ImageDecoder(config.image_decoder)
    assert count(text) == encoder + layers * feed_forward_and_attention + width  # and the final norm
    assert count(image) == decoder + layers * (feed_forward_and_attention + width) + width  # and before the text
    assert text.embed_positions.weight.shape == (64, width)
    assert image.embed_positions.weight.shape == (256, width)
    assert image.lm_head.weight.shape[0] == {"mini": 16385, "mega": 16416}[preset]


def test_published_detokenizer():
    with torch.device("meta"):
        vqgan = VQGAN(PRESETS["mini"].vqgan)
    assert PRESETS["mega"].vqgan == PRESETS["mini"].vqgan
    parts = (vqgan.decoder, vqgan.quantizer, vqgan.post_quant_conv)
    assert sum(map(count, parts)) == 46_709_891
    assert sum(len(part.state_dict()) for part in parts) == 197


def test_nano_is_small_enough_to_ship():
    config = PRESETS["nano"]
    with torch.device("meta"):
        parts = VQGAN(config.vqgan), TextEncoder(config.text_encoder), ImageDecoder(config.image_decoder)
    assert 2 * sum(map(count, parts)) < 60e6  # bytes in fp16


def test_unclip_nano_and_its_clip_are_small_enough_to_ship():
    whole = UNCLIP_PRESETS["unclip-nano"]
    with torch.device("meta"):
        parts = {part: CLASSES[part](getattr(whole, part, whole.generator)) for part in (*CLIP_PARTS, *UNCLIP_PARTS)}
    sizes = {part: count(module) for part, module in parts.items()}
    in_bytes = UNCLIP_PARTS.keys() - {"vae"}  # all but biases and scales, which are few
    assert sum(size * (1 if part in in_bytes else 2) for part, size in sizes.items()) < 39e6
