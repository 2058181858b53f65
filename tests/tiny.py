"""sizes -> checkpoint folder of a tiny random model; apart from conftest.py, which has a namesake in browser/."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dalle_demo.checkpoints import CLASSES, save_parts, stored_hash
from dalle_demo.config import (
    CLIP_PARTS,
    PARTS,
    UNCLIP_PARTS,
    CLIPConfig,
    DalleConfig,
    GeneratorConfig,
    ImageDecoderConfig,
    PriorConfig,
    TextEncoderConfig,
    UnclipConfig,
    VQGANConfig,
)
from dalle_demo.text import Tokenizer

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


def tiny_unclip_config() -> UnclipConfig:
    """The same of a DALL-E 2: latents of 4x4."""
    dalle = tiny_config()
    vae = dataclasses.replace(dalle.vqgan, quantizer="kl", levels=(), latent_dim=4)
    return UnclipConfig(
        text_encoder=dalle.text_encoder,
        clip=CLIPConfig(image_size=32, patch=4, widths=(16, 24, 32), text_width=32, embed_dim=32),
        vae=vae,
        prior=PriorConfig(embed_dim=32, width=48, blocks=2, steps=3),
        generator=GeneratorConfig(
            embed_dim=32,
            noise_dim=16,
            latent_dim=vae.latent_dim,
            grid=vae.grid,
            width=32,
            blocks=2,
            channels=16,
            critic_width=16,
        ),
        defaults={"guidance_scale": 1.5},
    )


def save_tiny(folder: Path, config: DalleConfig) -> Path:
    """Write a checkpoint folder of random weights, spread enough that prompts and positions matter."""
    configs = {part: getattr(config, part) for part in PARTS}
    return save_random(folder, configs, config.text_encoder, defaults=config.defaults)


def save_tiny_clip(folder: Path, config: UnclipConfig) -> Path:
    """The same of a CLIP."""
    return save_random(folder, {part: getattr(config, part) for part in CLIP_PARTS}, config.text_encoder)


def save_tiny_unclip(folder: Path, config: UnclipConfig, clip: Path) -> Path:
    """The same of a DALL-E 2 with that CLIP."""
    configs = {part: getattr(config, part, config.generator) for part in UNCLIP_PARTS}
    named = {"name": clip.name, "sha256": stored_hash(clip, "clip")}
    return save_random(folder, configs, clip=named, defaults=config.defaults)


def save_random(folder: Path, configs: Mapping[str, Any], text: TextEncoderConfig | None = None, **extra: Any) -> Path:
    """Write these parts, with a tokenizer for a text encoder."""
    torch.manual_seed(0)
    modules = {part: CLASSES[part](config) for part, config in configs.items()}
    for module in modules.values():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                parameter.data.mul_(3)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer.json" if text else None
    if text:
        Tokenizer.train(WORDS, text.vocab_size).save(tokenizer)
    save_parts(folder, configs, modules, tokenizer, **extra)
    return folder
