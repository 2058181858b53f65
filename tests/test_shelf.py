"""One model in memory at a time, to each request its own; downloads that end when nobody waits for them."""

import shutil
import threading
import time
import weakref
from pathlib import Path

import pytest
from tiny import save_tiny, tiny_config

from dalle_demo import hardware, hub, repos, shelf
from dalle_demo.config import SOURCES
from dalle_demo.engines import DalleEngine
from dalle_demo.shelf import Shelf, ShelfError, free_memory

GB = 10**9


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Folder of what was pulled, empty; on a machine with 8 GB to give, where mega needs 11 and mini 2."""
    monkeypatch.setenv("DALLE_DEMO_CACHE", str(tmp_path))
    needs = {1024: 2 * GB, 2048: 11 * GB}
    monkeypatch.setattr(hardware, "memory_needed", lambda config: needs.get(config.text_encoder.width, 10**6))
    monkeypatch.setattr(hardware, "seconds_per_image", lambda config: 6.0)
    monkeypatch.setattr(shelf, "free_memory", lambda: 8 * GB)
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory) -> Path:
    """Checkpoint folder of another tiny model, which stands for mini."""
    return save_tiny(tmp_path_factory.mktemp("other") / "mini", tiny_config(levels=(5, 4, 4)))


@pytest.fixture
def stocked(nano_folder, other_folder, cache) -> Shelf:
    """Shelf with two tiny models: `tiny`, and one in the place of `mini`."""
    shutil.copytree(other_folder, cache / "mini")
    return Shelf(str(nano_folder), load=load)


def load(preset: str) -> DalleEngine:
    return DalleEngine.load(preset, threads=1, form="float32")


def draw(engine: DalleEngine) -> list[bytes]:
    *_, last = engine.generate(engine.params("a red apple", n=2, seed=3))
    return [picture.tobytes() for picture in last.images]


def borrow(stand: Shelf, name: str) -> list[bytes]:
    with stand.lend(name, threading.Event()) as engine:
        assert engine.name == name
        return draw(engine)


def test_swapping_draws_exactly_what_each_model_draws(stocked, nano_folder, other_folder):
    pictures = {"tiny": draw(load(str(nano_folder))), "mini": draw(load(str(other_folder)))}
    assert pictures["tiny"] != pictures["mini"]
    for name in ("tiny", "mini", "mini", "tiny"):
        assert borrow(stocked, name) == pictures[name]
        assert stocked.loaded == name
        assert stocked.facts(name) == ("float32", 1)


def test_the_old_model_is_gone_before_the_next_is_read(stocked):
    borrow(stocked, "tiny")
    former = weakref.ref(stocked._engine.model.image_decoder)
    seen = []
    stocked._load_engine = lambda preset: (seen.append(former()), load(preset))[1]
    borrow(stocked, "mini")
    assert seen == [None]


def test_a_model_that_does_not_load_leaves_the_others_usable(stocked, cache):
    before = borrow(stocked, "tiny")
    (cache / "mini" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ShelfError, match=r"model\.safetensors"), stocked.lend("mini", threading.Event()):
        pass
    assert borrow(stocked, "tiny") == before


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory")])
def test_want_of_memory_is_one_sentence(stocked, error):
    def fail(preset):
        raise error

    stocked._load_engine = fail
    with pytest.raises(ShelfError, match="memory"), stocked.lend("mini", threading.Event()):
        pass
    stocked._load_engine = load
    borrow(stocked, "tiny")


def test_a_model_too_large_is_refused_before_the_former_is_freed(stocked, cache, other_folder):
    shutil.copytree(other_folder, cache / "mega")
    with pytest.raises(ShelfError, match="11,000,000,000 bytes of memory"), stocked.lend("mega", threading.Event()):
        pass
    assert stocked.loaded == "tiny"
    with pytest.raises(ShelfError, match="not offered"):
        next(stocked.fetch("mega", threading.Event()))


def test_memory_of_the_loaded_model_counts_as_free(stocked, monkeypatch):
    monkeypatch.setattr(shelf, "free_memory", lambda: 10 * GB)
    assert not stocked.find("mega").fits
    stocked._configs["tiny"] = stocked._configs["mini"]  # as large as mini
    assert stocked.find("mega").room == 12 * GB
    assert stocked.find("mega").fits


def test_nothing_is_refused_where_memory_is_unknown(stocked, monkeypatch):
    monkeypatch.setattr(shelf, "free_memory", lambda: None)
    assert stocked.find("mega").fits


def test_free_memory_is_that_of_this_machine():
    assert 10**7 < free_memory() < 10**14


def test_one_request_draws_at_a_time_and_who_waits_can_be_stopped(stocked):
    stop = threading.Event()
    with stocked.lend("tiny", threading.Event()):
        threading.Timer(0.2, stop.set).start()
        with stocked.lend("mini", stop) as engine:
            assert engine is None
        assert stocked.loaded == "tiny"
    borrow(stocked, "mini")


def test_a_request_that_fails_or_ends_early_gives_the_model_back(stocked):
    with pytest.raises(KeyError), stocked.lend("tiny", threading.Event()):
        raise KeyError
    borrow(stocked, "mini")


def test_lists_what_is_here_and_what_could_be(nano_folder):
    entries = {entry.name: entry for entry in Shelf(str(nano_folder), load=load).models()}
    assert list(entries) == ["tiny", "nano", "mini", "mega"]
    assert [entry.here for entry in entries.values()] == [True, True, False, False]
    mini = entries["mini"]
    assert mini.size == sum(file.size or 0 for file in SOURCES["mini"].files.values()) > GB
    assert (mini.licence, mini.memory, mini.seconds, mini.fits) == ("Apache-2.0", 2 * GB, 6.0, True)
    assert entries["tiny"].defaults["guidance_scale"] == 2.0
    assert not entries["mega"].fits


def test_offline_lists_what_is_here(nano_folder):
    assert [entry.name for entry in Shelf(str(nano_folder), offline=True, load=load).models()] == ["tiny", "nano"]


class Pull:
    """Stands for repos.pull: goes on until told what to do, or to stop."""

    def __init__(self, arrive):
        self.arrive = arrive
        self.begun = 0
        self.stopped = threading.Event()
        self.end = threading.Event()
        self.error = None

    def __call__(self, name, report, stop):
        self.begun += 1
        while not self.end.wait(0.01):
            report(30, 100)
            if stop.is_set():
                self.stopped.set()
                raise hub.StoppedError
        if self.error:
            raise self.error
        self.arrive(name)


@pytest.fixture
def pull(monkeypatch, cache, other_folder) -> Pull:
    made = Pull(lambda name: shutil.copytree(other_folder, cache / name))
    monkeypatch.setattr(repos, "pull", made)
    yield made
    made.end.set()


@pytest.fixture
def stand(nano_folder) -> Shelf:
    """Shelf on which mini is not."""
    return Shelf(str(nano_folder), load=load)


def await_bytes(states) -> None:
    while next(states) == (0, 0):
        pass


def test_fetch_tells_how_far_it_is_and_ends_with_the_model_here(stand, pull):
    states = stand.fetch("mini", threading.Event())
    await_bytes(states)
    assert next(states) == (30, 100)
    assert stand.fetching() == "mini"
    borrow(stand, "tiny")  # meanwhile
    pull.end.set()
    assert list(states)[-1:] in ([], [(30, 100)])
    assert stand.fetching() is None
    assert stand.find("mini").here
    borrow(stand, "mini")


def test_cancelling_ends_it_within_a_second(stand, pull):
    cancel = threading.Event()
    states = stand.fetch("mini", cancel)
    await_bytes(states)
    cancel.set()
    start = time.monotonic()
    assert list(states) == []
    assert pull.stopped.wait(1)
    assert time.monotonic() - start < 1
    assert not stand.find("mini").here


def test_a_download_goes_on_while_somebody_waits_for_it(stand, pull):
    first, second = (stand.fetch("mini", threading.Event()) for _ in range(2))
    await_bytes(first)
    await_bytes(second)
    assert pull.begun == 1
    first.close()  # as a closed tab does
    assert not pull.stopped.wait(0.3)
    second.close()
    assert pull.stopped.wait(1)


def test_one_model_is_downloaded_at_a_time(stand, pull, monkeypatch):
    monkeypatch.setattr(shelf, "free_memory", lambda: 20 * GB)
    states = stand.fetch("mini", threading.Event())
    await_bytes(states)
    with pytest.raises(ShelfError, match="mini is being downloaded"):
        next(stand.fetch("mega", threading.Event()))
    assert next(states) == (30, 100)
    states.close()


def test_after_cancelling_it_can_be_asked_for_again(stand, pull):
    for _ in range(2):
        states = stand.fetch("mini", threading.Event())
        await_bytes(states)
        states.close()
    assert pull.begun == 2


@pytest.mark.parametrize("error", [hub.HubError("no network"), OSError("disk full"), KeyError("a bug")])
def test_failure_reaches_all_who_wait_and_the_next_may_try(stand, pull, error):
    waiting = [stand.fetch("mini", threading.Event()) for _ in range(2)]
    for states in waiting:
        await_bytes(states)
    pull.error = error
    pull.end.set()
    for states in waiting:
        with pytest.raises(ShelfError, match=str(error)):
            list(states)
    pull.error = None
    list(stand.fetch("mini", threading.Event()))
    assert stand.find("mini").here
