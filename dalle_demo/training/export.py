"""run folder -> a zip for others: the tuned model, which `--preset FOLDER` loads, and how it came about."""

import csv
import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,39}")
LICENCE_LINE = re.compile(r"^license_name: .*$", re.MULTILINE)  # of the model card


def overall(line: Mapping[str, Any]) -> float:
    """Mean loss of pictures held out and of those trained on, of a line of the log; what is kept has the lowest.

    By held-out pictures alone the first steps would win, which have hardly learned what they were shown.
    """
    return (line["validation_loss"] + line["seen_loss"]) / 2


def set_licence(weights: Path, licence: str) -> None:
    """Name the licence of a tuned model in its card; raises ValueError for what is no name of one."""
    if not LICENCE.fullmatch(licence):
        raise ValueError(f"a licence is named by its SPDX identifier, such as cc-by-4.0, not {licence[:40]!r}")
    card = weights / "README.md"
    card.write_text(LICENCE_LINE.sub(f"license_name: {licence}", card.read_text(encoding="utf-8")), encoding="utf-8")


def pack(run: Path, name: str, file: Path) -> Path:
    """Write a zip that unpacks into one folder of that name; the pictures that were trained on are not in it."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((run / "weights").iterdir()):
            stored = zipfile.ZIP_STORED if path.suffix == ".safetensors" else zipfile.ZIP_DEFLATED  # hardly shrinks
            archive.write(path, f"{name}/{path.name}", stored)
        for path in sorted((run / "previews").glob("*.png")):
            archive.write(path, f"{name}/previews/{path.name}")
        archive.writestr(f"{name}/training/captions.jsonl", _captions(run))
        archive.writestr(f"{name}/training/loss.csv", _losses(run))
        archive.writestr(f"{name}/training/settings.json", _settings(run))
    return file


def _captions(run: Path) -> str:
    lines = (run / "data" / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    examples = [json.loads(line) for line in lines]
    pairs = [{"file_name": example["name"], "text": example["caption"]} for example in examples]
    return "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)


def _losses(run: Path) -> str:
    table = io.StringIO()
    names = ["step", "seconds", "loss", "token_loss", "pixels", "learning_rate", "images_per_second"]
    names += ["validation_loss", "seen_loss"]
    writer = csv.DictWriter(table, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(read_log(run))
    return table.getvalue()


def _settings(run: Path) -> str:
    """Without where the pictures were, which says more of the machine than of the model."""
    from dalle_demo.weights import name_of  # brings torch, which reading logs does not need

    settings = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    base = name_of(Path(settings.pop("base")))
    del settings["data"]
    return json.dumps({"base": base} | settings, ensure_ascii=False, indent=1) + "\n"


def read_log(run: Path, key: str = "step") -> list[dict[str, Any]]:
    """Lines of a run's log that hold a figure; one that is just being written, or was cut short, is passed over."""
    path, lines = run / "log.jsonl", []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if key in line:
            lines.append(line)
    return lines
