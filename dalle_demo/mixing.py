"""embeddings and noise -> others between and beyond them: variations, blends, text diffs and walks of DALL-E 2.

A picture's whole description is a `Seen`: what it shows, as CLIP sees it, and the noise that says the rest. Ramesh et
al. 2022, section 3, with the generator's noise in the place of the diffusion's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

WANDER = 0.3  # share of the way to another embedding at distance 1; beyond it, things lose their shape
PARALLEL = 1e-4  # angle, and its distance from a half turn, below which an arc is as good as its chord


@dataclass(frozen=True)
class Seen:
    """What the generator draws a picture, or each of several, from."""

    embedding: Float[Tensor, "*B E"]
    noise: Float[Tensor, "*B Z"]


def together(each: Sequence[Seen]) -> Seen:
    """What several pictures are drawn from, as one."""
    return Seen(torch.stack([seen.embedding for seen in each]), torch.stack([seen.noise for seen in each]))


def apart(seen: Seen) -> list[Seen]:
    """The inverse of `together`."""
    return [Seen(embedding, noise) for embedding, noise in zip(seen.embedding, seen.noise, strict=True)]


def slerp(a: Float[Tensor, "*#B E"], b: Float[Tensor, "*#B E"], share: float) -> Float[Tensor, "*#B E"]:
    """Point of the arc from `a` (share 0, to the bit) to `b` (share 1); its length goes along (Shoemake 1985).

    A single vector stands for as many as the other has.
    """
    angle = torch.acos(F.cosine_similarity(a, b, dim=-1).clamp(-1, 1))[..., None]
    bent = (angle > PARALLEL) & (angle < math.pi - PARALLEL)
    whole = torch.where(bent, angle, 1.0)  # so that no branch divides by zero
    from_a = torch.where(bent, torch.sin((1 - share) * whole) / torch.sin(whole), 1 - share)
    from_b = torch.where(bent, torch.sin(share * whole) / torch.sin(whole), share)
    return from_a * a + from_b * b


def blend(one: Seen, other: Seen, share: float) -> Seen:
    """What lies between two pictures, in what they show and in all else; the ends are the two."""
    return Seen(slerp(one.embedding, other.embedding, share), slerp(one.noise, other.noise, share))


def vary(seen: Seen, fresh: Seen, distance: float) -> Seen:
    """The same to be seen in other ways: its noise on the way to fresh ones, which it reaches at distance 1.

    In the paper the embedding stays. Here it goes some of the way, since a generator that draws in one pass leaves
    little to its noise.
    """
    embedding = slerp(seen.embedding, fresh.embedding, WANDER * distance)
    return Seen(embedding, slerp(seen.noise, fresh.noise, distance))


def text_diff(seen: Seen, source: Float[Tensor, " E"], target: Float[Tensor, " E"], strength: float) -> Seen:
    """The picture moved as its text would be, from `source` to `target`; all else stays (section 3.3)."""
    if torch.equal(source, target):
        return seen
    return Seen(slerp(seen.embedding, F.normalize(target - source, dim=-1), strength), seen.noise)


def loop(a: Float[Tensor, " Z"], b: Float[Tensor, " Z"], frames: int) -> Float[Tensor, "F Z"]:
    """A circle through noise that begins at `a`; each point of it is as likely as any other noise."""
    turn = torch.arange(frames)[:, None] * (2 * math.pi / frames)
    return turn.cos() * a + turn.sin() * b
