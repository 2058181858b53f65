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

from dalle_demo.config import PARTS, DalleConfig, GenerateParams, part_config
from dalle_demo.models.transformer import ImageDecoder, TextEncoder
from dalle_demo.models.vqgan import VQGAN
from dalle_demo.text import Tokenizer

SHIPPED = Path(__file__).resolve().parent.parent / "weights"
CLASSES = {"vqgan": VQGAN, "text_encoder": TextEncoder, "image_decoder": ImageDecoder}
FORMAT = 1


class WeightsError(ValueError):
    """Weights that cannot be used; the message names the file and says what to do."""


@dataclass(frozen=True)
class Dalle:
    """A loaded DALL-E model: config and modules in fp32, evaluation mode, on the CPU."""

    name: str
    sha256: str  # of the image decoder's tensors, which names the model beyond its folder
    config: DalleConfig
    tokenizer: Tokenizer
    vqgan: VQGAN
    text_encoder: TextEncoder
    image_decoder: ImageDecoder


def load_dalle(preset: str) -> Dalle:
    """Load a model from a folder, or from `weights/<preset>` beside the package.

    Raises:
        WeightsError: the folder does not exist, or one of its files is missing, damaged or of another model.
    """
    folder = find(preset)
    meta, tensors = _read(folder)
    missing = [part for part in PARTS if part not in meta["parts"]]
    if missing:
        raise WeightsError(f"{folder / 'config.json'} describes no {missing[0]}; it is not a complete DALL-E model")
    tokenizer = load_tokenizer(folder)
    _check_hash(folder / "tokenizer.json", "tokenizer", _file_hash(folder / "tokenizer.json"), meta)
    modules = {part: _build(folder, part, meta, tensors) for part in PARTS}
    configs = {part: part_config(part, meta["parts"][part]) for part in PARTS}
    config = DalleConfig(**configs, filler=meta.get("filler", 0), defaults=meta.get("defaults", {}))
    try:
        GenerateParams("a", **config.defaults)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{folder / 'config.json'}: defaults: {error}") from error
    return Dalle(folder.resolve().name, meta["sha256"]["image_decoder"], config, tokenizer, **modules)


def find(preset: str) -> Path:
    """Folder that holds a preset's weights."""
    for folder in (Path(preset), SHIPPED / preset):
        if (folder / "config.json").exists():
            return folder
    shipped = ", ".join(sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))) or "none is here"
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
    """Load one part of a checkpoint folder; raises WeightsError."""
    meta, tensors = _read(folder)
    if part not in meta["parts"]:
        raise WeightsError(f"{folder / 'config.json'} describes no {part}")
    return _build(folder, part, meta, tensors)


def stored_config(folder: Path, part: str) -> Any:
    """Config of one part of a checkpoint folder; raises WeightsError."""
    meta = _read_config(folder / "config.json")
    if part not in meta["parts"]:
        raise WeightsError(f"{folder / 'config.json'} describes no {part}")
    return part_config(part, meta["parts"][part])


def stored_hash(folder: Path, part: str) -> str:
    """sha256 of one part of a checkpoint folder; raises WeightsError."""
    stored_config(folder, part)
    return _read_config(folder / "config.json")["sha256"][part]


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a folder, each tensor of a part that the config describes."""
    meta, path = _read_config(folder / "config.json"), folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is truncated or damaged: {error}") from error
    strangers = [key for key in tensors if key.split(".")[0] not in meta["parts"]]
    if strangers:
        raise WeightsError(f"{path} holds {strangers[0]!r}, which belongs to no part in config.json")
    return meta, tensors


def _read_config(path: Path) -> dict[str, Any]:
    """Parse config.json and check its form down to the config of every part."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']} is not {FORMAT}")
        for part, values in meta["parts"].items():
            part_config(part, values)
            if part not in meta["sha256"]:
                raise ValueError(f"no sha256 of {part}")
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is damaged: {error}") from error
    return meta


def _build(folder: Path, part: str, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Fill a module with its tensors, all of them and no others, in fp32."""
    own = {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
    _check_hash(folder / "model.safetensors", part, tensor_hash(own), meta)
    with torch.device("meta"):
        module = CLASSES[part](part_config(part, meta["parts"][part]))
    try:
        module.load_state_dict({key: value.float() for key, value in own.items()}, strict=True, assign=True)
    except RuntimeError as error:
        raise WeightsError(f"{folder / 'model.safetensors'} does not fit config.json: {error}") from error
    return module.eval().requires_grad_(False)


def _check_hash(path: Path, name: str, found: str, meta: Mapping[str, Any]) -> None:
    expected = meta.get("sha256", {}).get(name)
    if found != expected:
        raise WeightsError(
            f"{path}: its {name} has sha256 {found[:12]}…, config.json was written for {str(expected)[:12]}…"
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
    names = ["model.safetensors", "config.json"]
    if tokenizer is not None:
        hashes["tokenizer"] = _file_hash(tokenizer)
        shutil.copyfile(tokenizer, folder / "tokenizer.json.part")
        names.append("tokenizer.json")
    meta = {"format": FORMAT, "parts": {part: dataclasses.asdict(configs[part]) for part in modules}, "sha256": hashes}
    save_file(tensors, folder / "model.safetensors.part")
    (folder / "config.json.part").write_text(json.dumps(meta | extra, indent=2) + "\n", encoding="utf-8")
    for name in names:
        (folder / f"{name}.part").replace(folder / name)
