"""Weights from the Hub: fetched once, whole or not at all, gone on with after any interruption, and never unawares."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections import namedtuple
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_stub import serving
from tiny import save_tiny, tiny_config

from dalle_demo import convert, hardware, hub, repos, shelf, weights
from dalle_demo.__main__ import ensure, main, progress_line
from dalle_demo.checkpoints import WeightsError
from dalle_demo.config import RemoteFile, Source
from dalle_demo.engines import DalleEngine
from dalle_demo.hub import HubError, StoppedError, download, read_lock
from dalle_demo.repos import pull
from dalle_demo.weights import find, load_dalle

ROOT = Path(__file__).resolve().parent.parent
BIG, SMALL = os.urandom(700_000), b"#version: 0.2\na b\n"
REPO = "someone/some-model"


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Hub of this test alone, and a cache of its own."""
    monkeypatch.setattr(hub, "WAITS", (0.01, 0.01))
    with serving(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def source(stub) -> Source:
    """Two files, one stored as large files are and one as text is."""
    stub.put(REPO, {"big_mini.pt": BIG, "merges_mini.txt": SMALL, "other.pt": b"x"})
    files = {"merges.txt": RemoteFile("merges_mini.txt"), "big.pt": RemoteFile("big_mini.pt", len(BIG) - 1000)}
    return Source(REPO, files, "min-dalle", "Apache-2.0")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache" / "downloads" / "some"


@pytest.fixture
def model(stub, nano_folder, tmp_path) -> str:
    """Repository of our own format."""
    copy = Path(shutil.copytree(nano_folder, tmp_path / "uploaded"))
    (copy / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Tiny\n")
    stub.put("someone/tiny", copy)
    return "someone/tiny"


def is_whole(folder: Path) -> bool:
    return (folder / "big.pt").read_bytes() == BIG and (folder / "merges.txt").read_bytes() == SMALL


def refuse(source: Source, folder: Path, *words: str, reason: str | None = None) -> str:
    """Message of the HubError that a download raises; one line, without secrets, that holds these words."""
    with pytest.raises(HubError) as caught:
        download(source, folder)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    for secret in ("hf_secret", "signature", "http://"):
        assert secret not in message
    assert reason in (None, caught.value.reason)
    assert caught.value.__cause__ is None, "its cause would print what the message leaves out"
    return message


def test_files_arrive_with_a_lock(stub, source, folder):
    reports = []
    download(source, folder, lambda done, total: reports.append((done, total)))
    assert is_whole(folder)
    assert {path.name for path in folder.iterdir()} == {"big.pt", "merges.txt", "lock.json"}
    lock = json.loads((folder / "lock.json").read_text())
    assert (lock["repo"], lock["commit"]) == (REPO, stub.repos[REPO].main)
    for name, path, content in (("big.pt", "big_mini.pt", BIG), ("merges.txt", "merges_mini.txt", SMALL)):
        entry = lock["files"][name]
        assert (entry["path"], entry["size"]) == (path, len(content))
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    whole = len(BIG) + len(SMALL)
    assert reports == sorted(reports)
    assert (reports[0], reports[-1]) == ((0, whole), (whole, whole))
    assert len(reports) > 5


def test_files_are_of_one_commit(stub, source, folder):
    """`main` is asked for once; whatever it is when a file is fetched, the file is of that commit."""
    download(source, folder)
    commit = stub.repos[REPO].main
    assert sum("/revision/main" in request.path for request in stub.requests) == 1
    fetches = [request.path for request in stub.requests if "/resolve/" in request.path]
    assert fetches == [f"/{REPO}/resolve/{commit}/{path}" for path in ("merges_mini.txt", "big_mini.pt")]


def test_a_whole_folder_needs_no_network(stub, source, folder):
    download(source, folder)
    stub.requests.clear()
    download(source, folder)
    assert stub.requests == []


@pytest.mark.parametrize("cuts", [[300_000], [0, 100_000], [1, 1, 600_000]])
def test_goes_on_where_the_connection_broke(stub, source, folder, cuts):
    stub.cuts["big_mini.pt"] = list(cuts)
    download(source, folder)
    assert is_whole(folder)
    starts = [request.start for request in stub.fetched("big_mini.pt")]
    assert starts == [None] + [sum(cuts[: i + 1]) or None for i in range(len(cuts))]


def test_a_later_call_goes_on(stub, source, folder):
    stub.cuts["big_mini.pt"] = [400_000, 0, 0, 0]
    refuse(source, folder, "127.0.0.1", "connection", "goes on")
    assert not (folder / "big.pt").exists()
    stub.requests.clear()
    reports = []
    download(source, folder, lambda done, total: reports.append(done))
    assert is_whole(folder)
    assert [request.start for request in stub.fetched("big_mini.pt")] == [400_000]
    assert reports[0] == 400_000 + len(SMALL)
    assert stub.fetched("merges_mini.txt") == []


def test_a_server_without_ranges_starts_over(stub, source, folder):
    stub.cuts["big_mini.pt"] = [300_000]
    stub.has_ranges = False
    download(source, folder)
    assert is_whole(folder)


def test_a_server_without_ranges_sends_a_part_again_that_lacked_one_byte(stub, source, folder):
    """What is counted is what the file holds now, not what it held before it was emptied."""
    stub.cuts["merges_mini.txt"] = [len(SMALL) - 1, 0, 0, 0]
    refuse(source, folder, "connection")
    stub.has_ranges = False
    download(source, folder)
    assert is_whole(folder)


DOWNLOAD = """
import sys
from pathlib import Path
from dalle_demo import hub
from dalle_demo.config import RemoteFile, Source
files = {"merges.txt": RemoteFile("merges_mini.txt"), "big.pt": RemoteFile("big_mini.pt")}
source = Source(sys.argv[1], files, "min-dalle", "x")
hub.download(source, Path(sys.argv[2]), lambda done, total: print(done, flush=True))
"""


def test_goes_on_after_a_kill(stub, source, folder):
    stub.pause = 0.2
    command = [sys.executable, "-c", DOWNLOAD, REPO, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while int(process.stdout.readline()) < 200_000:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    there = (folder / "big.pt.part").stat().st_size
    assert 0 < there < len(BIG)
    assert not (folder / "big.pt").exists()
    stub.pause = 0
    stub.requests.clear()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    assert is_whole(folder)
    assert [request.start for request in stub.fetched("big_mini.pt")] == [there]


@pytest.mark.parametrize("pause", [0.05, 30], ids=["slow", "silent"])
def test_stops_within_a_second(stub, source, folder, pause):
    stub.pause = pause
    stop = threading.Event()
    threading.Timer(0.4, stop.set).start()
    start = time.monotonic()
    with pytest.raises(StoppedError, match="goes on"):
        download(source, folder, stop=stop)
    assert time.monotonic() - start < 1.9
    assert not (folder / "big.pt").exists()
    stub.pause = 0
    download(source, folder)
    assert is_whole(folder)


def test_stops_while_waiting_to_try_again(stub, source, folder, monkeypatch):
    monkeypatch.setattr(hub, "WAITS", (60,))
    stub.statuses["big_mini.pt"] = [503]
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(StoppedError):
        download(source, folder, stop=stop)


@pytest.mark.parametrize("status", [503, 429, 500])
def test_a_passing_fault_is_waited_out(stub, source, folder, status):
    stub.statuses["big_mini.pt"] = [status, status]
    download(source, folder)
    assert is_whole(folder)


def test_a_lasting_fault(stub, source, folder):
    stub.statuses["big_mini.pt"] = [503] * 9
    refuse(source, folder, REPO, "503", "later", reason="unavailable")


def test_wrong_hash(stub, source, folder):
    stub.replaced["big_mini.pt"] = BIG[:-1] + bytes([BIG[-1] ^ 1])
    refuse(source, folder, "big_mini.pt", "hash", reason="wrong_hash")
    assert not list(folder.glob("big*")), "what is wrong must not be gone on with"
    stub.replaced.clear()
    download(source, folder)
    assert is_whole(folder)


def test_wrong_hash_of_a_small_file(stub, source, folder):
    """Of these the Hub knows no sha256, but the id of a git blob."""
    stub.replaced["merges_mini.txt"] = SMALL.replace(b"a", b"b")
    refuse(source, folder, "merges_mini.txt", "hash")


@pytest.mark.parametrize(("content", "words"), [(BIG[:-5], ["truncated"]), (BIG + b"12345", ["longer"])])
def test_other_length_than_announced(stub, source, folder, content, words):
    stub.replaced["big_mini.pt"] = content
    refuse(source, folder, "big", *words)
    assert not (folder / "big.pt").exists()
    stub.replaced.clear()
    download(source, folder)
    assert is_whole(folder)


@pytest.mark.parametrize("size", [len(BIG) + 1, len(BIG) - 2_000_001], ids=["too small", "too large"])
def test_a_file_of_another_size_is_not_fetched(stub, source, folder, size):
    big = {"big.pt": RemoteFile("big_mini.pt", size)}
    refuse(Source(REPO, source.files | big, "min-dalle", "x"), folder, "big_mini.pt", f"{len(BIG):,}", f"{size:,}")
    assert stub.fetched("big_mini.pt") == []


def test_no_such_file(stub, source, folder):
    files = source.files | {"vocab.json": RemoteFile("vocab_mini.json")}
    refuse(Source(REPO, files, "min-dalle", "x"), folder, REPO, "vocab_mini.json", "--revision")


def test_a_file_that_may_be_absent(stub, source, folder):
    optional = {"vocab.json": RemoteFile("vocab_mini.json", needed=False)}
    source = dataclasses.replace(source, files=source.files | optional)
    download(source, folder)
    assert is_whole(folder)
    assert not (folder / "vocab.json").exists()
    stub.requests.clear()
    download(source, folder)
    assert stub.requests == []
    later = stub.put(REPO, {"big_mini.pt": BIG, "merges_mini.txt": SMALL, "vocab_mini.json": b"{}"})
    download(dataclasses.replace(source, revision=later), folder)
    assert (folder / "vocab.json").read_bytes() == b"{}"


def test_a_second_repository_comes_along(stub, source, folder, monkeypatch):
    """As that of the picture tokenizer does; it is counted where bytes are, and gone on with as the first is."""
    content = {"config.json": b"{}", "flax_model.msgpack": BIG[::-1]}
    commit = stub.put("someone/vqgan", content)
    stub.put("someone/vqgan", {})
    vqgan = Source("someone/vqgan", {name: RemoteFile(name) for name in content}, "flax", "x", commit)
    source, whole = dataclasses.replace(source, form="flax", vqgan=vqgan), 2 * len(BIG) + len(SMALL) + 2
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(hub.shutil, "disk_usage", lambda path: usage(10**9, 0, 2 * whole - 1))
        refuse(source, folder, "GB are needed")
    assert stub.fetched("big_mini.pt") == []
    stub.cuts["flax_model.msgpack"] = [400_000, 0, 0, 0]
    refuse(source, folder, "connection")
    reports = []
    download(source, folder, lambda done, total: reports.append((done, total)))
    assert reports == sorted(reports)
    assert (reports[0], reports[-1]) == ((len(BIG) + len(SMALL) + 2 + 400_000, whole), (whole, whole))
    assert is_whole(folder)
    assert {name: (folder / "vqgan" / name).read_bytes() for name in content} == content
    assert read_lock(folder).repo == REPO
    assert read_lock(folder / "vqgan").commit == commit
    stub.requests.clear()
    download(source, folder)
    assert stub.requests == []


def test_no_such_repository(stub, source, folder, monkeypatch):
    refuse(Source("someone/else", source.files, "min-dalle", "x"), folder, "someone/else", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", stub.token)
    refuse(Source("someone/else", source.files, "min-dalle", "x"), folder, "someone/else", "404", reason="missing")


def test_no_such_commit(stub, source, folder):
    refuse(Source(REPO, source.files, "min-dalle", "x", revision="0" * 40), folder, REPO, "revision")


def test_private_and_gated(stub, source, folder, monkeypatch):
    stub.repos[REPO].private = True
    refuse(source, folder, REPO, "401", "HF_TOKEN")
    stub.repos[REPO].private, stub.repos[REPO].gated = False, True
    refuse(source, folder, REPO, "401", "gated", "HF_TOKEN")
    stub.repos[REPO].private = True
    monkeypatch.setenv("HF_TOKEN", stub.token)
    download(source, folder)
    assert is_whole(folder)


@pytest.mark.parametrize("status", [401, 403])
def test_refused(stub, source, folder, status):
    stub.statuses["big_mini.pt"] = [status]
    refuse(source, folder, REPO, str(status), "HF_TOKEN", reason="refused")


def test_the_token_stays_on_the_hub(stub, source, folder, monkeypatch):
    """Large files come from another host, which must not learn it."""
    monkeypatch.setenv("HF_TOKEN", stub.token)
    download(source, folder)
    tokens = {request.host: set() for request in stub.requests}
    for request in stub.requests:
        tokens[request.host].add(request.token)
    assert tokens["127.0.0.1"] == {stub.token}
    assert tokens["localhost"] == {None}


def test_nobody_answers(stub, source, folder, monkeypatch):
    stub.shutdown()
    stub.server_close()
    refuse(source, folder, "127.0.0.1", "connection", reason="unreachable")
    monkeypatch.setenv("HF_ENDPOINT", "http://name:hf_secret@no-such-host.invalid")
    refuse(source, folder, "no-such-host.invalid", "connection")


@pytest.mark.parametrize("page", [b"<html>sign in</html>", b"{}", b"[]", b'{"sha": 3, "siblings": [{}]}'])
def test_something_else_answers(stub, source, folder, page):
    stub.page = page
    refuse(source, folder, "127.0.0.1", "does not answer as the Hub")


@pytest.mark.parametrize("place", ["_append", "_write_lock"])
def test_faults_of_this_program_are_not_put_on_the_hub(stub, source, folder, monkeypatch, place):
    def fail(*_):
        raise TypeError("a bug")

    monkeypatch.setattr(hub, place, fail)
    with pytest.raises(TypeError, match="a bug"):
        download(source, folder)


def test_an_address_that_is_none(stub, source, folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:port")
    refuse(source, folder, "cannot reach the Hub", "InvalidURL")


def test_offline_by_choice(stub, source, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refuse(source, folder, "HF_HUB_OFFLINE")
    assert stub.requests == []


def test_no_room_on_the_disk(stub, source, folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    both = 2 * (len(BIG) + len(SMALL))  # as it comes, and converted
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage(10**9, 0, both - 1))
    refuse(source, folder, str(folder), "GB are needed", "DALLE_DEMO_CACHE", reason="no_room")
    assert stub.fetched("big_mini.pt") == []
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage(10**9, 0, both))
    download(source, folder)


def test_the_disk_fills_up(stub, source, folder, monkeypatch):
    def fail(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hub.os, "fsync", fail)
        refuse(source, folder, str(folder), "full")
    download(source, folder)
    assert is_whole(folder)


def test_what_is_begun_is_ended_from_the_same_commit(stub, source, folder, caplog):
    stub.cuts["big_mini.pt"] = [400_000, 0, 0, 0]
    refuse(source, folder)
    first, second = stub.repos[REPO].main, stub.put(REPO, {"big_mini.pt": BIG[::-1], "merges_mini.txt": SMALL})
    download(source, folder)
    assert is_whole(folder)
    assert read_lock(folder).commit == first
    assert second in caplog.text
    assert "--update" in caplog.text


def test_a_certain_commit(stub, source, folder):
    """A folder of another commit is cleared, down to what had begun to arrive."""
    stub.cuts["big_mini.pt"] = [400_000, 0, 0, 0]
    refuse(source, folder)
    stub.put(REPO, {"big_mini.pt": BIG[::-1], "merges_mini.txt": SMALL})
    third = stub.put(REPO, {"big_mini.pt": BIG[100:] + BIG[:100], "merges_mini.txt": SMALL, "new": b""})
    stub.put(REPO, {})
    download(Source(REPO, source.files, "min-dalle", "x", revision=third), folder)
    assert (folder / "big.pt").read_bytes() == BIG[100:] + BIG[:100]
    assert read_lock(folder).commit == third


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"repo": 1, "commit": 2, "files": {"a": {}}}'])
def test_a_damaged_lock_is_none(stub, source, folder, text):
    folder.mkdir(parents=True)
    (folder / "lock.json").write_text(text)
    (folder / "big.pt").write_bytes(b"of who knows which commit")
    assert read_lock(folder) is None
    download(source, folder)
    assert is_whole(folder)


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("DALLE_DEMO_CACHE", "~/somewhere")
    assert hub.cache_root() == Path.home() / "somewhere"
    monkeypatch.delenv("DALLE_DEMO_CACHE")
    monkeypatch.setattr(hub.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert hub.cache_root() == Path("/elsewhere/dalle_demo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.cache_root() == Path.home() / ".cache" / "dalle_demo"


# Whole models: repos.pull and the commands.


def test_pulled_once(stub, model, nano_folder):
    folder = pull(model)
    assert folder == hub.cache_root() / "models" / "someone" / "tiny"
    assert find(model) == folder
    before, after = load_dalle(str(nano_folder)), load_dalle(model)
    assert after.sha256 == before.sha256
    assert after.name == load_dalle(str(folder)).name == model
    origin = {"model": model, "weights": after.sha256[:12], "format": "float32", "threads": 1}
    assert DalleEngine.like(origin).name == model, "pictures name it by what finds it again"
    assert read_lock(folder).commit == stub.repos[model].main
    assert not (hub.cache_root() / "downloads" / "someone" / "tiny").exists()
    stub.requests.clear()
    assert pull(model) == folder
    load_dalle(model)
    assert stub.requests == []


def test_nothing_loads_before_it_is_whole(stub, model):
    stub.cuts["model.safetensors"] = [30_000, 0, 0, 0]
    with pytest.raises(HubError):
        pull(model)
    with pytest.raises(WeightsError, match=r"weights pull someone/tiny"):
        find(model)
    load_dalle(str(pull(model)))
    assert 30_000 in [request.start for request in stub.fetched("model.safetensors")]


def test_a_move_is_followed_when_asked(stub, model, tmp_path, capsys):
    folder = pull(model)
    old = load_dalle(model).sha256
    new = tmp_path / "new"
    save_tiny(new, tiny_config(channels=8))
    (new / "README.md").write_text("# Tiny")
    stub.put(model, new)
    stub.requests.clear()
    assert pull(model) == folder
    assert stub.requests == []
    assert main(["weights", "list", "--check"]) == 0
    assert "weights pull someone/tiny --update" in capsys.readouterr().out
    pull(model, update=True)
    assert read_lock(folder).commit == stub.repos[model].main
    assert load_dalle(model).config == tiny_config(channels=8)
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    main(["weights", "list", "--check"])
    assert "someone/tiny is at this commit still" in capsys.readouterr().out
    pull(model, revision=next(iter(stub.repos[model].commits)))
    assert load_dalle(model).sha256 == old


def test_an_update_that_fails_leaves_the_old_model(stub, model):
    pull(model)
    stub.put(model, {"config.json": b"{}"})
    for wanted in ({"update": True}, {"revision": "1" * 40}):
        with pytest.raises(HubError):
            pull(model, **wanted)
        load_dalle(model)


def test_a_repository_of_something_else(stub):
    files = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x", "tokenizer.json": b"{}"}
    stub.put("someone/bert", files | {"README.md": b"# BERT"})
    with pytest.raises(WeightsError, match=r"config\.json"):
        pull("someone/bert")
    with pytest.raises(WeightsError):
        find("someone/bert")


@pytest.mark.parametrize("wanted", ["--update", "--revision"])
@pytest.mark.parametrize("content", [None, b"x" * 100], ids=["one byte", "all"])
def test_damaged_weights_are_mended(stub, model, wanted, content):
    """The message names the command that does it, which leaves weights alone that are as they should be."""
    path = pull(model) / "model.safetensors"
    command = ["weights", "pull", model, wanted, *([stub.repos[model].main] if wanted == "--revision" else [])]
    stub.requests.clear()
    assert main(command) == 0
    assert stub.fetched("model.safetensors") == []
    right = path.read_bytes()
    path.write_bytes(content or right[:-1] + bytes([right[-1] ^ 1]))
    with pytest.raises(WeightsError, match=f"weights pull {model} --update` fetches these weights anew"):
        load_dalle(model)
    assert main(command) == 0
    assert path.read_bytes() == right
    load_dalle(model)


def test_a_repository_whose_parts_do_not_fit(stub, nano_folder, tmp_path):
    """Every file is as the Hub announces it, and the model would still draw noise."""
    copy = Path(shutil.copytree(nano_folder, tmp_path / "unfit"))
    save_tiny(tmp_path / "other", tiny_config(channels=8))
    shutil.copy(tmp_path / "other" / "model.safetensors", copy)
    (copy / "README.md").write_text("# Tiny")
    stub.put("someone/unfit", copy)
    with pytest.raises(WeightsError, match=r"sha256.*someone/unfit"):
        pull("someone/unfit")
    with pytest.raises(WeightsError):
        find("someone/unfit")
    fit = Path(shutil.copytree(nano_folder, tmp_path / "fit"))
    (fit / "README.md").write_text("# Tiny")
    stub.put("someone/unfit", fit)
    load_dalle(str(pull("someone/unfit", update=True)))


@pytest.mark.parametrize("name", ["gigantic", "../x", "a/b/c", "someone/..", "/tmp/x", "", "."])
def test_names_that_cannot_be_pulled(stub, name):
    with pytest.raises(WeightsError, match="mini"):
        pull(name)
    assert stub.requests == []
    assert not hub.cache_root().exists()


def test_revisions_are_whole_commits(stub, model):
    with pytest.raises(WeightsError, match="40"):
        pull(model, revision="main")


def test_one_at_a_time(stub, model):
    with hub.alone(hub.cache_root() / "downloads" / model), pytest.raises(HubError, match="already"):
        pull(model)
    pull(model)


def test_what_is_shipped_is_not_pulled(stub, nano_folder, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", nano_folder.parent)
    assert pull(nano_folder.name) == nano_folder
    assert stub.requests == []


def test_a_preset_that_is_not_here(stub):
    with pytest.raises(WeightsError, match="python -m dalle_demo weights pull mini`"):
        find("mini")
    with pytest.raises(WeightsError, match="python -m dalle_demo weights pull someone/tiny`"):
        load_dalle("someone/tiny")
    assert stub.requests == []


def test_a_preset_is_converted(stub, source, nano_folder, monkeypatch):
    """What arrives is handed to the converter; what it makes appears under the preset's name, with a card."""
    tiny = load_dalle(str(nano_folder))
    parts = {part: getattr(tiny, part).state_dict() for part in weights.PARTS}
    seen = []

    def fake(folder, form, config):
        seen.append((form, config, is_whole(folder)))
        return convert.Converted(config, parts, tiny.tokenizer)

    monkeypatch.setattr(convert, "convert", fake)
    monkeypatch.setitem(repos.SOURCES, "some", source)
    monkeypatch.setitem(repos.PRESETS, "some", tiny.config)
    folder = pull("some")
    assert seen == [("min-dalle", tiny.config, True)]
    assert folder == hub.cache_root() / "models" / "some"
    assert {path.name for path in folder.iterdir()} == {*repos.FILES, "lock.json"}
    assert not list(hub.cache_root().rglob("big.pt"))
    loaded = load_dalle("some")
    assert loaded.config == tiny.config
    assert torch.equal(loaded.vqgan.decoder.conv_out.weight.float(), tiny.vqgan.decoder.conv_out.weight.float())
    card = (folder / "README.md").read_text()
    for word in ("license: apache-2.0", REPO, stub.repos[REPO].main, 'load("some")'):
        assert word in card


def test_conversion_that_was_killed(stub, source, folder, nano_folder, monkeypatch):
    """What had arrived is not fetched again."""
    tiny = load_dalle(str(nano_folder))
    monkeypatch.setitem(repos.SOURCES, "some", source)
    monkeypatch.setitem(repos.PRESETS, "some", tiny.config)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "convert", killed)
        with pytest.raises(KeyboardInterrupt):
            pull("some")
    with pytest.raises(WeightsError):
        find("some")
    stub.requests.clear()
    parts = {part: getattr(tiny, part).state_dict() for part in weights.PARTS}
    monkeypatch.setattr(convert, "convert", lambda *_: convert.Converted(tiny.config, parts, tiny.tokenizer))
    load_dalle(str(pull("some")))
    assert stub.requests == []


@pytest.fixture
def converted(stub, source, nano_folder, monkeypatch) -> types.ModuleType:
    """Module of a converter that makes the tiny model of whatever the preset `some` fetches."""
    tiny = load_dalle(str(nano_folder))
    parts = {part: getattr(tiny, part).state_dict() for part in weights.PARTS}
    monkeypatch.setattr(convert, "convert", lambda *_: convert.Converted(tiny.config, parts, tiny.tokenizer))
    monkeypatch.setitem(repos.SOURCES, "some", source)
    monkeypatch.setitem(repos.PRESETS, "some", tiny.config)
    return convert


@pytest.mark.parametrize("step", ["download", "convert", "save_tensors"])
def test_conversion_can_be_stopped(converted, monkeypatch, step):
    """Whatever step it was in, nothing appears after that, and nothing half made stays."""
    stop, place = threading.Event(), {"download": hub, "convert": converted, "save_tensors": repos}[step]
    original = getattr(place, step)

    def stop_during(*args, **rest):
        stop.set()
        return original(*args[:3], **rest) if step == "download" else original(*args, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(place, step, stop_during)
        with pytest.raises(StoppedError, match="goes on"):
            pull("some", stop=stop)
    assert not list((hub.cache_root() / "models").glob("*"))
    load_dalle(str(pull("some")))


def test_a_converted_model_keeps_every_lock(stub, source, converted, monkeypatch):
    commit = stub.put("someone/vqgan", {"config.json": b"{}"})
    vqgan = Source("someone/vqgan", {"config.json": RemoteFile("config.json")}, "flax", "x", commit)
    monkeypatch.setitem(repos.SOURCES, "some", dataclasses.replace(source, form="flax", vqgan=vqgan))
    folder = pull("some")
    assert read_lock(folder).repo == REPO
    lock = json.loads((folder / "vqgan-lock.json").read_text())
    assert (lock["repo"], lock["commit"]) == ("someone/vqgan", commit)
    assert lock["files"]["config.json"]["sha256"] == hashlib.sha256(b"{}").hexdigest()


def test_listing_survives_what_others_have_written(stub, model):
    folder = pull(model)
    (folder / "README.md").write_bytes("---\nlicense: mit\n---\n# Müller".encode("latin-1"))
    assert {entry.name: entry.licence for entry in repos.listing()}[model] == "mit"


def test_listing_survives_what_goes_away_meanwhile(stub, model, monkeypatch):
    """As a folder does for a moment while an update takes its place."""
    pull(model)
    monkeypatch.setattr(hub, "read_lock", lambda folder: shutil.rmtree(folder))
    assert repos.listed(model).folder is None


def test_check_passes_over_a_repository_that_is_gone(stub, model, tmp_path, capsys):
    stub.put("someone/zebra", tmp_path / "uploaded")
    pull(model)
    pull("someone/zebra")
    stub.put("someone/zebra", tmp_path / "uploaded")
    stub.repos[model].private = True
    assert main(["weights", "list", "--check"]) == 0
    printed = capsys.readouterr().out
    assert f"the Hub has no repository {model}" in printed
    assert "someone/zebra has moved on" in printed


def test_check_says_so_where_nothing_was_fetched(stub, capsys):
    assert main(["weights", "list", "--check"]) == 0
    assert "nothing to check" in capsys.readouterr().out
    assert stub.requests == []


def test_list_advises_nothing_that_is_refused(stub, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    assert main(["weights", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "not here" in lines["nano"]
    assert "weights pull" not in lines["nano"]


def test_list(stub, model, capsys):
    pull(model)
    stub.requests.clear()
    assert main(["weights", "list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "1.06 GB" in lines["mini"]
    assert "5.36 GB" in lines["mega"]
    for word in ("Apache-2.0", "kuprel/min-dalle", "weights pull mini"):
        assert word in lines["mini"]
    for word in ("size not known before download", "dalle-mini/dalle-mega", "weights pull mega-flax"):
        assert word in lines["mega-flax"]
    assert str(ROOT / "weights" / "nano") in lines["nano"]
    for word in ("cc-by-4.0", stub.repos[model].main[:12], str(find(model))):
        assert word in lines[model]
    assert stub.requests == []


def test_pull_command(stub, model, capsys):
    assert main(["weights", "pull", model]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(find(model))
    assert printed.err == "", "no progress where there is no terminal"
    assert main(["weights", "pull", "someone/nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: the Hub has no repository someone/nothing")


def test_interrupted_pull_command(stub, model, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(repos.hub, "download", interrupt)
    assert main(["weights", "pull", model]) == 2
    assert capsys.readouterr().err.strip() == "stopped; the same command goes on"


def test_progress_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    clock = iter([100.0, 110.0, 110.1, 120.0])
    monkeypatch.setattr("dalle_demo.__main__.time.monotonic", lambda: next(clock))
    report = progress_line("mini", sys.stderr)
    for done in (200_000_000, 300_000_000, 310_000_000, 1_000_000_000):
        report(done, 1_000_000_000)
    first, second, third = capsys.readouterr().err.strip().split("\r")
    assert first.strip() == "mini: 20 % of 1.00 GB, 0.0 MB/s"
    assert second.strip() == "mini: 30 % of 1.00 GB, 10.0 MB/s, 1:10 left"
    assert third.strip() == "mini: 100 % of 1.00 GB, 40.0 MB/s, 0:00 left"


def test_the_page_fetches_what_is_not_here(stub, model, nano_folder, capsys):
    assert ensure(str(nano_folder)) == str(nano_folder)
    assert stub.requests == []
    assert ensure(model) == model
    assert "there is no someone/tiny on this computer" in capsys.readouterr().err
    stub.requests.clear()
    assert ensure(model) == model
    assert stub.requests == []
    with pytest.raises(WeightsError, match="gigantic"):
        ensure("gigantic")


def test_what_does_not_fit_into_memory_is_not_fetched_for_the_page(stub, source, monkeypatch, capsys):
    monkeypatch.setitem(repos.SOURCES, "some", dataclasses.replace(source, preset="nano"))
    needed = hardware.memory_needed(repos.PRESETS["nano"])
    monkeypatch.setattr(shelf, "free_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=r"some needs .* GB of memory .* free"):
        ensure("some")
    assert stub.requests == []
    assert main(["weights", "pull", "some"]) == 2, "what the repository holds is no model"
    assert "warning: some needs" in capsys.readouterr().err
    assert stub.requests != []
    for free in (needed, None):
        monkeypatch.setattr(shelf, "free_memory", lambda free=free: free)
        main(["weights", "pull", "some"])
        assert "warning" not in capsys.readouterr().err


def test_push_and_pull_back(stub, nano_folder, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(nano_folder, tmp_path / "mine"))
    arguments = ["weights", "push", str(folder), "--to", "tester/mine", "--private"]
    assert main(arguments) == 2
    assert "README.md" in capsys.readouterr().err
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# Mine\n")
    (folder / "samples.png").write_bytes(b"pictures that the card shows")
    for name in ("notes.txt", "private.png", "out/private.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not for others")
    (folder / "lock.json").write_text("{}")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "HF_TOKEN" in error
    assert "hf_secret" not in error
    assert stub.repos == {}
    monkeypatch.setenv("HF_TOKEN", stub.token)
    assert main(arguments) == 0
    assert f"{stub.endpoint}/tester/mine" in capsys.readouterr().out
    repo = stub.repos["tester/mine"]
    assert repo.private
    assert set(repo.commits[repo.main]) == {*repos.FILES, "samples.png"}
    assert load_dalle(str(pull("tester/mine"))).sha256 == load_dalle(str(folder)).sha256


def test_private_weights_do_not_go_to_a_public_place(stub, nano_folder, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(nano_folder, tmp_path / "mine"))
    (folder / "README.md").write_text("# Mine")
    stub.put("tester/mine", {})
    monkeypatch.setenv("HF_TOKEN", stub.token)
    assert main(["weights", "push", str(folder), "--to", "tester/mine", "--private"]) == 2
    assert "public" in capsys.readouterr().err
    assert stub.repos["tester/mine"].commits[stub.repos["tester/mine"].main] == {}


def test_push_refuses_what_does_not_load(stub, nano_folder, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(nano_folder, tmp_path / "mine"))
    (folder / "README.md").write_text("# Mine")
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    monkeypatch.setenv("HF_TOKEN", stub.token)
    assert main(["weights", "push", str(folder), "--to", "tester/mine"]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert stub.requests == []


def test_push_where_one_may_not_write(stub, nano_folder, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(nano_folder, tmp_path / "mine"))
    (folder / "README.md").write_text("# Mine")
    monkeypatch.setenv("HF_TOKEN", stub.token)
    assert main(["weights", "push", str(folder), "--to", "another/mine"]) == 2
    assert "403" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--preset", "gigantic", "--out", "new"], "mini"), (["--preset", "mini", "--out", "."], "already")],
)
def test_convert_says_what_is_wrong(tmp_path, capsys, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    assert main(["weights", "convert", "files", "--form", "min-dalle", *arguments]) == 2
    assert word in capsys.readouterr().err


def test_convert_command(tmp_path, nano_folder, monkeypatch, capsys):
    tiny = load_dalle(str(nano_folder))
    parts = {part: getattr(tiny, part).state_dict() for part in weights.PARTS}
    monkeypatch.setattr(convert, "convert", lambda *_: convert.Converted(tiny.config, parts, tiny.tokenizer))
    out = tmp_path / "new" / "out"
    assert main(["weights", "convert", "files", "--form", "flax", "--preset", "mini", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert load_dalle(str(out)).config == tiny.config
    assert [path.name for path in out.parent.iterdir()] == ["out"]
