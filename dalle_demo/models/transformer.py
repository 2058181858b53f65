"""text_ids (B, T) -> text states (B, T, D) -> logits (B, N, V) over image tokens.

P(w_1:N | text) is the product over t of P(w_t | w_<t, text). Encoder and decoder are those of DALL-E Mini (Dayma et
al. 2021), a BART with NormFormer's extra norms and gated feed-forward layers: no bias in any projection, exact GELU,
learned positions.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dalle_demo.config import ImageDecoderConfig, TextEncoderConfig
from dalle_demo.models.layers import EncoderLayer, FeedForward, SelfAttention, attend, init_weights


class CrossAttention(nn.Module):
    """Attention of image positions to the text, whose keys and values are computed once per prompt."""

    def __init__(self, width: int, heads: int, text_width: int):
        super().__init__()
        self.heads = heads
        self.norm_in = nn.LayerNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(text_width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_out = nn.LayerNorm(width)

    def project_text(self, text_states: Tensor) -> Tensor:
        """Keys and values (2, B, nh, T, hd)."""
        return self.kv(text_states).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def project(self, x: Tensor) -> Tensor:
        """Queries (B, nh, S, hd)."""
        return self.q(self.norm_in(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def join(self, attended: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.norm_out(self.out(attended))

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.join(attend(self.project(x), k, v, attn_mask=mask))


class TextEncoder(nn.Module):
    """Bidirectional Transformer over the prompt."""

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.embed_positions = nn.Embedding(config.length, config.width)
        self.norm_embedding = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(
            EncoderLayer(config.width, config.heads, config.glu_width) for _ in range(config.layers)
        )
        self.norm_final = nn.LayerNorm(config.width)
        self.apply(init_weights)

    def forward(self, text_ids: Int[Tensor, "B T"], text_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Encode; `text_mask` is true on real tokens. States at padding are computed and must not be used."""
        mask = text_mask[:, None, None]  # (B, 1, 1, T)
        x = self.embed_tokens(text_ids) + self.embed_positions.weight[: text_ids.shape[1]]
        x = self.norm_embedding(x.to(self.norm_embedding.weight.dtype))
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm_final(x)


# In products of a multiple of four rows, a row has the same bits however many there are (measured with MKL, oneDNN and
# FBGEMM); fewer take other code paths, but three of FBGEMM's do not. So a step fills its batch up, and a picture does
# not depend on n.
ROWS = 4


def fill_up(rows: Tensor, least: int = ROWS) -> Tensor:
    """(B, 1, D) -> (B', 1, D): rows of zeros up to `least`, and beyond it to a multiple of ROWS."""
    missing = least - len(rows) if len(rows) <= least else -len(rows) % ROWS
    return F.pad(rows, (0, 0, 0, 0, 0, missing)) if missing else rows


class KVCache:
    """Keys and values of one batch in flight, of each layer: self (B, 2, nh, N, hd), allocated once, and text.

    A step has some three hundred operations, and calling one costs microseconds: views that stay are made here, once.
    """

    def __init__(self, text: list[Tensor], text_mask: Tensor, length: int, least: int = ROWS):
        self.text = [layer.unbind() for layer in text]
        _, self.batch, heads, _, width = text[0].shape
        self.layers = [layer.new_empty(self.batch, 2, heads, length, width) for layer in text]
        self.text_bias = torch.zeros_like(text_mask, dtype=text[0].dtype).masked_fill(~text_mask, -torch.inf)
        self.text_bias = self.text_bias[:, None, None]  # (B, 1, 1, T)
        self._filled = fill_up(text[0].new_zeros(self.batch, 1, heads * width), least)
        self._attended = self._filled[: self.batch].unflatten(-1, (heads, width)).transpose(1, 2)  # (B, nh, 1, hd)

    def append(self, layer: int, position: int, keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
        """Store those (B, 2, nh, 1, hd) of this position; return keys and values of all positions up to it."""
        self.layers[layer].narrow(3, position, 1).copy_(keys_and_values)
        return self.layers[layer].narrow(3, 0, position + 1).unbind(1)

    def fill_up(self, attended: Tensor) -> Tensor:
        """Outputs of attention (B, nh, 1, hd) with heads joined and rows filled up: (B', 1, D), until the next call."""
        self._attended.copy_(attended)
        return self._filled


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the text and feed-forward, each around a shortcut."""

    def __init__(self, config: ImageDecoderConfig, text_width: int):
        super().__init__()
        self.self_attention = SelfAttention(config.width, config.heads)
        self.cross_attention = CrossAttention(config.width, config.heads, text_width)
        self.feed_forward = FeedForward(config.width, config.glu_width)

    def forward(self, x: Tensor, text_states: Tensor, mask: Tensor) -> Tensor:
        """All positions at once: (B, N, D) -> (B, N, D)."""
        x = x + self.self_attention(x, is_causal=True)
        x = x + self.cross_attention(x, *self.cross_attention.project_text(text_states), mask)
        return x + self.feed_forward(x)

    def step(self, x: Tensor, cache: KVCache, layer: int, position: int) -> Tensor:
        """One position, given the cache: (B', 1, D) -> (B', 1, D); only the first B rows are attended to."""
        qkv = self.self_attention.project_rows(x, cache.batch)
        k, v = cache.append(layer, position, qkv[:, 1:])
        x = x + self.self_attention.join(cache.fill_up(F.scaled_dot_product_attention(qkv[:, 0], k, v)))
        q = self.cross_attention.project(x)[: cache.batch]
        attended = F.scaled_dot_product_attention(q, *cache.text[layer], attn_mask=cache.text_bias)
        x = x + self.cross_attention.join(cache.fill_up(attended))
        return x + self.feed_forward(x)


class ImageDecoder(nn.Module):
    """Autoregressive Transformer over image tokens in raster order; position 0 reads BOS, position t reads w_t."""

    def __init__(self, config: ImageDecoderConfig):
        super().__init__()
        self.bos, self.length, self.text_width = config.bos, config.length, config.text_width
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.embed_positions = nn.Embedding(config.length, config.width)
        self.norm_embedding = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(DecoderLayer(config, config.text_width) for _ in range(config.layers))
        self.norm_final = nn.LayerNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.apply(init_weights)

    @property
    def least_rows(self) -> int:
        """Fewest rows of a product that have the bits which more have."""
        return getattr(self.lm_head, "least_rows", ROWS)

    def forward(
        self,
        image_tokens: Int[Tensor, "B N"],
        text_states: Float[Tensor, "B T D"],
        text_mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B N V"]:
        """Logits of every token given those before it (teacher forcing)."""
        start = torch.full_like(image_tokens[:, :1], self.bos)
        x = self.embed_tokens(torch.cat([start, image_tokens[:, :-1]], 1))
        x = self.norm_embedding(x + self.embed_positions.weight[: x.shape[1]])
        for layer in self.layers:
            x = layer(x, text_states, text_mask[:, None, None])
        return self.lm_head(self.norm_final(x))

    def prefill(self, text_states: Float[Tensor, "P T D"], text_mask: Bool[Tensor, "P T"], copies: int = 1) -> KVCache:
        """Compute what every step needs of the prompts, once each, and allocate a cache of B = P x copies rows."""
        text = [layer.cross_attention.project_text(text_states) for layer in self.layers]
        rows = [part.repeat_interleave(copies, 1) for part in text]
        return KVCache(rows, text_mask.repeat_interleave(copies, 0), self.length, self.least_rows)

    def step(self, image_tokens: Int[Tensor, " B"], position: int, cache: KVCache) -> Float[Tensor, "B V"]:
        """Logits at `position`, whose input is `image_tokens`: BOS at 0, then the token of position - 1."""
        x = self.embed_tokens(image_tokens) + self.embed_positions.weight[position]
        x = fill_up(self.norm_embedding(x)[:, None], self.least_rows)
        for i, layer in enumerate(self.layers):
            x = layer.step(x, cache, i, position)
        return self.lm_head(self.norm_final(x[:, 0]))[: cache.batch]
