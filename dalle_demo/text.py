"""prompt -> text_ids (T,): byte-level BPE, so that any language and any emoji has ids."""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

START, PAD, END, UNKNOWN = range(4)  # the order of BART, which DALL-E Mini's vocabularies share
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]


@dataclass(frozen=True)
class Encoded:
    """Ids of one prompt, and what had to be left out of it."""

    ids: list[int]
    dropped: int  # tokens beyond the model's length


class Tokenizer:
    """A `tokenizers` model that frames each prompt as <s> ... </s>."""

    def __init__(self, backend: tokenizers.Tokenizer):
        backend.encode_special_tokens = True  # a typed "</s>" is five characters, not the end
        self._backend = backend

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Read tokenizer.json."""
        return cls(tokenizers.Tokenizer.from_file(str(path)))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn merges from `texts`; the 256 bytes are always in the vocabulary."""
        backend = tokenizers.Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[UNKNOWN]))
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        start, end = SPECIAL_TOKENS[START], SPECIAL_TOKENS[END]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}", special_tokens=[(start, START), (end, END)]
        )
        return cls(backend)

    def save(self, path: Path) -> None:
        """Write tokenizer.json, whole or not at all."""
        partial = path.with_name(path.name + ".part")
        self._backend.save(str(partial))
        partial.replace(path)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._backend.get_vocab_size()

    def encode(self, prompt: str, length: int) -> Encoded:
        """Ids of a prompt, at most `length` of them; what is cut is the end of the text, never </s>."""
        ids = self._backend.encode(clean(prompt)).ids
        dropped = max(0, len(ids) - length)
        return Encoded([*ids[: length - 1], END] if dropped else ids, dropped)

    def batch(self, prompts: Iterable[str], length: int) -> Int[Tensor, "B T"]:
        """Ids of several prompts, padded to the longest of them."""
        rows = [self.encode(prompt, length).ids for prompt in prompts]
        longest = max(map(len, rows))
        return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


def clean(prompt: str) -> str:
    """Spaces for control characters and runs of white space; emoji presentation selectors dropped."""
    visible = (" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in prompt if c != "\ufe0f")
    return " ".join("".join(visible).split())
