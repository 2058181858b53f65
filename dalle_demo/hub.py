"""source on the Hugging Face Hub -> checked files in a folder, and back: the only place that uses the network.

Files arrive as `NAME.part` and get their name once size and hash are right, so what has its name is whole. `lock.json`
beside them says which commit they are of; whatever is fetched later is of that commit too.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import queue
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar
from urllib.parse import urlsplit

import httpx2  # the client of huggingface_hub, which decides on its version
from huggingface_hub import HfApi, errors, get_session, get_token, hf_hub_url
from huggingface_hub.utils import WeakFileLock, hf_raise_for_status

from dalle_demo.config import Source

LOCK = "lock.json"
TIMEOUT = 30  # seconds without an answer
WAITS = (0.5, 1, 2, 4, 8)  # seconds before each new try, as long as no byte arrives
SLACK = 2_000_000  # bytes by which a file may exceed the size of its tensors
AGAIN = "the same command goes on where it stopped"
STOPPED = f"stopped; {AGAIN}"

log = logging.getLogger(__name__)
T = TypeVar("T")
Reason = Literal[
    "unreachable", "refused", "missing", "unavailable", "truncated", "wrong_hash", "no_room", "disk_full"
]  # of a download that fails
UNREACHED = (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL)


class HubError(ValueError):
    """Files that cannot be fetched or sent; the message is one sentence that says what to do, free of secrets.

    `reason` and its `values` are for who says it in other words than those of the command line.
    """

    def __init__(self, message: str, reason: Reason | None = None, **values: float):
        super().__init__(message)
        self.reason, self.values = reason, values


class StoppedError(Exception):
    """The caller's `stop` was set; what has arrived stays, and the same call goes on there."""


@dataclass(frozen=True)
class LockedFile:
    """One file at one commit, as the Hub describes it."""

    path: str
    size: int
    sha256: str | None  # None until the file is here, where the Hub gives the id of a git blob instead
    blob: str | None


@dataclass(frozen=True)
class Lock:
    """What a folder was fetched from; files by their local names."""

    repo: str
    commit: str
    files: dict[str, LockedFile]


def cache_root() -> Path:
    """Folder for what can be fetched again: $DALLE_DEMO_CACHE, or one in the user's cache folder."""
    if chosen := os.environ.get("DALLE_DEMO_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        base = "~/Library/Caches" if sys.platform == "darwin" else os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dalle_demo"


def download(
    source: Source,
    folder: Path,
    report: Callable[[int, int], None] = lambda done, total: None,
    stop: threading.Event | None = None,
) -> None:
    """Put the files of a source, by their local names, and lock.json into `folder`, those of its VQGAN into one there.

    A folder with a lock is completed from the locked commit, whatever `main` is by now; a whole one needs no network.

    Args:
        report: called with the bytes that are here and those of all files.
        stop: when set, StoppedError is raised within a second.
    """
    stop = stop or threading.Event()
    places = {folder: source} | ({folder / "vqgan": source.vqgan} if source.vqgan else {})
    locks = {place: _locked(one, place, stop) for place, one in places.items()}
    total = sum(file.size for lock in locks.values() for file in lock.files.values())
    paths = [place / name for place, lock in locks.items() for name in lock.files]
    sizes = {path: _size(path) or _size(_part(path)) for path in paths}
    if not all(_is_whole(place, lock) for place, lock in locks.items()):
        copies = 1 if source.form == "dalle_demo" else 2  # foreign files are there until they are converted
        _check_room(folder, total * copies - sum(sizes.values()))

    def report_file(path: Path, done: int) -> None:
        sizes[path] = done
        report(sum(sizes.values()), total)

    report(sum(sizes.values()), total)
    for place, lock in locks.items():
        _complete(place, lock, report_file, stop)


def _complete(folder: Path, lock: Lock, report: Callable[[Path, int], None], stop: threading.Event) -> None:
    """Fetch what a folder lacks of its lock; `report` gets the bytes that are here of a file."""
    for name, file in lock.files.items():
        if _is_here(folder / name, file):
            continue
        _receive(lock, name, folder, partial(report, folder / name), stop)
        sha256 = _verify(_part(folder / name), file, lock, stop)
        lock = dataclasses.replace(lock, files=lock.files | {name: dataclasses.replace(file, sha256=sha256)})
        _write_lock(folder, lock)  # before the file gets its name: what has its name is in the lock
        _part(folder / name).replace(folder / name)


def head(repo: str, stop: threading.Event | None = None) -> str:
    """Commit that `main` of a repository is at now."""
    return _ask(lambda: _describe(repo, "main")["sha"], repo, stop or threading.Event())


def upload(folder: Path, repo: str, patterns: list[str], private: bool, token: str | None = None) -> str:
    """Send the files of a folder that match `patterns` to a repository, made where there is none; returns its address.

    Args:
        token: whose repository it is, where not that of whoever started this program.

    Raises:
        HubError: also when `private` is asked for and the repository is there already and public.
    """
    api = HfApi(endpoint=_endpoint(), token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not _describe(repo, "main", token)["private"]:
            first = "make it private on the Hub first, or do not ask for a private one"
            raise HubError(f"{repo} is there already and public: {first}")
        message = "Add weights in the format of dalle_demo"
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=patterns, commit_message=message)
    except HubError:
        raise
    except Exception as error:
        sent = error.__cause__ if type(error) is RuntimeError else None  # what failed while a large file was sent
        raise _explain(sent or error, repo, "write to") from None
    return f"{_endpoint()}/{repo}"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder for this thread of this process; raises HubError when another has it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(folder.with_name(folder.name + ".lock"), timeout=0.2))
        except TimeoutError:
            raise HubError(f"{folder.name} is being fetched already: wait for that to end, or stop it") from None
        yield


def read_lock(folder: Path) -> Lock | None:
    """Lock of a folder; None where there is none that can be read."""
    try:
        values = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        files = {name: LockedFile(**file) for name, file in values["files"].items()}
        return Lock(values["repo"], values["commit"], files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_lock(folder: Path, lock: Lock) -> None:
    text = json.dumps(dataclasses.asdict(lock), indent=2) + "\n"
    _part(folder / LOCK).write_text(text, encoding="utf-8")
    _part(folder / LOCK).replace(folder / LOCK)


def _locked(source: Source, folder: Path, stop: threading.Event) -> Lock:
    """What a folder is to hold: of its own lock, else of the Hub as it is now."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = _held_lock(source, folder)
    if lock is None:
        lock = _ask(lambda: _resolve(source), source.repo, stop)
        _write_lock(folder, lock)
    elif not _is_whole(folder, lock) and source.revision is None:
        _report_move(lock, stop)
    return lock


def _held_lock(source: Source, folder: Path) -> Lock | None:
    """Lock of a folder if it is one of this source; what came from elsewhere is deleted."""
    lock = read_lock(folder)
    if lock is not None and lock.repo == source.repo and source.revision in (None, lock.commit):
        paths = {name: file.path for name, file in lock.files.items()}
        if paths == {name: file.path for name, file in source.files.items() if file.needed or name in paths}:
            return lock
    for name in (LOCK, *source.files):
        (folder / name).unlink(missing_ok=True)
        _part(folder / name).unlink(missing_ok=True)
    return None


def _is_whole(folder: Path, lock: Lock) -> bool:
    return all(_is_here(folder / name, file) for name, file in lock.files.items())


def _is_here(path: Path, file: LockedFile) -> bool:
    return path.exists() and path.stat().st_size == file.size


def _describe(repo: str, revision: str, token: str | None = None) -> dict[str, Any]:
    """A commit of a repository, and the size and hash of each file, in the Hub's words."""
    address = f"{_endpoint()}/api/models/{repo}/revision/{revision}"
    answer = get_session().get(address, params={"blobs": True}, headers=_headers(token), timeout=TIMEOUT)
    hf_raise_for_status(answer)
    return answer.json()


def _resolve(source: Source) -> Lock:
    """Commit, sizes and hashes as the Hub gives them; the sizes must be those that config.py knows."""
    info = _describe(source.repo, source.revision or "main")
    there = {sibling["rfilename"]: sibling for sibling in info["siblings"]}
    files = {}
    for name, remote in source.files.items():
        if (found := there.get(remote.path)) is None:
            if not remote.needed:
                continue
            raise HubError(
                f"{source.repo} has no file {remote.path} at commit {info['sha']}, so it cannot be used: give the "
                "commit of another with --revision, or another repository"
            )
        large = found.get("lfs") or {}
        size = large.get("size", found["size"])
        if remote.size is not None and not remote.size <= size <= remote.size + SLACK:
            raise HubError(
                f"{remote.path} of {source.repo} has {size:,} bytes at commit {info['sha']} and should have "
                f"{remote.size:,} or little more: it is not the file that this program knows"
            )
        files[name] = LockedFile(remote.path, size, large.get("sha256"), found["blobId"])
    return Lock(source.repo, info["sha"], files)


def _report_move(lock: Lock, stop: threading.Event) -> None:
    now = head(lock.repo, stop)
    if now != lock.commit:
        log.warning("%s has moved on to commit %s: still fetching %s, --update follows", lock.repo, now, lock.commit)


def _receive(lock: Lock, name: str, folder: Path, report: Callable[[int], None], stop: threading.Event) -> None:
    """Append to the part of a file until it has its size, over as many connections as that takes."""
    part, file = _part(folder / name), lock.files[name]
    url = hf_hub_url(lock.repo, file.path, revision=lock.commit, endpoint=_endpoint())
    waits, most = iter(WAITS), _size(part)
    part.touch()
    while _size(part) != file.size:
        failure = HubError(f"{file.path} of {lock.repo} arrives truncated: {AGAIN}", "truncated")
        try:
            _append(url, part, file.size, report, stop)
        except (HubError, OSError, *UNREACHED) as error:
            failure = _explain(error, lock.repo, "read", folder)
            if not _may_pass(error):
                raise failure from None
        if _size(part) > most:
            waits, most = iter(WAITS), _size(part)
        elif (wait := next(waits, None)) is None:
            raise failure
        elif stop.wait(wait):
            raise StoppedError(STOPPED)


def _append(url: str, part: Path, size: int, report: Callable[[int], None], stop: threading.Event) -> None:
    """One connection's worth of a file; a part that does not fit is emptied."""
    with part.open("ab") as file:
        if file.tell() > size:
            _shorten(file, 0)
        try:
            with contextlib.closing(_attended(_stream(url, file.tell()), stop)) as answer:
                _shorten(file, next(answer))
                for chunk in answer:
                    file.write(chunk)
                    report(min(file.tell(), size))
                    if file.tell() > size:
                        _shorten(file, 0)
                        raise HubError(f"{part.stem} is longer on the Hub than it announces: try again later")
        except errors.HfHubHTTPError as error:
            if error.response.status_code != 416:
                raise
            _shorten(file, 0)  # the Hub has nothing after this part
        os.fsync(file.fileno())


def _shorten(file: BinaryIO, size: int) -> None:
    file.truncate(size)
    file.seek(0, os.SEEK_END)  # `tell` would go on to count what is gone


def _stream(url: str, offset: int) -> Iterator:
    """The offset at which the answer begins, then its bytes."""
    headers = _headers() | ({"Range": f"bytes={offset}-"} if offset else {})
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
        hf_raise_for_status(response)
        yield offset if response.status_code == 206 else 0
        yield from response.iter_bytes()


def _verify(part: Path, file: LockedFile, lock: Lock, stop: threading.Event) -> str:
    """sha256 of a file that is all here; one that is not what the Hub announced is deleted."""
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with part.open("rb") as content:
        while chunk := content.read(1 << 22):
            sha256.update(chunk)
            if file.sha256 is None:
                blob.update(chunk)
            if stop.is_set():
                raise StoppedError(STOPPED)
    right = blob.hexdigest() == file.blob if file.sha256 is None else sha256.hexdigest() == file.sha256
    if not right:
        part.unlink()
        raise HubError(
            f"{file.path} of {lock.repo} arrived with another hash than the Hub announced and was deleted: "
            "the same command fetches it again",
            "wrong_hash",
        )
    return sha256.hexdigest()


def _ask(question: Callable[[], T], repo: str, stop: threading.Event) -> T:
    """Answer to one request, unless `stop` comes first."""
    try:
        return next(_attended((question() for _ in range(1)), stop))
    except (HubError, StoppedError):
        raise
    except Exception as error:
        raise _explain(error, repo, "read") from None


def _attended(items: Iterator[T], stop: threading.Event) -> Iterator[T]:
    """Yield from `items`, which run in a thread of their own: a network that hangs must not hold up a stop."""
    handed: queue.Queue = queue.Queue(maxsize=16)
    left = threading.Event()
    threading.Thread(target=_hand, args=(items, handed, left), daemon=True).start()
    try:
        while not stop.is_set():
            with contextlib.suppress(queue.Empty):
                item, error = handed.get(timeout=0.1)
                if isinstance(error, StopIteration):
                    return
                if error is not None:
                    raise error
                yield item
        raise StoppedError(STOPPED)
    finally:
        left.set()


def _hand(items: Iterator, handed: queue.Queue, left: threading.Event) -> None:
    """Put pairs of item and error into the queue until someone has left; the last pair holds an error."""
    error = None
    while error is None and not left.is_set():
        try:
            pair = next(items), None
        except BaseException as caught:
            pair = None, (error := caught)
        while not left.is_set():
            with contextlib.suppress(queue.Full):
                handed.put(pair, timeout=0.1)
                break


def _may_pass(error: Exception) -> bool:
    """Whether trying again may help."""
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return status in (408, 429) or status >= 500
    return isinstance(error, httpx2.TransportError | httpx2.StreamError)


def _explain(error: Exception, repo: str, verb: str, folder: Path | None = None) -> HubError:
    """One sentence for what went wrong; messages of the libraries hold addresses, which can hold secrets.

    Raises whatever is neither of the network, nor of the disk, nor of reading an answer: that is a fault of a program.
    """
    if isinstance(error, HubError):
        return error
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(f"HF_HUB_OFFLINE is set, so {repo} cannot be reached: unset it to {verb} the Hub")
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error, repo, verb)
    if isinstance(error, UNREACHED):
        where = urlsplit(_endpoint()).hostname
        sentence = f"cannot reach the Hub at {where} ({type(error).__name__}): check the connection, then {AGAIN}"
        return HubError(sentence, "unreachable")
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return HubError(f"the disk of {folder} is full: free some space, then {AGAIN}", "disk_full")
        return HubError(f"{error.filename or repo}: {error.strerror or type(error).__name__}")
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{repo!r} is no name of a repository: write user/name")
    if isinstance(error, KeyError | TypeError | ValueError | AttributeError):  # of an answer with another content
        return HubError(
            f"{urlsplit(_endpoint()).hostname} does not answer as the Hub does ({type(error).__name__}): check the "
            "connection, which may ask you to sign in, and HF_ENDPOINT if it is set",
            "unreachable",
        )
    raise error


def _explain_status(error: errors.HfHubHTTPError, repo: str, verb: str) -> HubError:
    status = error.response.status_code
    reason = {401: "refused", 403: "refused", 404: "missing"}.get(status, "unavailable")
    return HubError(_status_sentence(error, status, repo, verb), reason, status=status)


def _status_sentence(error: errors.HfHubHTTPError, status: int, repo: str, verb: str) -> str:
    token = f"set HF_TOKEN to a token that may {verb} it, or log in with `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated ({status}): accept its terms on its page on the Hub, then {token}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hub has no repository {repo}, or it is private ({status}): then {token}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision ({status}): leave out --revision, or give the 40 digits of another commit"
    if status in (401, 403):
        return f"the Hub refuses to {verb} {repo} ({status}): {token}"
    if status == 404:
        return f"{repo} lacks a file that it listed ({status}): pull it again with --update"
    if status == 429 or status >= 500:
        return f"the Hub cannot serve {repo} just now ({status}): try again later, {AGAIN}"
    return f"the Hub answers {status} for {repo}, which this program does not understand: try again later, {AGAIN}"


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise HubError(
            f"{needed / 1e9:.2f} GB are needed in {folder} and {free / 1e9:.2f} GB are free: free some space, or name "
            "a folder on a larger disk in DALLE_DEMO_CACHE",
            "no_room",
            needed=needed / 1e9,
            free=free / 1e9,
        )


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _headers(token: str | None = None) -> dict[str, str]:
    """Those of huggingface_hub tell more about the machine, and cost a request of their own."""
    headers = {"User-Agent": "dalle_demo", "Accept-Encoding": "identity"}
    return headers | ({"Authorization": f"Bearer {token}"} if (token := token or get_token()) else {})
