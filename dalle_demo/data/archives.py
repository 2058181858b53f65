"""files, folders and zips -> their files by name, read within limits; what could do harm is refused in words.

Nothing is unpacked to the disk, so that no name in an archive decides where something is written.
"""

import contextlib
import os
import posixpath
import re
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

MAX_FILES = 5_000
MAX_BYTES = 64 << 20  # of one file
MAX_TOTAL = 2 << 30  # of all files, once unpacked
MAX_RATIO = 200  # of a zip's content to its size; pictures hardly shrink, tables by a factor of ten
MAX_ENTRIES = 4 * MAX_FILES  # of a zip, with folders and what macOS adds
MAX_DIRECTORY = 8 << 20  # bytes of its list of entries, which is read whole
HARMLESS = 64 << 20  # bytes that a zip may unpack to at any ratio
MAX_NAME = 250  # characters, folders included
JUNK = {"thumbs.db", "desktop.ini", "__macosx"}
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the others cannot be unpacked in bounded memory
BROKEN = (OSError, EOFError, ValueError, NotImplementedError, zlib.error, zipfile.BadZipFile)
ENCRYPTED = 0x2041  # flags of an entry: encrypted, strongly encrypted, its header hidden


class UploadError(ValueError):
    """An upload of which nothing can be used; the message says why and what to do."""


class UnusableError(ValueError):
    """One file that is left out; the message is the reason.

    `kind`, where there is one, and its `values` are for who says it in another language.
    """

    def __init__(self, message: str, kind: str = "", **values: int):
        super().__init__(message)
        self.kind, self.values = kind, values


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class File:
    """A file of an upload; its name is relative, with forward slashes."""

    name: str
    size: int  # bytes that it claims to have
    open: Callable[[], contextlib.AbstractContextManager]
    trouble: str = ""  # why it is not to be read

    @property
    def kind(self) -> str:
        """Ending of its name in small letters, with the dot."""
        return PurePosixPath(self.name).suffix.lower()

    def read(self, limit: int = MAX_BYTES) -> bytes:
        """All of its bytes; raises UnusableError when there are more than `limit`, or when it is damaged."""
        if self.trouble:
            raise UnusableError(self.trouble)
        try:
            with self.open() as stream:
                data = stream.read(limit + 1)  # whatever it claims
        except BROKEN as error:
            raise UnusableError("is damaged and cannot be read; copy it again from where it comes from") from error
        if len(data) > limit:
            raise UnusableError(f"is larger than {size_in_words(limit)}; make it smaller")
        return data


@contextlib.contextmanager
def opened(sources: Sequence[Path]) -> Iterator[list[File]]:
    """Files of all sources, sorted by name, to be read while the context is open.

    A folder that holds everything else is left out of the names. Raises UploadError where a source is missing, is too
    large, or looks like a trap.
    """
    with contextlib.ExitStack() as stack:
        files, total = [], 0
        for file in _all(sources, stack):
            files.append(file)
            total += file.size
            if len(files) > MAX_FILES:
                raise UploadError(
                    f"there are more than {MAX_FILES:,} files, the most that are read; give fewer of them"
                )
            if total > MAX_TOTAL:
                raise UploadError(
                    f"the files have more than {size_in_words(MAX_TOTAL)} once unpacked, the most that is read; "
                    "give fewer or smaller pictures"
                )
        yield sorted(_renamed(files), key=lambda file: file.name)


def size_in_words(size: int) -> str:
    """Bytes as people say them."""
    for unit, name in ((30, "GB"), (20, "MB"), (10, "kB")):
        if size >= 1 << unit:
            return f"{size / (1 << unit):.3g} {name}"
    return f"{size} bytes"


def clean(text: str) -> str:
    """One line without control characters and broken code points, in composed letters (macOS splits accents)."""
    kept = (letter for letter in text if letter.isspace() or unicodedata.category(letter) not in ("Cc", "Cs"))
    return unicodedata.normalize("NFC", " ".join("".join(kept).split()))


def _all(sources: Sequence[Path], stack: contextlib.ExitStack) -> Iterator[File]:
    for source in sources:
        folder = source.stem if len(sources) > 1 else ""  # keeps the files of two folders or zips apart
        if source.is_dir():
            found = _in_folder(source)
        elif source.suffix.lower() == ".zip" and source.is_file():
            found = _in_zip(source, stack)
        elif source.is_file():
            folder, found = "", [File(source.name, source.stat().st_size, partial(source.open, "rb"))]
        else:
            raise UploadError(f"{source} does not exist; give pictures, a folder or a zip file")
        for file in found:
            if not any(part.startswith(".") or part.lower() in JUNK for part in file.name.split("/")):
                yield replace(file, name=f"{folder}/{file.name}" if folder else file.name)


def _in_folder(folder: Path) -> Iterator[File]:
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name.lower() not in JUNK]
        for name in [*names, *(name for name in subfolders if os.path.islink(os.path.join(place, name)))]:
            path = Path(place, name)
            status = path.lstat()
            trouble = "" if stat.S_ISREG(status.st_mode) else "is a link or device; give the file itself"
            yield File(path.relative_to(folder).as_posix(), status.st_size, partial(path.open, "rb"), trouble)


def _in_zip(path: Path, stack: contextlib.ExitStack) -> Iterator[File]:
    try:
        _refuse_long_lists(path)
        archive = stack.enter_context(zipfile.ZipFile(path))
    except UploadError:
        raise
    except BROKEN as error:
        raise UploadError(f"{path.name} is not a whole zip file; pack it, or upload it, again") from error
    entries = archive.infolist()
    total = sum(entry.file_size for entry in entries)
    if total > HARMLESS and total > MAX_RATIO * path.stat().st_size:
        raise UploadError(
            f"{path.name} would unpack to {size_in_words(total)}, over {MAX_RATIO} times its size, which no set of "
            "pictures does; it was not opened"
        )
    for entry in entries:
        _refuse_traps(path.name, entry)
        if not entry.is_dir():
            name = posixpath.normpath(_name(entry))
            yield File(name, entry.file_size, partial(archive.open, entry))


def _refuse_long_lists(path: Path) -> None:
    """Raise UploadError by what a zip says of its list of entries, of which ZipFile makes objects at once."""
    with path.open("rb") as stream:
        end = zipfile._EndRecData(stream)  # as ZipFile finds it; another reading could be deceived
    if end and (end[zipfile._ECD_ENTRIES_TOTAL] > MAX_ENTRIES or end[zipfile._ECD_SIZE] > MAX_DIRECTORY):
        raise UploadError(f"{path.name} lists far more than {MAX_FILES:,} files, the most that are read; pack fewer")


def _refuse_traps(archive: str, entry: zipfile.ZipInfo) -> None:
    """Raise UploadError for an entry that honest programs do not write, or that cannot be read."""
    name, label = _name(entry), clean(entry.filename)[:80]
    if name.startswith("/") or ".." in name.split("/") or re.match("[A-Za-z]:", name):
        raise UploadError(f"{archive} holds {label!r}, a name that points outside of it; pack the pictures anew")
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UploadError(f"{archive} holds a link, {label!r}; pack the files themselves")
    if entry.flag_bits & ENCRYPTED:
        raise UploadError(f"{archive} is protected by a password; pack it again without one")
    if entry.compress_type not in METHODS:
        raise UploadError(f"{archive} is packed in an unusual way (method {entry.compress_type}); pack an ordinary zip")


def _name(entry: zipfile.ZipInfo) -> str:
    return clean(entry.filename.replace("\\", "/"))


def _renamed(files: Iterable[File]) -> list[File]:
    """The same with names that can be shown, without the folders that all have in common."""
    files = [replace(file, name=clean(file.name).strip("/")) for file in files]
    common = posixpath.commonpath([posixpath.dirname(file.name) for file in files]) if files else ""
    names: set[str] = set()
    renamed = []
    for file in files:
        name, trouble = file.name[len(common) :].lstrip("/"), file.trouble
        if len(name) > MAX_NAME:
            name, trouble = name[:MAX_NAME] + "…", f"has a name of more than {MAX_NAME} characters; rename it"
        elif name in names:
            trouble = "has the same name as another file; rename one of them"
        names.add(name)
        renamed.append(replace(file, name=name, trouble=trouble))
    return renamed
