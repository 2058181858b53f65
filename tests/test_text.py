"""Any prompt of any script has ids, framed and padded as the encoder expects; DALL-E Mini's are those of min-dalle."""

import json
from pathlib import Path

import min_dalle_reference as reference
import pytest
import torch

from dalle_demo.checkpoints import load_tokenizer
from dalle_demo.text import END, PAD, START, UNKNOWN, Tokenizer, clean, in_other_scripts, spelled


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


def test_words_that_are_read_in_bytes_are_told(tokenizer):
    caption = "a red apple, apple; zorkq the 小狗 and кот, 42 x 鼹鼠 don't"
    assert tokenizer.unknown_words(caption) == ["zorkq", "the", "小狗", "кот", "鼹鼠"]


def test_training_is_repeatable():
    texts = ["a red apple", "a red pear", "two red apples"]
    ids = {tuple(Tokenizer.train(texts, 280).encode("a red pear", 50).ids) for _ in range(2)}
    assert len(ids) == 1


# ---------------------------------------------------------------- the vocabularies of DALL-E Mini


@pytest.fixture(scope="module")
def min_dalle(tmp_path_factory) -> Path:
    return reference.folder(tmp_path_factory)


@pytest.fixture(scope="module", params=["as converted", "read again"])
def mini(request, min_dalle, tmp_path_factory) -> Tokenizer:
    tokenizer = Tokenizer.from_bpe(min_dalle / "vocab.json", min_dalle / "merges.txt")
    if request.param == "as converted":
        return tokenizer
    path = tmp_path_factory.mktemp("mini") / "tokenizer.json"
    tokenizer.save(path)
    return Tokenizer.from_file(path, ascii_only=True)


def test_ids_are_those_of_min_dalle(mini, min_dalle):
    prompts, theirs = (json.loads((min_dalle / f"{name}.json").read_text()) for name in ("prompts", "ids"))
    assert len(set(prompts)) >= 600
    for prompt, ids in zip(prompts, theirs, strict=True):
        encoded = mini.encode(prompt, 10_000)
        assert encoded.ids == ids, prompt
        assert encoded.dropped == 0
        assert (UNKNOWN in ids) <= bool(encoded.unread), prompt


def test_merges_and_unknown_characters_are_among_the_prompts(min_dalle):
    """So that the test above means something."""
    ids = json.loads((min_dalle / "ids.json").read_text())
    vocab = json.loads((min_dalle / "vocab.json").read_text())
    used = set().union(*ids)
    assert sum(len(token) > 3 and number in used for token, number in vocab.items()) > 100
    assert UNKNOWN in used


def test_long_prompt_keeps_its_end_mark(mini, min_dalle):
    """Where min-dalle cuts it off, and shows a stray word to the unconditional row."""
    prompt = "the cat on the wall " * 30
    whole = mini.encode(prompt, 10_000).ids
    encoded = mini.encode(prompt, 64)
    assert encoded.ids == [*whole[:63], END]
    assert encoded.dropped == len(whole) - 64 > 0


@pytest.mark.parametrize(
    ("prompt", "unread"),
    [
        ("a red apple", ""),
        ("a café, a café", "é"),
        ("一只小狗", "一只小狗"),
        ("a 🍕 and a ❤️", ""),
        ("tab\there~", "\t~"),
        ("a\u00a0b", "\u00a0"),
        ("👨‍👩‍👧 🇩🇪 1️⃣", ""),
        ("<s>", ""),
    ],
    ids=ascii,
)
def test_tells_what_was_not_read(mini, prompt, unread):
    assert sorted(mini.encode(prompt, 64).unread) == sorted(unread)


def test_words_that_are_not_read_at_all_are_told_too(mini):
    assert "小狗" in mini.unknown_words("a cat and a 小狗")


def test_prompt_without_english_is_empty(mini):
    assert mini.encode("一只小狗", 64).empty
    assert not mini.encode("一只小狗 x", 64).empty


def test_the_known_ids_of_a_notebook():
    """dalle-mini's own ids of this sentence; only the merges that it needs, numbered as published."""
    words = ["darth", "vader", "at", "a", "playground", "with", "young", "lings", "in", "shibuya", "."]
    numbers = [19109, 22981, 202, 58, 11071, 208, 2466, 8233, 91, 43085, 12]
    vocab, merges = dict(zip(["<s>", "<pad>", "</s>", "<unk>"], range(4), strict=True)), []
    for word, number in zip(words, numbers, strict=True):
        whole = word if word in ("lings", ".") else "Ġ" + word
        for end in range(1, len(whole)):
            pair = whole[:end], whole[end]
            merges.append(" ".join(pair))
            for part in pair:
                vocab.setdefault(part, 50_000 + len(vocab))
        vocab[whole] = number
    tokenizer = Tokenizer.from_merges(vocab, dict.fromkeys(merges))
    ids = tokenizer.encode("Darth Vader at a playground with younglings in Shibuya.", 64).ids
    assert ids == [0, 19109, 22981, 202, 58, 11071, 208, 2466, 8233, 91, 43085, 12, 2]


def test_subwords_beyond_the_table_have_no_ids(min_dalle):
    """A published vocabulary has one more entry than its model; its id would be out of range."""
    files = min_dalle / "vocab.json", min_dalle / "merges.txt"
    prompts = json.loads((min_dalle / "prompts.json").read_text())
    for rows in (500, 699):
        small = Tokenizer.from_bpe(*files, rows)
        assert max(max(small.encode(prompt, 64).ids) for prompt in prompts) < rows


def test_vocabulary_in_another_order_is_refused(min_dalle):
    vocab = json.loads((min_dalle / "vocab.json").read_text())
    with pytest.raises(ValueError, match="<s> <pad> </s> <unk>"):
        Tokenizer.from_merges(vocab | {"<pad>": 2, "</s>": 1}, [])


@pytest.mark.parametrize(
    ("prompt", "other"),
    [
        ("a red apple", False),
        ("Ein Käse, ½ ﬂat, ＡＢＣ", False),
        ("一只小狗，臺灣 々", False),
        ("🍕 3 ❤️ 42 % !?", False),
        ("кот", True),
        ("a cat and a кот", True),
        ("تفاحة", True),
        ("ねこ", True),
        ("カ 猫", True),
        ("사과", True),
        ("μήλο", True),
    ],
    ids=ascii,
)
def test_knows_letters_that_are_neither_latin_nor_chinese(prompt, other):
    assert in_other_scripts(prompt) is other


def test_characters_are_spelled_for_a_message():
    assert spelled("é一\t\u00a0\x00") == "é 一 tab no-break space U+0000"
    assert spelled("abc", at_most=2) == "a b …"
