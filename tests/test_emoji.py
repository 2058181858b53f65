"""The data set of the embedded model, built from a dozen real icons of each set."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle_demo.data import emoji, pairs
from dalle_demo.data.emoji import MARGIN, NAMES, SIZE, SOURCES, build

NPM = Path(__file__).parent / "fixtures" / "npm"
STYLES = {source.package.rpartition("/")[2]: source.style for source in SOURCES}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Data set made of the fixtures."""
    folder = tmp_path_factory.mktemp("emoji") / "new" / "folder"
    report = build(folder, NPM, workers=1)
    assert (folder / "report.txt").read_text(encoding="utf-8") == report
    return folder


@pytest.fixture(scope="module")
def rows(built) -> list[dict]:
    return pairs.load(built).rows


def drawn(rows: list[dict], name: str) -> dict[str, int]:
    """Style -> index of the rows with this name."""
    return {row["style"]: i for i, row in enumerate(rows) if row["name"] == name}


def test_rows_tell_name_language_and_origin(rows):
    apple = rows[drawn(rows, "red apple")["flat"]]
    assert apple["hex"] == "1F34E"
    assert apple["emoji"] == "🍎"
    assert apple["name_zh"] == "红苹果"
    assert "fruit" in apple["keywords"]
    assert "水果" in apple["keywords_zh"]
    assert apple["group"] == "food-drink"
    assert apple["style_zh"] == "扁平"
    assert (apple["source"], apple["licence"]) == ("@iconify-json/twemoji", "CC-BY-4.0")
    assert apple["icon"] == "red-apple"


def test_every_row_has_an_attribution(rows):
    licences = {source.package: source.licence for source in SOURCES}
    assert set(licences.values()) <= {"Apache-2.0", "MIT", "CC-BY-4.0"}
    for row in rows:
        assert row["licence"] == licences[row["source"]]
        assert row["icon"]
    readme = (NPM.parent / "README.md").read_text(encoding="utf-8")
    for source in (NAMES, *SOURCES):
        assert f"| `{source.package}` | {source.version} | {source.licence} | {source.credit} |" in readme


def test_names(rows):
    assert {row["name"]: row["name_zh"] for row in rows if row["name"] != "knot"} == {
        "red apple": "红苹果",
        "pizza": "披萨",
        "red heart": "红心",
        "backhand index pointing left": "反手食指向左指",
        "backhand index pointing right": "反手食指向右指",
        "blue circle": "蓝色圆",
        "clapping hands": "鼓掌",
        "person": "成人",
    }


def test_icons_are_found_by_code_by_name_and_by_alias(rows):
    assert rows[drawn(rows, "red heart")["shaded"]]["icon"] == "red-heart"  # code 2764 of chars.json
    assert rows[drawn(rows, "red heart")["3d"]]["icon"] == "2764-fe0f.webp"  # with the selector in the file's name
    assert rows[drawn(rows, "red apple")["retro"]]["icon"] == "red-apple"  # by name
    assert rows[drawn(rows, "clapping hands")["bold"]]["icon"] == "clap"  # by shortcode
    assert rows[drawn(rows, "pizza")["outlined"]]["icon"] == "pizza-1"
    assert rows[drawn(rows, "clapping hands")["outlined"]]["icon"] == "clapping-hands-1"  # not the light-skinned -2


@pytest.mark.parametrize("word", ["skin", "dark", "tone", "flag", "keycap", "oclock", "one-o"])
def test_variants_signs_flags_and_clocks_are_left_out(rows, word):
    assert not [row for row in rows if word in row["icon"] or word in row["name"]]


def test_hidden_icons_are_not_drawn(rows):
    """Iconify hides what a set has withdrawn, whether the icon is found by its code or by its name."""
    assert "adult" not in {row["icon"] for row in rows}
    assert rows[drawn(rows, "person")["flat"]]["icon"] == "person"
    assert drawn(rows, "knot") == {}


def test_report_counts_what_was_dropped(built, rows):
    report = (built / "report.txt").read_text(encoding="utf-8")
    lines = {line.split()[0]: line.split() for line in report.splitlines() if line.startswith("@")}
    assert list(lines) == [source.package for source in SOURCES]
    for source in SOURCES:
        package, version, licence, style, kept, blank, duplicates = lines[source.package]
        assert (version, licence, style) == (source.version, source.licence, source.style)
        assert int(kept) == sum(row["source"] == package for row in rows)
        twins = package == "@iconify-json/emojione"  # a blank pizza, and Twemoji's blue circle once more
        assert (int(blank), int(duplicates)) == ((1, 1) if twins else (0, 0))
    assert "1 clock face, 1 component, 1 flag, 1 letter, keycap or sign" in report
    assert report.startswith(f"{len(rows)} pictures of {len({row['hex'] for row in rows})} concepts")


def test_blanks_and_near_duplicates_are_not_in_the_set(rows):
    assert "cartoon" not in drawn(rows, "pizza")
    assert {"flat", "minimal", "shaded"} <= set(drawn(rows, "blue circle"))
    assert "cartoon" not in drawn(rows, "blue circle")


def test_pictures_are_cut_to_their_ink_and_centred(built):
    data = pairs.load(built)
    assert data.images.shape == (len(data), SIZE, SIZE, 4)
    assert data.images.dtype == np.uint8
    for row, picture in zip(data.rows, data.images, strict=True):
        visible = picture[:, :, 3] > 8
        lines, columns = np.where(visible.any(1))[0], np.where(visible.any(0))[0]
        spare = [lines[0], SIZE - 1 - lines[-1], columns[0], SIZE - 1 - columns[-1]]
        assert min(spare) >= MARGIN - 2, row  # resampling may bleed a pixel
        assert abs(spare[0] - spare[1]) <= 3, row
        assert abs(spare[2] - spare[3]) <= 3, row
        assert min(spare[0], spare[2]) <= MARGIN + 2, row  # these are all full-size drawings


def test_colours_are_those_of_the_drawing(built, rows):
    images = pairs.load(built).images
    for style, i in drawn(rows, "blue circle").items():
        red, green, blue, alpha = images[i][SIZE // 2, SIZE // 2].tolist()
        assert blue > max(red, green), style
        assert alpha == 255
        assert images[i][0, 0, 3] == 0  # straight alpha: the corners are empty


def test_a_mirrored_alias_is_drawn_mirrored(built, rows):
    images = pairs.load(built).images
    left = images[drawn(rows, "backhand index pointing left")["minimal"]]
    right = images[drawn(rows, "backhand index pointing right")["minimal"]]
    assert np.abs(left[:, ::-1].astype(int) - right).mean() < 2
    assert np.abs(left.astype(int) - right).mean() > 5


QUARTERS = {  # a red quarter at the top left, seen through each kind of alias
    "drawing": (0, 0),
    "mirrored": (0, 1),
    "upside down": (1, 0),
    "turned": (0, 1),
    "turned twice": (1, 1),
    "back again": (0, 0),
}
COLLECTION = {
    "width": 32,
    "height": 32,
    "icons": {"drawing": {"body": '<path fill="red" d="M0 0h16v16H0z"/>'}},
    "aliases": {
        "mirrored": {"parent": "drawing", "hFlip": True},
        "upside down": {"parent": "drawing", "vFlip": True},
        "turned": {"parent": "drawing", "rotate": 1},
        "turned twice": {"parent": "turned", "rotate": 1},
        "back again": {"parent": "mirrored", "hFlip": True},
    },
}


@pytest.mark.parametrize("name", QUARTERS)
def test_aliases_flip_and_turn_clockwise(name):
    picture = emoji._render_svg(COLLECTION, name)
    alpha = np.asarray(picture)[:, :, 3]
    half = alpha.shape[0] // 2
    filled = {(r, c): alpha[r * half :, c * half :][:half, :half].mean() for r in (0, 1) for c in (0, 1)}
    assert max(filled, key=filled.get) == QUARTERS[name]
    assert emoji._resolve(COLLECTION, "no such icon") is None


def test_size_of_an_icon_overrides_that_of_its_set():
    collection = COLLECTION | {
        "icons": {"small": {"body": COLLECTION["icons"]["drawing"]["body"], "width": 16, "height": 16}}
    }
    assert np.asarray(emoji._render_svg(collection, "small"))[:, :, 3].min() == 255


def test_centre():
    assert emoji.centre(Image.new("RGBA", (50, 50))) is None
    drawing = Image.new("RGBA", (200, 200))
    drawing.paste((10, 200, 30, 255), (20, 20, 120, 70))  # 100 wide, 50 high
    alpha = emoji.centre(drawing)[:, :, 3]
    rows, columns = np.where(alpha > 8)
    assert abs(np.ptp(columns) + 1 - 100 * emoji.MAX_ENLARGE * SIZE / 200) <= 2  # 109 wide, of 116 that would fit
    assert rows.min() + rows.max() == SIZE - 1


def test_thin_drawings_survive():
    line = Image.new("RGBA", (200, 200))
    line.paste((0, 0, 0, 255), (0, 99, 200, 103))
    assert emoji.centre(line)[:, :, 3].max() == 255


def test_building_twice_gives_the_same_files(built, tmp_path):
    build(tmp_path, NPM, workers=2)
    for name in ("images.npy", "pairs.jsonl", "report.txt"):
        assert (tmp_path / name).read_bytes() == (built / name).read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        f"{NAMES.folder}/meta/groups.json",
        f"{NAMES.folder}/zh/data.json",
        f"{NAMES.folder}/en/data.json",
        "iconify-json-noto-1.2.9/icons.json",
        "lobehub-fluent-emoji-3d-1.1.0/assets",
    ],
)
def test_incomplete_package_is_named(tmp_path, name):
    folder = Path(shutil.copytree(NPM, tmp_path / "npm"))
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.split("/")[0]):
        build(tmp_path / "out", folder, workers=1)
    assert not (tmp_path / "out").exists()


def test_missing_npm_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=r"npm.*--packages"):
        build(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fetches_pinned_versions(tmp_path, monkeypatch):
    """`npm pack` of the exact version, unpacked under the name that the rest reads."""
    import tarfile

    source = SOURCES[0]
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "icons.json").write_text("{}")
    commands = []

    def run(command, **options):
        commands.append(command)
        with tarfile.open(tmp_path / f"{source.folder}.tgz", "w:gz") as tar:
            tar.add(tmp_path / "package", "package")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(emoji.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(subprocess, "run", run)
    emoji.fetch(source, tmp_path)
    assert commands[0][:3] == ["/bin/npm", "pack", "@iconify-json/noto@1.2.9"]
    assert json.loads((tmp_path / source.folder / "icons.json").read_text()) == {}
    assert not (tmp_path / f"{source.folder}.tgz").exists()


def test_versions_are_exact():
    for source in (NAMES, *SOURCES):
        assert source.version.count(".") == 2
        assert source.version.replace(".", "").isdigit()
        assert source.credit
    assert len(set(STYLES.values())) == len(SOURCES)
