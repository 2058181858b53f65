"""base, data, run folder -> a tiny fine-tuning run, for tests that need a process to kill or to multiply."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dalle_demo.training import dalle_finetune_stage, finetune, finetune_stage, unclip_finetune_stage

NAMES = ("sun", "box moon", "big star")  # drawn by the base, if no caption has a word of them
SMALL = {
    finetune: {"BATCH": 4, "UNCLIP_BATCH": 4, "CHECKPOINTS": 5},
    finetune_stage: {"RENDERS": 3},
    dalle_finetune_stage: {"KEPT": NAMES},
    unclip_finetune_stage: {"KEPT": NAMES, "KEPT_EACH": 2},
}


def main() -> None:
    """Fine-tune as the arguments say."""
    parser = argparse.ArgumentParser()
    for name in ("base", "data", "out"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    for module, values in SMALL.items():
        for name, value in values.items():
            setattr(module, name, value)
    torch.set_num_threads(1)
    settings = finetune.FinetuneSettings(str(args.base), str(args.data), steps=args.steps, rank=4)
    finetune.finetune(settings, args.out, args.resume)


if __name__ == "__main__":
    main()
