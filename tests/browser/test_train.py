"""The Train tab, clicked through in Chromium with the tiny model: from a zip to a tuned model in the other tab."""

import io
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from dalle_demo import weights
from dalle_demo.engines import DalleEngine
from dalle_demo.shelf import UNCLIP, Shelf
from dalle_demo.training import finetune, jobs
from dalle_demo.ui.train_plan import Plans

try:
    from playwright.sync_api import expect
except ImportError:
    expect = None  # the chromium fixture then skips, or fails

ROOT = Path(__file__).resolve().parents[2]
SLOW = 180_000  # milliseconds; a training process starts in several seconds, on a busy machine in a minute


@pytest.fixture(scope="module")
def upload(tmp_path_factory) -> Path:
    """Eight pictures, one without a caption, and a file that is no picture."""
    path = tmp_path_factory.mktemp("upload") / "boxes.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, colour in enumerate(("red", "green", "blue", "gray", "pink", "gold", "brown", "black")):
            picture, data = Image.new("RGB", (64, 64), "white"), io.BytesIO()
            picture.paste(colour, (4 + 3 * number, 8, 34 + 2 * number, 40 + number))
            picture.save(data, "PNG")
            archive.writestr(f"{colour}.png", data.getvalue())
            if colour != "blue":
                archive.writestr(f"{colour}.txt", f"a {colour} box")
        archive.writestr("broken.png", b"no picture")
    return path


@pytest.fixture(scope="module")
def studio(nano_folder, shipped, serve, tmp_path_factory) -> str:
    """Address of a page whose jobs are in a folder of the test's."""
    folder = tmp_path_factory.mktemp("shipped")
    for model in (*shipped.iterdir(), weights.SHIPPED / "nano"):
        (folder / model.name).symlink_to(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DALLE_DEMO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(jobs, "NICENESS", 0)  # the machine of a test is busy with tests
        patch.setattr(finetune, "probe", lambda settings, data: finetune.Estimate(0.5, 400.0, 10**9))
        patch.setattr(weights, "SHIPPED", folder)
        yield serve(TinyShelf(str(nano_folder), offline=True, load=load))


class TinyShelf(Shelf):
    """One whose DALL-E 2 is the tiny one for the process of a training, too."""

    def trainable(self) -> dict[str, str]:
        return super().trainable() | {UNCLIP: str(weights.find(UNCLIP))}


def load(preset: str, threads: int = 1, form: str = "float32", **options) -> DalleEngine:
    return DalleEngine.load(preset, threads, form, "cpu", **options)


def open_tab(page) -> None:
    page.get_by_role("tab").last.click()


def prepare(page, upload: Path) -> None:
    open_tab(page)
    page.set_input_files("#upload input[type=file]", str(upload))
    expect(page.locator("#captions .card")).to_have_count(8, timeout=SLOW)


def test_from_a_zip_to_the_generate_tab_and_the_command_line(visit, studio, upload, tmp_path):
    page, stranger = visit(studio), visit(studio)
    prepare(page, upload)
    read_the_report_and_fix_a_caption(page)
    start_and_watch(page)
    see_nothing(stranger)
    page.click("#stop_training")
    expect(page.locator("#train_status")).to_contain_text("Stopped. The best until then is kept.", timeout=SLOW)
    compare(page)
    load_the_export(page, tmp_path)
    draw_with_it(page)
    see_nothing(stranger)
    open_tab(page)
    page.click("#delete")
    page.click("#delete_sure")
    expect(page.locator("#hint p")).to_have_text("Upload pictures first.")


def test_a_dalle_2_is_tuned_and_draws_in_its_own_tab(visit, studio, upload):
    page, stranger = visit(studio), visit(studio)
    prepare(page, upload)
    start_with_the_dalle_2(page)
    status = page.locator("#train_status")
    expect(status).to_contain_text("Done.", timeout=SLOW)
    expect(page.locator("#previews .pair")).to_have_count(12, timeout=SLOW)
    expect(page.locator("#strength")).to_be_hidden()
    compare(page)
    page.click("#use")
    line = page.locator("#stage p")
    expect(line).to_contain_text("My DALL-E 2 drew 4 pictures", timeout=SLOW)
    expect(page.locator("#unclip_model input")).to_have_value("My DALL-E 2")
    expect(page.locator("#footer")).to_contain_text("Model My DALL-E 2")
    go_back_to_the_shipped_one(page)
    stranger.get_by_role("tab", name="DALL·E 2").click()
    expect(stranger.locator("#stage p")).to_contain_text("unclip-nano drew 4 pictures", timeout=SLOW)
    expect(stranger.locator("#unclip_model")).to_be_hidden()
    assert "My DALL-E 2" not in stranger.locator("body").inner_text()
    page.reload()
    page.get_by_role("tab", name="DALL·E 2").click()
    expect(page.locator("#unclip_model input")).to_have_value(UNCLIP)
    choose(page, "unclip_model", "My DALL-E 2")
    expect(line).to_contain_text("My DALL-E 2 drew 4 pictures", timeout=SLOW)
    open_tab(page)
    page.click("#delete")
    page.click("#delete_sure")
    expect(page.locator("#hint p")).to_have_text("Upload pictures first.")
    page.get_by_role("tab", name="DALL·E 2").click()
    expect(line).to_contain_text("unclip-nano drew 4 pictures", timeout=SLOW)


def start_with_the_dalle_2(page) -> None:
    page.locator("#title").locator("input, textarea").fill("My DALL-E 2")
    page.locator("#train_advanced button").first.click()
    expect(page.locator("#method")).to_be_visible()
    choose(page, "base", UNCLIP)
    for name in ("method", "rank", "text_encoder"):
        expect(page.locator(f"#{name}")).to_be_hidden()
    page.fill("#steps input", "10")
    page.check("#consent input")
    expect(page.locator("#start")).to_be_enabled(timeout=SLOW)
    page.click("#start")


def go_back_to_the_shipped_one(page) -> None:
    choose(page, "unclip_model", UNCLIP)
    expect(page.locator("#stage p")).to_contain_text("unclip-nano drew 4 pictures", timeout=SLOW)
    expect(page.locator("#footer")).to_contain_text(f"Model {UNCLIP}")
    page.get_by_role("tab").first.click()
    expect(page.locator("#footer")).to_contain_text("Model tiny")


def choose(page, dropdown: str, option: str) -> None:
    page.locator(f"#{dropdown} input").click()
    page.get_by_role("option", name=option).click()


def read_the_report_and_fix_a_caption(page) -> None:
    report = page.locator("#report")
    expect(report).to_contain_text("Pictures found: 9, used: 8")
    expect(report).to_contain_text("broken.png is damaged")
    expect(page.locator("#plan")).to_contain_text("About 7 min here, 300 steps, 1.0 GB of memory", timeout=SLOW)
    expect(page.locator("#effort")).to_contain_text("Thorough: about 14 min")
    expect(page.locator("#start")).to_be_disabled()
    expect(page.locator("#hint p")).to_have_text("Tick that you may use the pictures.")
    consent, hint, upload = (page.locator(f"#{name}").bounding_box() for name in ("consent", "hint", "upload"))
    assert hint["y"] - consent["y"] < 200, "what is missing stands beside where it is given"
    assert upload["height"] < 130, "once it has been used it gives its place to the pictures"

    page.locator(".card.bare textarea").fill("a blue box")
    expect(page.locator(".card.bare")).to_have_count(0)
    page.check("#consent input")
    expect(page.locator("#start")).to_be_enabled()
    page.reload()
    open_tab(page)
    expect(page.get_by_label("Caption of blue.png")).to_have_value("a blue box")


def start_and_watch(page) -> None:
    page.check("#consent input")
    page.locator("#title").locator("input, textarea").fill("My boxes")
    page.locator("#train_advanced button").first.click()
    for name in ("steps", "learning_rate", "train_seed"):
        expect(page.locator(f"#{name} input")).to_have_value("")
    page.fill("#steps input", "4000")
    expect(page.locator("#start")).to_be_enabled()
    page.click("#start")
    status = page.locator("#train_status")
    expect(status).to_contain_text("Training.", timeout=SLOW)
    expect(page.locator("#reconstruction img").first).to_be_visible(timeout=SLOW)
    expect(page.locator("#loss_plot canvas, #loss_plot svg").first).to_be_visible(timeout=SLOW)
    moved = step_of(page)
    page.reload()
    expect(page.locator("#notice")).to_contain_text("A training is running on this computer")
    open_tab(page)
    expect(status).to_contain_text("Training.", timeout=SLOW)
    page.wait_for_function(f"/\\d+/.exec(document.querySelector('#train_status .figures').innerText)[0] > {moved}")
    page.click("#save_now")
    expect(page.locator("#previews .pair")).to_have_count(12, timeout=SLOW)
    assert not re.search(r"^\d+\.\ds$", page.locator("body").inner_text(), re.MULTILINE), "times of gradio's events"


def see_nothing(stranger) -> None:
    stranger.reload()
    stranger.wait_for_selector("#prompt textarea")
    stranger.locator("#model input").click()
    expect(stranger.get_by_role("option")).not_to_have_count(0)
    assert "boxes" not in stranger.locator("body").inner_text()
    stranger.keyboard.press("Escape")
    open_tab(stranger)
    expect(stranger.locator("#hint p")).to_have_text("Upload pictures first.")
    expect(stranger.locator("#trainings")).to_be_hidden()
    assert "boxes" not in stranger.locator("body").inner_text()


def compare(page) -> None:
    page.click("#draw_both")
    expect(page.locator("#compared")).to_contain_text("The same seeds", timeout=SLOW)
    expect(page.locator("#before img")).not_to_have_count(0)
    expect(page.locator("#tuned img")).not_to_have_count(0)


def load_the_export(page, folder: Path) -> None:
    page.locator("#manage button").first.click()
    page.click("#export")
    with page.expect_download() as event:
        page.click("#download_export", timeout=SLOW)
    with zipfile.ZipFile(event.value.path()) as archive:
        archive.extractall(folder / "unzipped")
    (weights,) = (folder / "unzipped").iterdir()
    command = [sys.executable, "-m", "dalle_demo", "generate", "a red box", "--preset", str(weights)]
    subprocess.run([*command, "--out", str(folder / "out"), "--n", "1"], cwd=ROOT, check=True, timeout=300)
    assert len(list((folder / "out").glob("*.png"))) == 1


def draw_with_it(page) -> None:
    page.click("#use")
    expect(page.locator("#model input")).to_have_value(re.compile("^My boxes:"))
    page.fill("#prompt textarea", "a red box")
    page.click("#go")
    expect(page.locator("#status")).to_contain_text("My boxes drew 4 pictures in", timeout=SLOW)


def step_of(page) -> int:
    return int(re.search(r"Step (\d+)", page.locator("#train_status").inner_text())[1])


def test_an_upload_that_cannot_be_used_says_why(visit, studio, tmp_path):
    page = visit(studio)
    (tmp_path / "notes.txt").write_text("no pictures")
    open_tab(page)
    page.set_input_files("#upload input[type=file]", str(tmp_path / "notes.txt"))
    expect(page.locator("#report .failed")).to_contain_text("Not used: there is no picture in it", timeout=SLOW)
    expect(page.locator("#start")).to_be_disabled()
    for name in ("trainings", "delete"):
        expect(page.locator(f"#{name}")).to_be_hidden()


def test_a_plan_that_takes_long_does_not_replace_a_newer_one(visit, studio, upload, monkeypatch):
    page, begun, ended = visit(studio), [], []
    prepare(page, upload)
    expect(page.locator("#effort")).to_contain_text("Thorough: about 14 min", timeout=SLOW)
    expect(page.locator("#hint p")).to_have_text("Tick that you may use the pictures.")

    def unknown_words(plans, job, base) -> list[str]:
        begun.append(base)
        if len(begun) == 1:
            time.sleep(2)
        ended.append(base)
        return []

    monkeypatch.setattr(Plans, "unknown_words", unknown_words)
    page.get_by_label("Thorough").check()
    page.check("#consent input")
    expect(page.locator("#start")).to_be_enabled(timeout=SLOW)
    while len(ended) < 2:
        page.wait_for_timeout(100)
    page.wait_for_timeout(1000)
    expect(page.locator("#start")).to_be_enabled()


@pytest.mark.parametrize("width", [390, 1400])
def test_the_tab_fits_the_screen_in_chinese(visit, studio, upload, width):
    page = visit(studio, width=width, locale="zh-CN")
    prepare(page, upload)
    expect(page.locator("#report")).to_contain_text("找到 9 张图片，采用 8 张")
    expect(page.locator("#effort")).to_contain_text("均衡")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
