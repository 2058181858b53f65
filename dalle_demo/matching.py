"""prompt and pictures -> CLIP's embeddings, and the pictures that fit the prompt best."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dalle_demo.images import from_pil, square
from dalle_demo.text import PAD
from dalle_demo.weights import Clip

CHUNK = 64  # prompts that are embedded at once
LIKELIHOOD_WEIGHT = (
    0.25  # of a nat a token beside CLIP's cosine, whose spreads in 8 pictures of a prompt are 0.3 and 0.04
)


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


def best(
    clip: Clip,
    prompt: str,
    pictures: list[Image.Image],
    seeds: list[int],
    n: int,
    likelihood: Float[Tensor, " B"],
) -> tuple[list[Image.Image], list[int], list[float]]:
    """The `n` pictures that fit a prompt best, the best first, with their seeds and CLIP's cosines.

    Args:
        clip: what reads the prompt and sees the pictures.
        prompt: what was asked for.
        pictures: all that were drawn.
        seeds: one of each picture.
        n: how many are wanted.
        likelihood: mean log-probability of each picture's tokens, in nats, by the decoder that drew them: what it drew
            by an unlikely choice is often torn, which CLIP hardly sees.
    """
    text = embed_text(clip, prompt)
    cosines = [(embed_image(clip, picture) * text).sum().item() for picture in pictures]
    fit = [cosine + LIKELIHOOD_WEIGHT * nats for cosine, nats in zip(cosines, likelihood.tolist(), strict=True)]
    order = sorted(range(len(pictures)), key=lambda i: -fit[i])[:n]
    return [pictures[i] for i in order], [seeds[i] for i in order], [cosines[i] for i in order]
