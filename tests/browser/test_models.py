"""The choice of a model, clicked through in Chromium and called through gradio_client; tiny weights stand for mini."""

import dataclasses
import re
import shutil
import threading
from pathlib import Path

import pytest
from tiny import save_tiny, tiny_config

from dalle_demo import hardware, hub, repos, shelf
from dalle_demo.config import PRESETS
from dalle_demo.engines import DalleEngine
from dalle_demo.images import read_request
from dalle_demo.shelf import Shelf

try:
    from playwright.sync_api import expect
except ImportError:
    expect = None  # the chromium fixture then skips, or fails

SLOW = 60_000  # milliseconds; a busy machine
GB = 10**9


class Studio:
    """A page without mini, and the download that `arrives` lets end."""

    def __init__(self, url: str, weights: Path, cache: Path):
        self.url, self.weights, self.cache = url, weights, cache
        self.begun = 0
        self.arrives, self.stopped = threading.Event(), threading.Event()
        self.error = None

    def pull(self, name, report, stop):
        self.begun += 1
        while not self.arrives.wait(0.05):
            report(GB // 4, GB)
            if stop.is_set():
                self.stopped.set()
                raise hub.StoppedError
        if self.error:
            raise self.error
        shutil.copytree(self.weights, self.cache / "models" / name)


@pytest.fixture(scope="session")
def mini_folder(tmp_path_factory) -> Path:
    config = dataclasses.replace(tiny_config(levels=(5, 4, 4)), defaults=PRESETS["mini"].defaults)
    return save_tiny(tmp_path_factory.mktemp("weights") / "mini", config)


@pytest.fixture
def studio(nano_folder, mini_folder, serve, tmp_path, monkeypatch) -> Studio:
    """On a machine with 8 GB of memory to give, where mini needs 2 and mega 11."""
    monkeypatch.setenv("DALLE_DEMO_CACHE", str(tmp_path))
    needs = {1024: 2 * GB, 2048: 11 * GB}
    monkeypatch.setattr(hardware, "memory_needed", lambda config: needs.get(config.text_encoder.width, 10**6))
    monkeypatch.setattr(hardware, "weight_memory", lambda config: 10**6)
    monkeypatch.setattr(hardware, "seconds_per_image", lambda config: 6.0)
    monkeypatch.setattr(shelf, "free_memory", lambda: 8 * GB)
    monkeypatch.setattr(shelf, "memory_limit", lambda: 16 * GB)
    made = Studio("", mini_folder, tmp_path)
    monkeypatch.setattr(repos, "pull", made.pull)
    made.url = serve(Shelf(str(nano_folder), load=load))
    yield made
    made.arrives.set()


def load(preset: str, threads: int = 1, form: str = "float32") -> DalleEngine:
    return DalleEngine.load(preset, threads, form)


def pick(page, name: str) -> None:
    page.locator("#model input").click()
    page.get_by_role("option").filter(has_text=re.compile(rf"\b{name}[:：]")).click()


def expect_model(page, name: str) -> None:
    expect(page.locator("#model input")).to_have_value(re.compile(f"^{name}:"))


def draw(page, name: str) -> None:
    """Press Generate and wait for the pictures of the model of that name."""
    page.fill("#prompt textarea", "a red apple")
    page.click("#go")
    expect(page.locator("#status")).to_contain_text(re.compile(rf"{name} drew \d pictures? in"), timeout=SLOW)
    expect(page.locator("#go")).to_be_visible()


def test_offer_cancel_download_draw_and_back(visit, studio):
    page = visit(studio.url)
    expect_model(page, "tiny")
    pick(page, "mini")
    offer = page.locator("#offer")
    expect(offer).to_contain_text(
        "mini is not on this computer yet: 1.1 GB download, Apache-2.0, about 6 s a picture here, "
        "needs 2.0 GB of memory. Until then, tiny draws."
    )
    expect_model(page, "tiny")
    page.click("#dismiss")
    expect(offer).to_be_hidden()
    assert studio.begun == 0

    pick(page, "mini")
    page.click("#download")
    expect(offer).to_contain_text("250 MB of 1.0 GB, 25 %")
    expect(page.locator("#download")).to_be_hidden()
    draw(page, "tiny")  # meanwhile
    expect(page.locator("#footer")).to_contain_text("Model tiny, float32")
    page.click("#cancel")
    expect(offer).to_be_hidden()
    assert studio.stopped.wait(1)

    pick(page, "mini")
    page.click("#download")
    studio.arrives.set()
    expect(offer).to_be_hidden(timeout=SLOW)
    expect_model(page, "mini")
    expect(page.locator("#top_k input[type=range]")).to_have_attribute("max", "16384")  # its codes
    for name, value in PRESETS["mini"].defaults.items():
        expect(page.locator(f"#{name} input[type=number]")).to_have_value(f"{value:g}")
    draw(page, "mini")
    expect(page.locator("#status")).to_contain_text("mini drew 1 picture in", timeout=SLOW)
    expect(page.locator("#footer")).to_contain_text("Model mini, float32, 1 processor thread")

    pick(page, "tiny")
    expect(page.locator("#top_k input[type=range]")).to_have_attribute("max", "60")
    expect(page.locator("#guidance_scale input[type=number]")).to_have_value("2")
    draw(page, "tiny")
    expect(page.locator("#status")).to_contain_text("tiny drew 4 pictures in", timeout=SLOW)
    expect(page.locator("#footer")).to_contain_text("Model tiny")


def test_visitors_wait_for_one_download_and_choose_for_themselves(visit, studio):
    first, second = visit(studio.url), visit(studio.url)
    pick(first, "mini")
    first.click("#download")
    expect(first.locator("#offer")).to_contain_text("25 %")
    pick(second, "mini")
    expect(second.locator("#offer")).to_contain_text("It is being downloaded already.")
    second.click("#download")
    expect(second.locator("#offer")).to_contain_text("25 %")
    first.close()
    assert not studio.stopped.wait(1)
    third = visit(studio.url)
    studio.arrives.set()
    expect_model(second, "mini")
    assert studio.begun == 1
    draw(second, "mini")
    draw(third, "tiny")
    expect_model(third, "tiny")
    expect(third.locator("#footer")).to_contain_text("Model tiny")
    expect(second.locator("#footer")).to_contain_text("Model mini")


def test_closing_the_only_tab_that_waits_ends_the_download(visit, studio):
    page = visit(studio.url)
    pick(page, "mini")
    page.click("#download")
    expect(page.locator("#offer")).to_contain_text("25 %")
    page.close()
    assert studio.stopped.wait(10)


def test_a_model_too_large_is_not_offered(visit, studio):
    page = visit(studio.url)
    pick(page, "mega")
    expect(page.locator("#offer")).to_contain_text("mega needs 11.0 GB of memory, and this computer has 8.0 GB free")
    expect(page.locator("#offer")).to_contain_text("tiny goes on drawing.")
    expect(page.locator("#download")).to_be_hidden()
    expect_model(page, "tiny")


def test_a_failed_download_says_why_and_can_be_tried_again(visit, studio):
    page = visit(studio.url)
    studio.error = hub.HubError("the Hub cannot be reached")
    studio.arrives.set()
    pick(page, "mini")
    page.click("#download")
    expect(page.locator("#offer")).to_contain_text("mini was not downloaded: the Hub cannot be reached")
    studio.error = None
    page.click("#download")
    expect_model(page, "mini")


def test_a_model_that_does_not_load_says_so_and_the_former_draws(visit, studio):
    page = visit(studio.url)
    shutil.copytree(studio.weights, studio.cache / "models" / "mini")
    (studio.cache / "models" / "mini" / "model.safetensors").write_bytes(b"half")
    pick(page, "mini")
    page.fill("#prompt textarea", "a red apple")
    page.click("#go")
    failure = page.get_by_text("mini could not be loaded")
    expect(failure).to_be_visible(timeout=SLOW)
    expect(failure).not_to_contain_text(str(studio.cache))
    expect(page.locator("#go")).to_be_visible()
    pick(page, "tiny")
    draw(page, "tiny")


def test_chinese_browser_is_offered_in_chinese(visit, studio):
    page = visit(studio.url, locale="zh-CN")
    expect(page.locator("#footer")).to_contain_text("模型 tiny")
    pick(page, "mini")
    expect(page.locator("#offer")).to_contain_text("mini 还不在这台电脑上")
    expect(page.locator("#dismiss")).to_have_text("暂不")


@pytest.mark.parametrize("width", [390, 1280])
def test_the_panel_fits_the_screen(visit, studio, width):
    page = visit(studio.url, width=width)
    pick(page, "mini")
    page.click("#download")
    expect(page.locator("#offer")).to_contain_text("25 %")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_api_takes_a_model_with_its_own_settings(studio):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(studio.url, verbose=False)
    with pytest.raises(AppError, match=r"Model: mini is not on this computer yet.* weights pull mini"):
        client.predict("a red apple", model="mini", api_name="/generate")
    with pytest.raises(AppError, match="Model: there is no 'dall-e' here; choose one of: tiny, nano, mini"):
        client.predict("a red apple", model="dall-e", api_name="/generate")
    assert studio.begun == 0
    parameters = client.view_api(return_format="dict")["named_endpoints"]["/generate"]["parameters"]
    model = next(parameter for parameter in parameters if parameter["parameter_name"] == "model")
    assert (model["parameter_has_default"], model["parameter_default"]) == (True, None)

    shutil.copytree(studio.weights, studio.cache / "models" / "mini")
    pictures, *_ = client.predict("a red apple", model="mini", temperature=0.5, api_name="/generate")
    request, origin = read_request(Path(pictures[0]["image"]))
    assert origin["model"] == "mini"
    expected = PRESETS["mini"].defaults | {"temperature": 0.5}
    assert {name: request[name] for name in expected} == expected
    pictures, *_ = client.predict("a red apple", api_name="/generate")
    assert len(pictures) == 4
    assert read_request(Path(pictures[0]["image"]))[1]["model"] == "tiny"
