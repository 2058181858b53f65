"""sizes -> checkpoint folder of a tiny random model; apart from conftest.py, which has a namesake in browser/."""

from pathlib import Path

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
    save_parts(folder, configs, modules, folder / "tokenizer.json", defaults=config.defaults)
    return folder
