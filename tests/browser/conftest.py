"""A served page and a Chromium to click through it."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from dalle_demo.shelf import Shelf

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@dataclass(frozen=True)
class Server:
    """Where the page is, and where its log is."""

    url: str
    log: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def server(nano_folder, tmp_path_factory) -> Iterator[Server]:
    """`python app.py` in its own process, as a user starts it."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "app.py", "--weights", str(nano_folder), "--port", str(port)]
    apart = {"HF_HUB_OFFLINE": "1", "DALLE_DEMO_CACHE": str(log.parent)}  # from the trainings of whoever tests
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | apart, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until_served(f"http://127.0.0.1:{port}/config", process, log)
        yield Server(f"http://127.0.0.1:{port}", log)
    finally:
        process.terminate()  # SIGINT is ignored by what a background shell started
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def wait_until_served(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120  # on a busy machine
    while time.monotonic() < deadline:
        assert process.poll() is None, f"app.py ended:\n{log.read_text()}"
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    pytest.fail(f"app.py does not answer:\n{log.read_text()}")


class EndlessEngine:
    """The real engine, except that a run goes on until it is stopped or its tab is closed."""

    def __init__(self, engine):
        self.engine = engine
        self.running = threading.Event()

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def generate(self, params, stop=None):
        first = next(self.engine.generate(params))
        self.running.set()
        try:
            while not stop.is_set():
                yield first
                stop.wait(0.05)
        finally:
            self.running.clear()


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[[Shelf], str]]:
    """Function that serves the page of a shelf in this process and returns its address."""
    from dalle_demo.ui.app import build

    pages = []

    def launch(shelf: Shelf) -> str:
        page, options = build(shelf)
        pages.append(page)
        return page.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True, **options)[1]

    yield launch
    for page in pages:
        page.close()


@pytest.fixture(scope="session")
def endless(engine, serve) -> EndlessEngine:
    """Engine whose runs do not end by themselves, with its page at `url`."""
    slow = EndlessEngine(engine)
    slow.url = serve(Shelf("endless", offline=True, load=lambda preset: slow))
    return slow


@pytest.fixture(scope="session")
def chromium():
    """Browser; without one the tests are skipped, except in continuous integration."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if path is None:
        complain = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        complain("needs playwright and Chromium: pip install playwright; apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Function that opens a page for a new visitor; afterwards, all they asked for must have been on this machine."""
    contexts, hosts = [], set()

    def open_page(url: str, width: int = 1280, height: int = 800, locale: str = "en-US"):
        context = chromium.new_context(viewport={"width": width, "height": height}, locale=locale)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.goto(url)
        page.wait_for_selector("#prompt textarea, #unclip_prompt textarea")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert hosts <= {"127.0.0.1", None}, "None is the host of data: and blob: addresses"


@pytest.fixture
def page(visit, server):
    """The served page on a wide screen."""
    return visit(server.url)
