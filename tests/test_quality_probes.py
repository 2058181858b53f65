"""What the probes say of pictures made of real icons, of which it is known what they show."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dalle_demo.config import GenerateParams
from dalle_demo.data import pairs
from dalle_demo.data.emoji import build
from dalle_demo.data.pairs import BACKGROUNDS, WHITE
from dalle_demo.evaluation import probes
from dalle_demo.evaluation.probes import Box

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from prompts import FILE
from scenes import HUE_OF, PLACES, SIDES, compose, recolour

NPM = Path(__file__).parent / "fixtures" / "npm"
GROUNDS = {"white": WHITE} | {name: rgb for name, (_, rgb) in BACKGROUNDS.items()}


@pytest.fixture(scope="module")
def icons(tmp_path_factory) -> dict[str, np.ndarray]:
    """Cut-outs of real icons by name, in the style `flat`."""
    folder = tmp_path_factory.mktemp("emoji")
    build(folder, NPM, workers=1)
    data = pairs.load(folder)
    return {row["name"]: data.images[i] for i, row in enumerate(data.rows) if row["style"] == "flat"}


@pytest.fixture(scope="module")
def apple(icons) -> np.ndarray:
    return icons["red apple"]


@pytest.mark.parametrize("name", GROUNDS)
def test_background_of_every_colour(apple, name):
    assert probes.background(compose([apple], PLACES[1], GROUNDS[name])) == name


def test_background_survives_noise(apple):
    picture = compose([apple], PLACES[1], GROUNDS["blue"]).astype(float)
    noisy = picture + np.random.default_rng(0).normal(0, 8, picture.shape)
    assert probes.background(noisy.clip(0, 255).astype(np.uint8)) == "blue"


def test_border_of_two_colours_is_no_background():
    picture = np.full((128, 128, 3), 255, np.uint8)
    picture[:, 64:] = GROUNDS["red"]
    assert probes.background(picture) is None


def test_ground_without_a_name_is_no_background():
    assert probes.background(np.full((128, 128, 3), (0, 255, 0), np.uint8)) is None


@pytest.mark.parametrize("colour", HUE_OF)
@pytest.mark.parametrize("ground", ["white", "green"])
def test_object_colour_after_a_turn_of_hues(apple, colour, ground):
    picture = compose([recolour(apple, colour)], PLACES[1], GROUNDS[ground])
    if colour != ground:
        assert probes.object_colour(picture) == colour


def test_the_red_apple_is_red_and_gray_has_no_colour(apple):
    assert probes.object_colour(compose([apple], PLACES[1])) == "red"
    gray = apple.copy()
    gray[:, :, :3] = apple[:, :, :3].mean(2, keepdims=True)
    assert probes.object_colour(compose([gray], PLACES[1])) is None


@pytest.mark.parametrize("number", PLACES)
@pytest.mark.parametrize("ground", ["white", "black", "pink"])
def test_count(apple, number, ground):
    assert probes.count(compose([apple] * number, PLACES[number], GROUNDS[ground])) == number


def test_count_of_an_empty_picture_is_zero():
    assert probes.count(np.full((128, 128, 3), 200, np.uint8)) == 0
    assert probes.object_colour(np.full((128, 128, 3), 200, np.uint8)) is None


def test_parts_inside_and_crumbs_are_no_objects():
    picture = np.full((128, 128, 3), 255, np.uint8)
    picture[20:100, 20:100] = 0
    picture[26:94, 26:94] = 255
    picture[40:60, 40:60] = 0  # within the frame
    picture[110:114, 110:114] = 0
    assert probes.count(picture) == 1


@pytest.mark.parametrize("side", SIDES)
def test_places_and_crops(icons, side):
    apple, heart = icons["red apple"], recolour(icons["red heart"], "blue")
    picture = compose([apple, heart], SIDES[side])
    boxes = probes.objects(picture)
    assert len(boxes) == 2
    colours = [probes.object_colour(probes.crop(picture, box)) for box in boxes]
    assert sorted(colours) == ["blue", "red"]
    red, blue = sorted(boxes, key=lambda box: colours[boxes.index(box)] == "blue")
    assert probes.relation(red, blue) == side


def test_crop_is_a_square_on_the_same_ground_without_the_neighbour(apple):
    picture = compose([apple, recolour(apple, "blue")], PLACES[2], GROUNDS["yellow"])
    for box in probes.objects(picture):
        crop = probes.crop(picture, box)
        assert crop.shape == picture.shape
        assert probes.count(crop) == 1
        assert probes.background(crop) == "yellow"


def test_relation_takes_the_longer_way():
    middle = Box(0.4, 0.4, 0.6, 0.6, 10)
    assert probes.relation(Box(0.3, 0.0, 0.5, 0.2, 10), middle) == "left"
    assert probes.relation(Box(0.0, 0.3, 0.2, 0.5, 10), middle) == "above"


@pytest.mark.parametrize("side", [64, 256])
def test_other_sizes_of_pictures(apple, side):
    picture = compose([apple, apple], PLACES[2], GROUNDS["blue"])
    picture = picture[::2, ::2] if side == 64 else picture.repeat(2, 0).repeat(2, 1)
    assert (probes.count(picture), probes.background(picture), probes.object_colour(picture)) == (2, "blue", "red")


def test_every_committed_prompt_can_be_asked_and_answered():
    groups = json.loads(FILE.read_text(encoding="utf-8"))
    for group in groups.values():
        for asked in group["prompts"]:
            GenerateParams(asked["prompt"], n=group["pictures"])
            assert asked.get("chinese", False) == (not asked["prompt"].isascii() and "ñ" not in asked["prompt"]), asked
            assert asked.get("background", "red") in probes.GROUNDS
            assert asked.get("colour", "red") in probes.HUES
            assert asked.get("count", 1) in PLACES
            assert asked.get("relation", "left") in SIDES
