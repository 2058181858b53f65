"""folder -> checked modules, and back: the only place that knows how weights are stored.

A checkpoint is a folder: `config.json` (the sizes of every part, and the hashes of what was trained together),
`model.safetensors` (tensors named `part.key`), `tokenizer.json` and `README.md` (the model card).
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle_demo.config import PARTS, DalleConfig, part_config
from dalle_demo.models.transformer import ImageDecoder, TextEncoder
from dalle_demo.models.vqgan import VQGAN
from dalle_demo.text import Tokenizer

SHIPPED = Path(__file__).resolve().parent.parent / "weights"
CLASSES = {"vqgan": VQGAN, "text_encoder": TextEncoder, "image_decoder": ImageDecoder}
FORMAT = 1


class WeightsError(Exception):
    """Weights that cannot be used; the message names the file and says what to do."""


@dataclass(frozen=True)
class Dalle:
    """A loaded DALL-E model: config and modules in fp32, evaluation mode, on the CPU."""

    config: DalleConfig
    tokenizer: Tokenizer
    vqgan: VQGAN
    text_encoder: TextEncoder
    image_decoder: ImageDecoder
    name: str


def load_dalle(preset: str) -> Dalle:
    """Load a model from a folder, or from `weights/<preset>` beside the package.

    Raises:
        WeightsError: the folder does not exist, or one of its files is missing, damaged or of another model.
    """
    folder = find(preset)
    meta = _read_config(folder)
    missing = [part for part in PARTS if part not in meta["parts"]]
    if missing:
        raise WeightsError(f"{folder / 'config.json'} describes no {missing[0]}; it is not a complete DALL-E model")
    tokenizer = load_tokenizer(folder)
    modules = {part: load_part(folder, part) for part in PARTS}
    _check_hash(folder, "tokenizer", _file_hash(folder / "tokenizer.json"), meta)
    config = DalleConfig(
        **{part: part_config(part, meta["parts"][part]) for part in PARTS},
        filler=meta.get("filler", 0),
        defaults=meta.get("defaults", {}),
    )
    return Dalle(config, tokenizer, **modules, name=folder.name)


def find(preset: str) -> Path:
    """Folder that holds a preset's weights."""
    for folder in (Path(preset), SHIPPED / preset):
        if (folder / "config.json").exists():
            return folder
    shipped = ", ".join(sorted(path.parent.name for path in SHIPPED.glob("*/config.json")))
    raise WeightsError(f"no weights at {preset!r}: give a folder with a config.json, or one of: {shipped}")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Tokenizer of a checkpoint folder."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise WeightsError(f"{path} is missing")
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise WeightsError(f"{path} is damaged: {error}") from error


def load_part(folder: Path, part: str) -> Any:
    """Build one part from its config and fill it with its tensors, all of them and no others."""
    meta = _read_config(folder)
    if part not in meta["parts"]:
        raise WeightsError(f"{folder / 'config.json'} describes no {part}")
    try:
        config = part_config(part, meta["parts"][part])
    except ValueError as error:
        raise WeightsError(f"{folder / 'config.json'}: {error}") from error
    path = folder / "model.safetensors"
    tensors = _read_tensors(path, part)
    _check_hash(folder, part, tensor_hash(tensors), meta)
    with torch.device("meta"):
        module = CLASSES[part](config)
    try:
        module.load_state_dict({key: value.float() for key, value in tensors.items()}, strict=True, assign=True)
    except RuntimeError as error:
        raise WeightsError(f"{path} does not fit config.json: {error}") from error
    return module.eval().requires_grad_(False)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != FORMAT or not isinstance(meta["parts"], dict):
            raise ValueError(f"format {meta['format']} is not {FORMAT}")
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing") from error
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} is damaged: {error!r}") from error
    return meta


def _read_tensors(path: Path, part: str) -> dict[str, Tensor]:
    try:
        stored = load_file(path)
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is truncated or damaged: {error}") from error
    return {key.removeprefix(part + "."): value for key, value in stored.items() if key.startswith(part + ".")}


def _check_hash(folder: Path, name: str, found: str, meta: Mapping[str, Any]) -> None:
    expected = meta["sha256"].get(name)
    if found != expected:
        raise WeightsError(
            f"{folder}: {name} has sha256 {found[:12]}…, config.json was written for {str(expected)[:12]}…"
        )


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_parts(
    folder: Path,
    configs: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    tokenizer: Path | None = None,
    **extra: Any,
) -> None:
    """Write a checkpoint folder in fp16; each file appears under its name only once it is whole.

    Args:
        configs: config of every part in `modules`.
        tokenizer: tokenizer.json to copy along.
        extra: further entries of config.json, such as `filler` and `defaults`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors, hashes = {}, {}
    for part, module in modules.items():
        stored = {key: value.detach().half().contiguous() for key, value in module.state_dict().items()}
        hashes[part] = tensor_hash(stored)
        tensors |= {f"{part}.{key}": value for key, value in stored.items()}
    if tokenizer is not None:
        if tokenizer.resolve() != (folder / "tokenizer.json").resolve():
            shutil.copyfile(tokenizer, folder / "tokenizer.json.part")
            (folder / "tokenizer.json.part").replace(folder / "tokenizer.json")
        hashes["tokenizer"] = _file_hash(tokenizer)
    meta = {"format": FORMAT, "parts": {part: dataclasses.asdict(configs[part]) for part in modules}, "sha256": hashes}
    save_file(tensors, folder / "model.safetensors.part")
    (folder / "config.json.part").write_text(json.dumps(meta | extra, indent=2) + "\n", encoding="utf-8")
    (folder / "model.safetensors.part").replace(folder / "model.safetensors")
    (folder / "config.json.part").replace(folder / "config.json")
