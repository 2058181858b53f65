"""A scene shows what its caption says, in both languages."""

import re

import numpy as np
import pytest

from dalle_demo.data.pairs import BACKGROUNDS, Pairs
from dalle_demo.data.scenes import COLOUR_WORDS, HUES, Item, Scenes, a, main_hue, plural, turned

SIDE = 64
THINGS = {"red apple": ("红苹果", (220, 40, 40)), "car": ("汽车", (40, 90, 220)), "zebra": ("斑马", (120, 120, 120))}


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    """Discs of one colour each, in one style."""
    y, x = np.mgrid[:SIDE, :SIDE]
    disc = (x - SIDE / 2) ** 2 + (y - SIDE / 2) ** 2 < (0.45 * SIDE) ** 2
    pictures = [np.dstack([*(np.full((SIDE, SIDE), c) for c in rgb), 255 * disc]) for _, rgb in THINGS.values()]
    rows = [{"name": name, "name_zh": zh, "style": "flat", "style_zh": "扁平"} for name, (zh, _) in THINGS.items()]
    return Scenes(Pairs(np.stack(pictures).astype(np.uint8), rows, ""), range(3))


def drawn(scenes: Scenes, index: int, count: int = 400) -> list:
    return [scenes.draw(index, np.random.default_rng(i)) for i in range(count)]


def pictures(scenes: Scenes, some: list) -> np.ndarray:
    """(B, S, S, 3) in 0..255."""
    return ((scenes.render(some).permute(0, 2, 3, 1).numpy() + 1) * 127.5).round()


def test_backgrounds_are_what_is_told(scenes):
    found = [scene for scene in drawn(scenes, 2) if "background" in scene.caption or "背景" in scene.caption]
    assert len({scene.background for scene in found}) == len(BACKGROUNDS)
    for scene, picture in zip(found, pictures(scenes, found), strict=True):
        chinese, rgb = BACKGROUNDS[scene.background]
        assert f"{chinese}背景的" in scene.caption or f"on {a(scene.background)} background" in scene.caption
        assert np.abs(picture[0, 0] - rgb).max() < 2
    assert all(scene.background is None for scene in drawn(scenes, 2) if scene not in found)


def test_colours_are_what_is_told_and_told_once(scenes):
    found = [scene for scene in drawn(scenes, 0) if scene.items[0].colour]
    assert {scene.items[0].colour for scene in found} == set(HUES)
    for scene in found:
        words = re.findall("[a-z]+", scene.caption.replace("flat style", ""))
        assert [word for word in words if word in COLOUR_WORDS] == [scene.items[0].colour]
        assert abs(main_hue(turned(scenes.pairs.images[0], scene.items[0])) - HUES[scene.items[0].colour]) % 354 < 6


def test_chinese_colours_are_told_of_names_without_a_colour(scenes):
    found = [s for s in drawn(scenes, 1, 800) if s.items[0].colour and "汽车" in s.caption]
    assert found
    for scene in found:
        assert f"{BACKGROUNDS[scene.items[0].colour][0]}的汽车" in scene.caption
    assert not [s for s in drawn(scenes, 0, 800) if s.items[0].colour and "苹果" in s.caption]


def test_a_third_of_the_captions_are_chinese(scenes):
    captions = [scene.caption for scene in drawn(scenes, 1, 900)]
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", caption)) for caption in captions)
    assert chinese / len(captions) == pytest.approx(1 / 3, abs=0.05)


def test_style_words_take_the_place_of_the_article(scenes):
    styled = [scene.caption for scene in drawn(scenes, 1, 900) if "flat" in scene.caption]
    assert any("orange car" in caption for caption in styled)
    assert not [caption for caption in styled if re.search(r"^an? .* flat style|\bflat an? |of an? an? ", caption)], (
        styled
    )


def test_grey_things_are_not_recoloured(scenes):
    assert not [scene for scene in drawn(scenes, 2) if scene.items[0].colour]
    assert 2 not in scenes.hues


@pytest.mark.parametrize(("number", "word", "characters"), [(2, "two cars", "两个汽车"), (4, "four cars", "四个汽车")])
def test_counts_are_what_is_told(scenes, number, word, characters):
    found = [scene for scene in drawn(scenes, 1) if word in scene.caption or characters in scene.caption]
    assert len(found) > 5
    for scene, picture in zip(found, pictures(scenes, found), strict=True):
        assert len(scene.items) == number
        columns = (picture[:, :, 0] < 128).any(0)  # a gap between left and right
        assert int((np.diff(columns.astype(int)) == 1).sum()) == 2
        share = (picture[:, :, 0] < 128).mean()
        assert share == pytest.approx(number * np.pi * (0.45 * scene.items[0].zoom) ** 2, rel=0.1)


@pytest.mark.parametrize(
    ("words", "axis", "first"),
    [
        (("a car to the left of ", "汽车在红苹果的左边"), 1, 0),
        (("a car to the right of ", "汽车在红苹果的右边"), 1, 1),
        (("a car above ", "汽车在红苹果的上面"), 0, 0),
        (("a car below ", "汽车在红苹果的下面"), 0, 1),
    ],
)
def test_relations_are_what_is_told(scenes, words, axis, first):
    found = [s for s in drawn(scenes, 1, 3000) if any(w in s.caption for w in words) and s.items[1].index == 0]
    assert len(found) > 5
    for picture in pictures(scenes, found):
        halves = np.split(picture, 2, axis)
        blue = [(half[:, :, 2] > half[:, :, 0] + 80).sum() for half in halves]
        assert blue[first] > 5 * blue[1 - first]


def test_sizes_are_what_is_told(scenes):
    found = {size: [s for s in drawn(scenes, 1) if size in s.caption] for size in ("small", "big")}
    ink = {size: (pictures(scenes, some)[..., 0] < 128).mean() for size, some in found.items()}
    assert ink["big"] > 4 * ink["small"] > 0


def test_scenes_follow_from_the_generator(scenes):
    assert drawn(scenes, 1, 50) == drawn(scenes, 1, 50)


def test_words_are_those_of_the_language(scenes):
    for scene in drawn(scenes, 1) + drawn(scenes, 0):
        chinese = re.search("[\u4e00-\u9fff]", scene.caption)
        assert not (chinese and re.search("[a-z]", scene.caption)), scene.caption
    assert a("orange background") == "an orange background"
    assert plural("bus", 2) == "buses"
    assert plural("shorts", 2) == "shorts"
    assert plural("cat face", 1) == "cat face"


def test_turning_keeps_what_has_no_colour():
    grey = np.dstack([np.full((8, 8, 3), 90, np.uint8), np.full((8, 8), 255, np.uint8)])
    assert np.array_equal(turned(grey, Item(0, 1.0, (0.0, 0.0), 120, "green")), grey)
