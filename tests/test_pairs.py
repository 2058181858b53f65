"""Captions say what is in the picture, renders show what was asked, and held-out drawings stay held out."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from dalle_demo.data import pairs
from dalle_demo.data.pairs import BACKGROUNDS, HELD_OUT, Pairs, all_captions, caption, load, render, split, unseen_words

ROW = {
    "hex": "1F34E",
    "emoji": "🍎",
    "name": "red apple",
    "keywords": ["fruit", "ripe"],
    "name_zh": "红苹果",
    "keywords_zh": ["水果", "熟"],
    "group": "food-drink",
    "style": "flat",
    "style_zh": "扁平",
}


def captions(row: dict, count: int = 3000) -> list[str]:
    return [caption(row, np.random.default_rng(i)) for i in range(count)]


def is_chinese(text: str) -> bool:
    return re.search("[\u4e00-\u9fff]", text) is not None


def test_no_background_is_told_where_there_is_none():
    assert not [text for text in captions(ROW) if "background" in text or "背景" in text]


def test_languages_do_not_mix():
    texts = captions(ROW)
    share = sum(map(is_chinese, texts)) / len(texts)
    assert 0.28 < share < 0.38
    for text in texts:
        rest = text.replace("🍎", "")
        assert not (is_chinese(rest) and re.search("[a-z]", rest)), text


@pytest.mark.parametrize("chinese", [False, True])
def test_all_that_is_known_is_said_sometimes(chinese):
    texts = [text for text in captions(ROW) if is_chinese(text) == chinese]
    words = (
        ("红苹果", "水果", "熟", "扁平风格的") if chinese else ("red apple", "fruit", "ripe", "flat", "a picture of a ")
    )
    for word in words:
        assert any(word in text for text in texts), word
    assert any("🍎" in text for text in texts)
    assert sum(words[0] in text for text in texts) > 0.7 * len(texts)  # the name is the rule


def test_style_words_come_in_a_share_of_captions():
    share = sum("flat" in text or "扁平" in text for text in captions(ROW)) / 3000
    assert 0.45 < share < 0.55


def test_rows_without_chinese_or_keywords_have_captions():
    for text in captions(ROW | {"name_zh": "", "keywords_zh": [], "keywords": []}, 500):
        assert text
        assert not is_chinese(text)


def test_captions_follow_from_the_generator():
    assert captions(ROW, 50) == captions(ROW, 50)


def of_rows(rows: list[dict]) -> Pairs:
    return Pairs(np.zeros((len(rows), 4, 4, 4), np.uint8), rows, "")


HELD_OUT_LISTS = json.loads(HELD_OUT.read_text())


def test_split_follows_from_emoji_and_style_alone():
    held_out = [*HELD_OUT_LISTS["concepts"], *(key.split("/")[0] for key in HELD_OUT_LISTS["styles"])]
    codes = [*dict.fromkeys(held_out), *(f"{code:X}" for code in range(0x1F300, 0x1F400))]
    rows = [ROW | {"hex": code, "style": style} for code in codes for style in ("flat", "3d", "minimal")]
    sides = {}
    for order in (rows, rows[::-1], rows[100:], [row | {"name": "other", "group": "x"} for row in rows]):
        found = split(of_rows(order))
        assert sorted(np.concatenate(found)) == list(range(len(order)))
        for side, indices in found._asdict().items():
            for i in indices:
                key = order[i]["hex"], order[i]["style"]
                assert sides.setdefault(key, side) == side
    assert set(sides.values()) == {"training", "styles", "concepts"}


def test_a_held_out_concept_leaves_in_all_its_styles():
    rows = [ROW | {"hex": code, "style": style} for code in HELD_OUT_LISTS["concepts"] for style in ("flat", "new")]
    assert len(split(of_rows(rows)).concepts) == len(rows) > 0


def test_names_of_held_out_concepts_and_what_benchmarks_ask_for_are_not_told_in_words():
    hidden, seen = ({"hex": HELD_OUT_LISTS["concepts"][0], "name": "dodo"}, {"hex": "1F300", "name": "cyclone"})
    words = unseen_words(of_rows([ROW | hidden, ROW | seen]))
    assert {"dodo", "pooch", "motorcar"} <= words
    assert "cyclone" not in words


def test_a_concept_held_out_in_one_style_is_seen_in_others():
    codes = {key.split("/")[0] for key in HELD_OUT_LISTS["styles"]}
    assert codes
    assert not codes & set(HELD_OUT_LISTS["concepts"])
    rows = [ROW | {"hex": code, "style": "never heard of"} for code in codes]
    assert len(split(of_rows(rows)).training) == len(rows)


def test_all_captions_are_distinct_and_mean_english():
    rows = [ROW, ROW | {"style": "3d"}, ROW | {"name": "green apple", "name_zh": "", "emoji": "🍏"}]
    texts = dict(all_captions(of_rows(rows)))
    assert len(texts) == len(all_captions(of_rows(rows)))
    assert "" not in texts
    assert texts["red apple"] == "red apple"
    assert texts["flat red apple"] == "flat red apple"
    assert texts["3d red apple"] == "3d red apple"
    assert texts["红苹果"] == texts["🍎"] == texts["熟"] == "red apple"
    assert texts["红色背景"] == texts["on a red background"] == "on a red background"
    assert not any(is_chinese(meaning) for meaning in texts.values())


def picture() -> torch.Tensor:
    """Opaque 10x20 box of pure red at the left, mid-height, on nothing; (1, 40, 40, 4)."""
    box = torch.zeros(1, 40, 40, 4, dtype=torch.uint8)
    box[:, 10:30, 5:15] = torch.tensor([255, 0, 0, 255], dtype=torch.uint8)
    return box


def draw(colour=(255, 255, 255), zoom=1.0, shift=(0.0, 0.0), flip=None, pictures=None) -> torch.Tensor:
    """Levels 0..255 (3, H, W) of one render."""
    flips = None if flip is None else torch.tensor([flip])
    pixels = render(
        picture() if pictures is None else pictures,
        torch.tensor([colour], dtype=torch.float32),
        torch.tensor([zoom]),
        torch.tensor([shift]),
        flips,
    )
    assert -1.001 <= pixels.min() <= pixels.max() <= 1.001
    return ((pixels[0] + 1) * 127.5).round()


def red_box(levels: torch.Tensor) -> tuple[int, int, int, int]:
    """Rows and columns (first, last + 1) of what is red on white."""
    rows, columns = torch.where(levels[1] < 128)
    return rows.min().item(), rows.max().item() + 1, columns.min().item(), columns.max().item() + 1


def test_plain_render_is_the_picture_on_white():
    levels = draw()
    assert levels[:, 0, 0].tolist() == [255, 255, 255]
    assert levels[:, 20, 10].tolist() == [255, 0, 0]
    assert red_box(levels) == (10, 30, 5, 15)


@pytest.mark.parametrize("colour", [(0, 0, 0), (229, 57, 53), (66, 165, 245)])
def test_background_colour_fills_what_is_transparent(colour):
    levels = draw(colour)
    assert levels[:, 0, 0].tolist() == list(colour)
    assert levels[:, 20, 10].tolist() == [255, 0, 0]
    assert levels[:, 39, 39].tolist() == list(colour)


def test_half_transparent_ink_mixes_and_hidden_colours_do_not_show():
    ghost = picture()
    ghost[..., :3] = torch.tensor([0, 255, 0], dtype=torch.uint8)  # green everywhere, under alpha 0 too
    ghost[:, 10:30, 5:15, 3] = 128
    levels = draw((255, 255, 255), pictures=ghost)
    assert levels[:, 0, 0].tolist() == [255, 255, 255]
    assert levels[:, 20, 10].tolist() == [127, 255, 127]
    shrunk = draw((255, 255, 255), zoom=0.83, pictures=ghost)
    assert (shrunk[1] == 255).all()  # no fringe: green on white never loses green


def test_zoom_and_shift():
    top, bottom, left, right = red_box(draw(zoom=0.5))
    assert (top, bottom) == (15, 25)
    assert left + right in range(29, 32)  # 12.5 to 17.5, whichever way the halves are rounded
    assert red_box(draw(shift=(0.5, 0.0))) == (10, 30, 15, 25)  # half of half a side, to the right
    assert red_box(draw(shift=(0.0, 0.25))) == (15, 35, 5, 15)  # and down


def test_flip_mirrors_left_and_right():
    assert red_box(draw(flip=True)) == (10, 30, 25, 35)
    assert red_box(draw(flip=False)) == (10, 30, 5, 15)


def test_each_picture_of_a_batch_has_its_own_settings():
    pixels = render(
        picture().expand(3, -1, -1, -1),
        torch.tensor([[255.0, 255, 255], [0, 0, 0], [255, 255, 255]]),
        torch.tensor([1.0, 1.0, 0.5]),
        torch.tensor([[0.0, 0], [0, 0], [0, 0.25]]),
        torch.tensor([False, True, False]),
    )
    alone = [draw(), draw((0, 0, 0), flip=True), draw(zoom=0.5, shift=(0.0, 0.25))]
    for one, other in zip(pixels, alone, strict=True):
        assert torch.equal(((one + 1) * 127.5).round(), other)


def test_loads_the_folder(data_folder):
    data = load(data_folder)
    assert len(data) == 24
    assert data.pictures(np.array([3, 1])).shape == (2, 128, 128, 4)
    assert torch.equal(data.pictures(np.array([1]))[0], torch.tensor(np.array(data.images[1])))


@pytest.mark.parametrize("name", ["images.npy", "pairs.jsonl"])
def test_missing_files_are_named_with_the_remedy(data_folder, tmp_path, name):
    folder = shutil.copytree(data_folder, tmp_path / "set")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name}.*data emoji --out"):
        load(folder)


def test_files_that_do_not_belong_together(data_folder, tmp_path):
    folder = shutil.copytree(data_folder, tmp_path / "set")
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    (folder / "pairs.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match="23 captions"):
        load(folder)
    np.save(folder / "images.npy", np.zeros((23, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="do not belong together"):
        load(folder)


def test_every_background_has_a_chinese_name_of_its_own():
    names = [chinese for chinese, _ in BACKGROUNDS.values()]
    colours = [colour for _, colour in BACKGROUNDS.values()]
    assert len(set(names)) == len(set(colours)) == len(BACKGROUNDS)
    assert pairs.WHITE not in colours
    json.dumps(BACKGROUNDS)
