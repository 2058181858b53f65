"""Mini, and Mega when asked for, at their real size: files as published, but random, become pictures."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stub import Hub, serving

from dalle_demo import hub
from dalle_demo.checkpoints import StoredPart
from dalle_demo.config import PRESETS, SOURCES
from dalle_demo.weights import PARTS, find

ROOT = Path(__file__).resolve().parent.parent
PEAK = Path("/proc/self/status")  # has the most memory that a process ever took, on Linux

# A process as `app.py --weights NAME` is one, up to its first picture if one is asked for.
START = """
import json, re, sys
from dalle_demo.__main__ import ensure
from dalle_demo.engines import DalleEngine

name, status, draws = sys.argv[1:]

def peak():
    try:
        with open(status) as lines:
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", lines.read())[1])
    except OSError:
        return 0

ensure(name)
found = {"fetched": peak()}
engine = DalleEngine.load(name)
found |= {"name": engine.name, "sha256": engine.model.sha256, "format": engine.format}
if draws == "yes":
    (last,) = engine.generate(engine.params("a red apple", seed=1), previews=False)
    (picture,) = last.images
    found |= {"size": picture.size, "extrema": picture.getextrema(), "tokens": last.step}
print(json.dumps(found | {"peak": peak()}))
"""


@pytest.fixture
def stub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """Hub whose files, and the cache, are deleted at once: pytest would keep some gigabytes."""
    with serving(tmp_path, monkeypatch) as server:
        yield server
    shutil.rmtree(tmp_path)


def publish(stub: Hub, preset: str, folder: Path) -> None:
    """Give the stub files of the real size."""
    command = [sys.executable, "benchmarks/random_weights.py", "--preset", preset, "--out", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    source = SOURCES[preset]
    stub.put(source.repo, {file.path: folder / name for name, file in source.files.items()})


def start(preset: str, draws: str = "no") -> dict:
    """What a new process finds."""
    command = [sys.executable, "-c", START, preset, str(PEAK), draws]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def count(preset: str, part: str) -> int:
    """Numbers that are stored of a part."""
    return sum(map(math.prod, StoredPart(find(preset) / "model.safetensors", part).shapes.values()))


@pytest.mark.parametrize(
    ("preset", "encoder", "decoder", "memory"),
    [
        pytest.param("mini", 202_591_224, 235_242_488, 3e9, id="mini"),
        pytest.param("mega", 1_110_022_144, 1_477_498_880, 12e9, id="mega", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(7200)
def test_from_the_hub_to_a_picture(stub, tmp_path, preset, encoder, decoder, memory):
    """Numbers of both Transformers as published; here are ones, too, for the norms that have no scale there."""
    publish(stub, preset, tmp_path / "files")
    first = start(preset)
    assert len(stub.fetched("detoker.pt")) == 1
    assert {path.name for path in hub.cache_root().iterdir()} == {"models", "downloads"}
    assert not (hub.cache_root() / "downloads" / preset).exists()

    sizes = PRESETS[preset].text_encoder
    scales = sizes.layers * (2 * sizes.width + sizes.glu_width) + sizes.width
    assert count(preset, "text_encoder") == encoder + scales
    assert count(preset, "image_decoder") == decoder + scales + sizes.layers * sizes.width
    assert count(preset, "vqgan") == 46_709_891
    assert set(PARTS) == {"text_encoder", "image_decoder", "vqgan"}

    stub.requests.clear()
    second = start(preset, draws="yes")
    assert stub.requests == []
    assert (first["name"], first["sha256"]) == (second["name"], second["sha256"])
    assert second["size"] == [256, 256]
    assert second["tokens"] == 256
    assert all(low < high for low, high in second["extrema"])
    if PEAK.exists():
        peaks = {"fetched and converted": first["fetched"], "loaded": first["peak"], "drawn": second["peak"]}
        assert max(peaks.values()) < memory, peaks
