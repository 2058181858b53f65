"""Any prompt of any script has ids, framed and padded as the encoder expects."""

import pytest
import torch

from dalle_demo.text import END, PAD, START, UNKNOWN, Tokenizer, clean
from dalle_demo.weights import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(nano_folder) -> Tokenizer:
    return load_tokenizer(nano_folder)


@pytest.mark.parametrize(
    "prompt", ["a red apple", "一只小狗", "🍕", "👨‍👩‍👧", "кот", "ﷺ", "a\x00b", "\U0010ffff", "नमस्ते"]
)
def test_every_prompt_has_ids(tokenizer, prompt):
    encoded = tokenizer.encode(prompt, 1000)
    assert encoded.dropped == 0
    assert encoded.ids[0] == START
    assert encoded.ids[-1] == END
    assert len(encoded.ids) > 2
    assert not {START, PAD, END, UNKNOWN} & set(encoded.ids[1:-1])
    assert max(encoded.ids) < tokenizer.vocab_size


def test_learns_merges(tokenizer):
    assert len(tokenizer.encode("a red apple", 100).ids) < len(" a red apple") + 2


def test_different_prompts_have_different_ids(tokenizer):
    prompts = ["a red apple", "a green apple", "一只小狗", "一只小猫", "🍕", "🍔", ""]
    assert len({tuple(tokenizer.encode(prompt, 100).ids) for prompt in prompts}) == len(prompts)


def test_empty_prompt_is_only_the_frame(tokenizer):
    assert tokenizer.encode("", 16).ids == [START, END]


@pytest.mark.parametrize("length", [3, 8, 16])
def test_cuts_the_end_and_keeps_the_frame(tokenizer, length):
    whole = tokenizer.encode("zyxwvutsrq " * 5, 10_000)
    cut = tokenizer.encode("zyxwvutsrq " * 5, length)
    assert cut.ids == [*whole.ids[: length - 1], END]
    assert cut.dropped == len(whole.ids) - length


def test_exact_fit_is_not_cut(tokenizer):
    whole = tokenizer.encode("a red apple", 100).ids
    fitting = tokenizer.encode("a red apple", len(whole))
    assert fitting.ids == whole
    assert fitting.dropped == 0


def test_batch_pads_to_the_longest(tokenizer):
    prompts = ["🍕", "a red apple", "a house, flat style"]
    ids = tokenizer.batch(prompts, 32)
    rows = [tokenizer.encode(prompt, 32).ids for prompt in prompts]
    assert ids.dtype == torch.long
    assert ids.shape == (3, max(map(len, rows)))
    for row, expected in zip(ids.tolist(), rows, strict=True):
        assert row == expected + [PAD] * (ids.shape[1] - len(expected))


@pytest.mark.parametrize("prompt", ["<pad>", "a <s> b", "</s>", "<unk><pad>"])
def test_prompts_cannot_spell_special_tokens(tokenizer, prompt):
    assert not {START, PAD, END, UNKNOWN} & set(tokenizer.encode(prompt, 100).ids[1:-1])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("  a\n\tred   apple ", "a red apple"),
        ("a\x00b\x7fc\x1b[31m", "a b c [31m"),
        ("❤️", "❤"),
        ("a\ud800b", "a b"),
        ("a\u3000b\u00a0c", "a b c"),
        ("👨‍👩‍👧", "👨‍👩‍👧"),  # joiners stay: they make one drawing of three
        ("一只小狗", "一只小狗"),
    ],
    ids=ascii,
)
def test_clean(prompt, expected):
    assert clean(prompt) == expected


def test_spelling_variants_that_mean_the_same(tokenizer):
    for one, other in [("a red apple", "A Red\nApple"), ("❤", "❤️"), ("ＡＢＣ", "abc"), ("café", "cafe\u0301")]:
        assert tokenizer.encode(one, 100) == tokenizer.encode(other, 100)


def test_save_and_read_again(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again.vocab_size == tokenizer.vocab_size
    for prompt in ("a red apple", "一只小狗 🍕", ""):
        assert again.encode(prompt, 50) == tokenizer.encode(prompt, 50)


def test_training_is_repeatable():
    texts = ["a red apple", "a red pear", "two red apples"]
    ids = {tuple(Tokenizer.train(texts, 280).encode("a red pear", 50).ids) for _ in range(2)}
    assert len(ids) == 1
