"""Pixels become pictures without a shift, and a file tells how its picture was made."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_demo.images import (
    CHUNK,
    describe,
    from_pil,
    grid,
    read_request,
    save_animation,
    save_each,
    save_png,
    square,
    to_pil,
)

REQUEST = {
    "prompt": "一只小狗 🍕 “café”\nsecond line",
    "n": 1,
    "seed": 7,
    "temperature": 0.9,
    "top_k": 5,
    "top_p": 0.95,
    "guidance_scale": 2.5,
}
ORIGIN = {"model": "nano", "sampler": "autoregressive", "steps": 64, "format": "float32", "threads": 2}


def every_level() -> Image.Image:
    """16x16 picture that holds each of the 256 levels in each channel, at different places."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    return Image.fromarray(np.stack([levels, levels[::-1], levels.T], -1))


def test_every_level_survives_the_round_trip():
    picture = every_level()
    (again,) = to_pil(from_pil([picture]))
    assert again.tobytes() == picture.tobytes()
    assert again.mode == "RGB"


def test_range_and_order_of_axes():
    picture = Image.new("RGB", (6, 4), (255, 0, 0))  # 6 wide, 4 high
    pixels = from_pil([picture, picture])
    assert pixels.shape == (2, 3, 4, 6)
    assert pixels.dtype == torch.float32
    assert pixels[0, 0].eq(1).all()
    assert pixels[0, 1:].eq(-1).all()


def test_clips_and_rounds_to_nearest():
    values = torch.tensor([-7.0, -1.0, 0.0, 0.999, 1.0, 7.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert np.asarray(to_pil(values)[0])[0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]


def test_bf16_pixels_become_pictures():
    (picture,) = to_pil(torch.ones(1, 3, 2, 2, dtype=torch.bfloat16))
    assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_transparent_pictures_are_read_as_rgb():
    assert from_pil([Image.new("RGBA", (2, 2), (1, 2, 3, 4))]).shape == (1, 3, 2, 2)


@pytest.mark.parametrize(
    ("count", "columns", "size"), [(1, None, (4, 4)), (4, None, (10, 10)), (5, None, (16, 10)), (3, 3, (16, 4))]
)
def test_grid_is_filled_row_by_row(count, columns, size):
    pictures = [Image.new("RGB", (4, 4), (40 * i, 0, 0)) for i in range(count)]
    sheet = grid(pictures, columns)
    assert sheet.size == size
    across = (size[0] + 2) // 6
    for i in range(count):
        assert sheet.getpixel((i % across * 6 + 1, i // across * 6 + 1)) == (40 * i, 0, 0)
    if count == 5:
        assert sheet.getpixel((13, 7)) == (255, 255, 255)  # the empty place, and the gaps, are white
        assert sheet.getpixel((4, 1)) == (255, 255, 255)


def test_png_remembers_its_request(tmp_path):
    path = save_png(every_level(), tmp_path / "a.png", REQUEST, ORIGIN)
    assert read_request(path) == (REQUEST, ORIGIN)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    with Image.open(path) as picture:
        picture.load()
        assert picture.tobytes() == every_level().tobytes()
        assert json.loads(picture.text[CHUNK]) == {**ORIGIN, "request": REQUEST}
        assert CHUNK == "dalle_demo"
        lines = picture.text["parameters"].split("\n")
    assert lines[:2] == REQUEST["prompt"].split("\n")
    settings = dict(part.split(": ") for part in lines[2].split(", "))
    expected = {"Steps": "64", "CFG scale": "2.5", "Seed": "7", "Size": "16x16", "Model": "nano", "Temperature": "0.9"}
    assert expected.items() <= settings.items()


def test_each_picture_of_a_request_has_settings_of_its_own(tmp_path):
    paths = save_each([every_level()] * 2, [7, 8], REQUEST | {"n": 2}, ORIGIN, tmp_path / "a.b")
    assert paths == [tmp_path / "a.b-7.png", tmp_path / "a.b-8.png"]
    for path, seed in zip(paths, (7, 8), strict=True):
        assert read_request(path) == (REQUEST | {"n": 1, "seed": seed}, ORIGIN)


def test_same_picture_and_request_give_the_same_file(tmp_path):
    one, other = (save_png(every_level(), tmp_path / name, REQUEST, ORIGIN) for name in ("a.png", "b.png"))
    assert one.read_bytes() == other.read_bytes()


def test_describes_settings_in_the_usual_order():
    text = describe(REQUEST | {"prompt": "a cat"}, ORIGIN, (8, 8))
    assert text == (
        "a cat\nSteps: 64, Sampler: autoregressive, CFG scale: 2.5, Seed: 7, Size: 8x8, Model: nano, "
        "Temperature: 0.9, Top-k: 5, Top-p: 0.95"
    )


def test_describes_the_settings_of_any_request():
    request = {"prompt": "a cat", "n": 1, "seed": 7, "guidance_scale": 2.0, "truncation": 0.5, "candidates": 2}
    origin = ORIGIN | {"model": "unclip-nano", "sampler": "flow and GAN", "steps": 8}
    assert describe(request, origin, (8, 8)) == (
        "a cat\nSteps: 8, Sampler: flow and GAN, CFG scale: 2.0, Seed: 7, Size: 8x8, Model: unclip-nano, "
        "Truncation: 0.5, Candidates: 2"
    )


def test_square_pads_with_white_about_the_middle():
    wide = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    wide.putpixel((0, 0), (0, 0, 0, 0))  # transparent: white as well
    picture = square(wide)
    assert (picture.size, picture.mode) == ((4, 4), "RGB")
    white, red = (255, 255, 255), (255, 0, 0)
    assert [picture.getpixel((2, y)) for y in range(4)] == [white, red, red, white]
    assert picture.getpixel((0, 1)) == white
    assert square(every_level()).tobytes() == every_level().tobytes()


def test_an_animation_shows_its_pictures_in_turn_for_ever(tmp_path):
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    path = save_animation(pictures, tmp_path / "walk.webp", 80)
    assert [file.name for file in tmp_path.iterdir()] == ["walk.webp"]
    with Image.open(path) as shown:
        assert (shown.n_frames, shown.info["loop"]) == (3, 0)
        for number, picture in enumerate(pictures):
            shown.seek(number)
            shown.load()
            assert shown.info["duration"] == 80
            difference = np.asarray(shown.convert("RGB"), int) - np.asarray(picture, int)
            assert np.abs(difference).max() < 12


def test_failed_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_png(every_level(), tmp_path / "a.png", REQUEST, ORIGIN)
    before = path.read_bytes()

    def fail(self, target, *args, **options):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(every_level(), path, REQUEST, ORIGIN)
    assert path.read_bytes() == before


def foreign(folder, kind: str):
    """A file that was not made here."""
    path = folder / f"some {kind}"
    chunks = {
        "png": {},
        "png with another chunk": {"parameters": "a cat"},
        "png with broken JSON": {CHUNK: "{"},
        "png with a list": {CHUNK: "[1]"},
        "png with half a record": {CHUNK: '{"model": "nano"}'},
        "png with a request of text": {CHUNK: '{"model": "nano", "request": "a cat"}'},
        "png with no request": {CHUNK: '{"model": "nano", "request": null}'},
        "png with a number": {CHUNK: "1"},
    }
    if kind in chunks:
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for name, text in chunks[kind].items():
            info.add_text(name, text)
        every_level().save(path, "PNG", pnginfo=info)
    elif kind in ("jpeg", "gif", "webp"):
        every_level().save(path, kind)
    elif kind == "truncated png":
        save_png(every_level(), path, REQUEST, ORIGIN)
        path.write_bytes(path.read_bytes()[:60])
    elif kind != "missing file":
        path.write_bytes({"empty file": b"", "text": b"hello", "svg": b"<svg/>", "garbage": bytes(range(256))}[kind])
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "png",
        "png with another chunk",
        "png with broken JSON",
        "png with a list",
        "png with half a record",
        "png with a request of text",
        "png with no request",
        "png with a number",
        "jpeg",
        "gif",
        "webp",
        "truncated png",
        "empty file",
        "text",
        "svg",
        "garbage",
        "missing file",
    ],
)
def test_foreign_files_are_refused_by_name(kind, tmp_path):
    path = foreign(tmp_path, kind)
    with pytest.raises(ValueError, match="some") as caught:
        read_request(path)
    assert str(path) in str(caught.value)


def test_damaged_files_raise_nothing_else(tmp_path):
    """Each byte of a small file turned over: the request is read, or refused with a ValueError."""
    path = save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", REQUEST, ORIGIN)
    whole = path.read_bytes()
    refused = 0
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            read_request(path)
        except ValueError:
            refused += 1
    assert refused > len(whole) / 2
