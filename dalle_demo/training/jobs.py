"""visitors' wishes -> training runs, one at a time, each a process of its own: `python -m dalle_demo train finetune`.

A job is a folder: job.json, which says what its owner wants, and run/, the run folder of training/finetune.py, which
says how far that is. Nothing else is remembered, so a server that starts finds what another one has left.
"""

import atexit
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from dalle_demo import hub
from dalle_demo.training.export import read_log

try:
    import fcntl
except ImportError:  # Windows, where the run of a server that was killed is not found again
    fcntl = None

ROOT = Path(__file__).resolve().parents[2]  # from where `python -m dalle_demo` is found
DAY = 24 * 3600.0  # seconds
KEPT = {"draft": DAY, "started": 30 * DAY}  # since the owner last did something
TRIES = 3  # starts of a process without a new checkpoint, after which a job counts as failed
NICENESS = 10  # a tenth of the processor for training while somebody draws, all of it when nobody does
TICK = 0.5  # seconds between two looks at the running process
HOUR = 3600.0  # seconds between two looks for what is to be deleted
RETRY = 60.0  # seconds until a job is tried again whose trouble cannot be written down
MAX_WAITING, MAX_OWN = 16, 2  # jobs that run or wait, of all owners and of one
MAX_TITLE = 60  # characters
ENDED = ("done", "stopped", "failed")

log = logging.getLogger(__name__)


class JobError(ValueError):
    """What cannot be done with a job; `key` and `values` are for who says it in the visitor's language."""

    def __init__(self, key: str, **values: Any):
        super().__init__(f"{key}: {values}" if values else key)
        self.key, self.values = key, values


@dataclass(frozen=True)
class Job:
    """What an owner wants."""

    id: str
    owner: str  # hash of what only the owner's browser knows
    title: str
    wish: Literal["draft", "run", "pause", "stop"]
    asked: float  # when its owner last asked for its turn
    strength: float = 1.0  # of the adapters, when it draws
    expected: float | None = None  # seconds that it takes in all, as estimated before its start
    trouble: str = ""  # why it cannot run


@dataclass(frozen=True)
class State:
    """How far a job is."""

    state: Literal[
        "draft", "waiting", "preparing", "running", "pausing", "paused", "stopping", "stopped", "done", "failed"
    ]
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    message: str = ""  # of what failed
    notice: tuple[str, dict[str, int]] = ("early", {})  # how the training goes, as training/watch.py judges it
    ahead: int = 0  # jobs that come first
    doing: tuple[str, dict[str, int]] | None = None  # before the first step: one of DOINGS in training/watch.py


class Jobs:
    """All jobs of a folder. May be used from many threads, and by several servers at once."""

    def __init__(self, root: Path | None = None):
        self.root = root or hub.cache_root() / "jobs"
        self._tries: dict[str, tuple[float, int]] = {}  # time of the checkpoint at the last start, starts since then
        self._changes = threading.RLock()  # of job.json
        self._wake, self._closed = threading.Event(), threading.Event()
        self._keeper: threading.Thread | None = None
        self._process: subprocess.Popen | None = None
        self._turn = ""  # id of the job whose process that is
        if self.root.is_dir():
            self._clear()
            self._keep()
        threading.Thread(target=self._clear_hourly, name="old training jobs", daemon=True).start()

    # what owners do

    def create(self, owner: str) -> Job:
        """The owner's draft, a new one if there is none yet, which waits for its pictures."""
        self._clear()
        with self._changes:
            for job in self.of(owner):
                if job.wish == "draft":
                    return self._write(job)
            job = Job(secrets.token_hex(16), _hash(owner), "", "draft", time.time())
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)  # nobody else's on this machine
            self.run(job).mkdir(parents=True)
            return self._write(job)

    def of(self, owner: str) -> list[Job]:
        """Jobs of an owner, the newest first."""
        mine = [job for job in self._all() if job.owner == _hash(owner)]
        return sorted(mine, key=lambda job: job.asked, reverse=True)

    def get(self, owner: str, name: str) -> Job:
        """Job of an owner; of anybody else's, JobError says that there is none."""
        job = self._read(name) if re.fullmatch("[0-9a-f]{32}", name or "") else None
        if job is None or job.owner != _hash(owner):
            raise JobError("job_unknown")
        return job

    def run(self, job: Job) -> Path:
        """Run folder."""
        return self.root / job.id / "run"

    def data(self, job: Job) -> Path:
        """Folder of the prepared pictures."""
        return self.run(job) / "data"

    def weights(self, job: Job) -> Path | None:
        """Folder of the tuned model, if the training is over and has left one."""
        folder = self.run(job) / "weights"
        return folder if self.state(job).state in ENDED and (folder / "config.json").exists() else None

    def put_data(self, job: Job, folder: Path) -> None:
        """Move prepared pictures into a draft, in the place of those that it had."""
        with self.editing(job):
            shutil.rmtree(self.data(job), ignore_errors=True)
            folder.replace(self.data(job))

    def touch(self, job: Job) -> None:
        """Remember that the owner has done something; JobError when the job is no draft any more."""
        with self._changes:
            if self._fresh(job).wish != "draft":
                raise JobError("job_started")
            self._write(self._fresh(job))

    @contextlib.contextmanager
    def editing(self, job: Job) -> Iterator[None]:
        """Keep a draft from being started while it is changed; JobError when it is none any more."""
        with self._changes:
            self.touch(job)
            yield

    def settings(self, job: Job) -> dict[str, Any]:
        """Those of the run, as training/finetune.py has them."""
        return json.loads((self.run(job) / "settings.json").read_text(encoding="utf-8"))

    def start(self, job: Job, title: str, settings: dict[str, Any], expected: float | None = None) -> Job:
        """Put a draft into the queue; settings that are left out are those of training/finetune.py."""
        with self._changes:
            if self._fresh(job).wish != "draft":
                raise JobError("job_started")
            self._refuse_too_many(job)
            path = self.run(job) / "settings.json"  # not flags, which everybody on this machine could read
            path.write_text(json.dumps(settings | {"data": str(self.data(job))}, ensure_ascii=False), encoding="utf-8")
            started = self._change(job, title=tidy(title), wish="run", asked=time.time(), expected=expected)
        self._keep()
        return started

    def resume(self, job: Job) -> Job:
        """Let a paused or failed job go on when its turn comes."""
        if self.state(job).state not in ("paused", "failed"):
            return job
        with self._changes:
            self._refuse_too_many(job)
            (self.run(job) / "state.json").unlink(missing_ok=True)
            self._tries.pop(job.id, None)
            job = self._change(job, wish="run", asked=time.time(), trouble="")
        self._keep()
        return job

    def pause(self, job: Job) -> Job:
        """Let a job rest after a checkpoint, or at once when it has not come to its first step."""
        return self._end(job, "pause")

    def stop(self, job: Job) -> Job:
        """End a job after a checkpoint, or at once when it has not come to its first step, and keep what was best."""
        return self._end(job, "stop")

    def save(self, job: Job) -> None:
        """Have a running job make a checkpoint and previews now."""
        if self.state(job).state == "running":
            self._ask(job, "save")

    def rename(self, job: Job, title: str) -> Job:
        """Give a job another title."""
        return self._change(job, title=tidy(title) or job.title)

    def set_strength(self, job: Job, strength: float) -> Job:
        """Remember how strongly a tuned model is to draw."""
        return self._change(job, strength=strength)

    def delete(self, job: Job) -> None:
        """End a job at once and leave nothing of it."""
        with self._changes:
            if self.running() == job.id:
                self._signal(signal.SIGTERM if os.name == "nt" else signal.SIGKILL, job.id)
                for _ in range(100):
                    if self.running() != job.id:
                        break
                    time.sleep(0.05)
            shutil.rmtree(self.root / job.id, ignore_errors=True)
        self._wake.set()

    def state(self, job: Job) -> State:
        """How far a job is."""
        told = self._told(job)
        state, running = told.pop("state", ""), self.running() == job.id
        if job.wish == "draft":
            return State("draft")
        if state in ENDED or job.trouble:
            state = state if state in ENDED else "failed"
        elif running and job.wish != "run":
            state = {"pause": "pausing", "stop": "stopping"}[job.wish]
        elif running:
            state = "running" if state == "running" else "preparing"
        else:
            state = {"run": "waiting", "pause": "paused", "stop": "stopped"}[job.wish]
        before = self._all() if state == "waiting" else ()
        ahead = [other for other in before if self._is_waiting(other) and other.asked < job.asked]
        notice, doing = told.pop("notice", {"key": "early", "values": {}}), told.pop("doing", None)
        message = told.pop("message", "").replace(f"{self.root / job.id}{os.sep}", "")
        return State(
            state,
            **told,
            message=job.trouble or message,
            notice=(notice["key"], notice["values"]),
            ahead=len(ahead),
            doing=(doing.pop("key"), doing) if doing and state == "preparing" else None,
        )

    def log(self, job: Job) -> list[dict[str, float]]:
        """Lines of the run's log."""
        return read_log(self.run(job))

    def previews(self, job: Job) -> list[dict[str, Any]]:
        """What was drawn at each checkpoint, the first one first; `path` is the picture with all of it."""
        found = []
        for path in sorted((self.run(job) / "previews").glob("*.json")):
            with contextlib.suppress(OSError, ValueError):
                found.append(json.loads(path.read_text(encoding="utf-8")) | {"path": path.with_suffix(".png")})
        return found

    # the process

    def running(self) -> str | None:
        """Id of the job that has a process, whichever server started it."""
        if self._process is not None and self._process.poll() is None:
            return self._turn
        if fcntl is None or not (self.root / "lock").exists():
            return None
        with (self.root / "lock").open("a") as file:
            return None if _seize(file, shared=True) else self._holder()[0]

    def close(self) -> None:
        """Have the running job make a checkpoint and end; the next server goes on with it."""
        with self._changes:
            self._closed.set()
            if name := self.running():
                self._signal(signal.SIGTERM, name)
                if job := self._read(name):
                    log.info("the training of %s rests now: start this program again, and it goes on", job.title)
        self._wake.set()

    def command(self, job: Job) -> list[str]:
        """What is run; settings.json has the rest."""
        return [sys.executable, "-m", "dalle_demo", "train", "finetune", "--resume", f"--out={self.run(job)}"]

    def _keep(self) -> None:
        """Make sure that somebody looks after the queue as long as there is one."""
        with self._changes:
            if not self._closed.is_set() and self._keeper is None and any(map(self._is_waiting, self._all())):
                atexit.unregister(self.close)
                atexit.register(self.close)
                self._keeper = threading.Thread(target=self._look_after, name="training jobs", daemon=True)
                self._keeper.start()
        self._wake.set()

    def _look_after(self) -> None:
        while not self._closed.is_set():
            pause = TICK
            with self._changes:
                waiting = sorted(filter(self._is_waiting, self._all()), key=lambda job: job.asked)
                if not waiting:
                    self._keeper = None
                    return
                try:
                    self._give_turn(waiting[0])
                except Exception:  # of one job: the others are to have their turns
                    log.exception("training job %s cannot be started", waiting[0].id)
                    pause = self._give_up(waiting[0])
            self._wake.wait(pause)
            self._wake.clear()

    def _give_up(self, job: Job) -> float:
        """Mark a job that cannot be started; seconds until the next look at the queue."""
        try:
            self._change(job, trouble="not_started")
        except JobError:  # just deleted
            return TICK
        except OSError:  # a full disk, which concerns all jobs
            return RETRY
        return TICK

    def _refuse_too_many(self, job: Job) -> None:
        """JobError where as many jobs run or wait as may."""
        busy = [other for other in self._all() if self._is_waiting(other)]
        if len(busy) >= MAX_WAITING:
            raise JobError("queue_full", count=MAX_WAITING)
        if sum(other.owner == job.owner for other in busy) >= MAX_OWN:
            raise JobError("own_queue_full", count=MAX_OWN)

    def _is_waiting(self, job: Job) -> bool:
        """Whether a job runs or waits for its turn."""
        return job.wish == "run" and not job.trouble and self._told(job).get("state") not in ENDED

    def _give_turn(self, job: Job) -> None:
        """Start a process, unless there is one that has not ended yet."""
        if self._process is not None and self._process.poll() is None:
            return
        with (self.root / "lock").open("a+") as file:
            if not _seize(file):
                return
            file.truncate(0)
            if not self._may_try(job):
                self._change(job, trouble=self._last_words(job))
                return
            (self.run(job) / "ask").unlink(missing_ok=True)
            self._process, self._turn = self._spawn(job, file.fileno()), job.id
            with contextlib.suppress(OSError):  # on a full disk other servers cannot address it, but it runs
                os.write(file.fileno(), f"{job.id} {self._process.pid}".encode())

    def _spawn(self, job: Job, lock: int) -> subprocess.Popen:
        """The training itself. It inherits the lock, which is free again when it has ended, however that came about."""
        cores = os.cpu_count() or 1
        threads = {"OMP_NUM_THREADS": str(cores - 1)} if cores > 2 and "OMP_NUM_THREADS" not in os.environ else {}
        environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()])}
        apart = {"creationflags": subprocess.BELOW_NORMAL_PRIORITY_CLASS} if os.name == "nt" else {}
        if fcntl is not None:  # Ctrl+C at the server is not meant for it: `close` tells it to end
            apart = {"start_new_session": True, "pass_fds": (lock,)}
        with (self.root / job.id / "output.txt").open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                self.command(job), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, **apart
            )
        if hasattr(os, "setpriority"):
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        return process

    def _may_try(self, job: Job) -> bool:
        """Whether a job has come further since it was last started, or not been tried often."""
        checkpoint = self.run(job) / "checkpoint.pt"
        reached = checkpoint.stat().st_mtime if checkpoint.exists() else 0.0
        former, tries = self._tries.get(job.id, (reached, 0))
        self._tries[job.id] = (reached, tries + 1 if former == reached else 1)
        return self._tries[job.id][1] <= TRIES

    def _last_words(self, job: Job) -> str:
        """What the process said before it ended; of one that was killed, its likely reason."""
        path = self.root / job.id / "output.txt"
        output = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        errors = [line.removeprefix("error: ") for line in output.splitlines() if line.startswith("error: ")]
        if not errors:
            log.warning("a training job ended %d times without a word", TRIES)
        return errors[-1].replace(f"{self.root / job.id}{os.sep}", "") if errors else "killed"

    def _end(self, job: Job, wish: Literal["pause", "stop"]) -> Job:
        with self._changes:
            before = self.state(job).state
            if before in ("draft", *ENDED):
                return job
            job = self._change(job, wish=wish)
            if self.running() == job.id:
                self._ask(job, wish)
                if before == "preparing":  # it reads what it is asked after each step only
                    self._signal(signal.SIGTERM, job.id)
        self._wake.set()
        return job

    def _ask(self, job: Job, word: str) -> None:
        part = self.run(job) / "ask.part"
        part.write_text(word, encoding="utf-8")
        part.replace(self.run(job) / "ask")

    def _signal(self, number: int, name: str) -> None:
        """Tell the process of a job, ours or that of another server, if it still is that job's."""
        with contextlib.suppress(OSError):
            if self._turn == name and self._process is not None and self._process.poll() is None:
                self._process.send_signal(number)
                return
            holder, pid = self._holder()
            if holder == name and pid > 0:  # others address all processes of a group, or of the user
                os.kill(pid, number)

    def _holder(self) -> tuple[str, int]:
        """Job and process that have the lock, or had it."""
        words = (self.root / "lock").read_text(encoding="utf-8").split()
        return (words[0], int(words[1])) if len(words) == 2 and words[1].isdecimal() else ("", -1)

    # the files

    def _all(self) -> list[Job]:
        folders = self.root.iterdir() if self.root.is_dir() else ()
        return [job for folder in folders if (job := self._read(folder.name)) is not None]

    def _read(self, name: str) -> Job | None:
        try:
            return Job(**json.loads((self.root / name / "job.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # none, one that is just being deleted, or one of another version
            return None

    def _fresh(self, job: Job) -> Job:
        if (found := self._read(job.id)) is None:
            raise JobError("job_unknown")
        return found

    def _change(self, job: Job, **values: Any) -> Job:
        with self._changes:
            return self._write(dataclasses.replace(self._fresh(job), **values))

    def _write(self, job: Job) -> Job:
        path = self.root / job.id / "job.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(dataclasses.asdict(job), ensure_ascii=False), encoding="utf-8")
        part.replace(path)
        return job

    def _told(self, job: Job) -> dict[str, Any]:
        """What the run last said of itself."""
        try:
            return dict(json.loads((self.run(job) / "state.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def _clear(self) -> None:
        """Delete what its owner has not touched for long, whether or not it can be read."""
        for folder in self.root.iterdir() if self.root.is_dir() else ():
            if not re.fullmatch("[0-9a-f]{32}", folder.name):
                continue
            kept = KEPT["started" if (folder / "run" / "settings.json").exists() else "draft"]
            with self._changes, contextlib.suppress(OSError):
                path = folder / "job.json"
                age = time.time() - (path if path.exists() else folder).stat().st_mtime
                if age > kept and self.running() != folder.name:
                    shutil.rmtree(folder, ignore_errors=True)

    def _clear_hourly(self) -> None:
        while not self._closed.wait(HOUR):
            try:
                self._clear()
            except OSError:
                log.exception("old training jobs cannot be looked for")


def new_owner() -> str:
    """What a visitor's browser is to keep, and nobody can guess."""
    return secrets.token_hex(16)


def tidy(title: str) -> str:
    """Title on one line, without what a page would take for markup."""
    return " ".join("".join(c if c.isprintable() and c not in "<>" else " " for c in title).split())[:MAX_TITLE]


def smoothed(values: list[float], weight: float = 0.9) -> list[float]:
    """Running average that does not lean towards its start (Kingma & Ba 2015)."""
    total = share = 0.0
    averages = []
    for value in values:
        total = weight * total + (1 - weight) * value
        share = weight * share + (1 - weight)
        averages.append(total / share)
    return averages


def _hash(owner: str) -> str:
    return hashlib.sha256(str(owner).encode()).hexdigest()


def _seize(file: TextIO, shared: bool = False) -> bool:
    """Whether nobody has the lock, which the caller now has until the file is closed."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
