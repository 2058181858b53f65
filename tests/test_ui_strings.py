"""Both languages say the same things, in units that people use."""

from string import Formatter

import pytest

from dalle_demo.config import GenerateParams
from dalle_demo.ui.strings import SENTENCES, duration, footer, label, megabytes, translations


def names(sentence: str) -> set[str]:
    """Values that a sentence wants."""
    return {name.split(".")[0] for _, name, _, _ in Formatter().parse(sentence) if name}


@pytest.mark.parametrize("key", SENTENCES["en"])
def test_every_sentence_is_there_in_chinese_with_the_same_values(key):
    assert names(SENTENCES["zh"][key]) == names(SENTENCES["en"][key])


def test_no_chinese_sentence_is_left_over():
    assert SENTENCES["zh"].keys() == SENTENCES["en"].keys()


def test_every_label_has_a_chinese_one():
    found = translations()
    assert found["en"].keys() == found["zh"].keys()
    same = {key for key in found["en"] if found["en"][key] == found["zh"][key]}
    assert same == {"top_k", "top_p"}


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.25, "0.2 s"), (1.94, "1.9 s"), (6.2, "6 s"), (99, "99 s"), (100, "2 min"), (900, "15 min")]
)
def test_durations(seconds, said):
    assert duration(seconds, "en") == said


@pytest.mark.parametrize(("size", "said"), [(0, "0 MB"), (31_000_000, "31 MB"), (1_062_506_988, "1.1 GB")])
def test_sizes(size, said):
    assert megabytes(size) == said


def test_footer_says_how_a_model_runs_once_that_is_known():
    assert footer("mini", None, "en").startswith("Model mini. ")
    assert footer("mini", ("float16", 1), "en").startswith("Model mini, float16, 1 processor thread. ")
    assert footer("mini", ("float16", 2), "zh-CN,en").startswith("模型 mini，float16，2 个处理器线程。")


def test_settings_are_called_as_the_page_calls_them():
    assert label("prompt", "en") == "Prompt"
    assert label("n", "en") == GenerateParams.__dataclass_fields__["n"].metadata["label"]
    assert label("n", "zh") == "张数"
