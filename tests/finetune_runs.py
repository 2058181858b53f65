"""run folders of fine-tuning -> whether they are equal, and processes that make them, for tests of either engine."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dalle_demo.training.export import read_log

DRIVER = Path(__file__).with_name("finetune_tiny.py")
PAIRS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def checkpoint(out: Path) -> dict:
    """State of a run."""
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, averages, optimizer, exported files, previews and what was logged of losses are equal to the bit."""
    first, second = checkpoint(one), checkpoint(other)
    for part in ("network", "ema"):
        assert list(first[part]) == list(second[part]) != []
        assert all(torch.equal(value, second[part][key]) for key, value in first[part].items())
    for ours, theirs in zip(first["optimizers"], second["optimizers"], strict=True):
        for index, values in ours["state"].items():
            assert all(torch.equal(value, theirs["state"][index][key]) for key, value in values.items())
    assert read_log(one, "validation_loss")[-1]["step"] == first["step"] == second["step"]
    losses = [
        [(line["step"], line["validation_loss"], line["seen_loss"]) for line in read_log(out, "validation_loss")]
        for out in (one, other)
    ]
    assert losses[0] == losses[1]
    for folder in ("weights", "previews"):
        files = [{path.name: path.read_bytes() for path in (out / folder).iterdir()} for out in (one, other)]
        assert files[0].keys() == files[1].keys() != set()
        assert [name for name in files[0] if files[0][name] != files[1][name]] == []


class Processes:
    """Fine-tuning runs of tiny models, none of which outlives its test."""

    def __init__(self, data: Path):
        self.data, self.started = data, []

    def start(self, base: Path, out: Path, steps: int, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
        """A process that fine-tunes."""
        command = [sys.executable, *launcher, str(DRIVER), "--base", str(base), "--data", str(self.data)]
        command += ["--out", str(out), "--steps", str(steps)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.started.append(subprocess.Popen(command, env=environment, start_new_session=True, **pipes))
        return self.started[-1]

    def run_in_two(self, base: Path, out: Path, steps: int) -> None:
        """Fine-tune in two processes, to the end."""
        process = self.start(base, out, steps, PAIRS)
        output = process.communicate(timeout=250)[0]
        assert process.returncode == 0, output

    def kill_midway(self, base: Path, out: Path, steps: int, seconds: float) -> None:
        """Start, and kill so long after the first checkpoint of which optimizers have a state."""
        process, deadline = self.start(base, out, steps), time.monotonic() + 120
        while not (out / "checkpoint.pt").exists() or not checkpoint(out)["step"]:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert checkpoint(out)["step"] < steps

    def assert_goes_on(self, base: Path, folder: Path, steps: int, train: Callable[..., None]) -> None:
        """Kill at a random moment, of a step, a preview, an export or a checkpoint; it goes on as if nothing had been.

        `train` runs to the end in this process, in a folder.
        """
        killed, whole = folder / "killed", folder / "whole"
        self.kill_midway(base, killed, steps, seconds=random.uniform(0, 0.5))
        train(killed, resume=True)
        train(whole)
        assert_same_run(whole, killed)

    def close(self) -> None:
        """Leave none."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
