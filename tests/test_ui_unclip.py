"""The DALL-E 2 tab without a browser: what each section draws, what its files say, and what it refuses in words."""

import base64
import contextlib
import gc
import io
import weakref
from types import SimpleNamespace

import gradio as gr
import pytest
import torch
from PIL import Image

from dalle_demo import mixing, weights
from dalle_demo.data import emoji, uploads
from dalle_demo.engines import UnclipEngine
from dalle_demo.images import describe, read_request
from dalle_demo.shelf import UNCLIP, Shelf
from dalle_demo.ui import frames
from dalle_demo.ui.frames import SECTIONS, SLIDERS, MissingError, Sources, Values
from dalle_demo.ui.generate import GenerateTab
from dalle_demo.ui.strings import STYLES, translations
from dalle_demo.ui.unclip import UnclipTab

ENGLISH = SimpleNamespace(session_hash="page", headers={})
CHINESE = SimpleNamespace(session_hash="page", headers={"accept-language": "zh-CN"})
NOTHING = (gr.skip(),) * 5  # that a click changes
PAGE = {name: value for name, (*_, value) in SLIDERS.items()} | {
    "section": "words",
    "prompt": "a red apple",
    "style": "",
    "truncation": 1.0,
    "guidance_scale": 2.0,
    "second": "",
    "source": "",
    "other": "",
    "change_from": "",
    "change_to": "",
    "edit_from": "",
    "edit_to": "",
    "seed": 3,
}


@pytest.fixture
def sources(unclip) -> Sources:
    return Sources()


@pytest.fixture
def cat(unclip, sources) -> str:
    """Name of a picture to go on from."""
    seen = unclip.invert(Image.new("RGB", (40, 30), "orange"))
    return sources.keep("page", frames.Source(seen, "a cat"))


@pytest.fixture
def scene(unclip, sources):
    """Function that makes the scene of a page with these changes."""
    return lambda **changes: frames.scene_of(unclip, Values(PAGE | changes, sources))


@pytest.fixture(scope="module")
def tab(nano_folder, engine, unclip, shipped):
    """The tab of a page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "SHIPPED", shipped)
        return make_tab(Shelf(str(nano_folder), True, lambda preset: engine, lambda preset: unclip))


def make_tab(shelf: Shelf) -> UnclipTab:
    t = gr.I18n(**translations())
    with gr.Blocks() as page:
        tabs = gr.Tabs()
        return UnclipTab(shelf, t, GenerateTab(shelf, t, page), tabs)


def same(one, other) -> bool:
    return torch.equal(one.embedding, other.embedding) and torch.equal(one.noise, other.noise)


def near(one, other) -> bool:
    pairs = ((one.embedding, other.embedding), (one.noise, other.noise))
    return all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def picture_of(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))


def draw(tab, request=ENGLISH, **changes) -> dict:
    functions = dict(zip(("draw", "save"), tab._server_functions(), strict=True))
    return functions["draw"](PAGE | changes, request)


def test_words_alone_are_what_the_engine_draws(unclip, scene):
    for truncation in (1.0, 0.35):
        params = unclip.params("a red apple", n=4, seed=3, guidance_scale=2.0, truncation=truncation)
        (update,) = unclip.generate(params)
        assert scene(truncation=truncation).draw(unclip) == update.images


def test_each_slider_of_the_words_moves_the_pictures(scene):
    moved = {
        "truncation": scene(truncation=0.5),
        "guidance_scale": scene(guidance_scale=3.0),
        "share": scene(second="一只小狗", share=0.3),
        "change_strength": scene(change_to="a house", change_strength=0.3),
        "style": scene(style="flat"),
        "seed": scene(seed=4),
    }
    first = scene().seen[1]
    for name, other in moved.items():
        assert not same(first, other.seen[1]), name
    assert not same(moved["share"].seen[1], scene(second="一只小狗", share=0.6).seen[1])
    assert not same(moved["change_strength"].seen[1], scene(change_to="a house", change_strength=0.6).seen[1])


def test_ends_of_a_blend_of_prompts_are_the_prompts(scene):
    for share, prompt in ((0, "a red apple"), (1, "a house")):
        for one, other in zip(scene(second="a house", share=share).seen, scene(prompt=prompt).seen, strict=True):
            assert near(one, other)


def test_a_style_is_asked_for_as_in_the_captions():
    assert Values({"style": "flat"}).styled("a house") == "a house, flat style"
    assert Values({"style": "flat"}).styled("一只小狗") == "扁平风格的一只小狗"
    assert {source.style: source.style_zh for source in emoji.SOURCES} == STYLES


def test_a_style_is_that_of_all_words(scene):
    """A text diff from a styled prompt to a plain one would take the style away."""
    styled = {"style": "flat", "change_to": "a house"}
    for one, other in (
        (scene(style="flat", second="a house", share=1), scene(style="flat", prompt="a house")),
        (scene(**styled), scene(prompt="a red apple, flat style", change_to="a house, flat style")),
        (scene(**styled, change_from="a cat"), scene(**styled, change_from="a red apple")),
    ):
        alike = near(one.seen[0], other.seen[0])
        assert alike == ("a cat" not in str(one.requests))


def test_an_edit_without_a_beginning_goes_to_what_the_words_show(unclip, scene, sources, cat):
    goal = unclip.imagine(unclip.params("a house", n=1, seed=0)).embedding[0]
    for strength in (0.2, 0.5):
        _, after = scene(section="edit", source=cat, edit_to="a house", edit_strength=strength).seen
        expected = mixing.slerp(sources.find(cat).seen.embedding, goal, strength)
        assert torch.allclose(after.embedding, expected, atol=1e-5)
    _, other = scene(section="edit", source=cat, edit_from="a cat", edit_to="a house", edit_strength=0.5).seen
    assert not near(after, other)


def test_variations_are_of_the_seed(scene, cat):
    one, other = (scene(section="variations", source=cat, seed=seed) for seed in (3, 4))
    assert same(one.seen[1], other.seen[0])
    assert not same(one.seen[0], other.seen[0])


def test_variations_go_further_row_by_row(scene, sources, cat):
    shown, source = scene(section="variations", source=cat, distance=0.9), sources.find(cat).seen
    rows = [shown.seen[start : start + frames.GRID] for start in range(0, len(shown.seen), frames.GRID)]
    assert len(rows) == frames.ROWS
    for name in ("noise", "embedding"):
        away = torch.tensor([[(getattr(one, name) - getattr(source, name)).norm() for one in row] for row in rows])
        assert (away.diff(dim=0) > 0).all()
    for one in scene(section="variations", source=cat, distance=0).seen:
        assert near(one, source)


def test_a_blend_lies_between_its_two_pictures(unclip, scene, sources, cat):
    other = sources.keep("page", frames.Source(unclip.invert(Image.new("RGB", (20, 20), "blue")), "the sea"))
    first, between, second = scene(section="blend", source=cat, other=other, blend=0.5).seen
    assert near(first, sources.find(cat).seen)
    assert near(second, sources.find(other).seen)
    assert not near(between, first)
    assert not near(between, second)


@pytest.mark.parametrize("start", ["a cat", ""])
def test_an_edit_keeps_the_noise_and_shows_the_picture_beside(scene, sources, cat, start):
    before, after = scene(section="edit", source=cat, edit_from=start, edit_to="a house").seen
    assert near(before, sources.find(cat).seen)
    assert torch.equal(after.noise, before.noise)
    assert not torch.allclose(after.embedding, before.embedding, atol=1e-3)


def test_a_walk_is_an_animation(tab):
    answer = draw(tab, section="walk", frames=8)
    assert picture_of(answer["pictures"][0]["url"]).n_frames == 8
    assert answer["file"].endswith(".webp")
    assert "drew 8 frames in " in answer["line"]
    assert len(answer["pictures"]) == 1


def test_a_walk_is_imagined_once(tab, unclip, monkeypatch):
    monkeypatch.setattr(unclip, "imagine", lambda params: pytest.fail("the walk's first picture, once more"))
    draw(tab, section="walk", frames=8, prompt="a walk that nothing remembers")


def test_a_saved_picture_says_how_it_was_made(unclip, scene, tmp_path):
    shown, path = scene(), tmp_path / "apple.png"
    path.write_bytes(frames.png(unclip, shown, 2))
    request, origin = read_request(path)
    (update,) = unclip.generate(unclip.params(**request))
    assert update.images[0].tobytes() == Image.open(path).tobytes()
    assert origin["weights"] == unclip.origin["weights"]
    assert frames.file_name(shown.requests[2], "png") == "a-red-apple-5.png"


def test_files_of_one_page_have_names_of_their_own(scene, sources, cat):
    other = {"section": "variations", "source": cat, "other": cat, "edit_to": "a house"}
    names = [
        frames.file_name(request, "png")
        for section in ("variations", "blend", "edit")
        for request in scene(**other | {"section": section}).requests
    ]
    assert len(set(names)) == len(names)
    assert "a-cat-variation-3-0-33.png" in names
    (request, *_), origin = scene(**other | {"section": "blend"}).requests, {"steps": 1, "sampler": "s", "model": "m"}
    told = describe(request, origin, (8, 8))
    assert "Seed" not in told  # of a picture that has none
    assert "CFG" not in told


@pytest.mark.parametrize("section", SECTIONS)
def test_any_picture_can_be_saved_and_gone_on_from(tab, unclip, section):
    source = tab.sources.keep("page", frames.Source(unclip.invert(Image.new("RGB", (40, 30), "orange")), "猫.png"))
    values = PAGE | {"section": section, "source": source, "other": source, "edit_to": "a house", "frames": 8}
    _, save = tab._server_functions()
    shown = frames.scene_of(unclip, Values(values, tab.sources))
    last = len(shown.seen) - 1
    answer = save(values | {"index": last}, ENGLISH)
    assert answer["name"].endswith(".png")
    event = SimpleNamespace(_data=values | {"index": last})
    next_section, picture, _, kept, _ = tab.take(ENGLISH, event, section, source, source)
    assert next_section == ("variations" if section in ("words", "walk") else section)
    assert same(tab.sources.find(kept).seen, shown.seen[last])
    assert picture.tobytes() == picture_of(answer["url"]).tobytes()


@pytest.mark.parametrize(
    ("section", "source", "other", "place"),
    [
        ("blend", "", "", "source"),
        ("blend", "kept", "", "other"),
        ("blend", "", "kept", "source"),
        ("blend", "kept", "kept", "source"),
        ("edit", "", "", "source"),
        ("edit", "kept", "", "source"),
    ],
)
def test_a_clicked_picture_goes_where_one_lacks(tab, section, source, other, place):
    """Whatever the section was that it was drawn in."""
    stays, *taken = tab.take(ENGLISH, SimpleNamespace(_data=PAGE | {"index": 2}), section, source, other)
    assert stays == section
    pictures, names = (dict(zip(("source", "other"), pair, strict=True)) for pair in (taken[:2], taken[2:]))
    assert [name for name in names if names[name] != gr.skip()] == [place]
    assert pictures[place].size == (32, 32)
    assert tab.sources.find(names[place]).name == "a red apple"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": " "}, "Not drawn. Prompt: type what to draw"),
        ({"prompt": "x" * 2000}, "Not drawn. Prompt: has 2,000 characters"),
        ({"prompt": 7}, "Not drawn. Prompt: type what to draw"),
        ({"truncation": "much"}, "Not drawn. Variety: must be a number from 0.0 to 1.0, not 'much'"),
        ({"seed": -1}, "Not drawn. Seed: must be from 0"),
        ({"second": "…", "share": 0.5}, "Not drawn. Second prompt: has no letter"),
        ({"second": "a house", "share": 7}, "Not drawn. From the first prompt to the second: must be from 0.0 to 1.0"),
        ({"change_to": "a house", "change_strength": None}, "Not drawn. Strength of the change: must be a number"),
        ({"style": "baroque"}, "Not drawn. Style: must be one of shaded"),
        ({"section": "dream"}, "Not drawn. What would you like to do?: must be one of words"),
        ({"section": "variations"}, "Choose a picture"),
        ({"section": "variations", "source": "guessed"}, "This picture is not kept any more"),
        ({"section": "variations", "source": ["guessed"]}, "This picture is not kept any more"),
        ({"section": "blend"}, "Choose two pictures"),
        ({"section": "blend", "other": "guessed"}, "Choose a picture"),
        ({"section": "walk", "frames": 10**9}, "Not drawn. Frames: must be from 8 to 64"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_sentence(tab, changes, said):
    assert draw(tab, **changes)["said"].startswith(said)


def test_words_that_are_not_read_are_named(tab):
    for changes in ({"prompt": "a red apple " * 30}, {"second": "a red apple " * 30}, {"change_to": "apples " * 30}):
        assert "left out the end of the prompt" in draw(tab, **changes)["line"]


def test_words_in_letters_that_it_was_not_taught_are_told(tab, unclip):
    source = tab.sources.keep("page", frames.Source(unclip.invert(Image.new("RGB", (8, 8))), "dot"))
    for changes in ({"prompt": "кот"}, {"second": "кот"}, {"change_from": "кот", "change_to": "a house"}):
        assert draw(tab, **changes)["line"].endswith("it may not know words in other letters.")
    edit = {"section": "edit", "source": source, "edit_from": "кот", "edit_to": "a house"}
    assert draw(tab, CHINESE, **edit)["line"].endswith("可能不认识其他文字的词。")
    assert "other letters" not in draw(tab, prompt="猫, a café 🍕")["line"]


def test_an_edit_asks_for_its_words_and_in_chinese(tab, unclip):
    source = tab.sources.keep("page", frames.Source(unclip.invert(Image.new("RGB", (8, 8))), "dot"))
    assert draw(tab, section="blend", source=source)["said"].startswith("Choose the second picture")
    assert draw(tab, section="edit", source=source)["said"].startswith("Type what the picture should become")
    assert draw(tab, CHINESE, section="edit", source=source)["said"].startswith("请写下")
    assert "画了 4 张图片" in draw(tab, CHINESE)["line"]


def test_values_of_another_shape_are_refused(tab):
    functions = tab._server_functions()
    for function in functions:
        for given in (None, [], "words", {}, {"section": {}}, PAGE | {"prompt": {"a": 1}}):
            assert "said" in function(given, ENGLISH)
    for index in (None, -1, 4, 1.5, "0"):
        assert "said" in functions[1](PAGE | {"index": index}, ENGLISH)
        assert tab.take(ENGLISH, SimpleNamespace(_data=PAGE | {"index": index}), "words", "", "") == NOTHING
    assert tab.take(ENGLISH, SimpleNamespace(_data=None), "words", "", "") == NOTHING


def found(sources: Sources, names: list[str]) -> list:
    """What is kept under these names, where it still is."""
    kept = []
    for name in names:
        with contextlib.suppress(MissingError):
            kept.append(sources.find(name))
    return kept


def test_each_visitor_has_so_many_pictures_whatever_the_others_upload(sources, monkeypatch):
    monkeypatch.setattr(frames, "KEPT_EACH", 2)
    first = sources.keep("quiet", "first")
    names = [sources.keep("greedy", number) for number in range(5)]
    assert found(sources, [first, *names]) == ["first", 3, 4]
    sources.find(names[3])
    sources.keep("greedy", 5)
    assert found(sources, names) == [3], "one that is still shown stays longer than one that is not"


def test_all_visitors_together_have_so_many_pictures(sources, monkeypatch):
    monkeypatch.setattr(frames, "KEPT", 3)
    names = [sources.keep(visitor, visitor) for visitor in ("one", "two", "two", "three", "four")]
    assert found(sources, names) == ["two", "three", "four"], "of who has most, then of who came first"
    assert len(set(names)) == 5
    assert min(map(len, names)) >= 22, "128 bits, which nobody guesses"


def test_an_upload_that_cannot_be_used_is_refused_in_a_sentence(tab, tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(gr, "Warning", warned.append)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    path, outside = tmp_path / "uploads" / "broken.png", tmp_path / "secret.png"
    path.parent.mkdir()
    path.write_bytes(b"no picture")
    Image.new("RGB", (60, 40)).save(outside)
    assert tab.see(ENGLISH, {"path": str(path)}, UNCLIP) == (None, "")
    assert warned == ["Not used: the picture is damaged, or no picture at all; save it again as PNG or JPEG."]
    for other in (str(outside), f"{path.parent}/../secret.png", None, 7):
        assert tab.see(ENGLISH, {"path": other}, UNCLIP) == (None, "")
    assert tab.see(ENGLISH, "words", UNCLIP) == (None, "")
    Image.new("RGBA", (60, 40), (200, 20, 20, 128)).save(path)
    _, kept = tab.see(ENGLISH, {"path": str(path)}, UNCLIP)
    assert tab.sources.find(kept).name == "broken"
    assert tab.see(ENGLISH, None, UNCLIP)[1] == ""
    assert tab.see(ENGLISH, {"path": str(path)}, "guessed")[1] == ""
    assert warned[-1] == "This model is no longer here; choose another."


@pytest.mark.parametrize(
    ("size", "colour", "english", "chinese"),
    [
        ((60, 40), (0, 0, 0, 0), "Not used: the picture is empty", "没有采用：图片是空的，全部透明。"),
        ((8, 40), "red", "Not used: the picture is tiny (8x40 pixels, at least 32", "没有采用：图片太小（8x40 像素"),
        ((1200, 1000), "red", "Not used: the picture has more than 1 million", "没有采用：图片超过 1 百万像素"),
        (None, None, "Not used: the picture is damaged, or no picture", "没有采用：图片已损坏"),
    ],
)
def test_why_an_upload_cannot_be_used_is_said_in_both_languages(
    tab, tmp_path, monkeypatch, size, colour, english, chinese
):
    warned, path = [], tmp_path / "uploads" / "picture.png"
    monkeypatch.setattr(gr, "Warning", warned.append)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(path.parent))
    monkeypatch.setattr(uploads, "MAX_PIXELS", 10**6)
    path.parent.mkdir()
    Image.new("RGBA", size, colour).save(path) if size else path.write_bytes(b"no picture")
    for request in (ENGLISH, CHINESE):
        tab.see(request, {"path": str(path)}, UNCLIP)
    path.unlink()
    tab.see(CHINESE, {"path": str(path)}, UNCLIP)
    assert [sentence.startswith(start) for sentence, start in zip(warned, (english, chinese), strict=False)] == [
        True
    ] * 2
    assert warned[2:] == ["这张图片已经不在了，请重新选择。"]


def test_without_weights_the_tab_says_so(nano_folder, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    monkeypatch.setenv("DALLE_DEMO_CACHE", str(tmp_path))
    tab = make_tab(Shelf(str(nano_folder), True, lambda preset: engine))
    assert not hasattr(tab, "stage")


def test_weights_that_cannot_be_loaded_are_named(tab, monkeypatch):
    def fail(preset):
        raise ValueError("model.safetensors is truncated")

    monkeypatch.setattr(tab.shelf, "_unclips", {})
    monkeypatch.setattr(tab.shelf, "_load_unclip", fail)
    assert "model.safetensors is truncated" in draw(tab)["said"]


def test_a_tuned_model_is_drawn_with_by_its_name_and_not_by_a_guess(tab, shipped, unclip, monkeypatch):
    monkeypatch.setattr(tab.shelf, "_load_unclip", UnclipEngine.load)
    tab.shelf.adopt_unclip("secret@1", "Mine", shipped / "unclip-nano")
    assert draw(tab, model="secret@1")["line"].startswith("Mine drew 4 pictures")
    assert draw(tab, model=UNCLIP)["line"].startswith("unclip-nano drew 4 pictures")
    assert tab.footer(ENGLISH, "secret@1").startswith("Model Mine, float32")
    tab.shelf.drop("secret@1")
    for name in ("secret@1", "guessed", 7):
        told = draw(tab, model=name)
        assert told["wrong"]
        assert told["said"] == "This model is no longer here; choose another."


def test_what_is_remembered_of_an_engine_does_not_keep_it(shipped):
    engine = UnclipEngine.load(str(shipped / "unclip-nano"), 1)
    seen = frames._imagined(engine, engine.params("a red apple", n=2, seed=1))
    assert frames._imagined(engine, engine.params("a red apple", n=2, seed=1)) is seen
    alive = weakref.ref(engine)
    del engine
    gc.collect()
    assert alive() is None
