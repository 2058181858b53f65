"""what an array is computed from -> the array, computed once and kept in a file."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dalle_demo.training.loop import Workers


def digest(made_from: dict[str, str]) -> str:
    """Short name for what a cache was computed from."""
    return hashlib.sha256(repr(sorted(made_from.items())).encode()).hexdigest()[:12]


def shared_cache(path: Path, rows: int, compute: Callable[[range], np.ndarray], workers: Workers) -> np.ndarray:
    """Array kept at `path`, computed in equal shares by all processes when it is not there yet."""
    if not path.exists():
        share = range(rows * workers.rank // workers.count, rows * (workers.rank + 1) // workers.count)
        own = path.with_suffix(f".{workers.rank}.part.npy")
        np.save(own, compute(share))
        workers.wait()
        if workers.rank == 0:
            parts = [path.with_suffix(f".{rank}.part.npy") for rank in range(workers.count)]
            with path.with_suffix(".part").open("wb") as file:
                np.save(file, np.concatenate([np.load(part) for part in parts]))
            path.with_suffix(".part").replace(path)
            for part in parts:
                part.unlink()
    workers.wait()
    return np.load(path)
