"""Tiny seeded models and data, made once a session."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import save_tiny, tiny_config

from dalle_demo.engines import DalleEngine


@pytest.fixture(scope="session")
def nano_folder(tmp_path_factory) -> Path:
    """Checkpoint folder of a tiny DALL-E with random weights."""
    return save_tiny(tmp_path_factory.mktemp("weights") / "tiny", tiny_config())


@pytest.fixture(scope="session")
def engine(nano_folder):
    """Engine on the tiny model, in fp32 whatever the processor: what is promised to the bit is promised for fp32."""
    return DalleEngine.load(str(nano_folder), form="float32", device="cpu")


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
