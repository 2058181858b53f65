"""One model in memory at a time, to each request its own; downloads that end when nobody waits for them."""

import dataclasses
import logging
import os
import shutil
import threading
import time
import weakref
from pathlib import Path

import pytest
from tiny import save_tiny, tiny_config

from dalle_demo import hardware, hub, repos, shelf, weights
from dalle_demo.config import PRESETS, SOURCES
from dalle_demo.engines import DalleEngine
from dalle_demo.shelf import Shelf, ShelfError, free_memory, memory_limit

GB = 10**9
ESTIMATES = {name: getattr(hardware, name) for name in ("memory_needed", "weight_memory", "seconds_per_image")}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Folder of what was pulled, empty; on a machine of 16 GB with 8 to give, where mega needs 11 and mini 2."""
    monkeypatch.setenv("DALLE_DEMO_CACHE", str(tmp_path))
    needs = {1024: 2 * GB, 2048: 11 * GB}
    monkeypatch.setattr(hardware, "memory_needed", lambda config: needs.get(config.text_encoder.width, 10**6))
    monkeypatch.setattr(hardware, "weight_memory", lambda config: needs.get(config.text_encoder.width, 10**6) // 2)
    monkeypatch.setattr(hardware, "seconds_per_image", lambda config: 6.0)
    monkeypatch.setattr(shelf, "free_memory", lambda: 8 * GB)
    monkeypatch.setattr(shelf, "memory_limit", lambda: 16 * GB)
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


def load(preset: str, threads: int = 1, form: str = "float32") -> DalleEngine:
    return DalleEngine.load(preset, threads, form)


@pytest.fixture
def both(nano_folder, shipped, monkeypatch) -> Shelf:
    """Shelf where there is a DALL-E 2 beside a DALL-E."""
    monkeypatch.setattr(weights, "SHIPPED", shipped)
    return Shelf(str(nano_folder), load=load)


def test_the_dalle_2_model_is_loaded_when_it_is_asked_for_and_stays(both, nano_folder):
    assert both._unclips == {}
    engine = both.unclip()
    assert engine.name == "unclip-nano"
    assert both.loaded == "tiny"
    assert both.unclip() is engine
    assert borrow(both, "tiny") == draw(load(str(nano_folder)))


def test_the_dalle_2_model_is_lent_while_another_draws(both):
    with both.lend("tiny", threading.Event()):
        (last,) = both.unclip().generate(both.unclip().params("a red apple", n=1, seed=1))
    assert last.final


def test_the_dalle_2_model_is_loaded_once_by_many(both):
    loads, original = [], both._load_unclip
    both._load_unclip = lambda preset: (loads.append(preset), time.sleep(0.1), original(preset))[2]
    threads = [threading.Thread(target=both.unclip) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["unclip-nano"]


def test_a_dalle_2_model_that_is_not_here_is_one_sentence(both, tmp_path, monkeypatch):
    assert both.unclips() == ["unclip-nano"]
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    assert both.unclips() == []
    with pytest.raises(ShelfError, match="the weights of unclip-nano are not here"):
        both.unclip()


def test_a_damaged_dalle_2_model_is_told_without_folders_and_may_be_mended(both, shipped, tmp_path, monkeypatch):
    damaged = Path(shutil.copytree(shipped, tmp_path / "damaged"))
    monkeypatch.setattr(weights, "SHIPPED", damaged)
    whole = (damaged / "unclip-nano" / "model.safetensors").read_bytes()
    (damaged / "unclip-nano" / "model.safetensors").write_bytes(whole[:-9])
    with pytest.raises(ShelfError, match=r"model\.safetensors is truncated") as caught:
        both.unclip()
    assert str(tmp_path) not in str(caught.value)
    (damaged / "unclip-nano" / "model.safetensors").write_bytes(whole)
    assert both.unclip().name == "unclip-nano"


def test_a_given_dalle_2_model_is_everybodys_beside_the_shipped_one(nano_folder, shipped, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", shipped)
    folder = str(shutil.copytree(shipped / "unclip-nano", tmp_path / "mine"))
    shelf = Shelf(str(nano_folder), load=load, unclip=folder)
    assert (shelf.home, shelf.unclip_home, shelf.unclips()) == ("tiny", "mine", ["mine", "unclip-nano"])
    assert shelf.unclip().name == "mine"
    assert shelf.unclip("unclip-nano").name == "unclip-nano"
    assert shelf.is_unclip("mine")
    assert {"mine": folder, "unclip-nano": "unclip-nano"}.items() <= shelf.trainable().items()
    shelf.adopt_unclip("secret@1", "Secret", shipped / "unclip-nano")
    monkeypatch.setattr("dalle_demo.shelf.OWN_LOADED", 1)
    former = shelf.unclip()
    shelf.adopt_unclip("other@1", "Other", shipped / "unclip-nano")
    for name in ("secret@1", "other@1"):
        shelf.unclip(name)
    assert shelf.unclip() is former, "own models take the place of other own ones only"
    same = Shelf(str(nano_folder), load=load, unclip=str(shipped / "unclip-nano"))
    assert same.unclips() == ["unclip-nano"]


def test_of_tuned_dalle_2_models_those_drawn_with_last_stay_beside_the_shipped_one(both, shipped, monkeypatch):
    """Two visitors who draw in turn do not wait for their models each time."""
    monkeypatch.setattr(shelf, "OWN_LOADED", 2)
    shipped_one = both.unclip()
    for name in ("secret@1", "other@1", "third@1"):
        both.adopt_unclip(name, name.title(), shipped / "unclip-nano")
    first, second = both.unclip("secret@1"), both.unclip("other@1")
    assert first is both.unclip("secret@1")
    assert (first.name, first.origin["model"], both.title("secret@1")) == ("Secret@1",) * 3
    assert both.unclip_facts("secret@1") == ("float32", first.threads)
    both.unclip("third@1")
    assert both.unclip_facts("other@1") is None
    assert both.unclip("secret@1") is first
    assert both.unclip() is shipped_one
    assert both.unclip("other@1") is not second


def test_a_tuned_dalle_2_model_is_told_to_nobody_and_can_be_dropped(both, shipped):
    both.adopt_unclip("secret@1", "Mine", shipped / "unclip-nano")
    told = [*both.names(), *both.trainable(), *(entry.name for entry in both.models())]
    assert "secret@1" not in told
    assert "unclip-nano" in both.trainable()
    assert both.is_unclip("secret@1")
    assert both.adopted() == ["secret@1"]
    engine = both.unclip("secret@1")
    both.adopt_unclip("secret@1", "Mine", shipped / "unclip-nano")
    assert both.unclip("secret@1") is engine
    both.adopt_unclip("secret@1", "Ours", shipped / "unclip-nano")
    assert both.unclip("secret@1").name == "Ours"
    both.drop("secret@1")
    assert not both.is_unclip("secret@1")
    with pytest.raises(ShelfError, match="deleted"):
        both.unclip("secret@1")


def test_a_damaged_tuned_dalle_2_model_is_told_without_its_folder(both, shipped, tmp_path):
    folder = Path(shutil.copytree(shipped / "unclip-nano", tmp_path / "weights"))
    (folder / "model.safetensors").write_bytes(b"")
    both.adopt_unclip("secret@1", "Mine", folder)
    with pytest.raises(ShelfError, match=r"model\.safetensors is truncated") as caught:
        both.unclip("secret@1")
    assert str(tmp_path) not in str(caught.value)
    assert both.unclip().name == "unclip-nano"


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


def test_a_model_that_comes_back_draws_as_it_did(stocked, nano_folder):
    """Whatever would be measured fastest by then."""
    stocked._facts["tiny"] = ("bfloat16", 1)
    borrow(stocked, "mini")
    asked = []
    stocked._load_engine = lambda preset, **options: (asked.append(options), load(preset, **options))[1]
    expected = draw(load(str(nano_folder), form="bfloat16"))
    assert borrow(stocked, "tiny") == expected != draw(load(str(nano_folder)))
    assert asked == [{"form": "bfloat16", "threads": 1}]
    assert stocked.facts("tiny") == ("bfloat16", 1)


def test_a_tuned_model_that_was_renamed_or_trained_on_is_loaded_anew(stocked, other_folder, tmp_path):
    folder = Path(shutil.copytree(other_folder, tmp_path / "weights"))
    stocked._load_engine = lambda preset, change=lambda model: model, **_: DalleEngine(
        change(weights.load_dalle(preset)), threads=1, form="float32"
    )

    def adopted(title):
        stocked.adopt("secret@1", title, folder, lambda model: dataclasses.replace(model, name=title))
        with stocked.lend("secret@1", threading.Event()) as engine:
            return engine

    first = adopted("Mine")
    assert adopted("Mine") is first
    second = adopted("Ours")
    assert (first.name, second.name) == ("Mine", "Ours")
    os.utime(folder / "config.json", ns=(1, 1))
    assert adopted("Ours") is not second


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
    def fail(preset, **options):
        raise error

    stocked._load_engine = fail
    with pytest.raises(ShelfError, match="memory"), stocked.lend("mini", threading.Event()):
        pass
    stocked._load_engine = load
    borrow(stocked, "tiny")


def test_a_model_too_large_is_refused_before_the_former_is_freed(stocked, cache, other_folder):
    shutil.copytree(other_folder, cache / "mega")
    sentence = r"mega needs 11\.0 GB of memory, and 8\.0 GB are free: close other programs"
    with pytest.raises(ShelfError, match=sentence), stocked.lend("mega", threading.Event()):
        pass
    assert stocked.loaded == "tiny"
    with pytest.raises(ShelfError, match=sentence):
        next(stocked.fetch("mega", threading.Event()))
    with pytest.raises(ShelfError, match="there is no dall-e to download here; there is: mini, mega"):
        next(stocked.fetch("dall-e", threading.Event()))


def test_weights_of_the_loaded_model_count_as_free(stocked, monkeypatch):
    monkeypatch.setattr(shelf, "free_memory", lambda: 10 * GB)
    assert not stocked.find("mega").fits
    stocked._estimates["tiny"] = stocked._estimate("mini")  # as large as mini, of which the half is weights
    assert stocked.find("mega").room == 11 * GB
    assert stocked.find("mega").fits
    monkeypatch.setattr(shelf, "free_memory", lambda: 16 * GB)  # where nothing says what is free
    assert stocked.find("mega").room == 16 * GB


def test_a_second_look_at_a_model_builds_nothing(nano_folder, monkeypatch):
    for name, real in ESTIMATES.items():
        monkeypatch.setattr(hardware, name, real)
    monkeypatch.setattr(hardware, "_speeds", lambda: (1e-12, 1e-12))
    stand, built = Shelf(str(nano_folder), load=load), []
    once = stand.find("nano")
    build = hardware._meta
    monkeypatch.setattr(hardware, "_meta", lambda config: (built.append(config), build(config))[1])
    again = stand.find("nano")
    assert (again.memory, again.seconds) == (once.memory, once.seconds)
    assert built == []
    assert once.memory == hardware.memory_needed(PRESETS["nano"])
    hardware._sizes.cache_clear()
    hardware.memory_needed(PRESETS["nano"])
    assert len(built) == 3, "each part once"


def test_names_and_settings_are_known_without_an_estimate(stocked, monkeypatch):
    """The page starts with them."""
    monkeypatch.setattr(hardware, "memory_needed", None)
    assert stocked.names() == ["tiny", "nano", "mini", "mega"]
    assert stocked.defaults("mini") == PRESETS["mini"].defaults


def test_a_source_that_was_pulled_can_be_trained_if_it_makes_codes_of_pictures(stocked, cache, other_folder):
    assert "mini-flax" not in stocked.trainable()
    shutil.copytree(other_folder, cache / "mini-flax")
    assert stocked.trainable()["mini-flax"] == "mini-flax"
    assert "mini-flax" not in stocked.names()
    (cache / "mini-flax" / "config.json").write_text("{")
    assert "mini-flax" not in stocked.trainable()


@pytest.mark.parametrize("name", ["dall-e", "", None, 3, ["mini"], {}])
def test_there_is_no_model_of_another_name(stocked, name):
    assert stocked.find(name) is None


def test_nothing_is_refused_where_memory_is_unknown(stocked, monkeypatch):
    monkeypatch.setattr(shelf, "free_memory", lambda: None)
    assert stocked.find("mega").fits


def test_free_memory_is_that_of_this_machine():
    assert 10**7 < free_memory() <= memory_limit() < 10**14


def test_of_a_container_what_it_has_left_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "CGROUP", tmp_path)
    for name, text in {
        "memory.max": "9000000",
        "memory.current": "7000000",
        "memory.stat": "anon 4000000\nfile 3000000\nactive_file 1000000\ninactive_file 1500000",
    }.items():
        (tmp_path / name).write_text(text + "\n")
    assert (free_memory(), memory_limit()) == (4_500_000, 9_000_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 9_000_000
    assert memory_limit() > 9_000_000


def test_on_macos_what_is_free_or_idle_is_free(tmp_path, monkeypatch):
    """As `vm_stat` of macOS 14 prints it."""
    monkeypatch.setattr(shelf, "MEMINFO", tmp_path / "none")
    told = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                3000.
Pages active:                            400000.
Pages inactive:                            2000.
Pages speculative:                         1000.
Pages throttled:                              0.
Pages wired down:                        150000.
Pages purgeable:                            500.
"Translation faults":                 900000000.
File-backed pages:                       200000.
"""
    (tmp_path / "vm_stat").write_text(f"#!/bin/sh\ncat <<'END'\n{told}END\n")
    (tmp_path / "vm_stat").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert free_memory() == 6000 * 16384
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert free_memory() == shelf.memory_limit(), "where nothing says what is free"


def test_one_request_draws_at_a_time_and_who_waits_can_be_stopped(stocked):
    stop = threading.Event()
    with stocked.lend("tiny", threading.Event()):
        threading.Timer(0.2, stop.set).start()
        with stocked.lend("mini", stop) as engine:
            assert engine is None
        assert stocked.loaded == "tiny"
    borrow(stocked, "mini")


def test_a_run_that_was_stopped_loads_nothing(stocked):
    stop = threading.Event()
    stop.set()
    with stocked.lend("mini", stop) as engine:
        assert engine is None
    assert stocked.loaded == "tiny"
    borrow(stocked, "tiny")


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


def test_one_that_is_just_ending_is_not_called_a_download(stand, pull, monkeypatch):
    monkeypatch.setattr(shelf, "ENDING", 0.1)
    monkeypatch.setattr(shelf, "free_memory", lambda: 20 * GB)
    cancel, ended = threading.Event(), threading.Event()
    monkeypatch.setattr(repos, "pull", lambda name, report, stop: ended.wait(10))  # hears of no `stop`
    states = stand.fetch("mini", cancel)
    next(states)
    cancel.set()
    assert list(states) == []
    for name in ("mini", "mega"):
        with pytest.raises(ShelfError, match="the download of mini is just ending"):
            next(stand.fetch(name, threading.Event()))
    ended.set()


def test_who_waits_for_an_ending_download_keeps_nobody_in(stand, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(repos, "pull", lambda name, report, stop: ended.wait(10))
    states = stand.fetch("mini", threading.Event())
    next(states)
    states.close()
    waiter = threading.Thread(target=lambda: list(stand.fetch("mini", threading.Event())))
    waiter.start()
    time.sleep(0.1)
    assert stand._door.acquire(timeout=1)
    stand._door.release()
    ended.set()
    waiter.join()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (hub.HubError("no network"), "^no network$"),
        (OSError(28, "No space left on device", "/home/me/part"), "^No space left on device$"),
        (KeyError("a bug"), "^an error of this program, KeyError, which its log describes"),
    ],
)
def test_failure_reaches_all_who_wait_and_the_next_may_try(stand, pull, caplog, error, said):
    waiting = [stand.fetch("mini", threading.Event()) for _ in range(2)]
    for states in waiting:
        await_bytes(states)
    pull.error = error
    pull.end.set()
    for states in waiting:
        with pytest.raises(ShelfError, match=said) as failure:
            list(states)
        assert failure.value.__cause__ is error
    traced = [record for record in caplog.records if record.exc_info and record.levelno == logging.ERROR]
    assert len(traced) == isinstance(error, KeyError)
    pull.error = None
    list(stand.fetch("mini", threading.Event()))
    assert stand.find("mini").here


def test_visitors_do_not_read_where_the_server_keeps_its_files(stocked, stand, pull, cache, nano_folder):
    """Who runs it does: the cause names the file."""
    (cache / "mini" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ShelfError, match=r"^models.mini.model\.safetensors is ") as failure:
        borrow(stocked, "mini")
    assert str(cache) in str(failure.value.__cause__)
    assert str(stocked._failure("tiny", ValueError(f"{nano_folder / 'config.json'} is missing"))) == (
        "config.json is missing"
    )
    shutil.rmtree(cache / "mini")
    pull.error = hub.HubError(f"2.12 GB are needed in {cache.parent} and 1.00 GB are free")
    pull.end.set()
    with pytest.raises(ShelfError, match=f"^2.12 GB are needed in {cache.parent.name} and"):
        list(stand.fetch("mini", threading.Event()))
