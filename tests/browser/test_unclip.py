"""The DALL-E 2 tab, clicked through in Chromium with the tiny model: pictures follow the sliders, and each other."""

import os
import time
from pathlib import Path

import pytest
from PIL import Image

from dalle_demo import weights
from dalle_demo.config import UNCLIP_PRESETS
from dalle_demo.images import read_request
from dalle_demo.shelf import UNCLIP, Shelf
from dalle_demo.ui import frames

try:
    from playwright.sync_api import expect
except ImportError:
    expect = None  # the chromium fixture then skips, or fails

SLOW = 90_000  # milliseconds; a busy machine
PICTURES = "#stage .wall img[src]"


class SlowEngine:
    """The real engine, except that pictures take as long as a test says."""

    def __init__(self, engine):
        self.engine, self.seconds, self.drawn = engine, 0.0, 0
        self.drawing = self.at_once = 0

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def draw(self, embeddings, noise):
        self.drawn, self.drawing = self.drawn + 1, self.drawing + 1
        self.at_once = max(self.at_once, self.drawing)
        time.sleep(self.seconds)
        self.drawing -= 1
        return self.engine.draw(embeddings, noise)


@pytest.fixture(scope="module")
def slow(unclip) -> SlowEngine:
    return SlowEngine(unclip)


@pytest.fixture(scope="module")
def studio(nano_folder, engine, slow, shipped, serve, tmp_path_factory) -> str:
    """Address of a page with both models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DALLE_DEMO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        patch.setattr(weights, "SHIPPED", shipped)
        yield serve(Shelf(str(nano_folder), True, lambda preset, **options: engine, lambda preset: slow))


def test_a_page_of_dalle_2_weights_opens_with_them(
    visit, nano_folder, engine, slow, shipped, serve, monkeypatch, tmp_path
):
    monkeypatch.setenv("DALLE_DEMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "SHIPPED", shipped)
    slow.seconds = 0.0
    shelf = Shelf(str(nano_folder), True, lambda preset, **options: engine, lambda preset: slow, UNCLIP)
    page = visit(serve(shelf))
    expect(page.locator(PICTURES)).to_have_count(4, timeout=SLOW)
    expect(page.locator("#footer")).to_contain_text(f"Model {slow.name}")
    page.get_by_role("tab", name="Generate").click()
    expect(page.locator("#footer")).to_contain_text(f"Model {engine.name}")


@pytest.fixture
def tab(visit, studio, slow):
    """Page on which the tab is open and has drawn."""
    slow.seconds = 0.0
    page = visit(studio)
    open_tab(page)
    return page


def open_tab(page) -> None:
    page.get_by_role("tab", name="DALL·E 2").click()
    expect(page.locator(PICTURES)).to_have_count(4, timeout=SLOW)


def choose(page, section: str) -> None:
    page.locator(f"#unclip_section input[value={section}]").click()


def line(page):
    return page.locator("#stage p")


def sources(page) -> list[str]:
    return page.locator(PICTURES).evaluate_all("images => images.map(image => image.src)")


def settle(page, slow) -> None:
    """Wait until nothing is drawn any more."""
    count = -1
    while count != slow.drawn:
        count = slow.drawn
        page.wait_for_timeout(1000 * slow.seconds + 500)
        page.wait_for_selector("#stage .wall[aria-busy=false]")


def drag(page, name: str, moves: int) -> float:
    """Drag a slider from its left end to somewhere, in so many moves; its value then."""
    slider = page.locator(f"#unclip_{name} input[type=range]")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 9, y)
    page.mouse.down()
    for move in range(moves):
        page.mouse.move(box["x"] + 9 + (move * 7) % 150, y)
    page.mouse.up()
    return float(slider.input_value())


def test_the_last_frame_belongs_to_the_last_value(tab, unclip, slow):
    slow.seconds = 0.15
    settle(tab, slow)
    before, slow.at_once = slow.drawn, 0
    value = drag(tab, "truncation", 40)
    settle(tab, slow)
    assert slow.drawn - before < 20, "values that have moved on meanwhile are not drawn"
    assert slow.at_once == 1, "a frame that is asked for before the last one has come could overtake it"
    params = unclip.params("a smiling cat", n=4, seed=1, truncation=value)
    (update,) = unclip.generate(params)
    assert sources(tab) == [frames.data_url(frames.jpeg(picture), "jpeg") for picture in update.images]


def test_frames_leave_no_files(tab, slow):
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    files = sorted(folder.rglob("*"))
    drag(tab, "truncation", 10)
    settle(tab, slow)
    assert sorted(folder.rglob("*")) == files


def test_pictures_follow_the_words_as_they_are_typed(tab, slow):
    tab.fill("#unclip_prompt textarea", "一只小狗")
    settle(tab, slow)
    first = sources(tab)
    tab.locator("#unclip_mix button").click()
    tab.fill("#unclip_second textarea", "a house")
    settle(tab, slow)
    assert sources(tab) != first
    tab.locator("#unclip_share input[type=number]").fill("0")
    tab.keyboard.press("Tab")
    settle(tab, slow)
    assert sources(tab) == first


def test_enter_keeps_the_noise_unless_told_otherwise(tab):
    seed, prompt = tab.locator("#unclip_seed input"), tab.locator("#unclip_prompt textarea")
    prompt.press("Enter")
    expect(seed).to_have_value("1")
    tab.locator("#unclip_keep input").uncheck()
    prompt.press("Enter")
    expect(seed).not_to_have_value("1")
    rolled = seed.input_value()
    tab.click("#unclip_dice")
    expect(seed).not_to_have_value(rolled)


def test_from_a_picture_to_variations_edits_blends_and_a_walk(tab, tmp_path):
    tab.locator("#stage .pick").nth(2).click()
    expect(tab.locator(PICTURES)).to_have_count(12, timeout=SLOW)
    expect(tab.locator("#unclip_section input[value=variations]")).to_be_checked()
    expect(tab.locator("#unclip_source img")).to_be_visible()
    choose(tab, "edit")
    expect(line(tab)).to_contain_text("Type what the picture should become")
    tab.fill("#unclip_edit_to textarea", "a house")
    expect(tab.locator(PICTURES)).to_have_count(2, timeout=SLOW)
    choose(tab, "blend")
    expect(line(tab)).to_contain_text("Choose the second picture")
    tab.locator("#stage .pick").nth(1).click()
    expect(tab.locator(PICTURES)).to_have_count(3, timeout=SLOW)
    expect(tab.locator("#unclip_section input[value=blend]")).to_be_checked()
    tab.locator("#unclip_other button[aria-label='Remove Image']").click()
    expect(line(tab)).to_contain_text("Choose the second picture", timeout=SLOW)
    picture = tmp_path / "sea.png"
    Image.new("RGB", (50, 40), "teal").save(picture)
    tab.set_input_files("#unclip_other input[type=file]", str(picture))
    expect(line(tab)).to_contain_text("drew the blend", timeout=SLOW)
    choose(tab, "walk")
    expect(tab.locator(PICTURES)).to_have_count(1, timeout=SLOW)
    with Image.open(save(tab, 0, tmp_path)) as walk:
        assert (walk.format, walk.n_frames) == ("WEBP", 32)


def save(page, index: int, folder: Path) -> Path:
    with page.expect_download() as event:
        page.locator("#stage .save").nth(index).click()
    path = folder / event.value.suggested_filename
    event.value.save_as(path)
    return path


def test_a_picture_is_saved_with_its_settings(tab, unclip, tmp_path):
    path = save(tab, 3, tmp_path)
    assert path.name == "a-smiling-cat-4.png"
    request, origin = read_request(path)
    assert (request["prompt"], request["seed"], origin["model"]) == ("a smiling cat", 4, "unclip-nano")


def test_a_picture_that_was_taken_away_is_gone(tab, tmp_path):
    """One that was clicked here, and one that was uploaded in its place."""
    picture = tmp_path / "sea.png"
    Image.new("RGB", (50, 40), "teal").save(picture)
    tab.locator("#stage .pick").first.click()
    for _ in range(2):
        expect(line(tab)).to_contain_text("12 variations", timeout=SLOW)
        tab.locator("#unclip_source button[aria-label='Remove Image']").click()
        expect(line(tab)).to_contain_text("Choose a picture", timeout=SLOW)
        tab.set_input_files("#unclip_source input[type=file]", str(picture))


def test_without_a_seed_what_is_saved_is_what_is_shown(tab, slow, tmp_path):
    tab.fill("#unclip_seed input", "")
    tab.fill("#unclip_prompt textarea", "a house")
    settle(tab, slow)
    shown = sources(tab)[2]
    with Image.open(save(tab, 2, tmp_path)) as saved:
        assert frames.data_url(frames.jpeg(saved), "jpeg") == shown


def test_settings_go_back_to_those_that_the_model_is_served_with(tab):
    slider = tab.locator("#unclip_truncation")
    slider.locator("input[type=number]").fill("0.2")
    slider.locator("button.reset-button").click()
    expect(slider.locator("input[type=number]")).to_have_value(
        str(UNCLIP_PRESETS["unclip-nano"].defaults["truncation"])
    )


def test_what_is_wrong_is_said_beside_the_pictures(tab, tmp_path):
    tab.fill("#unclip_prompt textarea", "")
    expect(line(tab)).to_contain_text("Prompt: type what to draw", timeout=SLOW)
    choose(tab, "variations")
    expect(line(tab)).to_contain_text("Choose a picture", timeout=SLOW)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    tab.set_input_files("#unclip_source input[type=file]", str(broken))
    expect(tab.locator("body")).to_contain_text("Not used: the picture is damaged", timeout=SLOW)


def test_a_server_that_does_not_answer_is_named(tab):
    tab.route("**/component_server/", lambda route: route.abort())
    tab.fill("#unclip_prompt textarea", "a house")
    expect(line(tab)).to_contain_text("The server does not answer", timeout=SLOW)
    tab.unroute("**/component_server/")
    tab.fill("#unclip_prompt textarea", "a house!")
    expect(line(tab)).to_contain_text("4 pictures", timeout=SLOW)


def test_over_from_the_generate_tab(visit, studio):
    page = visit(studio)
    page.fill("#prompt textarea", "a red apple")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("drew 4 pictures", timeout=SLOW)
    page.locator("#gallery .thumbnail-lg").first.click()
    page.click("#vary")
    expect(page.locator(PICTURES)).to_have_count(12, timeout=SLOW)


def test_on_a_phone_in_chinese(visit, studio):
    page = visit(studio, width=390, height=844, locale="zh-CN")
    open_tab(page)
    expect(line(page)).to_contain_text("4 张图片", timeout=SLOW)
    expect(page.locator("#unclip_prompt textarea")).to_have_value("一只微笑的猫")
    for section in ("words", "variations", "blend", "edit", "walk"):
        choose(page, section)
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, section
    choose(page, "words")
    page.locator("#unclip_guidance_scale").scroll_into_view_if_needed()
    wall, slider = (page.locator(name).bounding_box() for name in ("#stage .wall", "#unclip_guidance_scale"))
    assert wall["y"] >= 0, "the pictures stay in sight"
    assert wall["y"] + wall["height"] <= slider["y"]
    covered = """({x, y, width, height}) => [...Array(40).keys()].some((i) =>
      !document.elementFromPoint(x + width / 2, y + 4 + i * (height - 8) / 40)?.closest("#unclip_result"))"""
    for _ in range(12):
        page.mouse.wheel(0, 45)
        page.wait_for_timeout(60)
        if (wall := page.locator("#stage .wall").bounding_box())["y"] > -1:
            assert not page.evaluate(covered, wall), "nothing is painted over the pictures"


def test_without_weights_there_is_one_sentence(visit, nano_folder, engine, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    monkeypatch.setenv("DALLE_DEMO_CACHE", str(tmp_path))
    page = visit(serve(Shelf(str(nano_folder), True, lambda preset, **options: engine)))
    page.get_by_role("tab", name="DALL·E 2").click()
    expect(page.locator("#unclip_missing")).to_contain_text("are not on this computer")
    expect(page.locator("#unclip_section")).to_have_count(0)


def test_a_page_of_weights_for_this_tab_opens_with_it(visit, nano_folder, engine, slow, shipped, serve):
    slow.seconds = 0.0
    load = lambda preset, **options: engine  # noqa: E731
    folder = str(shipped / "unclip-nano")
    page = visit(serve(Shelf(str(nano_folder), True, load, lambda preset: slow, unclip=folder)))
    expect(page.locator(PICTURES)).to_have_count(4, timeout=SLOW)
    page.get_by_role("tab", name="Generate").click()
    page.fill("#prompt textarea", "a red apple")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("drew 4 pictures", timeout=SLOW)


def test_many_visitors_get_their_own_pictures(visit, studio, slow, unclip):
    slow.seconds = 0.05
    pages = [visit(studio) for _ in range(2)]
    for page, prompt in zip(pages, ("a red apple", "a house"), strict=True):
        open_tab(page)
        page.fill("#unclip_prompt textarea", prompt)
    settle(pages[0], slow)
    for page, prompt in zip(pages, ("a red apple", "a house"), strict=True):
        (update,) = unclip.generate(unclip.params(prompt, n=4, seed=1))
        assert sources(page)[0] == frames.data_url(frames.jpeg(update.images[0]), "jpeg")
