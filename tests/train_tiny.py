"""stage name, folders -> a tiny run, for the tests that need a process of their own to kill or to multiply."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny import tiny_config

from dalle_demo.text import PAD
from dalle_demo.training import stages
from dalle_demo.training.loop import Plan, Workers, train

BATCH = 4


def make_plan(steps: int, checkpoint_minutes: float = 1e9) -> Plan:
    """Short plan in fp32, in which what is promised to the bit is promised."""
    return Plan(BATCH, 2e-3, steps, warmup=5, checkpoint_minutes=checkpoint_minutes, precision="fp32")


def make_stage(
    name: str, data: Path, out: Path, weights: Path, trace: Path | None = None
) -> Callable[[Workers], object]:
    """Maker of a tiny stage; `weights` holds what the stages `sharpen` and `dalle` build on."""

    def make(workers: Workers):
        if name == "vqgan":
            stage = stages.VQGANStage(data, tiny_config().vqgan)
        elif name == "sharpen":
            stage = stages.SharpenStage(data, tiny_config().vqgan, weights)
        elif name == "text":
            stage = stages.TextStage(data, tiny_config().text_encoder, out, workers, seed=5)
        else:
            stage = stages.DalleStage(data, tiny_config(), weights, weights, out, workers)
        if trace is not None:
            record(stage, trace.with_suffix(f".{workers.rank}"))
        return stage

    return make


def record(stage, path: Path) -> None:
    """Note a fingerprint of every sample that the stage makes."""
    original = stage.batch

    def batch(samples: range) -> dict:
        made = original(samples)
        with path.open("a") as file:
            for row, sample in enumerate(samples):
                file.write(json.dumps([sample, fingerprint(made, row)]) + "\n")
        return made

    stage.batch = batch


def fingerprint(batch: dict, row: int) -> str:
    """Hash of one sample, whatever the padding of its batch."""
    digest = hashlib.sha256()
    for name, value in sorted(batch.items()):
        if isinstance(value, torch.Tensor):
            own = value[row]
            digest.update((own[own != PAD] if name == "text_ids" else own).contiguous().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Train as the arguments say."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    for name in ("data", "out", "weights", "trace"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--checkpoint-minutes", type=float, default=1e9)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = make_plan(args.steps, args.checkpoint_minutes)
    made, make = [], make_stage(args.stage, args.data, args.out, args.weights, args.trace)
    train(lambda workers: made.append(make(workers)) or made[0], plan, args.out, args.resume)
    if args.trace is not None:
        torch.save(made[0].network.state_dict(), args.trace.with_suffix(f".{os.environ.get('RANK', 0)}.pt"))


if __name__ == "__main__":
    main()
