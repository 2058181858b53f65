"""Whatever people upload becomes a prepared folder, or a sentence that they can act on; and nothing else is written."""

import builtins
import io
import json
import os
import random
import stat
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageDraw, ImageEnhance

from dalle_demo.data import archives, captions, emoji, uploads
from dalle_demo.data.archives import Skipped, UploadError
from dalle_demo.data.uploads import (
    Example,
    fingerprint,
    load,
    load_report,
    pictures,
    pixels,
    prepare,
    save_captions,
    split,
)

NPM = Path(__file__).parent / "fixtures" / "npm"


def blocks(seed: int, side: int = 64, mode: str = "RGB") -> Image.Image:
    """Picture of 8x8 blocks of random colours; two of them are never alike."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, len(mode)), np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.NEAREST)


def save(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


A, B, C = (save(blocks(seed)) for seed in range(3))
Files = dict[str, bytes | str]


def in_folder(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def in_zip(path: Path, files: Files, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def read(tmp_path: Path, files: Files, packed: bool = False) -> tuple[uploads.Report, dict[str, str]]:
    """Prepare a folder or a zip of these files; return the report and the caption of each picture."""
    source = in_zip(tmp_path / "set.zip", files) if packed else in_folder(tmp_path / "set", files)
    report = prepare([source], tmp_path / "out")
    assert report == load_report(tmp_path / "out")
    return report, {example.name: example.caption for example in load(tmp_path / "out")}


CAPTIONED = {"a.png": "a red fox", "b.png": "ein grüner Bär, müde"}
LAYOUTS = {
    "text files": (
        {"a.png": A, "a.txt": "a red fox\r\n", "b.png": B, "b.caption": "ein grüner Bär, müde"},
        "captions in text files named as their pictures (2)",
    ),
    "text files, ending kept": (
        {"a.png": A, "a.png.txt": "a red fox", "b.png": B, "b.png.txt": "ein grüner Bär, müde"},
        "captions in text files",
    ),
    "text files elsewhere": (
        {"images/a.png": A, "captions/a.txt": "a red fox", "images/b.png": B, "captions/b.txt": CAPTIONED["b.png"]},
        "captions in text files",
    ),
    "csv": (
        {"a.png": A, "b.png": B, "metadata.csv": 'file_name,text\na.png,a red fox\nb.png,"ein grüner Bär, müde"\n'},
        "captions in the table metadata.csv (columns file_name and text)",
    ),
    "csv of Excel": (
        {
            "a.png": A,
            "b.png": B,
            "metadata.csv": "\ufeffsep=;\r\nCaption;Image File\r\na red fox;a.png\r\nein grüner Bär, müde;b.png\r\n",
        },
        "captions in the table metadata.csv (columns Image File and Caption)",
    ),
    "csv without endings": (
        {"a.png": A, "b.png": B, "c.csv": 'filename,prompt\nA,a red fox\nb,"ein grüner Bär, müde"\n'},
        "captions in the table c.csv (columns filename and prompt)",
    ),
    "csv in UTF-16": (
        {
            "a.png": A,
            "b.png": B,
            "m.csv": f"file\tcaption\na.png\ta red fox\nb.png\t{CAPTIONED['b.png']}".encode("utf-16"),
        },
        "captions in the table m.csv",
    ),
    "tsv with folders of another computer": (
        {
            "a.png": A,
            "b.png": B,
            "m.tsv": f"path\tdescription\nC:\\me\\a.png\ta red fox\n/b.png\t{CAPTIONED['b.png']}\n",
        },
        "captions in the table m.tsv",
    ),
    "jsonl": (
        {
            "a.png": A,
            "b.png": B,
            "metadata.jsonl": '{"file_name": "a.png", "text": "a red fox"}\r\n\n'
            '{"file_name": "b.png", "text": ["ein gr\\u00fcner B\\u00e4r, m\\u00fcde", "second"]}\n',
        },
        "captions in the table metadata.jsonl",
    ),
    "json": (
        {"a.png": A, "b.png": B, "m.json": json.dumps(CAPTIONED)},
        "captions in the table m.json",
    ),
    "json of kohya": (
        {
            "a.png": A,
            "b.png": B,
            "m.json": json.dumps({k[0]: {"caption": v, "tags": ""} for k, v in CAPTIONED.items()}),
        },
        "captions in the table m.json (columns file_name and caption)",
    ),
}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout, packed):
    files, words = LAYOUTS[layout]
    report, found = read(tmp_path, files, packed)
    assert {name.rpartition("/")[2]: caption for name, caption in found.items()} == CAPTIONED
    assert words in report.layout
    assert report.layout.startswith("set.zip: " if packed else "set: ")
    assert (report.found, report.used, report.skipped, report.warnings) == (2, 2, [], [])


def test_folders_of_subjects(tmp_path):
    files = {
        "pets/10_black cat/1.png": A,
        "pets/10_black cat/2.png": B,
        "pets/white_dog/1.png": C,
        "pets/x.png": save(blocks(9)),
    }
    report, found = read(tmp_path, files, packed=True)
    assert found == {
        "10_black cat/1.png": "black cat",
        "10_black cat/2.png": "black cat",
        "white_dog/1.png": "white dog",
        "x.png": "",
    }
    assert "a folder for each of 2 subjects, whose name is the caption" in report.layout
    assert report.warnings == ["1 of 4 pictures have no caption and are not trained on until you type one: x.png"]


def test_folders_named_for_what_they_are_say_nothing(tmp_path):
    report, found = read(tmp_path, {"train/1.png": A, "test/2.png": B})
    assert set(found.values()) == {""}
    assert "pictures without captions" in report.layout


def test_phrases_in_file_names(tmp_path):
    report, found = read(tmp_path, {"a_red-fox_2.png": A, "two bears, asleep (1).png": B})
    assert sorted(found.values()) == ["a red fox", "two bears, asleep"]
    assert "captions in the names of the pictures" in report.layout
    assert set(read(tmp_path, {"IMG_2034_edit.png": C})[1].values()) == {""}  # not phrases any more


def test_metadata_in_subfolders_is_of_its_folder(tmp_path):
    files = {
        "cats/1.png": A,
        "cats/metadata.csv": "file_name,text\n1.png,a cat",
        "dogs/1.png": B,
        "dogs/metadata.csv": "file_name,text\n1.png,a dog",
    }
    assert read(tmp_path, files)[1] == {"cats/1.png": "a cat", "dogs/1.png": "a dog"}


def test_a_text_file_beside_pictures_is_of_none_elsewhere(tmp_path):
    report, found = read(tmp_path, {"cats/1.png": A, "cats/2.png": B, "dogs/1.png": C, "dogs/2.txt": "a dog"})
    assert found == {"cats/1.png": "cats", "cats/2.png": "cats", "dogs/1.png": "dogs"}
    assert [skipped.name for skipped in report.skipped] == ["dogs/2.txt"]


def test_a_readme_hides_no_captions_in_names(tmp_path):
    assert set(read(tmp_path, {"cats/1.png": A, "dogs/1.png": B, "README.txt": "Hello"})[1].values()) == {
        "cats",
        "dogs",
    }
    phrases = {"a red fox.png": A, "two bears asleep.png": B, "LICENSE.txt": "CC0"}
    assert set(read(tmp_path / "other", phrases)[1].values()) == {"a red fox", "two bears asleep"}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_second_file_of_a_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.png", A)
        archive.writestr("a.png", B)
    report = prepare([tmp_path / "set.zip"], tmp_path / "out")
    assert report.skipped == [Skipped("a.png", "has the same name as another file; rename one of them")]
    assert pictures(tmp_path / "out", load(tmp_path / "out"), 64)[0, 0, 0].tolist() == list(blocks(0).getpixel((0, 0)))


def test_table_comes_before_text_files(tmp_path):
    files = {
        "a.png": A,
        "b.png": B,
        "a.txt": "other",
        "b.txt": "from text",
        "m.csv": "file,text\na.png,from table\nb.png,\n",
    }
    report, found = read(tmp_path, files)
    assert found == {"a.png": "from table", "b.png": "from text"}
    assert "second captions of a picture, of which the first was kept: a.txt" in report.warnings


def test_several_sources(tmp_path):
    """Loose files, a folder and a zip in one upload; equal names in two of them stay apart."""
    zipped = in_zip(tmp_path / "one.zip", {"1.png": A, "1.txt": "one"})
    folder = in_folder(tmp_path / "two", {"1.png": B, "1.txt": "two"})
    loose = in_folder(tmp_path / "loose", {"c.png": C, "captions.csv": "file_name,text\nc.png,three"})
    report = prepare([zipped, folder, *sorted(loose.iterdir())], tmp_path / "out")
    found = {example.name: example.caption for example in load(tmp_path / "out")}
    assert found == {"c.png": "three", "one/1.png": "one", "two/1.png": "two"}
    assert report.layout.startswith("one.zip, two, c.png and 1 more: ") or "and 1 more" in report.layout


def test_names_of_macos_and_windows_zips(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("top/caf\u0065\u0301.png", A)  # accents apart, as macOS writes them
        archive.writestr("top/metadata.csv", "file_name,text\ncaf\u00e9.png,a café\nb.png,two")
        info = zipfile.ZipInfo("x")
        info.filename = "top\\sub\\b.png"
        archive.writestr(info, B)
        for junk in ("__MACOSX/top/._a.png", "top/Thumbs.db", "top/.DS_Store", "top/desktop.ini"):
            archive.writestr(junk, b"junk")
    report = prepare([path], tmp_path / "out")
    assert {example.name: example.caption for example in load(tmp_path / "out")} == {
        "café.png": "a café",
        "sub/b.png": "two",
    }
    assert (report.skipped, report.warnings) == ([], [])


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    stream = io.BytesIO()
    parquet.write_table(
        pyarrow.table({"file_name": list(CAPTIONED), "text": list(CAPTIONED.values()), "n": [1, 2]}), stream
    )
    report, found = read(tmp_path, {"a.png": A, "b.png": B, "metadata.parquet": stream.getvalue()})
    assert found == CAPTIONED
    assert "captions in the table metadata.parquet" in report.layout
    damaged = {"a.png": C, "b.png": B, "metadata.parquet": stream.getvalue()[:-20]}
    assert read(tmp_path, damaged)[0].skipped == [Skipped("metadata.parquet", "is damaged; save the table as CSV")]


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    real = builtins.__import__

    def importing(name, *rest):
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", importing)
    (skipped,) = read(tmp_path, {"a.png": A, "metadata.parquet": b"PAR1"})[0].skipped
    assert "save the table as CSV, or run `pip install pyarrow`" in skipped.reason


# What is wrong with an upload, and what is said of it


def entry(path: Path, name: str, content: bytes = b"", **fields) -> Path:
    """Zip of one good picture and an entry with some fields of its header set."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.png", A)
        info = zipfile.ZipInfo("x")
        info.filename = name
        for key, value in fields.items():
            setattr(info, key, value)
        archive.writestr(info, content)
    return path


def encrypted(path: Path) -> Path:
    data = bytearray(in_zip(path, {"a.png": A}).read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)
    return path


def huge_png(width: int, height: int) -> bytes:
    """A header that claims a picture of this size."""
    data = bytearray(save(Image.new("1", (8, 8))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def symlink(folder: Path) -> Path:
    in_folder(folder, {"a.png": A})
    os.symlink("/etc/hostname", folder / "b.png")
    return folder


def pipe(folder: Path) -> Path:
    in_folder(folder, {"a.png": A})
    os.mkfifo(folder / "b.png")  # opening it would wait for ever
    return folder


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


REFUSED = {  # the whole upload
    "nothing": (lambda here: [], "nothing was given; choose pictures, a folder or a zip file"),
    "missing source": (lambda here: [here / "no.zip"], "no.zip does not exist; give pictures, a folder or a zip file"),
    "empty folder": (
        lambda here: [in_folder(here / "s", {".DS_Store": b"x"})],
        "there are no files in it; give pictures of",
    ),
    "empty zip": (lambda here: [in_zip(here / "s.zip", {})], "there are no files in it"),
    "no picture": (
        lambda here: [in_folder(here / "s", {"a.txt": "a fox"})],
        "there is no picture in it: a.txt has no picture of the same name",
    ),
    "not a zip": (
        lambda here: [written(here / "s.zip", b"<html>not found</html>")],
        "s.zip is not a whole zip file; pack it, or upload it, again",
    ),
    "zip cut off": (
        lambda here: [written(here / "s.zip", in_zip(here / "t.zip", {"a.png": A}).read_bytes()[:-30])],
        "s.zip is not a whole zip file",
    ),
    "zip-slip": (
        lambda here: [entry(here / "s.zip", "../evil.png", B)],
        "s.zip holds '../evil.png', a name that points outside of it",
    ),
    "zip-slip inside": (
        lambda here: [entry(here / "s.zip", "a/../../evil.png", B)],
        "a name that points outside of it",
    ),
    "zip-slip of Windows": (
        lambda here: [entry(here / "s.zip", "..\\evil.png", B)],
        "a name that points outside of it",
    ),
    "absolute name": (lambda here: [entry(here / "s.zip", "/etc/evil.png", B)], "a name that points outside of it"),
    "absolute name, hidden": (
        lambda here: [entry(here / "s.zip", " /evil.png", B)],
        "a name that points outside of it",
    ),
    "name with a drive": (lambda here: [entry(here / "s.zip", "C:\\evil.png", B)], "a name that points outside of it"),
    "link in a zip": (
        lambda here: [entry(here / "s.zip", "l.png", b"/etc/passwd", external_attr=(stat.S_IFLNK | 0o777) << 16)],
        "s.zip holds a link, 'l.png'; pack the files themselves",
    ),
    "encrypted zip": (
        lambda here: [encrypted(here / "s.zip")],
        "s.zip is protected by a password; pack it again without one",
    ),
    "unusual packing": (
        lambda here: [in_zip(here / "s.zip", {"a.png": A}, zipfile.ZIP_LZMA)],
        "s.zip is packed in an unusual way (method 14); pack an ordinary zip",
    ),
    "zip bomb": (
        lambda here: [in_zip(here / "s.zip", {"a.png": A, "b.txt": bytes(70 << 20)})],
        "s.zip would unpack to 70 MB, over 200 times its size, which no set of pictures does",
    ),
    "too many files": (
        lambda here: [in_zip(here / "s.zip", {f"{i}.txt": "" for i in range(5001)})],
        "there are more than 5,000 files, the most that are read",
    ),
    "only an archive": (
        lambda here: [in_zip(here / "s.zip", {"inner.zip": b"PK\x03\x04"})],
        "there is no picture in it: inner.zip is an archive that is not opened here",
    ),
    "only damaged": (
        lambda here: [in_folder(here / "s", {"a.png": b"x", "b.png": b""})],
        "none of 2 pictures can be used: a.png is damaged, or no picture at all; save it again as PNG or JPEG; b.png",
    ),
    "phone pictures": (
        lambda here: [in_folder(here / "s", {"a.HEIC": b"x"})],
        "there is no picture in it: a.HEIC is in Apple's HEIC format, which is not read here; export it as JPEG",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    make, message = REFUSED[case]
    sources = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UploadError) as error:
        prepare(sources, tmp_path / "out")
    assert message in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("limit", ["MAX_ENTRIES", "MAX_DIRECTORY"])
def test_a_long_list_of_entries_is_not_even_read(tmp_path, monkeypatch, limit):
    path = in_zip(tmp_path / "s.zip", {f"{i}.txt": "" for i in range(9)})
    monkeypatch.setattr(archives, limit, 8)
    monkeypatch.setattr(archives.zipfile, "ZipFile", None)
    with pytest.raises(UploadError, match="lists far more than 5,000 files"):
        prepare([path], tmp_path / "out")


def test_total_size(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_TOTAL", 2 << 10)
    with pytest.raises(UploadError, match="the files have more than 2 kB once unpacked, the most that is read"):
        prepare([in_folder(tmp_path / "set", {"a.png": bytes(1500), "b.png": bytes(1500)})], tmp_path / "out")


LEFT_OUT = {  # one file, of which the report says why
    "damaged": (
        b"\x89PNG\r\n\x1a\n nonsense",
        "b.png",
        "is damaged, or no picture at all; save it again as PNG or JPEG",
    ),
    "cut off": (B[: len(B) // 2], "b.png", "is damaged"),
    "cut off jpeg": (save(blocks(5, 256), "JPEG")[:2000], "b.jpg", "is damaged"),
    "empty": (b"", "b.png", "is damaged"),
    "web page": (b"<!doctype html>", "b.jpg", "is damaged, or no picture at all"),
    "pixel bomb": (huge_png(10_000, 9_000), "b.png", "has more than 64 million pixels; make it smaller"),
    "worse pixel bomb": (huge_png(60_000, 60_000), "b.png", "has more than 64 million pixels; make it smaller"),
    "tiny": (save(blocks(1, 24)), "b.png", "is tiny (24x24 pixels, at least 32 a side are needed); give a larger one"),
    "narrow": (save(Image.new("RGB", (400, 20))), "b.png", "is tiny (400x20 pixels"),
    "invisible": (save(Image.new("RGBA", (64, 64))), "b.png", "is empty: all of it is transparent"),
    "twin": (save(blocks(0), "BMP"), "b.bmp", "is the same picture as a.png, which is used once"),
    "nested": (b"PK\x03\x04", "b.zip", "is an archive that is not opened here; unpack it"),
    "drawing": (b"<svg/>", "b.svg", "is not a picture of pixels; export it as PNG"),
    "video": (b"", "b.mp4", "is a video; save single pictures of it"),
    "spreadsheet": (b"PK", "b.xlsx", "is a spreadsheet; save it as CSV UTF-8"),
    "mistyped ending": (b"{}", "metadata.json1", "is neither a picture (.png, .jpg,"),
    "note": (b"hello", "readme.txt", "has no picture of the same name; rename it if it is the caption of one"),
    "binary caption": (b"\0\1\2", "a.txt", "is not plain text; save it as text"),
    "long caption file": (b"x" * 70_000, "a.txt", "is larger than 64 kB; make it smaller"),
    "table without names": (
        b"a.png,a fox\nb.png,a bear\n",
        "m.csv",
        "has no column file_name and text (its columns are: a.png, a fox)",
    ),
    "table without captions": (
        b"file_name,colour\na.png,red\n",
        "m.csv",
        "has no column text (its columns are: file_name, colour); name",
    ),
    "table of others": (
        b"file_name,text\nz.png,a fox\n",
        "m.csv",
        "names none of the pictures that are here, but z.png; correct",
    ),
    "table without rows": (b"file_name,text\n", "m.csv", "holds no file names and captions; fill it in"),
    "open quote": (
        b'file_name,text\na.png,"a fox\nb.png,x',
        "m.csv",
        'has a double quote (") that opens or closes no entry, in or before line',
    ),
    "spreadsheet called csv": (b"PK\x03\x04\0\0", "m.csv", "is not plain text; save it as text, or as CSV, in UTF-8"),
    "no json": (b"[{", "m.json", "is not JSON (Expecting property name"),
    "json of something else": (b"5", "m.json", "is not a list of pictures and captions; save the table as CSV"),
    "deep json": (b"[" * 100_000, "m.json", "is not JSON"),
    "long name": (B, "b" * 120 + "/" + "b" * 140 + ".png", "has a name of more than 250 characters; rename it"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_left_out_with_a_reason(tmp_path, case):
    content, name, reason = LEFT_OUT[case]
    report, found = read(tmp_path, {"a.png": A, name: content}, packed=True)
    (skipped,) = report.skipped
    assert skipped.name.rstrip("…") == name[:250]
    assert reason in skipped.reason
    assert list(found) == ["a.png"]
    assert not skipped.reason.startswith(name)


DOUBTFUL = {  # used, with a warning
    "animated": (
        {"b.gif": save(blocks(1), "GIF", save_all=True, append_images=[blocks(2)])},
        "only the first picture was used of files with several: b.gif",
    ),
    "no caption": (
        {"a.txt": " \n"},
        "1 of 1 pictures have no caption and are not trained on until you type one: a.png",
    ),
    "not UTF-8": (
        {"a.txt": "a café".encode("cp1252")},
        "texts not saved as UTF-8 and read as those of Windows (check the accents): a.txt",
    ),
    "comma in a caption": (
        {"m.csv": "file_name,text\na.png,a fox\na.png,a fox, asleep\n"},
        'lines of m.csv with more entries than columns (put captions with commas in quotes, "..."): line 3',
    ),
    "line without a name": (
        {"m.csv": "file_name,text\na.png,a fox\n,a bear\n"},
        "lines of m.csv without a file name in the column file_name: line 3",
    ),
    "picture that is not there": (
        {"m.csv": "file_name,text\na.png,a fox\nz.png,a bear\n../../etc/passwd,x\n"},
        "pictures that m.csv names and that are not here: z.png, ../../etc/passwd",
    ),
    "two captions": (
        {"m.csv": "file_name,text\na.png,a fox\na.png,a bear\n"},
        "second captions of a picture, of which the first was kept: m.csv, line 3",
    ),
    "caption of two pictures": (
        {"x/1.png": B, "y/1.png": C, "m.csv": "file_name,text\n1.png,a fox\n"},
        "captions that fit two or more pictures, which should be renamed: m.csv, line 2",
    ),
    "bad line of jsonl": (
        {"m.jsonl": '{"file_name": "a.png", "text": "a fox"}\n{"file_name": \n[]\n'},
        'lines of m.jsonl not of the form {"file_name": "...", "text": "..."}, which were left out: line 2, line 3',
    ),
    "long caption": ({"a.txt": "x" * 2000}, "captions of which the first 1,000 letters were kept: a.txt"),
    "near-duplicate": (
        {"b.jpg": save(blocks(0, 200), "JPEG", quality=60)},
        "pictures that look nearly the same, and so are either all learned or all held out: a.png, b.jpg",
    ),
}


@pytest.mark.parametrize("case", DOUBTFUL)
def test_doubtful_is_told(tmp_path, case):
    files, warning = DOUBTFUL[case]
    report, _ = read(tmp_path, {"a.png": A} | files)
    assert warning in report.warnings


@pytest.mark.parametrize("make", [symlink, pipe])
def test_links_and_devices_in_a_folder_are_not_followed(tmp_path, make):
    report = prepare([make(tmp_path / "set")], tmp_path / "out")
    assert report.skipped == [Skipped("b.png", "is a link or device; give the file itself")]


def test_linked_folders_are_not_entered(tmp_path):
    in_folder(tmp_path / "other", {"b.png": B})
    in_folder(tmp_path / "set", {"a.png": A})
    (tmp_path / "set" / "link").symlink_to(tmp_path / "other")
    assert prepare([tmp_path / "set"], tmp_path / "out").found == 1


def test_an_entry_larger_than_it_claims_is_not_read(tmp_path):
    """The claim of 1 kB passes every check before reading."""
    path = in_zip(tmp_path / "set.zip", {"a.png": A, "b.png": bytes(1 << 20)})
    data = path.read_bytes()
    data = data.replace(struct.pack("<I", 1 << 20), struct.pack("<I", 1 << 10))
    path.write_bytes(data)
    (skipped,) = prepare([path], tmp_path / "out").skipped
    assert skipped == Skipped("b.png", "is damaged and cannot be read; copy it again from where it comes from")


def test_damaged_zips_end_in_a_sentence(tmp_path):
    """Whichever bytes are wrong, nothing but UploadError is raised, and nothing stays."""
    data, rng = in_zip(tmp_path / "good.zip", {"a.png": A, "a.txt": "a fox"}).read_bytes(), random.Random(0)
    headers = [i for i in range(len(data)) if i < 40 or i > data.index(b"PK\x01\x02")]
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))):
            broken[rng.choice(headers)] = rng.randrange(256)
        path = written(tmp_path / "set.zip", broken)
        try:
            prepare([path], tmp_path / "out")
        except UploadError:
            assert not (tmp_path / "out").exists() or load(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} <= {"good.zip", "set.zip", "out"}


# The prepared folder


def test_prepared_pictures(tmp_path):
    """Upright, at most 512 pixels, transparent where they were, and without what cameras write into files."""
    photo = Image.new("RGB", (1200, 600), "red")
    photo.paste("blue", (0, 0, 600, 600))
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    exif[0x010F] = "camera"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    files = {
        "alpha.png": save(blocks(3, mode="RGBA"), icc_profile=profile),
        "opaque.png": save(Image.merge("RGBA", (*blocks(4).split(), Image.new("L", (64, 64), 255)))),
        "photo.jpg": save(photo, "JPEG", exif=exif),
    }
    read(tmp_path, files)
    pictures = {example.name: Image.open(tmp_path / "out" / example.file) for example in load(tmp_path / "out")}
    assert [example.file for example in load(tmp_path / "out")] == [f"pictures/000{i}.png" for i in range(3)]
    assert np.array_equal(np.asarray(pictures["alpha.png"]), np.asarray(blocks(3, mode="RGBA")))
    assert pictures["opaque.png"].mode == "RGB"
    upright = pictures["photo.jpg"]
    assert upright.size == (256, 512)
    assert upright.getpixel((128, 50))[2] > 200 > 50 > upright.getpixel((128, 50))[0]
    assert not upright.getexif()
    assert [picture.info for picture in pictures.values()] == [{}, {}, {}]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "I;16", "I", "F"])
def test_every_kind_of_pixels(mode):
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    if mode == "I;16":
        data = save(Image.fromarray(ramp.astype(np.uint16) * 257))
    else:
        data = save(Image.fromarray(ramp).convert(mode), "TIFF")
    levels = np.asarray(uploads.decode(data)[0].convert("L")).astype(int)
    if mode == "1":
        assert set(np.unique(levels)) == {0, 255}
    else:
        assert np.abs(levels - ramp).max() <= 3


def test_colours_of_a_palette_with_a_transparent_one():
    drawing = Image.new("P", (64, 64), 0)
    drawing.putpalette([255, 0, 255, 0, 200, 0])
    drawing.paste(1, (16, 16, 48, 48))
    picture, several = uploads.decode(save(drawing, "GIF", transparency=0))
    assert picture.mode == "RGBA"
    assert picture.getpixel((0, 0))[3] == 0
    assert picture.getpixel((32, 32)) == (0, 200, 0, 255)
    assert not several


def test_twin_lends_its_caption(tmp_path):
    report, found = read(tmp_path, {"a.png": A, "b.bmp": save(blocks(0), "BMP"), "b.txt": "a fox"})
    assert found == {"a.png": "a fox"}
    assert (report.found, report.used) == (2, 1)


def test_captions_hold_nothing_that_breaks_a_file(tmp_path):
    files = {
        "a.png": A,
        "m.jsonl": '{"file": "a.png", "text": "\\ud800 two\\nlines\\u2028 \\u0000\\u001b[31mred 👩\\u200d🚒"}',
    }
    assert read(tmp_path, files)[1] == {"a.png": "two lines [31mred 👩\u200d🚒"}


def test_save_captions(tmp_path):
    _, before = read(tmp_path, {"a.png": A, "b.png": B})
    folder = tmp_path / "out"
    first, second = load(folder)
    save_captions(folder, {second.file: "  two\nlines  "})
    assert load(folder) == [first, replace(second, caption="two lines")]
    assert set(before.values()) == {""}
    with pytest.raises(UploadError, match=r"pictures/0009\.png is not among the prepared pictures"):
        save_captions(folder, {"pictures/0009.png": "x"})
    assert not list(folder.glob("*.part"))


def test_an_exported_folder_can_be_uploaded_again(tmp_path):
    _, found = read(tmp_path, {"a.png": A, "a.txt": "a fox", "b.png": B, "b.txt": "a bear"})
    prepare([tmp_path / "out"], tmp_path / "again")
    assert [example.caption for example in load(tmp_path / "again")] == list(found.values())


def test_only_prepared_folders_are_replaced(tmp_path):
    folder = in_folder(tmp_path / "set", {"a.png": A})
    with pytest.raises(UploadError, match="set holds other things; choose a new folder"):
        prepare([folder], folder)
    assert [path.name for path in folder.iterdir()] == ["a.png"]
    prepare([folder], tmp_path / "out")
    in_folder(folder, {"b.png": B})
    (tmp_path / ".out.part" / "pictures").mkdir(parents=True)  # left by a run that was killed
    assert prepare([folder], tmp_path / "out").used == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "set"]


def test_a_failed_upload_leaves_the_former_one(tmp_path):
    prepare([in_folder(tmp_path / "set", {"a.png": A})], tmp_path / "out")
    with pytest.raises(UploadError):
        prepare([in_folder(tmp_path / "bad", {"a.png": b"x"})], tmp_path / "out")
    assert len(load(tmp_path / "out")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "out", "set"]


def test_same_upload_same_folder(tmp_path):
    files = {f"{i}.png": save(blocks(i)) for i in range(6)} | {"3.txt": "three"}
    prepare([in_folder(tmp_path / "set", files)], tmp_path / "one")
    prepare([in_zip(tmp_path / "set.zip", dict(reversed(files.items())))], tmp_path / "two")
    for name in ("examples.jsonl", "pictures/0003.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a folder of prepared pictures"),
        ("{", "examples.jsonl is damaged"),
        ('{"file": "pictures/0000.png"}', "examples.jsonl is damaged"),
        ('{"file": "../../secret.png", "caption": "", "name": "", "group": 0}', "which is not in the folder"),
    ],
)
def test_what_is_not_a_prepared_folder(tmp_path, content, message):
    in_folder(tmp_path, {"report.json": "{}"} | ({} if content is None else {"examples.jsonl": content}))
    with pytest.raises(UploadError, match=message):
        load(tmp_path)


# Near-duplicates, the split, pixels


@pytest.fixture(scope="module")
def icons() -> list[tuple[str, Image.Image]]:
    """Subject and drawing: a dozen subjects in eight sets, flat and shaded, on nothing."""
    drawn = []
    for source in emoji.SOURCES:
        table = NPM / source.folder / "icons.json"
        for name in json.loads(table.read_text(encoding="utf-8"))["icons"] if table.exists() else ():
            picture = emoji.render((source, name, ""), NPM)
            if picture is not None:
                subject = name.replace("-", "").removeprefix("large")  # a large blue circle is a blue circle
                drawn.append((subject, Image.fromarray(picture)))
    return drawn


def test_different_drawings_are_not_grouped(icons):
    groups = uploads.group_alike([fingerprint(picture) for _, picture in icons])
    subjects = [{name for (name, _), group in zip(icons, groups, strict=True) if group == one} for one in set(groups)]
    assert len(icons) > 60
    assert [names for names in subjects if len(names) > 1] == []


def test_faces_that_differ_in_their_mouth_are_not_grouped():
    faces = []
    for start, end in ((20, 160), (200, 340)):  # a smile, a frown
        face = Image.new("RGB", (128, 128), "white")
        pen = ImageDraw.Draw(face)
        pen.ellipse((8, 8, 120, 120), fill=(255, 204, 50))
        pen.ellipse((40, 40, 52, 56), fill=(80, 50, 20))
        pen.ellipse((76, 40, 88, 56), fill=(80, 50, 20))
        pen.arc((38, 62, 90, 98), start, end, fill=(80, 50, 20), width=3)
        faces.append(fingerprint(face))
    assert uploads.group_alike(faces) == [0, 1]


CHANGES = {
    "jpeg": lambda picture: Image.open(io.BytesIO(save(picture, "JPEG", quality=60))),
    "smaller": lambda picture: picture.resize((picture.width // 2, picture.height // 2)),
    "darker": lambda picture: ImageEnhance.Brightness(picture).enhance(0.85),
    "paler": lambda picture: ImageEnhance.Contrast(picture).enhance(0.8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_grouped(icons, change):
    pictures = [uploads.square(picture) for _, picture in icons[::4]]
    likeness = [fingerprint(picture) @ fingerprint(CHANGES[change](picture)) for picture in pictures]
    assert min(likeness) > uploads.SAME


def test_groups_are_joined_by_what_lies_between():
    angles = np.radians([0, 90, 20, 10])  # the last is like the first and the third, which are not alike
    prints = [np.array([np.cos(angle), np.sin(angle)]) for angle in angles]
    assert uploads.group_alike(prints) == [0, 1, 0, 0]


def examples(groups: list[int], captions: list[str] | None = None) -> list[Example]:
    captions = captions or ["x"] * len(groups)
    return [Example(f"pictures/{i:04d}.png", captions[i], f"{i}.png", group) for i, group in enumerate(groups)]


@pytest.mark.parametrize("count", [1, 4, 5, 12, 30, 200])
def test_split_share(count):
    training, held_out = split(examples(list(range(count))))
    assert sorted([*training, *held_out]) == list(range(count))
    assert len(held_out) == (0 if count < 5 else max(1, round(0.15 * count)))
    assert (training, held_out) == split(examples(list(range(count))))


def test_split_follows_seed_and_names():
    assert split(examples(list(range(30))), 1) != split(examples(list(range(30))), 2)
    renumbered = examples([group + 7 for group in range(30)])
    assert split(renumbered) == split(examples(list(range(30))))


def test_split_keeps_groups_together_and_leaves_out_what_has_no_caption():
    groups = [i // 3 for i in range(60)]
    for seed in range(5):
        training, held_out = split(examples(groups, ["" if i % 10 == 0 else "x" for i in range(60)]), seed)
        assert not {groups[i] for i in training} & {groups[i] for i in held_out}
        assert sorted([*training, *held_out]) == [i for i in range(60) if i % 10]
    sizes = examples([0] * 20 + [1] * 20 + [2] * 20 + [3] * 20 + [4] * 18)  # none fits into 15 %
    assert split(sizes)[1] == list(range(80, 98))


def test_pixels_are_padded_on_white(tmp_path):
    wide = Image.new("RGBA", (128, 64), (255, 0, 0, 255))
    wide.paste((0, 0, 0, 0), (0, 0, 64, 64))
    read(tmp_path, {"a.png": A, "wide.png": save(wide)})
    batch = pictures(tmp_path / "out", load(tmp_path / "out")[::-1], 32)
    assert batch.shape == (2, 32, 32, 3)
    assert batch.dtype == torch.uint8
    assert batch[0, 2, 16].tolist() == [255, 255, 255]  # above it
    assert batch[0, 16, 4].tolist() == [255, 255, 255]  # where it is transparent
    assert batch[0, 16, 28].tolist() == [255, 0, 0]
    assert np.abs(np.asarray(blocks(0).resize((32, 32))).astype(int) - batch[1].numpy()).mean() < 20
    taken = pixels(tmp_path / "out", load(tmp_path / "out")[::-1], 32)
    assert taken.shape == (2, 3, 32, 32)
    assert (taken[0, :, 2, 16].tolist(), taken[0, :, 16, 28].tolist()) == ([1, 1, 1], [1, -1, -1])


def test_every_table_kind_is_told_apart():
    assert not set(uploads.PICTURES) & {*captions.TABLES, *captions.TEXTS}
    assert not {kind for kinds in uploads.REASONS for kind in kinds} & {*uploads.PICTURES, *captions.TABLES}
