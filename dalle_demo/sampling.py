"""logits (B, V) -> image_tokens (B, N): guidance, filtering, and the token loop.

Randomness is one uniform number per image and position, drawn up front and turned into a token by inverse CDF, so
image i depends on its own seed and on nothing else in the batch.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Step = Callable[[Tensor, int], Tensor]  # (image_tokens (B,), position) -> logits (B, V)


def draw_uniforms(seeds: Sequence[int], length: int) -> Float[Tensor, "B N"]:
    """Uniform numbers in [0, 1), one row a seed, the same whatever the other seeds are."""
    return torch.stack([torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def guide(cond: Float[Tensor, "B V"], uncond: Float[Tensor, "B V"], scale: float) -> Float[Tensor, "B V"]:
    """Classifier-free guidance (Ho & Salimans 2022): uncond + scale (cond - uncond); 1 is off."""
    return uncond + scale * (cond - uncond)


def filter_logits(logits: Float[Tensor, "B V"], top_k: int = 0, top_p: float = 1.0) -> Float[Tensor, "B V"]:
    """Set to -inf all but the `top_k` best (0 is off; ties stay), then all beyond the share `top_p` (1 is off).

    The best token always stays (nucleus sampling, Holtzman et al. 2020).
    """
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        probs, order = logits.softmax(-1).sort(descending=True)
        beyond = probs.cumsum(-1) - probs >= top_p  # mass before this token already reaches top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return logits


def choose(logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Inverse CDF: the first token whose cumulative probability exceeds the uniform number."""
    cdf = logits.softmax(-1).to("cpu", torch.float64).cumsum(-1)  # not every device has float64
    target = uniforms.double()[:, None] * cdf[:, -1:]  # scaled, so that rounding cannot leave the last token behind
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def sample(
    step: Step,
    uniforms: Float[Tensor, "B N"],
    bos: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Iterator[Int[Tensor, "B M"]]:
    """Yield the tokens so far after each position, M = 1 .. N.

    Args:
        step: logits of a position given the token before it, guidance included.
        uniforms: as drawn by `draw_uniforms`; their number of columns is N.
        bos: the token fed at position 0.
        temperature: positive; divides the logits.
        top_k: see `filter_logits`.
        top_p: see `filter_logits`.
    """
    batch, length = uniforms.shape
    tokens = torch.empty(batch, length, dtype=torch.long)
    previous = torch.full((batch,), bos)
    for position in range(length):
        logits = step(previous, position).float() / temperature
        previous = choose(filter_logits(logits, top_k, top_p), uniforms[:, position])
        tokens[:, position] = previous
        yield tokens[:, : position + 1]
