"""Tiny seeded models and data, made once a session."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_runs import Processes
from PIL import Image
from tiny import save_tiny, save_tiny_clip, save_tiny_unclip, tiny_config, tiny_unclip_config

from dalle_demo.config import CLIP_PRESET
from dalle_demo.data import uploads
from dalle_demo.engines import DalleEngine, UnclipEngine
from dalle_demo.training.loop import Workers

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 30), "blue": (30, 30, 220), "gray": (120, 120, 120)}


@pytest.fixture(scope="session")
def nano_folder(tmp_path_factory) -> Path:
    """Checkpoint folder of a tiny DALL-E with random weights."""
    return save_tiny(tmp_path_factory.mktemp("weights") / "tiny", tiny_config())


@pytest.fixture(scope="session")
def engine(nano_folder):
    """Engine on the tiny model, in fp32 whatever the processor: what is promised to the bit is promised for fp32."""
    return DalleEngine.load(str(nano_folder), form="float32", device="cpu")


@pytest.fixture(scope="session")
def shipped(tmp_path_factory) -> Path:
    """Folder with a tiny CLIP and a tiny DALL-E 2 that was trained with it, by the names of the real ones."""
    folder, config = tmp_path_factory.mktemp("shipped"), tiny_unclip_config()
    save_tiny_unclip(folder / "unclip-nano", config, save_tiny_clip(folder / CLIP_PRESET, config))
    return folder


@pytest.fixture(scope="session")
def unclip(shipped):
    """Engine on the tiny DALL-E 2."""
    return UnclipEngine.load(str(shipped / "unclip-nano"))


@pytest.fixture
def one_thread():
    """Sums over several threads may be added up in another order; the processes that tests start use one as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def alone() -> Workers:
    """The only process of a run."""
    workers = Workers()
    workers.count, workers.rank = 1, 0
    return workers


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """Data set folder in the form of `data emoji`: 24 discs and boxes of six colours."""
    folder = tmp_path_factory.mktemp("data")
    colours = {"red": "红", "green": "绿", "blue": "蓝", "yellow": "黄", "pink": "粉", "gray": "灰"}
    rng = np.random.default_rng(0)
    images, rows = [], []
    for number, (name, chinese) in enumerate(colours.items()):
        for style, style_zh in (("flat", "扁平"), ("shaded", "阴影"), ("bold", "粗犷"), ("retro", "复古")):
            picture = np.zeros((128, 128, 4), np.uint8)
            top, left = rng.integers(8, 40, size=2)
            picture[top : top + 70, left : left + 70] = (*rng.integers(256, size=3), 255)
            images.append(picture)
            rows.append(
                {
                    "hex": f"{0x1F34A + number:X}",  # of these, `split` holds out 1F34E in retro
                    "emoji": chr(0x1F34A + number),
                    "name": f"{name} box",
                    "keywords": ["box", name],
                    "name_zh": f"{chinese}色盒子",
                    "keywords_zh": ["盒子"],
                    "group": "objects",
                    "style": style,
                    "style_zh": style_zh,
                }
            )
    np.save(folder / "images.npy", np.stack(images))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def upload(tmp_path_factory) -> Path:
    """Twelve pictures with a caption beside each."""
    folder, rng = tmp_path_factory.mktemp("upload"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for place in ("left", "right", "middle"):
            picture = Image.new("RGB", (64, 64), "white")
            left = {"left": 2, "right": 30, "middle": 16}[place]
            size, top = rng.integers(14, 30), rng.integers(4, 30)
            picture.paste(colour, (left, top, left + size, top + 28))
            picture.save(folder / f"{name}-{place}.png")
            (folder / f"{name}-{place}.txt").write_text(f"{name} box {place}")
    return folder


@pytest.fixture(scope="session")
def data(upload, tmp_path_factory) -> Path:
    """The same, prepared."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    uploads.prepare([upload], folder)
    return folder


@pytest.fixture
def processes(data) -> Iterator[Processes]:
    """Fine-tuning in processes of its own."""
    started = Processes(data)
    yield started
    started.close()
