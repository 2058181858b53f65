"""prompt -> text_ids (T,): byte-level BPE, so that any language and any emoji has ids.

DALL-E Mini's vocabularies are read as min-dalle reads them: emoji by their English names, everything else beyond ASCII
dropped. What a prompt loses on the way is told.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import emoji
import tokenizers
import torch
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

START, PAD, END, UNKNOWN = range(4)  # the order of BART, which DALL-E Mini's vocabularies share
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
WORD = re.compile(r"[^\W\d_]+")  # letters of any script
CONTROLS = {"\t": "tab", "\n": "line break", "\r": "line break"}


@dataclass(frozen=True)
class Encoded:
    """Ids of one prompt, and what had to be left out of it."""

    ids: list[int]
    dropped: int  # tokens beyond the model's length
    unread: str = ""  # characters that have no ids, each once

    @property
    def empty(self) -> bool:
        """Whether only the frame is left."""
        return len(self.ids) <= 2


class Tokenizer:
    """A `tokenizers` model that frames each prompt as <s> ... </s>."""

    def __init__(self, backend: tokenizers.Tokenizer, ascii_only: bool = False):
        backend.encode_special_tokens = True  # a typed "</s>" is five characters, not the end
        self._backend = backend
        self._ascii_only = ascii_only

    @classmethod
    def from_file(cls, path: Path, ascii_only: bool = False) -> "Tokenizer":
        """Read tokenizer.json; `ascii_only` as in TextEncoderConfig."""
        return cls(tokenizers.Tokenizer.from_file(str(path)), ascii_only)

    @classmethod
    def from_bpe(cls, vocab: Path, merges: Path, rows: int | None = None) -> "Tokenizer":
        """Read the vocab.json and merges.txt of a DALL-E Mini; raises ValueError.

        Args:
            vocab: subword -> id.
            merges: a header, then one pair a line, the first to be merged first.
            rows: of the model's token table; subwords beyond it have no id.
        """
        lines = merges.read_text(encoding="utf-8").split("\n")[1:]
        return cls.from_merges(json.loads(vocab.read_text(encoding="utf-8")), [line for line in lines if line], rows)

    @classmethod
    def from_merges(cls, vocab: Mapping[str, int], merges: Iterable[str], rows: int | None = None) -> "Tokenizer":
        """As `from_bpe`, of what the files say."""
        if [vocab.get(token) for token in SPECIAL_TOKENS] != list(range(len(SPECIAL_TOKENS))):
            raise ValueError(f"the vocabulary does not number {' '.join(SPECIAL_TOKENS)} from 0")
        known = {token: number for token, number in vocab.items() if rows is None or number < rows}
        pairs = [tuple(line.split()) for line in merges]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError("a line of merges does not hold two subwords")
        pairs = [(a, b) for a, b in pairs if a in known and b in known and a + b in known]
        backend = tokenizers.Tokenizer(models.BPE(known, pairs, unk_token=SPECIAL_TOKENS[UNKNOWN]))
        backend.pre_tokenizer = pre_tokenizers.Metaspace("Ġ", prepend_scheme="always", split=True)
        backend.decoder = decoders.Metaspace("Ġ", prepend_scheme="always")
        backend.post_processor = _frame()
        return cls(backend, ascii_only=True)

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
        backend.post_processor = _frame()
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
        text, lost = spell_out(prompt) if self._ascii_only else (clean(prompt), "")
        ids = self._backend.encode(text).ids
        if UNKNOWN in ids:
            lost += "".join(c for c in text if c != " " and self._backend.token_to_id(c) is None)
        dropped = max(0, len(ids) - length)
        return Encoded([*ids[: length - 1], END] if dropped else ids, dropped, "".join(dict.fromkeys(lost)))

    def unknown_words(self, text: str) -> list[str]:
        """Words of a text, each once, that are read in single bytes or letters for the most part, or not at all."""
        return [word for word in dict.fromkeys(WORD.findall(text)) if self._is_unknown(word)]

    def _is_unknown(self, word: str) -> bool:
        if self._ascii_only and spell_out(word)[1]:
            return True
        tokens = self._backend.encode(word, add_special_tokens=False).tokens
        pieces = [piece for token in tokens if (piece := token.removeprefix("Ġ"))]
        single = [piece for piece in pieces if len(piece) == 1]
        # In byte-level vocabularies a character beyond ASCII stands for a byte of one that has no token of its own
        return (len(word) > 1 and 2 * len(single) > len(pieces)) or any(not piece.isascii() for piece in single)

    def batch(self, prompts: Iterable[str], length: int) -> Int[Tensor, "B T"]:
        """Ids of several prompts, padded to the longest of them."""
        rows = [self.encode(prompt, length).ids for prompt in prompts]
        longest = max(map(len, rows))
        return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


def _frame() -> processors.TemplateProcessing:
    """<s> ... </s>."""
    start, end = SPECIAL_TOKENS[START], SPECIAL_TOKENS[END]
    return processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=[(start, START), (end, END)])


def spell_out(prompt: str) -> tuple[str, str]:
    """Text as min-dalle 0.4.11 reads it, and the characters that it does not: beyond ASCII, once emoji have names.

    Words are parted by single spaces; tabs and line breaks stay in theirs. Selectors and joiners of emoji, which show
    nothing, are not told of.
    """
    named = emoji.demojize(prompt, delimiters=("", ""))
    text = _ascii(named.lower())
    invisible = (c in "\ufe0e\ufe0f" or unicodedata.category(c) in ("Cf", "Cs") for c in named)
    lost = [c for c, hidden in zip(named, invisible, strict=True) if not hidden and not _ascii(c.lower())]
    return " ".join(word for word in text.split(" ") if word), "".join(lost)


def _ascii(text: str) -> str:
    return text.encode("ascii", errors="ignore").decode()


def clean(prompt: str) -> str:
    """Spaces for control characters and runs of white space; emoji presentation selectors dropped."""
    visible = (" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in prompt if c != "\ufe0f")
    return " ".join("".join(visible).split())


def in_other_scripts(prompt: str) -> bool:
    """Whether there are letters in it that are neither Latin nor Chinese."""
    letters = (c for c in unicodedata.normalize("NFKC", prompt) if unicodedata.category(c) in ("Lu", "Ll", "Lt", "Lo"))
    return not all(unicodedata.name(c, "").startswith(("LATIN ", "CJK ")) for c in letters)


def spelled(characters: str, at_most: int = 12) -> str:
    """Characters for a message: as they are if they show anything, by name otherwise."""
    shown = [c if c.isprintable() and not c.isspace() else CONTROLS.get(c, _name(c)) for c in characters[:at_most]]
    return " ".join(shown) + (" …" if len(characters) > at_most else "")


def _name(character: str) -> str:
    return unicodedata.name(character, "").lower() or f"U+{ord(character):04X}"
