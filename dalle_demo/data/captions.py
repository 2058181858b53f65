"""tables, text files and folder names beside pictures -> a caption for each picture, and where it was found."""

import codecs
import csv
import io
import itertools
import json
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from dalle_demo.data.archives import File, Skipped, UnusableError, clean

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
TEXTS = (".txt", ".caption")
FILE_COLUMNS = (
    "file_name", "filename", "file", "file_path", "filepath", "path", "image_file", "image_name", "image_path",
    "image", "img", "picture", "photo", "name",
)  # fmt: skip
TEXT_COLUMNS = ("text", "caption", "captions", "prompt", "description", "sentence", "title", "label", "tags")
GENERIC = {"train", "training", "test", "val", "valid", "validation", "images", "image", "img", "imgs", "pictures"}
GENERIC |= {"photos", "data", "dataset"}  # folders named for what they are, not for what is in the pictures
MAX_TABLE = 16 << 20  # bytes
MAX_TEXT = 64 << 10
MAX_ROWS = 20_000
MAX_CAPTION = 1_000  # characters
OVERFLOW = None  # key of what a line has beyond its columns, as csv calls it


class Captions:
    """Captions by the name of their picture, and what is to be told of how they were found.

    Args:
        pictures: names of all pictures.
    """

    def __init__(self, pictures: Sequence[str]):
        self.found: dict[str, str] = {}
        self.layout: list[str] = []
        self.skipped: list[Skipped] = []
        self._pictures = pictures
        self._texts = 0  # text files that were captions
        self._faults: dict[str, list[str]] = defaultdict(list)  # sentence -> where it holds
        self._paths: dict[str, list[str]] = defaultdict(list)
        self._endings: dict[str, list[str]] = defaultdict(list)
        for picture in pictures:
            for path in {_key(picture), _key(_stem(picture))}:
                self._paths[path].append(picture)
                parts = path.split("/")
                for i in range(len(parts)):
                    self._endings["/".join(parts[i:])].append(picture)

    @property
    def warnings(self) -> list[str]:
        """What is doubtful, and where."""
        return [f"{fault}: {some(places)}" for fault, places in self._faults.items()]

    def read(self, files: Sequence[File]) -> None:
        """Take captions from tables; then from text files; where neither has any, from folders or from file names."""
        tables = [file for file in files if file.kind in TABLES]
        texts = [file for file in files if file.kind in TEXTS]
        for take, file in [(self._take_table, file) for file in tables] + [(self._take_text, file) for file in texts]:
            try:
                take(file)
            except UnusableError as error:
                self.skipped.append(Skipped(file.name, str(error)))
        if self._texts:
            self.layout.append(f"captions in text files named as their pictures ({self._texts})")
        if not tables and not self._texts:  # a README.txt says nothing of how the pictures are captioned
            self._take_folders() or self._take_names()
        if not self.layout:
            self.layout.append("pictures without captions")

    def _take_table(self, file: File) -> None:
        rows = list(self._rows(file))
        if not rows:
            raise UnusableError("holds no file names and captions; fill it in")
        name, text = _columns(rows[0][1])
        taken, absent = 0, []
        for line, row in rows:
            if row.get(OVERFLOW):
                fault = (
                    f'lines of {file.name} with more entries than columns (put captions with commas in quotes, "...")'
                )
                self._faults[fault].append(line)
                continue
            wanted = row.get(name)
            if not isinstance(wanted, str) or not wanted.strip():
                self._faults[f"lines of {file.name} without a file name in the column {name}"].append(line)
                continue
            pictures = self._find(wanted, PurePosixPath(file.name).parent.as_posix())
            if pictures:
                taken += 1
                self._add(pictures, _text_of(row.get(text)), f"{file.name}, {line}")
            else:
                absent.append(clean(wanted)[:80])
        if absent and not taken:
            raise UnusableError(
                f"names none of the pictures that are here, but {some(absent)}; correct the names in it"
            )
        if absent:
            self._faults[f"pictures that {file.name} names and that are not here"] = absent
        if taken:
            self.layout.append(f"captions in the table {file.name} (columns {name} and {text})")

    def _rows(self, file: File) -> Iterator[tuple[str, dict[Any, Any]]]:
        """Yield each row of a table by column, with words for where it stands."""
        data = file.read(MAX_TABLE)
        if file.kind == ".parquet":
            rows = _parquet_rows(data)
        else:
            text = self._decode(data, file.name)
            if file.kind == ".jsonl":
                rows = self._json_lines(text, file.name)
            else:
                rows = _json_rows(text) if file.kind == ".json" else _csv_rows(text)
        for i, row in enumerate(rows):
            if i >= MAX_ROWS:
                raise UnusableError(f"has more than {MAX_ROWS:,} rows; divide it")
            yield row

    def _take_text(self, file: File) -> None:
        path, place = _stem(file.name), PurePosixPath(file.name).parent
        beside = any(PurePosixPath(picture).parent == place for picture in self._pictures)
        pictures = self._paths.get(_key(path), []) if beside else self._find(path, "")
        if not pictures:
            raise UnusableError("has no picture of the same name; rename it if it is the caption of one")
        self._add(pictures, self._decode(file.read(MAX_TEXT), file.name), file.name)
        self._texts += 1

    def _take_folders(self) -> bool:
        """Take the folder of each picture for its caption where there are two or more with telling names."""
        subjects = {picture: _subject(PurePosixPath(picture).parent.name) for picture in self._pictures}
        subjects = {picture: subject for picture, subject in subjects.items() if subject}
        if len(set(subjects.values())) < 2:
            return False
        self.found |= subjects
        self.layout.append(f"a folder for each of {len(set(subjects.values()))} subjects, whose name is the caption")
        return True

    def _take_names(self) -> None:
        """Take file names for captions when all of them are phrases of three words or more, as in `a red fox 2.png`."""
        phrases = {picture: _phrase(picture) for picture in self._pictures}
        if phrases and all(len(phrase.split()) >= 3 for phrase in phrases.values()):
            self.found |= phrases
            self.layout.append("captions in the names of the pictures")

    def _find(self, wanted: str, place: str) -> list[str]:
        """Pictures meant by a path, whose first folders or ending may be missing, or be those of another computer."""
        key = _key(wanted.strip().replace("\\", "/"))
        for path in (posixpath.normpath(f"{_key(place)}/{key}"), key):
            if path in self._paths:
                return self._paths[path]
        parts = key.split("/")[-8:]
        endings = ("/".join(parts[i:]) for i in range(len(parts)))
        return next((self._endings[ending] for ending in endings if ending in self._endings), [])

    def _add(self, pictures: list[str], text: str, origin: str) -> None:
        caption = clean(text)
        if not caption:
            return
        if len(pictures) > 1:
            self._faults["captions that fit two or more pictures, which should be renamed"].append(origin)
        elif pictures[0] in self.found:
            if self.found[pictures[0]] != caption[:MAX_CAPTION]:
                self._faults["second captions of a picture, of which the first was kept"].append(origin)
        else:
            self.found[pictures[0]] = caption[:MAX_CAPTION]
            if len(caption) > MAX_CAPTION:
                self._faults[f"captions of which the first {MAX_CAPTION:,} letters were kept"].append(origin)

    def _decode(self, data: bytes, name: str) -> str:
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        for encoding in ("utf-16",) if utf16 else ("utf-8-sig", "cp1252"):
            try:
                text = data.decode(encoding)
            except UnicodeError:
                continue
            if "\0" in text:
                break
            if encoding == "cp1252":
                self._faults["texts not saved as UTF-8 and read as those of Windows (check the accents)"].append(name)
            return text
        raise UnusableError("is not plain text; save it as text, or as CSV, in UTF-8")

    def _json_lines(self, text: str, name: str) -> Iterator[tuple[str, dict]]:
        for i, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield f"line {i}", row
            else:
                fault = f'lines of {name} not of the form {{"file_name": "...", "text": "..."}}, which were left out'
                self._faults[fault].append(f"line {i}")


def _json_rows(text: str) -> Iterator[tuple[str, dict]]:
    """Rows of a list of objects, or of an object that gives each picture its caption."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnusableError(f"is not JSON ({error}); mend it, or save the table as CSV") from error
    if isinstance(table, dict):
        table = [
            {"file_name": name, **(row if isinstance(row, dict) else {"text": row})} for name, row in table.items()
        ]
    if not isinstance(table, list):
        raise UnusableError("is not a list of pictures and captions; save the table as CSV")
    yield from ((f"entry {i}", row) for i, row in enumerate(table, 1) if isinstance(row, dict))


def _csv_rows(text: str) -> Iterator[tuple[str, dict]]:
    """Rows under the separator that gives the columns that are needed, or else the most columns."""
    if text.lower().startswith("sep="):  # a line that Excel writes for itself
        text = text.partition("\n")[2]
    delimiter = max(",;\t|", key=lambda delimiter: _quality(text, delimiter))
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise UnusableError(
            f'has a double quote (") that opens or closes no entry, in or before line {reader.line_num}; mend it, or '
            "save the table as CSV UTF-8 in a spreadsheet program"
        ) from error


def _quality(text: str, delimiter: str) -> tuple[int, int]:
    """Columns that are needed, and columns, that a table has when it is cut at a separator."""
    try:
        header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [])
    except csv.Error:
        return 0, 0
    return sum(_column(header, known) is not None for known in (FILE_COLUMNS, TEXT_COLUMNS)), len(header)


def _parquet_rows(data: bytes) -> Iterator[tuple[str, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UnusableError(
            "a .parquet table is read with the package pyarrow, which is not installed; save the table as CSV, or run "
            "`pip install pyarrow`"
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        names = _columns(dict.fromkeys(file.schema_arrow.names))
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(64, columns=list(names)))
        yield from ((f"row {i}", row) for i, row in enumerate(rows, 1))
    except (pyarrow.ArrowException, OSError) as error:
        raise UnusableError("is damaged; save the table as CSV") from error


def _columns(row: Mapping[Any, Any]) -> tuple[str, str]:
    """The columns of file names and of captions."""
    name, text = _column(row, FILE_COLUMNS), _column(row, TEXT_COLUMNS)
    if name is None or text is None:
        missing = " and ".join(["file_name"] * (name is None) + ["text"] * (text is None))
        columns = some([clean(str(column))[:80] for column in row if column is not OVERFLOW])
        raise UnusableError(f"has no column {missing} (its columns are: {columns}); name the columns in its first line")
    return name, text


def _column(columns: Iterable[Any], known: Sequence[str]) -> str | None:
    """The column with the first of the known names."""
    names = {re.sub(r"[\s-]+", "_", str(column).strip().casefold()): column for column in columns}
    return next((names[name] for name in known if name in names), None)


def _text_of(value: object) -> str:
    if isinstance(value, list):  # several captions for one picture
        value = value[0] if value else ""
    return str(value) if isinstance(value, str | int | float) else ""


def _subject(folder: str) -> str:
    """Caption in the name of a folder; kohya's trainer puts a number of repetitions before it."""
    words = re.sub(r"^\d+_|[_-]+", " ", folder).strip()
    return "" if words.casefold() in GENERIC or words.isdigit() else clean(words)


def _phrase(picture: str) -> str:
    """Words in the name of a picture; empty when it holds anything else but a last number."""
    words = re.sub(r"[_\s-]+", " ", _stem(PurePosixPath(picture).name)).strip()
    words = re.sub(r"\s*\(?\d+\)?$", "", words)
    return clean(words) if all(word.strip(",.'’").isalpha() for word in words.split()) else ""


def _stem(name: str) -> str:
    """Name without its ending, folders kept."""
    return posixpath.splitext(name)[0]


def _key(name: str) -> str:
    return clean(name).casefold()


def some(names: Sequence[str], between: str = ", ") -> str:
    """The first few of a list of names, and how many more there are."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return between.join(names[:3]) + more
