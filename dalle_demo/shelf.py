"""model name -> its engine: one model in memory at a time, and what there is to know of those that are not.

A request borrows the engine of its model with `lend`; `fetch` brings a model that is not here yet. The models of
`unclip` are so small that some stay beside any other: everybody's, and of visitors' own ones the last.
"""

import dataclasses
import gc
import logging
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle_demo import hardware, hub, repos, weights
from dalle_demo.config import PRESETS, SOURCES, UNCLIP_PRESETS, DalleConfig
from dalle_demo.engines import DalleEngine, UnclipEngine
from dalle_demo.weights import Dalle, Unclip

TICK = 0.25  # seconds between two looks at a download, and the longest that it takes to cancel one
UNCLIP = "unclip-nano"
OWN_LOADED = 4  # of visitors' own DALL-E 2 models; the one that nobody has drawn with for longest makes room
ENDING = 5.0  # seconds that a new download waits for a cancelled one to end
CGROUP = Path("/sys/fs/cgroup")  # of a container: what it may take, and takes
MEMINFO = Path("/proc/meminfo")  # of Linux

log = logging.getLogger(__name__)


class ShelfError(ValueError):
    """A model that cannot be had; the message says why, and is for visitors: it names no folder of the server.

    Its cause may.
    """


@dataclass(frozen=True)
class Entry:
    """What there is to know of a model before it is loaded; sizes in bytes."""

    name: str
    title: str  # what people call it; the name, unless that is a secret
    here: bool
    size: int  # of its files: to download, or on this disk
    memory: int  # that it takes when loaded
    room: int | None  # that there would be for it; None where the system does not say
    seconds: float  # a picture takes on this machine, estimated
    licence: str  # empty where the weights do not say
    defaults: dict[str, float]  # settings of GenerateParams that it is served with
    codes: int  # that each piece of a picture is chosen from

    @property
    def fits(self) -> bool:
        """Whether there is memory for it."""
        return self.room is None or self.memory <= self.room


@dataclass(frozen=True)
class Own:
    """A model of one visitor's; `change` is what is done to it when it is loaded, `written` when its files were."""

    title: str
    written: int
    change: Callable[[Dalle], Dalle] = field(compare=False)


@dataclass(frozen=True)
class OwnUnclip:
    """A DALL-E 2 model of one visitor's."""

    title: str
    written: int
    folder: Path

    def named(self, model: Unclip) -> Unclip:
        """The model by its title, which pictures tell."""
        return dataclasses.replace(model, name=self.title)


@dataclass(frozen=True)
class Estimate:
    """What a model takes, which takes seconds to find out."""

    memory: int
    weights: int  # the part of it that is free once another model is loaded
    seconds: float

    @classmethod
    def of(cls, config: DalleConfig) -> "Estimate":
        """Estimate for this machine."""
        return cls(hardware.memory_needed(config), hardware.weight_memory(config), hardware.seconds_per_image(config))


class Shelf:
    """The models that a server can draw with; may be used from many threads.

    Args:
        preset: preset or folder of the model that is loaded at once, and meant where a request names none.
        offline: leave out models that would have to be downloaded.
        load: preset or folder -> engine; takes `form` and `threads` as DalleEngine.load does.
        load_unclip: preset or folder -> engine; takes `change` as UnclipEngine.load does.
        unclip: the same as `preset` of DALL-E 2 models; the shipped one, loaded when it is asked for, when None.
    """

    def __init__(
        self,
        preset: str = "nano",
        offline: bool = False,
        load: Callable[..., DalleEngine] = DalleEngine.load,
        load_unclip: Callable[..., UnclipEngine] = UnclipEngine.load,
        unclip: str | None = None,
    ):
        self._load_engine = load
        self._offline = offline
        self._lock = threading.Lock()  # held by the request that draws
        self._engine: DalleEngine | None = load(preset)
        self._load_unclip = load_unclip
        given = [load_unclip(unclip)] if unclip else []
        self._unclips = {engine.name: engine for engine in given}  # that are loaded
        self.unclip_given = unclip is not None  # the page opens with it then
        self.unclip_home = given[0].name if given else UNCLIP
        others = {name: name for name in UNCLIP_PRESETS if name != self.unclip_home}
        self._unclip_presets = {self.unclip_home: unclip or UNCLIP} | others
        self._own_unclips: dict[str, OwnUnclip] = {}
        self._unclip_door = threading.Lock()  # of who would load it
        self.home = self.loaded = self._engine.name
        self._presets = {self.home: preset} | {name: name for name in PRESETS if name != self.home}
        self._configs = PRESETS | {self.home: self._engine.config}
        self._facts = {self.home: _facts(self._engine)}
        self._own: dict[str, Own] = {}
        self._estimates: dict[str, Estimate] = {}
        self._estimating = threading.Lock()
        self._download: Download | None = None
        self._door = threading.Lock()  # of who comes to a download and who leaves

    def models(self) -> list[Entry]:
        """Models that are here, and those that could be downloaded."""
        return [self._entry(name) for name in self.names()]

    def names(self) -> list[str]:
        """Names of these models, for which nothing has to be estimated."""
        public = [name for name in self._presets if name not in self._own]
        return [name for name in public if self._files(name).folder or (name in SOURCES and not self._offline)]

    def find(self, name: str) -> Entry | None:
        """Entry of that name, if there is one."""
        return self._entry(name) if name in [*self.names(), *self._own] else None

    def adopt(self, name: str, title: str, folder: Path, change: Callable[[Dalle], Dalle]) -> None:
        """Add a model that is drawn with by who knows its name, and that nobody else is told of."""
        config = weights.stored_model(folder)
        with self._door:
            for known in (self._facts, self._estimates):  # those of its base, with which it is compared
                alike = [known[other] for other in list(known) if self._configs[other] == config]  # others add to it
                known.update(dict.fromkeys([name], alike[0]) if alike else {})
            self._configs = self._configs | {name: config}  # new ones: others may be going through these
            self._presets = self._presets | {name: str(folder)}
            own, before = Own(title, _written(folder), change), self._own.get(name)
            self._own = self._own | {name: own}
            if name == self.loaded and own != before:  # it has another title, or was trained on
                self.loaded = None

    def adopt_unclip(self, name: str, title: str, folder: Path) -> None:
        """The same of a DALL-E 2 model, for `unclip`."""
        own = OwnUnclip(title, _written(folder), folder)
        if self._own_unclips.get(name) != own:
            with self._unclip_door:
                self._unclips.pop(name, None)  # which has another title, or was trained on
                self._own_unclips = self._own_unclips | {name: own}

    def is_unclip(self, name: str) -> bool:
        """Whether a name is that of a DALL-E 2 model."""
        return name in self._unclip_presets or name in self._own_unclips

    def drop(self, name: str) -> None:
        """Forget an adopted model, which may go on drawing what it has begun."""
        if name in self._own_unclips:
            with self._unclip_door:
                self._own_unclips = {other: own for other, own in self._own_unclips.items() if other != name}
                self._unclips.pop(name, None)
        with self._door:
            self._own = {other: own for other, own in self._own.items() if other != name}
            if name != self.home:
                self._presets = {other: preset for other, preset in self._presets.items() if other != name}

    def adopted(self) -> list[str]:
        """Names of all adopted models, for nobody's eyes."""
        return [*self._own, *self._own_unclips]

    def title(self, name: str) -> str:
        """What people call a model."""
        own = self._own.get(name) or self._own_unclips.get(name)
        return own.title if own else name

    def trainable(self) -> dict[str, str]:
        """Models here that can be fine-tuned, and their presets or folders; a DALL-E takes an encoder for pictures."""
        able = [name for name in self.names() if self._configs[name].vqgan.encoder and self._files(name).folder]
        presets = {name: self._presets[name] for name in able}
        presets |= {name: name for name in SOURCES if name not in self._configs and _has_encoder(repos.listed(name))}
        presets |= {name: self._unclip_presets[name] for name in self.unclips()}
        return {
            name: str(Path(preset).absolute()) if Path(preset).exists() else preset for name, preset in presets.items()
        }

    def defaults(self, name: str) -> dict[str, float]:
        """Settings that a model is served with."""
        return self._configs[name].defaults

    def codes(self, name: str) -> int:
        """Size of a model's codebook, beyond which top-k chooses no more."""
        return self._configs[name].vqgan.codebook_size

    def facts(self, name: str) -> tuple[str, int] | None:
        """Number format and processor threads that a model last ran with, if it did."""
        return self._facts.get(name)

    @contextmanager
    def lend(self, name: str, stop: threading.Event) -> Iterator[DalleEngine | None]:
        """Engine of a model for the length of one request; None when `stop` is set before its turn.

        Where another model is loaded it is freed first. Raises ShelfError when the wanted one cannot be loaded; then
        none is, and the next request loads its own.
        """
        while not self._lock.acquire(timeout=0.05):
            if stop.is_set():
                yield None
                return
        try:
            if stop.is_set():
                yield None
                return
            if name != self.loaded:
                self._swap(name)
            yield self._engine
        finally:
            self._lock.release()

    def unclips(self) -> list[str]:
        """Names of everybody's DALL-E 2 models whose weights are here, whole or not."""
        return [name for name, preset in self._unclip_presets.items() if _is_here(preset)]

    def unclip(self, name: str | None = None) -> UnclipEngine:
        """Engine of a DALL-E 2 model, loaded when it is first asked for; raises ShelfError where that fails."""
        name = name or self.unclip_home
        with self._unclip_door:
            own = self._own_unclips.get(name)
            if own is None and name not in self._unclip_presets:
                raise ShelfError("it has just been deleted; choose another")
            engine = self._unclips.get(name)
            if engine is None:
                try:
                    preset, options = self._unclip_presets.get(name), {}
                    if own:
                        preset, options = str(own.folder), {"change": own.named}
                    engine = self._load_unclip(preset, **options)
                except (ValueError, OSError, MemoryError, RuntimeError) as error:
                    raise self._failure(name, error) from error
            loaded = {other: kept for other, kept in self._unclips.items() if other != name} | {name: engine}
            for longest in [other for other in loaded if other in self._own_unclips][:-OWN_LOADED]:
                del loaded[longest]
            self._unclips = loaded  # a new one: others may be looking things up
            return engine

    def unclip_facts(self, name: str) -> tuple[str, int] | None:
        """Number format and processor threads of a DALL-E 2 model, if it is loaded."""
        engine = self._unclips.get(name)
        return _facts(engine) if engine else None

    def fetch(self, name: str, cancel: threading.Event) -> Iterator[tuple[int, int]]:
        """Yield bytes done and bytes in all, a few times a second, until a model is here.

        A download goes on for as long as somebody waits for it, whoever began it: setting `cancel`, or closing the
        iterator as a closed tab does, ends it only when nobody else does. Raises ShelfError where it fails.
        """
        download = self._join(name)
        try:
            while download.thread.is_alive() and not cancel.is_set():
                yield download.progress
                download.thread.join(TICK)
        finally:
            with self._door:
                download.leave()
        if not cancel.is_set() and download.error is not None:
            raise self._failure(name, download.error) from download.error

    def fetching(self) -> str | None:
        """Name of the model that is being downloaded, for whomever."""
        download = self._download
        return download.name if download is not None and download.thread.is_alive() else None

    def _swap(self, name: str) -> None:
        if name not in self._presets:
            raise ShelfError("it has just been deleted; choose another")
        entry = self._entry(name)
        if not entry.fits:
            raise ShelfError(_too_big(entry))
        self._engine = self.loaded = None
        gc.collect()  # before the next one is read: the two may not fit beside each other
        former = self._facts.get(name)  # measured again they may be others, which draw other pictures
        options: dict[str, Any] = {} if former is None else {"form": former[0], "threads": former[1]}
        if name in self._own:
            options["change"] = self._own[name].change
        try:
            self._engine = self._load_engine(self._presets[name], **options)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:  # torch's want of memory is a RuntimeError
            raise self._failure(name, error) from error
        self.loaded = name
        if self._configs[name] != self._engine.config:
            self._configs[name] = self._engine.config
            self._estimates.pop(name, None)
        self._facts[name] = _facts(self._engine)

    def _failure(self, name: str, error: Exception) -> ShelfError:
        """What visitors are told of an error, without the folders in which the server keeps its files."""
        if isinstance(error, ValueError):
            sentence, own = str(error), self._own_unclips.get(name)
            home = own.folder if own else Path((self._presets | self._unclip_presets).get(name, name))
            for folder in (home, hub.cache_root(), weights.SHIPPED):
                if folder.name and folder != Path(name):
                    sentence = sentence.replace(f"{folder}{os.sep}", "").replace(str(folder), folder.name)
        elif isinstance(error, OSError):
            sentence = error.strerror or "a file cannot be read or written; the server's log names it"
        elif isinstance(error, MemoryError | RuntimeError):
            sentence = str(error) or "there is not enough memory: close other programs or use a larger computer"
        else:
            sentence = f"an error of this program, {type(error).__name__}, which its log describes; please report it"
        return ShelfError(sentence)

    def _join(self, name: str) -> "Download":
        """The download of that name, which begins unless it is under way."""
        former = self._download
        if former is not None and former.stop.is_set():
            former.thread.join(ENDING)
        with self._door:
            other = self._download
            if self.fetching() == name and not other.stop.is_set():
                other.waiting += 1
                return other
            if self.fetching():
                ending = f"the download of {other.name} is just ending; try again in a moment"
                busy = f"{other.name} is being downloaded, and one model at a time is; try again later"
                raise ShelfError(ending if other.stop.is_set() else busy)
            entry = self.find(name)
            if entry is None or name not in SOURCES:
                known = ", ".join(known for known in self.names() if known in SOURCES) or "none, without a network"
                raise ShelfError(f"there is no {name} to download here; there is: {known}")
            if not entry.fits:
                raise ShelfError(_too_big(entry))
            self._download = Download(name)
            return self._download

    def _entry(self, name: str) -> Entry:
        files, estimate = self._files(name), self._estimate(name)
        return Entry(
            name,
            self.title(name),
            here=files.folder is not None,
            size=files.size,
            memory=estimate.memory,
            room=self._room(),
            seconds=estimate.seconds,
            licence="" if name in self._own else files.licence or (SOURCES[name].licence if name in SOURCES else ""),
            defaults=self.defaults(name),
            codes=self.codes(name),
        )

    def _files(self, name: str) -> repos.Listed:
        """What is known of a model's files, which may be a folder of the user's."""
        preset = self._presets[name]
        if preset in PRESETS or preset in SOURCES:
            return repos.listed(preset)
        files = repos.listed(str(Path(preset).absolute()) if Path(preset).exists() else preset)
        return files if files.folder else repos.Listed(name, Path(preset), 0, "", None, None)

    def _room(self) -> int | None:
        """Bytes that a model could take once the loaded one is freed."""
        free, loaded = free_memory(), self.loaded
        if free is None or loaded is None:
            return free
        limit, room = memory_limit(), free + self._estimate(loaded).weights
        return room if limit is None else min(room, limit)

    def _estimate(self, name: str) -> Estimate:
        with self._estimating:  # once, even when many ask at first
            if name not in self._estimates:
                self._estimates[name] = Estimate.of(self._configs[name])
            return self._estimates[name]


class Download:
    """A model on its way here, in a thread of its own."""

    def __init__(self, name: str):
        self.name = name
        self.waiting = 1
        self.progress = (0, 0)
        self.error: Exception | None = None
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"download of {name}", daemon=True)
        self.thread.start()

    def leave(self) -> None:
        """Wait no longer; who leaves last ends it."""
        self.waiting -= 1
        if self.waiting == 0:
            self.stop.set()

    def _run(self) -> None:
        try:
            repos.pull(self.name, self._report, self.stop)
        except hub.StoppedError:
            pass
        except Exception as error:  # raised again where somebody waits for it
            self.error = error
            if not isinstance(error, ValueError | OSError):
                log.exception("download of %s", self.name)

    def _report(self, done: int, total: int) -> None:
        self.progress = (done, total)


def _written(folder: Path) -> int:
    """When the model of a folder was stored."""
    return (folder / "config.json").stat().st_mtime_ns


def free_memory() -> int | None:
    """Bytes of memory that a model could take now; of a container, what it is allowed. None where unknown."""
    try:
        free = _counts(MEMINFO)["MemAvailable"]
    except (OSError, ValueError, KeyError):
        return _free_of_macos() or memory_limit()  # all there is, where nothing says what is free
    try:
        limit, taken = (int((CGROUP / f"memory.{kind}").read_text(encoding="ascii")) for kind in ("max", "current"))
        cached = _counts(CGROUP / "memory.stat")  # files in memory, which yield to a model
        return min(free, max(0, limit - taken + cached["active_file"] + cached["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no container, or one without a limit, which reads "max"
        return free


def memory_limit() -> int | None:
    """Bytes of memory that all of this machine, or container, has; None where unknown."""
    try:
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    try:
        return min(limit, int((CGROUP / "memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):
        return limit


def _free_of_macos() -> int | None:
    """Bytes in pages that are free or that macOS would take from others first; None elsewhere."""
    try:
        told = subprocess.run(["vm_stat"], capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    page = re.search(r"page size of (\d+) bytes", told)
    pages = re.findall(r"^Pages (?:free|inactive|speculative): +(\d+)", told, re.MULTILINE)
    return int(page[1]) * sum(map(int, pages)) if page else None


def _counts(path: Path) -> dict[str, int]:
    """Numbers of a file of the kernel's, in bytes: `name: 12 kB` or `name 12` a line."""
    counts = {}
    for line in path.read_text(encoding="ascii").splitlines():
        name, number, *unit = line.split()
        counts[name.removesuffix(":")] = int(number) * (1024 if unit else 1)
    return counts


def _too_big(entry: Entry) -> str:
    needed, free = entry.memory / 1e9, (entry.room or 0) / 1e9
    return f"{entry.name} needs {needed:.1f} GB of memory, and {free:.1f} GB are free: close other programs first"


def _is_here(preset: str) -> bool:
    """Whether there are weights of a preset, or in a folder."""
    try:
        return bool(weights.find(preset))
    except ValueError:
        return False


def _has_encoder(files: repos.Listed) -> bool:
    """Whether weights, if they are here, make codes of pictures."""
    try:
        return files.folder is not None and weights.stored_model(files.folder).vqgan.encoder
    except (ValueError, OSError):  # damaged, or just being replaced
        return False


def _facts(engine: DalleEngine | UnclipEngine) -> tuple[str, int]:
    return engine.format, engine.threads
