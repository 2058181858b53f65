"""Both languages say the same things, in units that people use."""

import ast
import importlib
from pathlib import Path
from string import Formatter
from typing import get_args

import pytest

import dalle_demo
from dalle_demo.config import GenerateParams, ParamError
from dalle_demo.hub import HubError, Reason
from dalle_demo.shelf import ShelfError
from dalle_demo.training.watch import NOTICES
from dalle_demo.turns import LeftOut
from dalle_demo.ui.generate import _summary
from dalle_demo.ui.models import reason
from dalle_demo.ui.strings import REASONS, SENTENCES, duration, footer, label, megabytes, say, translations, why

PACKAGE = Path(dalle_demo.__file__).parent


def names(sentence: str) -> set[str]:
    """Values that a sentence wants."""
    return {name.split(".")[0] for _, name, _, _ in Formatter().parse(sentence) if name}


@pytest.mark.parametrize("key", SENTENCES["en"])
def test_every_sentence_is_there_in_chinese_with_the_same_values(key):
    assert names(SENTENCES["zh"][key]) == names(SENTENCES["en"][key])


def test_no_chinese_sentence_is_left_over():
    assert SENTENCES["zh"].keys() == SENTENCES["en"].keys()


def sentences_of_param_errors() -> list[str]:
    """Those that the program's modules raise, but for the ones that are passed on."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ParamError":
                sentence = node.args[1]
                if isinstance(sentence, ast.Name):
                    found.append(getattr(importlib.import_module(module), sentence.id))
                elif not isinstance(sentence, ast.Attribute):
                    found.append(ast.literal_eval(sentence))  # an f-string, which cannot be translated, has none
    return found


def test_every_reason_against_a_setting_is_there_in_chinese_with_the_same_values():
    sentences = sentences_of_param_errors()
    assert len(sentences) > 10
    assert set(sentences) == set(REASONS)
    for sentence, chinese in REASONS.items():
        assert names(sentence) == names(chinese)


def test_a_setting_out_of_range_is_refused_in_the_visitors_language():
    with pytest.raises(ParamError) as caught:
        GenerateParams("a cat", top_p=3)
    assert str(caught.value) == "top_p: must be from 0.05 to 1.0, not 3"
    assert why(caught.value, "en") == "must be from 0.05 to 1.0, not 3"
    assert why(caught.value, "zh-CN") == "必须在 0.05 到 1.0 之间，不能是 3"


def test_every_label_has_a_chinese_one():
    found = translations()
    assert found["en"].keys() == found["zh"].keys()
    same = {key for key in found["en"] if found["en"][key] == found["zh"][key]}
    assert same == {"top_k", "top_p", "tab_unclip"}


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        *[(0.25, "0.2 s"), (1.94, "1.9 s"), (6.2, "6 s"), (99, "99 s")],
        *[(100, "2 min"), (900, "15 min"), (7100, "118 min"), (18000, "5.0 hours")],
    ],
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


def test_what_a_model_left_out_is_said_in_the_language_of_the_visitor():
    notice = LeftOut("unread_and_cut", "é", 80, 64)
    assert say(notice.key, "en", **vars(notice)) == str(notice)
    assert "é" in str(notice)
    chinese = say(notice.key, "zh-CN", **vars(notice))
    assert chinese.startswith("这个模型")
    for value in ("é", "80", "64"):
        assert value in chinese


def test_the_summary_of_a_run_says_it_too(engine):
    params = engine.params("zyxwvut " * 20, seed=1)
    assert "left out the end" in _summary(engine, params, 2.0, "en")
    assert "略去了描述的末尾" in _summary(engine, params, 2.0, "zh-CN")
    assert _summary(engine, engine.params("кот", seed=1), 2.0, "zh-CN").endswith("可能不认识其他文字的词。")
    one = engine.params("a red apple", n=1, seed=1)
    assert _summary(engine, one, 2.0, "en") == "tiny drew 1 picture in 2.0 s, seed 1."


def test_the_summary_counts_candidates_as_drawn(engine):
    params = engine.params("a red apple", n=2, seed=1, candidates=8)
    assert _summary(engine, params, 2.0, "en").startswith("tiny drew 8 pictures in 2.0 s, 0.2 s each, seed 1.")


@pytest.mark.parametrize("key", get_args(Reason))
def test_a_failed_download_is_explained_without_the_command_line(key):
    failure = ShelfError("the same command goes on")
    failure.__cause__ = HubError("the same command goes on", key, status=403, needed=2.0, free=1.0)
    for language in ("en", "zh-CN"):
        assert "command" not in reason(failure, language)
    assert ("Download" in reason(failure, "en")) == ("下载" in reason(failure, "zh-CN"))
    failure.__cause__ = HubError("something rare")
    assert reason(failure, "zh-CN") == "the same command goes on"


def test_how_training_goes_is_said_in_the_words_of_the_trainer():
    """Which the page does not import, since that takes seconds."""
    assert {f"watch_{key}": sentence for key, sentence in NOTICES.items()}.items() <= SENTENCES["en"].items()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_does_not_say_on_what_it_computes(language):
    """That may be a graphics card."""
    subtitle = translations()[language]["subtitle"]
    assert "processor" not in subtitle
    assert "处理器" not in subtitle
