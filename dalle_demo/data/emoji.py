"""npm packages of open emoji sets -> images.npy (N, 128, 128, 4) and pairs.jsonl, one row a picture.

The training set of the embedded model. Every set is Apache-2.0, MIT or CC-BY-4.0; names and keywords in English
and Chinese are those of Unicode CLDR as packaged by emojibase. Nothing is drawn twice: skin tones, flags, clock
faces, letters and near-identical finishes of one drawing are left out, and the report says how many of each.
"""

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 128
MARGIN = 6  # transparent pixels left on each side of the longest side
MAX_ENLARGE = 1.7  # small drawings (a lone eye, a droplet) stay smaller than full-size ones
NEAR_DUPLICATE = 3.0  # mean absolute difference of 16x16 thumbnails, 0..255
MIN_INK = 0.01  # share of pixels that must be visible


@dataclass(frozen=True)
class Source:
    """One emoji set: where it comes from, who made it, and the word that asks for its style."""

    package: str
    version: str
    licence: str
    credit: str
    style: str
    style_zh: str

    @property
    def folder(self) -> str:
        """Name of the unpacked package folder."""
        return f"{self.package.strip('@').replace('/', '-')}-{self.version}"


NAMES = Source("emojibase-data", "17.0.0", "MIT", "Miles Johnson; names: Unicode CLDR (Unicode-3.0)", "", "")
SOURCES = (
    Source("@iconify-json/noto", "1.2.9", "Apache-2.0", "Noto Emoji, Google", "shaded", "立体阴影"),
    Source("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Twemoji, Twitter and contributors", "flat", "扁平"),
    Source("@iconify-json/fluent-emoji", "1.2.7", "MIT", "Fluent Emoji, Microsoft", "glossy", "光泽"),
    Source("@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "Fluent Emoji, Microsoft; packaged by LobeHub", "3d", "3D"),
    Source("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Fluent Emoji, Microsoft", "minimal", "简约"),
    Source("@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "EmojiOne / EmojiTwo", "cartoon", "卡通"),
    Source("@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Noto Emoji (v1), Google", "retro", "复古"),
    Source("@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "FxEmojis, Mozilla", "bold", "粗犷"),
    Source("@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0", "Streamline Emojis, Webalys", "outlined", "描边"),
)

DROPPED_SUBGROUPS = {
    "keycap", "alphanum", "punctuation", "math", "currency", "gender", "other-symbol", "arrow", "av-symbol",
    "skin-tone", "hair-style",
}  # fmt: skip
DROPPED_GROUPS = {"component": "component", "flags": "flag"}


def build(out: Path, packages: Path | None = None, workers: int | None = None) -> str:
    """Write the data set into `out` and return the report.

    Args:
        out: folder to create; `images.npy` is uint8 RGBA, straight alpha, cropped to the ink and centred.
        packages: folder that holds the unpacked npm packages; fetched with the `npm` client when None.
        workers: rendering processes, all cores when None.

    Raises:
        FileNotFoundError: `npm` is needed and missing, or a package folder is incomplete.
        ValueError: npm could not fetch a package.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if packages is None:
            packages = Path(scratch)
            for source in (NAMES, *SOURCES):
                fetch(source, packages)
        emoji, dropped = read_names(packages)
        icons = [icon for source in SOURCES for icon in match_icons(source, packages, emoji)]
        with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
            pictures = list(pool.map(render, icons, [packages] * len(icons), chunksize=32))
    return write_pairs(out, emoji, icons, pictures, dropped)


def fetch(source: Source, folder: Path) -> None:
    """Download one package with `npm pack` at its pinned version and unpack it below `folder`."""
    npm = shutil.which("npm")  # its full name, since Windows does not find npm.cmd by itself
    if npm is None:
        raise FileNotFoundError("npm is not installed; install Node.js, or pass --packages with the unpacked packages")
    command = [npm, "pack", f"{source.package}@{source.version}", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.splitlines()[:2])  # the code and what it means; the rest is advice
        raise ValueError(f"npm could not fetch {source.package}@{source.version}: {reason}")
    archive = folder / f"{source.folder}.tgz"
    with tarfile.open(archive) as tar:
        tar.extractall(folder / f"{source.folder}.part", filter="data")
    (folder / f"{source.folder}.part" / "package").rename(folder / source.folder)
    archive.unlink()


def read_names(packages: Path) -> tuple[dict[str, dict], Counter]:
    """Read the emoji table: code points -> name, keywords (both languages) and group; and what was left out."""
    folder = packages / NAMES.folder
    groups = _load(folder / "meta/groups.json")
    chinese = {e["hexcode"]: e for e in _load(folder / "zh/data.json")}
    aliases = _load(folder / "en/shortcodes/iamcal.json")
    unicode_names = _load(folder / "meta/unicode-names.json")
    emoji, dropped = {}, Counter()
    for entry in _load(folder / "en/data.json"):
        group = groups["groups"].get(str(entry.get("group")), "component")
        subgroup = groups["subgroups"].get(str(entry.get("subgroup")), "component")
        reason = _leave_out(entry["label"], group, subgroup)
        if reason:
            dropped[reason] += 1
            continue
        code = entry["hexcode"]
        shortcodes = aliases.get(code, [])
        emoji[_key(code)] = {
            "hex": code,
            "emoji": entry["emoji"],
            "name": _plain(entry["label"]),
            "keywords": entry.get("tags", []),
            "name_zh": chinese.get(code, {}).get("label", ""),
            "keywords_zh": chinese.get(code, {}).get("tags", []),
            "group": group,
            "subgroup": subgroup,
            "aliases": [shortcodes] if isinstance(shortcodes, str) else shortcodes,
            "unicode_name": unicode_names.get(code, ""),
        }
    return emoji, dropped


def _leave_out(name: str, group: str, subgroup: str) -> str | None:
    if group in DROPPED_GROUPS:
        return DROPPED_GROUPS[group]
    if subgroup in DROPPED_SUBGROUPS:
        return "letter, keycap or sign"
    if subgroup == "time" and ("o’clock" in name or "-thirty" in name):
        return "clock face"
    return None


def match_icons(source: Source, packages: Path, emoji: dict[str, dict]) -> Iterator[tuple[Source, str, str]]:
    """Yield (source, icon name or file, emoji key) for each emoji that the set draws, by code point, else by name."""
    folder = packages / source.folder
    if (folder / "assets").is_dir():
        drawn = {_key(path.stem): path.name for path in sorted((folder / "assets").glob("*.webp"))}
    else:
        collection = _load(folder / "icons.json")
        drawn = _icons_by_name(collection, emoji) | _icons_by_code(folder, collection)
    for key, icon in drawn.items():
        if key in emoji:
            yield source, icon, key


def _icons_by_code(folder: Path, collection: dict) -> dict[str, str]:
    table = _load(folder / "chars.json") if (folder / "chars.json").exists() else {}
    drawn = {}
    for code, name in table.items():
        icon = _resolve(collection, name)
        if icon is not None and not icon.get("hidden"):
            drawn.setdefault(_key(code), name)
    return drawn


def _icons_by_name(collection: dict, emoji: dict[str, dict]) -> dict[str, str]:
    keys = {}
    for key, entry in emoji.items():
        for name in (entry["name"], entry["unicode_name"], *entry["aliases"]):
            if name:
                keys.setdefault(_slug(name), key)
    drawn = {}
    for name in sorted(collection["icons"]):  # "-1" (yellow) sorts before its light-skinned twin "-2"
        if collection["icons"][name].get("hidden"):
            continue
        key = keys.get(_slug(re.sub(r"-\d$", "", name)))
        if key is not None:
            drawn.setdefault(key, name)
    return drawn


def render(icon: tuple[Source, str, str], packages: Path) -> np.ndarray | None:
    """Draw one icon as (SIZE, SIZE, 4) uint8 RGBA, cropped to its ink and centred; None when it is blank."""
    source, name, _ = icon
    folder = packages / source.folder
    if name.endswith(".webp"):
        picture = Image.open(folder / "assets" / name).convert("RGBA")
    else:
        picture = _render_svg(_collection(folder), name)
    return centre(picture)


def centre(picture: Image.Image) -> np.ndarray | None:
    """RGBA picture of any size -> (SIZE, SIZE, 4) uint8, its ink centred and scaled to leave MARGIN; None if blank."""
    alpha = np.asarray(picture)[:, :, 3]
    if (alpha > 8).mean() < MIN_INK:
        return None
    rows, columns = np.where(alpha > 8)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    width, height = box[2] - box[0], box[3] - box[1]
    scale = min((SIZE - 2 * MARGIN) / max(width, height), MAX_ENLARGE * SIZE / max(picture.size))
    target = (max(1, round(width * scale)), max(1, round(height * scale)))
    ink = picture.crop(box).resize(target, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(ink, ((SIZE - target[0]) // 2, (SIZE - target[1]) // 2))
    return np.asarray(canvas)


_collections: dict[Path, dict] = {}  # one parsed icons.json per set and rendering process


def _collection(folder: Path) -> dict:
    if folder not in _collections:
        _collections[folder] = _load(folder / "icons.json")
    return _collections[folder]


def _render_svg(collection: dict, name: str) -> Image.Image:
    import resvg_py  # only this command needs it

    icon = _resolve(collection, name)
    box = f"{icon['left']} {icon['top']} {icon['width']} {icon['height']}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{2 * SIZE}" height="{2 * SIZE}" color="#333">{icon["body"]}</svg>'
    )
    # dpi is given because resvg_py's default of 0 rejects sizes in pt or mm
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIZE, height=2 * SIZE, dpi=96, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if icon["hFlip"]:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if icon["vFlip"]:
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return picture.rotate(-90 * icon["rotate"])


def _resolve(collection: dict, name: str) -> dict | None:
    """Follow an Iconify alias to its drawing, adding up flips and quarter turns."""
    turn, flip, flop = 0, False, False
    while name not in collection["icons"]:
        alias = collection.get("aliases", {}).get(name)
        if alias is None:
            return None
        turn += alias.get("rotate", 0)
        flip ^= alias.get("hFlip", False)
        flop ^= alias.get("vFlip", False)
        name = alias["parent"]
    size = {"left": 0, "top": 0, "width": collection.get("width", 16), "height": collection.get("height", 16)}
    return size | collection["icons"][name] | {"rotate": turn % 4, "hFlip": flip, "vFlip": flop}


def write_pairs(
    out: Path, emoji: dict[str, dict], icons: list, pictures: list[np.ndarray | None], dropped: Counter
) -> str:
    """Drop blanks and near-duplicates, write the data set atomically, return the report text."""
    kept, rows, counts = [], [], {source.package: Counter() for source in SOURCES}
    thumbnails: dict[str, list[np.ndarray]] = {}
    for (source, name, key), picture in zip(icons, pictures, strict=True):
        if picture is None:
            counts[source.package]["blank"] += 1
            continue
        thumbnail = _thumbnail(picture)
        if any(np.abs(thumbnail - other).mean() < NEAR_DUPLICATE for other in thumbnails.setdefault(key, [])):
            counts[source.package]["near-duplicate"] += 1
            continue
        thumbnails[key].append(thumbnail)
        counts[source.package]["kept"] += 1
        style = {"style": source.style, "style_zh": source.style_zh, "source": source.package}
        entry = {k: v for k, v in emoji[key].items() if k not in ("aliases", "unicode_name")}
        kept.append(picture)
        rows.append(entry | style | {"licence": source.licence, "icon": name})
    report = _report(rows, counts, dropped)
    out.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / "pairs.jsonl.part").write_text("".join(lines), encoding="utf-8")
    (out / "report.txt.part").write_text(report, encoding="utf-8")
    with (out / "images.npy.part").open("wb") as file:  # a file object, since np.save renames other paths
        np.save(file, np.stack(kept))
    for name in ("images.npy", "pairs.jsonl", "report.txt"):
        (out / f"{name}.part").replace(out / name)
    return report


def _thumbnail(picture: np.ndarray) -> np.ndarray:
    """Average 8x8 blocks over mid-grey, so that white drawings differ from empty ones."""
    alpha = picture[:, :, 3:].astype(np.float32) / 255
    flat = picture[:, :, :3] * alpha + 128 * (1 - alpha)
    return flat.reshape(16, SIZE // 16, 16, SIZE // 16, 3).mean((1, 3))


def _report(rows: list[dict], counts: dict[str, Counter], dropped: Counter) -> str:
    lines = [f"{len(rows)} pictures of {len({row['hex'] for row in rows})} concepts"]
    lines.append(f"{'source':34s} {'version':8s} {'licence':11s} {'style':9s} kept blank near-duplicate")
    for source in SOURCES:
        count = counts[source.package]
        lines.append(
            f"{source.package:34s} {source.version:8s} {source.licence:11s} {source.style:9s} "
            f"{count['kept']:4d} {count['blank']:5d} {count['near-duplicate']:14d}"
        )
    lines.append("emoji left out: " + ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items())))
    lines.append("skin-tone variants are not listed separately in the table of names and are never drawn")
    return "\n".join(lines) + "\n"


def _load(path: Path) -> dict | list:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: the package is incomplete or of another version")
    return json.loads(path.read_text(encoding="utf-8"))


def _key(code: str) -> str:
    """Code points without the emoji presentation selector, which some sets write and others omit."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _slug(name: str) -> str:
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]", "", ascii_name.replace("&", "and"))


def _plain(name: str) -> str:
    return name.replace("’", "'").replace("“", "").replace("”", "")
