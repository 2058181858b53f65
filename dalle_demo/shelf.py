"""model name -> its engine: one model in memory at a time, and what there is to know of those that are not.

A request borrows the engine of its model with `lend`; `fetch` brings a model that is not here yet.
"""

import gc
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dalle_demo import hardware, hub, repos
from dalle_demo.config import PRESETS, SOURCES, DalleConfig
from dalle_demo.engines import DalleEngine

TICK = 0.25  # seconds between two looks at a download, and the longest that it takes to cancel one
ENDING = 5.0  # seconds that a new download waits for a cancelled one to end


class ShelfError(ValueError):
    """A model that cannot be had; the message says why."""


@dataclass(frozen=True)
class Entry:
    """What there is to know of a model before it is loaded; sizes in bytes."""

    name: str
    here: bool
    size: int  # of its files: to download, or on this disk
    memory: int  # that it takes when loaded
    room: int | None  # that there would be for it; None where the system does not say
    seconds: float  # a picture takes on this machine, estimated
    licence: str  # empty where the weights do not say
    defaults: dict[str, float]  # settings of GenerateParams that it is served with

    @property
    def fits(self) -> bool:
        """Whether there is memory for it."""
        return self.room is None or self.memory <= self.room


class Shelf:
    """The models that a server can draw with; may be used from many threads.

    Args:
        preset: preset or folder of the model that is loaded at once, and meant where a request names none.
        offline: leave out models that would have to be downloaded.
        load: preset or folder -> engine.
    """

    def __init__(
        self, preset: str = "nano", offline: bool = False, load: Callable[[str], DalleEngine] = DalleEngine.load
    ):
        self._load_engine = load
        self._offline = offline
        self._lock = threading.Lock()  # held by the request that draws
        self._engine: DalleEngine | None = load(preset)
        self.home = self.loaded = self._engine.name
        self._presets = {self.home: preset} | {name: name for name in PRESETS if name != self.home}
        self._configs = PRESETS | {self.home: self._engine.config}
        self._facts = {self.home: _facts(self._engine)}
        self._seconds: dict[str, float] = {}
        self._download: Download | None = None
        self._door = threading.Lock()  # of who comes to a download and who leaves

    def models(self) -> list[Entry]:
        """Models that are here, and those that could be downloaded."""
        entries = [self._entry(name) for name in self._presets]
        return [entry for entry in entries if entry.here or (entry.name in SOURCES and not self._offline)]

    def find(self, name: str) -> Entry | None:
        """Entry of that name, if there is one."""
        return next((entry for entry in self.models() if entry.name == name), None)

    def facts(self, name: str) -> tuple[str, int] | None:
        """Number format and processor threads that a model last ran with, if it did."""
        return self._facts.get(name)

    @contextmanager
    def lend(self, name: str, stop: threading.Event) -> Iterator[DalleEngine | None]:
        """Engine of a model for the length of one request; None when `stop` is set while others draw.

        Where another model is loaded it is freed first. Raises ShelfError when the wanted one cannot be loaded; then
        none is, and the next request loads its own.
        """
        while not self._lock.acquire(timeout=0.05):
            if stop.is_set():
                yield None
                return
        try:
            if name != self.loaded:
                self._swap(name)
            yield self._engine
        finally:
            self._lock.release()

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
            raise ShelfError(str(download.error)) from download.error

    def fetching(self) -> str | None:
        """Name of the model that is being downloaded, for whomever."""
        download = self._download
        return download.name if download is not None and download.thread.is_alive() else None

    def _swap(self, name: str) -> None:
        entry = self._entry(name)
        if not entry.fits:
            raise ShelfError(f"{name} needs {entry.memory:,} bytes of memory, and only {entry.room:,} are free")
        self._engine = self.loaded = None
        gc.collect()  # before the next one is read: the two may not fit beside each other
        try:
            self._engine = self._load_engine(self._presets[name])
        except (ValueError, OSError, MemoryError, RuntimeError) as error:  # torch's want of memory is a RuntimeError
            raise ShelfError(str(error) or "there is not enough memory") from error
        self.loaded = name
        self._configs[name] = self._engine.config
        self._facts[name] = _facts(self._engine)

    def _join(self, name: str) -> "Download":
        """The download of that name, which begins unless it is under way."""
        with self._door:
            other = self._download
            if other is not None and other.stop.is_set():
                other.thread.join(ENDING)
            if self.fetching() == name and not other.stop.is_set():
                other.waiting += 1
                return other
            if self.fetching():
                raise ShelfError(f"{other.name} is being downloaded, and one model at a time is; try again later")
            entry = self.find(name)
            if entry is None or name not in SOURCES or not entry.fits:
                raise ShelfError(f"{name} is not offered for download")
            self._download = Download(name)
            return self._download

    def _entry(self, name: str) -> Entry:
        config, files = self._configs[name], self._files(name)
        return Entry(
            name,
            here=files.folder is not None,
            size=files.size,
            memory=hardware.memory_needed(config),
            room=self._room(),
            seconds=self._seconds_per_image(name, config),
            licence=files.licence or (SOURCES[name].licence if name in SOURCES else ""),
            defaults=config.defaults,
        )

    def _files(self, name: str) -> repos.Listed:
        """What is known of a model's files, which may be a folder of the user's."""
        preset = self._presets[name]
        known = (files for files in repos.listing() if preset in (files.name, str(files.folder)))
        return next(known, repos.Listed(name, Path(preset), 0, "", None, None))

    def _room(self) -> int | None:
        """Bytes that a model could take once the loaded one is freed."""
        free, loaded = free_memory(), self.loaded
        if free is None or loaded is None:
            return free
        return free + hardware.memory_needed(self._configs[loaded])

    def _seconds_per_image(self, name: str, config: DalleConfig) -> float:
        if name not in self._seconds:
            self._seconds[name] = hardware.seconds_per_image(config)
        return self._seconds[name]


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

    def _report(self, done: int, total: int) -> None:
        self.progress = (done, total)


def free_memory() -> int | None:
    """Bytes of memory that a model could take now; of a container, what it is allowed. None where unknown."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        try:  # all there is, where nothing says what is free
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            return None
    try:
        return min(free, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or one without a limit, which reads "max"
        return free


def _facts(engine: DalleEngine) -> tuple[str, int]:
    return engine.format, engine.threads
