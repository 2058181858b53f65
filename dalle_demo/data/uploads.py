"""pictures and captions in any layout -> prepared folder: pictures/*.png, examples.jsonl, report.json.

The layout is found out and told, as is all that was left out or looks doubtful. What follows works on such folders.
"""

import hashlib
import io
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from dalle_demo.data.archives import File, Skipped, UnusableError, UploadError, clean, opened
from dalle_demo.data.captions import MAX_CAPTION, TABLES, TEXTS, Captions, some
from dalle_demo.images import square

SIDE = 512  # of a prepared picture, the longer one
TINY = 32  # pixels of the shorter side
MAX_PIXELS = 64_000_000  # of a picture; 200 MB while it is read
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
REASONS = {  # for kinds of files that people give
    (".zip", ".rar", ".7z", ".tar", ".gz", ".tgz", ".bz2", ".xz"): (
        "is an archive that is not opened here; unpack it, and give the pictures or one zip of them"
    ),
    (".heic", ".heif"): "is in Apple's HEIC format, which is not read here; export it as JPEG",
    (".svg", ".ai", ".eps", ".pdf", ".psd"): "is not a picture of pixels; export it as PNG",
    (".mp4", ".mov", ".avi", ".webm", ".mkv"): "is a video; save single pictures of it",
    (".xlsx", ".xls", ".ods"): "is a spreadsheet; save it as CSV UTF-8",
}
UNKNOWN = f"is neither a picture ({', '.join(PICTURES)}), nor a caption ({', '.join(TEXTS)}), nor a table of captions"
# Likeness from which two pictures are near-duplicates. Copies of 110 icons, as JPEG of quality 50, at a third of the
# size, darker or paler, are at least 0.98 like the icon. Of the 604,450 pairs among 1,100 icons 43 are above 0.97, most
# of them one drawing in two skin tones. Copies with cut edges mostly stay below it.
SAME = 0.97
HELD_OUT_SHARE = 0.15
MIN_GROUPS = 5  # below it, nothing is held out


@dataclass(frozen=True)
class Example:
    """A picture of a prepared folder, its caption (empty: not trained on), and the name that it came with."""

    file: str
    caption: str
    name: str
    group: int  # shared with its near-duplicates


@dataclass(frozen=True)
class Report:
    """What was found in an upload, in words for whoever gave it."""

    layout: str
    found: int  # pictures
    used: int  # of these, in the prepared folder
    skipped: list[Skipped] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def prepare(sources: Sequence[Path], folder: Path) -> Report:
    """Read files, folders and zips into a prepared folder, which is whole or not there; an earlier one is replaced.

    Raises UploadError where there is no picture to use, or where the upload looks like a trap.
    """
    if not sources:
        raise UploadError("nothing was given; choose pictures, a folder or a zip file")
    if folder.exists() and not is_prepared(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UploadError(f"{folder} holds other things; choose a new folder for the prepared pictures")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    (part / "pictures").mkdir(parents=True)
    try:
        with opened(sources) as files:
            report = _write(files, part, some([source.name for source in sources]))
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
        return report
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load(folder: Path) -> list[Example]:
    """Examples of a prepared folder."""
    if not is_prepared(folder):
        raise UploadError(f"{folder} is not a folder of prepared pictures; prepare it anew from the pictures")
    lines = (folder / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    try:
        examples = [Example(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise UploadError(f"{folder / 'examples.jsonl'} is damaged; prepare the folder anew") from error
    strange = [example.file for example in examples if not re.fullmatch(r"pictures/\d{4,}\.png", example.file)]
    if strange:
        raise UploadError(f"{folder / 'examples.jsonl'} names {strange[0]}, which is not in the folder")
    return examples


def load_report(folder: Path) -> Report:
    """Report of a prepared folder."""
    fields = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return Report(**fields | {"skipped": [Skipped(**skipped) for skipped in fields["skipped"]]})


def is_prepared(folder: Path) -> bool:
    """Whether `prepare` made this folder."""
    return (folder / "examples.jsonl").is_file() and (folder / "report.json").is_file()


def save_captions(folder: Path, captions: Mapping[str, str]) -> None:
    """Replace the captions of some pictures, given by file."""
    examples = load(folder)
    unknown = captions.keys() - {example.file for example in examples}
    if unknown:
        raise UploadError(f"{min(unknown)} is not among the prepared pictures; load the page again")
    new = {file: clean(caption)[:MAX_CAPTION] for file, caption in captions.items()}
    _save([replace(example, caption=new.get(example.file, example.caption)) for example in examples], folder)


def split(examples: Sequence[Example], seed: int = 0) -> tuple[list[int], list[int]]:
    """Indices for training and for validation among the examples that have a caption; near-duplicates go together."""
    groups = defaultdict(list)
    for i, example in enumerate(examples):
        if example.caption:
            groups[example.group].append(i)

    def lot(members: list[int]) -> bytes:
        name = min(examples[i].name for i in members)  # not the number, which another picture would change
        return hashlib.sha256(f"{seed}/{name}".encode()).digest()

    held_out: list[int] = []
    if len(groups) >= MIN_GROUPS:
        wanted = max(1, round(HELD_OUT_SHARE * sum(map(len, groups.values()))))
        for members in sorted(groups.values(), key=lot):
            if len(held_out) + len(members) <= wanted:
                held_out += members
        held_out = held_out or min(groups.values(), key=lambda members: (len(members), lot(members)))
    training = {i for members in groups.values() for i in members} - set(held_out)
    return sorted(training), sorted(held_out)


def pixels(folder: Path, examples: Sequence[Example], size: int) -> Float[Tensor, "N 3 S S"]:
    """The same as models take them, in [-1, 1]."""
    return pictures(folder, examples, size).permute(0, 3, 1, 2).float() / 127.5 - 1


def pictures(folder: Path, examples: Sequence[Example], size: int) -> UInt8[Tensor, "N S S 3"]:
    """Pictures on white, each padded to a square about its middle and scaled to `size`."""
    stacked = np.empty((len(examples), size, size, 3), np.uint8)
    for i, example in enumerate(examples):
        with Image.open(folder / example.file) as picture:
            stacked[i] = square(picture).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(stacked)


def fingerprint(picture: Image.Image) -> np.ndarray:
    """Perceptual hash: colour steps between neighbours of a 16x16 thumbnail, as a vector of length 1.

    The product of two is their likeness, whatever the brightness, contrast, size and compression. Bits, as hashes
    mostly have them, would be noise where a flat drawing is symmetric or plain.
    """
    small = np.asarray(square(picture).resize((16, 16), Image.Resampling.BOX), np.float32)
    steps = np.concatenate([np.diff(small, axis=axis).ravel() for axis in (0, 1)])
    return steps / max(np.linalg.norm(steps), 1e-6)


def _write(files: Sequence[File], folder: Path, label: str) -> Report:
    """Write all of a prepared folder."""
    pictures = [file for file in files if file.kind in PICTURES]
    captions = Captions([file.name for file in pictures if not file.trouble])
    captions.read([file for file in files if file.kind in (*TABLES, *TEXTS)])
    skipped = [Skipped(file.name, file.trouble or _reason(file.kind)) for file in files if not _is_known(file.kind)]
    examples, prints, animated = [], [], []
    first: dict[str, int] = {}  # pixels -> number of the example that has them
    for file in pictures:
        try:
            picture, several = decode(file.read())
        except UnusableError as error:
            skipped.append(Skipped(file.name, str(error)))
            continue
        caption = captions.found.get(file.name, "")
        key = hashlib.sha256(repr((picture.size, picture.mode)).encode() + picture.tobytes()).hexdigest()
        if key in first:
            twin = examples[first[key]]
            skipped.append(Skipped(file.name, f"is the same picture as {twin.name}, which is used once"))
            examples[first[key]] = replace(twin, caption=twin.caption or caption)
            continue
        first[key] = len(examples)
        example = Example(f"pictures/{len(examples):04d}.png", caption, file.name, group=0)
        picture.save(folder / example.file)
        examples.append(example)
        prints.append(fingerprint(picture))
        animated += [file.name] * several
    skipped += captions.skipped
    if not examples:
        raise UploadError(_nothing(len(files), len(pictures), skipped))
    examples = [replace(example, group=group) for example, group in zip(examples, group_alike(prints), strict=True)]
    report = Report(
        f"{label}: {'; '.join(captions.layout)}",
        len(pictures),
        len(examples),
        sorted(skipped, key=lambda skipped: skipped.name),
        [*captions.warnings, *_warnings(examples, animated)],
    )
    _save(examples, folder)
    (folder / "report.json").write_text(json.dumps(asdict(report), ensure_ascii=False, indent=1), encoding="utf-8")
    return report


def decode(data: bytes) -> tuple[Image.Image, bool]:
    """Upright RGB or RGBA picture of at most SIDE pixels, and whether it is the first of several in its file.

    Raises UnusableError, of the kind `damaged`, `transparent`, `large` or `tiny`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as source:
            _check_size(*source.size)
            several = source.format != "MPO" and getattr(source, "is_animated", False)  # MPO: a photo and its preview
            source.draft(None, (2 * SIDE, 2 * SIDE))  # a large JPEG is read at a fraction of its size
            picture = _to_8_bits(ImageOps.exif_transpose(source))
            picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    except UnusableError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large() from error
    except Exception as error:  # on damaged data the decoders raise what they like
        raise UnusableError("is damaged, or no picture at all; save it again as PNG or JPEG", "damaged") from error
    if picture.mode == "RGBA":
        least, most = picture.getchannel("A").getextrema()
        if most == 0:
            raise UnusableError("is empty: all of it is transparent", "transparent")
        picture = picture.convert("RGB") if least == 255 else picture
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    picture.info.clear()  # where and when it was taken is nobody's business
    return picture, several


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _too_large()
    if min(width, height) < TINY:
        reason = f"is tiny ({width}x{height} pixels, at least {TINY} a side are needed); give a larger one"
        raise UnusableError(reason, "tiny", width=width, height=height, least=TINY)


def _too_large() -> UnusableError:
    millions = MAX_PIXELS // 10**6
    return UnusableError(f"has more than {millions} million pixels; make it smaller", "large", millions=millions)


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Scale what has 16 bits a pixel, which Pillow would clip."""
    if not picture.mode.startswith(("I", "F")):
        return picture
    levels = np.asarray(picture, np.float32)
    top = 65535 if levels.max() > 255 else 255 if levels.max() > 1 else 1
    return Image.fromarray((levels.clip(0, top) * (255 / top)).round().astype(np.uint8))


def group_alike(prints: Sequence[np.ndarray]) -> list[int]:
    """Number of each picture's group: near-duplicates, and theirs, share one."""
    vectors, groups = np.stack(prints), np.arange(len(prints))
    for i in range(1, len(vectors)):
        alike = groups[:i][vectors[:i] @ vectors[i] > SAME]
        if len(alike):
            groups[i] = alike.min()
            groups[:i][np.isin(groups[:i], alike)] = alike.min()
    return np.unique(groups, return_inverse=True)[1].tolist()


def _warnings(examples: Sequence[Example], animated: Sequence[str]) -> Iterator[str]:
    """What the giver should know of the pictures that are used."""
    if animated:
        yield f"only the first picture was used of files with several: {some(animated)}"
    members = defaultdict(list)
    for example in examples:
        members[example.group].append(example.name)
    alike = [f"{some(names)}" for names in members.values() if len(names) > 1]
    if alike:
        yield f"pictures that look nearly the same, and so are either all learned or all held out: {some(alike, '; ')}"
    bare = [example.name for example in examples if not example.caption]
    if bare:
        yield (
            f"{len(bare)} of {len(examples)} pictures have no caption and are not trained on until you type one: "
            + some(bare)
        )


def _is_known(kind: str) -> bool:
    return kind in (*PICTURES, *TABLES, *TEXTS)


def _reason(kind: str) -> str:
    return next((reason for kinds, reason in REASONS.items() if kind in kinds), UNKNOWN)


def _nothing(files: int, pictures: int, skipped: Sequence[Skipped]) -> str:
    """Why no picture can be used."""
    why = some([f"{one.name} {one.reason}" for one in skipped], "; ")
    if not files:
        return f"there are no files in it; give pictures of these kinds: {', '.join(PICTURES)}"
    return f"none of {pictures} pictures can be used: {why}" if pictures else f"there is no picture in it: {why}"


def _save(examples: Sequence[Example], folder: Path) -> None:
    part = folder / "examples.jsonl.part"
    part.write_text(
        "".join(json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples), encoding="utf-8"
    )
    part.replace(folder / "examples.jsonl")
