"""Tiny seeded models, made once a session."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dalle_demo.config import DalleConfig, ImageDecoderConfig, TextEncoderConfig, VQGANConfig
from dalle_demo.models.transformer import ImageDecoder, TextEncoder
from dalle_demo.models.vqgan import VQGAN
from dalle_demo.text import Tokenizer
from dalle_demo.weights import save_parts

WORDS = ["a red apple", "a black cat on a blue background", "a house, flat style", "一只小狗", "红色背景的汽车", "🍕"]


def tiny_config(**vqgan) -> DalleConfig:
    """16x16 tokens of 4 pixels shrunk to 4x4: every part of the real thing, a thousandth of its size."""
    sizes = {"image_size": 32, "patch": 2, "channels": 16, "multipliers": (1, 1, 2), "blocks": 1, "quantizer": "fsq"}
    tokenizer = VQGANConfig(**(sizes | {"levels": (5, 4, 3)} | vqgan))
    codes = tokenizer.codebook_size
    return DalleConfig(
        vqgan=tokenizer,
        text_encoder=TextEncoderConfig(vocab_size=300, length=16, width=32, layers=2, heads=2, glu_width=48),
        image_decoder=ImageDecoderConfig(codes + 1, tokenizer.tokens, codes, 32, 48, layers=2, heads=3, glu_width=64),
        filler=3,
        defaults={"temperature": 0.9, "guidance_scale": 2.0},
    )


def save_tiny(folder: Path, config: DalleConfig) -> Path:
    """Write a checkpoint folder of random weights, spread enough that prompts and positions matter."""
    torch.manual_seed(0)
    configs = {"vqgan": config.vqgan, "text_encoder": config.text_encoder, "image_decoder": config.image_decoder}
    modules = {
        "vqgan": VQGAN(config.vqgan),
        "text_encoder": TextEncoder(config.text_encoder),
        "image_decoder": ImageDecoder(config.image_decoder),
    }
    for module in modules.values():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                parameter.data.mul_(3)
    folder.mkdir(parents=True, exist_ok=True)
    Tokenizer.train(WORDS, config.text_encoder.vocab_size).save(folder / "tokenizer.json")
    save_parts(folder, configs, modules, folder / "tokenizer.json", filler=config.filler, defaults=config.defaults)
    return folder


@pytest.fixture(scope="session")
def nano_folder(tmp_path_factory) -> Path:
    """Checkpoint folder of a tiny DALL-E with random weights."""
    return save_tiny(tmp_path_factory.mktemp("weights") / "tiny", tiny_config())


@pytest.fixture(scope="session")
def engine(nano_folder):
    """Engine on the tiny model, in fp32 whatever the processor: what is promised to the bit is promised for fp32."""
    from dalle_demo import engines

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "has_native_bf16", lambda: False)
        return engines.DalleEngine.load(str(nano_folder))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """Data set folder in the form of `data emoji`: 24 discs and boxes of six colours."""
    import json

    folder = tmp_path_factory.mktemp("data")
    colours = {"red": "红", "green": "绿", "blue": "蓝", "yellow": "黄", "pink": "粉", "gray": "灰"}
    rng = np.random.default_rng(0)
    images, rows = [], []
    for number, (name, chinese) in enumerate(colours.items()):
        for style, style_zh in (("flat", "扁平"), ("shaded", "阴影"), ("bold", "粗犷"), ("retro", "复古")):
            picture = np.zeros((128, 128, 4), np.uint8)
            top, left = rng.integers(8, 40, size=2)
            picture[top : top + 70, left : left + 70] = (*rng.integers(256, size=3), 255)
            images.append(picture)
            rows.append(
                {
                    "hex": f"{0x1F34A + number:X}",  # of these, `split` holds out 1F34E in retro
                    "emoji": chr(0x1F34A + number),
                    "name": f"{name} box",
                    "keywords": ["box", name],
                    "name_zh": f"{chinese}色盒子",
                    "keywords_zh": ["盒子"],
                    "group": "objects",
                    "style": style,
                    "style_zh": style_zh,
                }
            )
    np.save(folder / "images.npy", np.stack(images))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
