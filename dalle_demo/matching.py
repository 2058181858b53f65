"""prompt and pictures -> CLIP's embeddings, and the pictures that are nearest to the prompt."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dalle_demo.images import from_pil, square
from dalle_demo.text import PAD
from dalle_demo.weights import Clip

CHUNK = 64  # prompts that are embedded at once


def fitted(picture: Image.Image, side: int) -> Float[Tensor, "1 3 H W"]:
    """Pixels of any picture, as models want them: on white, and square."""
    return from_pil([square(picture).resize((side, side), Image.Resampling.LANCZOS)])


def embed_texts(clip: Clip, prompts: Sequence[str]) -> Float[Tensor, "B E"]:
    """CLIP's embeddings of prompts."""
    ids = clip.tokenizer.batch(prompts, clip.text_config.length)
    mask = ids != PAD
    return clip.clip.encode_text(clip.text_encoder(ids, mask), mask)


def embed_many(clip: Clip, prompts: Sequence[str]) -> Float[Tensor, "B E"]:
    """`embed_texts` of any number, CHUNK at a time."""
    return torch.cat([embed_texts(clip, prompts[start : start + CHUNK]) for start in range(0, len(prompts), CHUNK)])


def embed_text(clip: Clip, prompt: str) -> Float[Tensor, " E"]:
    """CLIP's embedding of a prompt."""
    return embed_texts(clip, [prompt])[0]


def embed_image(clip: Clip, picture: Image.Image) -> Float[Tensor, " E"]:
    """CLIP's embedding of a picture."""
    return clip.clip.encode_image(fitted(picture, clip.config.image_size))[0]


def nearest(
    clip: Clip, prompt: str, pictures: list[Image.Image], seeds: list[int], n: int
) -> tuple[list[Image.Image], list[int], list[float]]:
    """The `n` pictures nearest to a prompt, the nearest first, with their seeds and cosines."""
    text = embed_text(clip, prompt)
    scores = [(embed_image(clip, picture) * text).sum().item() for picture in pictures]
    best = sorted(range(len(pictures)), key=lambda i: -scores[i])[:n]
    return [pictures[i] for i in best], [seeds[i] for i in best], [scores[i] for i in best]
