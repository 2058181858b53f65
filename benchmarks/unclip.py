"""unclip-nano -> seconds for 16 pictures, and how often a grid of four is drawn anew while a slider is dragged.

The engine is timed in this process. The drag is taken end to end: `python app.py` serves the page, a Chromium drags
sliders on it as a hand would, and the frames are counted that it shows. Afterwards the last one must be the picture
that the last value gives when nothing is in a hurry. Needs playwright and Chromium; run it on an idle machine:

    python benchmarks/unclip.py

The last line is JSON, which is also written to benchmarks/results/unclip-nano.json.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from latency import PROMPT, ROOT, RUNS, WARM_UPS, finish, summary, wait_for

PRESET = "unclip-nano"
OUT = Path(__file__).parent / "results" / f"{PRESET}.json"
DRAGGED = {  # sliders of the section "From words", and what is typed for them to work on
    "truncation": {"prompt": PROMPT},
    "guidance_scale": {},
    "share": {"second": "a green pear"},
    "change_strength": {"second": "", "change_from": "an apple", "change_to": "a car"},
}
SECONDS = 5.0  # of each drag
MOVES = 60  # of the pointer a second
PATIENCE = 60_000  # milliseconds
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
COUNT = """() => {
  const wall = document.querySelector("#stage .wall"), seen = window.seen = [];
  window.watcher?.disconnect();
  window.watcher = new MutationObserver(() => {
    const {src} = wall.querySelector("img");
    if (src !== seen.at(-1)) seen.push(src);
  });
  window.watcher.observe(wall, {subtree: true, attributes: true, attributeFilter: ["src"]});
}"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each drag (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="write the JSON here (default: %(default)s)")
    options = parser.parse_args()
    figures = {"preset": PRESET, **time_engine(), **time_drags(options.seconds)}
    options.out.parent.mkdir(exist_ok=True)
    finish(figures, options.out)


def time_engine() -> dict:
    """Seconds of requests to the engine in this process."""
    sys.path.insert(0, str(ROOT))
    import torch

    from dalle_demo.engines import UnclipEngine

    engine = UnclipEngine.load(PRESET)
    figures = {}
    for n in (4, 16):
        totals = []
        for run in range(WARM_UPS + RUNS):
            start = time.perf_counter()
            list(engine.generate(engine.params(PROMPT, n=n, seed=run)))
            totals.append(time.perf_counter() - start)
        figures[f"engine_{n}_pictures_s"] = summary(totals[WARM_UPS:])
    return figures | {"threads": engine.threads, "torch": torch.__version__}


def time_drags(seconds: float) -> dict:
    """Frames a second of a drag of each slider, and whether each ended with the picture of its last value."""
    from playwright.sync_api import sync_playwright

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    try:
        wait_for(url, server)
        with sync_playwright() as playwright:
            chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=CHROMIUM_FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="en-US")
            page.set_default_timeout(PATIENCE)
            open_tab(page, url)
            drags = {name: drag(page, name, words, seconds) for name, words in DRAGGED.items()}
            version = browser.version
            browser.close()
    finally:
        server.terminate()
        server.wait()
    rates = {f"drag_{name}_frames_per_second": rate for name, (rate, _) in drags.items()}
    return rates | {"last_frame_is_of_last_value": all(ended for _, ended in drags.values()), "chromium": version}


def open_tab(page, url: str) -> None:
    """Bring the tab up, with all of its sliders."""
    page.goto(url)
    page.get_by_role("tab", name="DALL·E 2").click()
    page.wait_for_selector("#stage .wall img[src]")
    for accordion in ("mix", "change"):
        page.click(f"#unclip_{accordion} button")
    settle(page)


def drag(page, name: str, words: dict[str, str], seconds: float) -> tuple[float, bool]:
    """Frames a second that the page shows while a slider is dragged to and fro, and whether the last one is right."""
    for box, text in words.items():
        page.fill(f"#unclip_{box} textarea", text)
    slider = page.locator(f"#unclip_{name} input[type=range]")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    left, reach, y = box["x"] + 10, box["width"] - 20, box["y"] + box["height"] / 2
    page.mouse.move(left, y)
    page.mouse.down()
    settle(page)
    page.evaluate(COUNT)
    start, step = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        step += 1
        there = (step * reach / MOVES) % (2 * reach)  # to the other end in a second
        page.mouse.move(left + min(there, 2 * reach - there), y)
        time.sleep(max(0, start + step / MOVES - time.perf_counter()))
    frames, took = page.evaluate("window.seen.length"), time.perf_counter() - start
    page.mouse.up()
    settle(page)
    last, value = first_picture(page), slider.input_value()
    low, high = (slider.get_attribute(end) for end in ("min", "max"))
    for number in (low if value != low else high, value):
        page.fill(f"#unclip_{name} input[type=number]", number)
        page.keyboard.press("Tab")
        settle(page)
    return round(frames / took, 1), first_picture(page) == last


def settle(page) -> None:
    """Wait until the pictures stay as they are."""
    before = None
    while before != (before := first_picture(page)):
        page.wait_for_timeout(500)
        page.wait_for_selector("#stage .wall[aria-busy=false]")


def first_picture(page) -> str:
    """Data of the first picture."""
    return page.locator("#stage .wall img").first.get_attribute("src")


if __name__ == "__main__":
    main()
