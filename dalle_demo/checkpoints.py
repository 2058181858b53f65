"""folder -> checked tensors and modules, and back: the only place that knows how weights are stored.

A checkpoint is a folder: `config.json` (the sizes of every part, and the hashes of what was trained together),
`model.safetensors` (tensors named `part.key`), `tokenizer.json` and `README.md` (the model card). A matrix or kernel
may be in bytes, with a scale for each of its rows beside it.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dalle_demo.config import part_config
from dalle_demo.models.clip import CLIP
from dalle_demo.models.discriminator import LatentDiscriminator
from dalle_demo.models.packed import StoredEmbedding, StoredLinear
from dalle_demo.models.transformer import ImageDecoder, TextEncoder
from dalle_demo.models.unclip import Generator, NoiseEncoder, Prior
from dalle_demo.models.vqgan import VAE, VQGAN
from dalle_demo.text import Tokenizer

CLASSES = {
    "vqgan": VQGAN,
    "text_encoder": TextEncoder,
    "image_decoder": ImageDecoder,
    "clip": CLIP,
    "vae": VAE,
    "prior": Prior,
    "generator": Generator,
    "noise_encoder": NoiseEncoder,
    "discriminator": LatentDiscriminator,
}
FORMAT = 1
SCALE = ":scale"  # at the end of the name of the scales of what is in bytes


class WeightsError(ValueError):
    """Weights that cannot be used; the message names the file and says what to do."""


def load_parts(folder: Path, parts: Iterable[str], kind: str, large: float = math.inf) -> dict[str, Any]:
    """Modules of a folder that must hold all these parts, in evaluation mode, in the types they are stored in.

    Args:
        kind: what to call a model that has them.
        large: of a part with more weights, projections and embeddings are left in the file.
    """
    meta = read_config(folder)
    missing = [part for part in parts if part not in meta["parts"]]
    if missing:
        raise WeightsError(
            f"{folder / 'config.json'} describes no {missing[0]}, only {', '.join(meta['parts']) or 'nothing'}; "
            f"it is not a complete {kind} model"
        )
    _check_parts(folder / "model.safetensors", meta)
    return {part: _build(folder, part, meta, large) for part in parts}


def load_tokenizer(folder: Path) -> Tokenizer:
    """Tokenizer of a checkpoint folder; raises WeightsError."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise WeightsError(f"{path} is missing")
    meta = read_config(folder)
    try:
        tokenizer = Tokenizer.from_file(path, meta["parts"].get("text_encoder", {}).get("ascii_only", False))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise WeightsError(f"{path} is damaged: {error}") from error
    _check_hash(path, "tokenizer", _file_hash(path), meta)
    return tokenizer


def load_part(folder: Path, part: str) -> Any:
    """Load one part of a checkpoint folder, in fp32; raises WeightsError."""
    meta = _describing(folder, part)
    _check_parts(folder / "model.safetensors", meta)
    return _build(folder, part, meta).float()


def stored_config(folder: Path, part: str) -> Any:
    """Config of one part of a checkpoint folder; raises WeightsError."""
    return part_config(part, _describing(folder, part)["parts"][part])


def stored_hash(folder: Path, part: str) -> str:
    """sha256 of one part of a checkpoint folder; raises WeightsError."""
    return _describing(folder, part)["sha256"][part]


def _describing(folder: Path, part: str) -> dict[str, Any]:
    """The config.json of a folder, which must have this part."""
    meta = read_config(folder)
    if part not in meta["parts"]:
        raise WeightsError(f"{folder / 'config.json'} describes no {part}")
    return meta


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file; raises WeightsError."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is truncated or damaged: {error}") from error


class StoredPart(Mapping[str, Tensor]):
    """Tensors of one part of a file, each read when it is asked for; those in bytes are given in fp16."""

    def __init__(self, path: Path, part: str):
        self.path, self._prefix = path, f"{part}."
        with _opened(path) as file:
            names = [key for key in file.keys() if key.startswith(self._prefix)]  # noqa: SIM118, it is no mapping
            shapes = {key.removeprefix(self._prefix): tuple(file.get_slice(key).get_shape()) for key in names}
        self._scaled = {key for key, shape in shapes.items() if shapes.get(key + SCALE) == _rows(shape)}
        scales = {key + SCALE for key in self._scaled}
        self.shapes = {key: shape for key, shape in shapes.items() if key not in scales}

    def __getitem__(self, key: str) -> Tensor:
        """Tensor whose pages leave memory with it."""
        with _opened(self.path) as file:
            stored = file.get_tensor(self._prefix + key)
            return stored * file.get_tensor(self._prefix + key + SCALE) if key in self._scaled else stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _check_parts(path: Path, meta: Mapping[str, Any]) -> None:
    """Raise WeightsError for a file that holds a tensor of a part which config.json does not describe."""
    with _opened(path) as file:
        strangers = [key for key in file.keys() if key.split(".")[0] not in meta["parts"]]  # noqa: SIM118
    if strangers:
        raise WeightsError(f"{path} holds {strangers[0]!r}, which belongs to no part in config.json")


def read_config(folder: Path) -> dict[str, Any]:
    """Parse config.json and check its form down to the config of every part; raises WeightsError."""
    path = folder / "config.json"
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


def _build(folder: Path, part: str, meta: Mapping[str, Any], large: float = math.inf) -> Any:
    """Fill a module with its tensors, all of them and no others, as they are stored.

    Projections and embeddings of a part with more than `large` weights are left in the file.
    """
    path = folder / "model.safetensors"
    stored = StoredPart(path, part)
    _check_hash(path, part, tensor_hash(stored), meta)
    with torch.device("meta"):
        module = CLASSES[part](part_config(part, meta["parts"][part]))
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    for key in sorted(expected.keys() | stored.shapes.keys()):
        if expected.get(key) != stored.shapes.get(key):
            found = (
                f"{part}.{key} is {stored.shapes.get(key, 'missing')}, expected {expected.get(key, 'no such tensor')}"
            )
            raise WeightsError(f"{path} does not fit config.json: {found}")
    if sum(map(math.prod, expected.values())) > large:
        _leave_in_file(module, stored)
    module.load_state_dict({key: stored[key].clone() for key in module.state_dict()}, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def _leave_in_file(module: nn.Module, stored: StoredPart, prefix: str = "") -> None:
    """Replace projections and the embedding of tokens by such as read their weights when they need them."""
    for name, child in module.named_children():
        key = f"{prefix}{name}"
        if isinstance(child, nn.Linear):
            setattr(module, name, StoredLinear(partial(stored.__getitem__, f"{key}.weight")))
        elif name == "embed_tokens":
            setattr(module, name, StoredEmbedding(partial(stored.__getitem__, f"{key}.weight")))
        else:
            _leave_in_file(child, stored, f"{key}.")


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
    """Write modules as a checkpoint folder in fp16; see `save_tensors`."""
    states = {part: module.state_dict() for part, module in modules.items()}
    halves = {part: {key: value.detach().half() for key, value in state.items()} for part, state in states.items()}
    save_tensors(folder, configs, halves, tokenizer, **extra)


def save_tensors(
    folder: Path,
    configs: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Tensor]],
    tokenizer: Path | None = None,
    **extra: Any,
) -> None:
    """Write a checkpoint folder; each file appears under its name only once it is whole.

    Args:
        configs: config of every part in `parts`.
        parts: state dict of every part's module, stored in the types given; see `in_bytes`.
        tokenizer: tokenizer.json to copy along.
        extra: further entries of config.json, such as `defaults`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{part}.{key}": value.contiguous() for part, state in parts.items() for key, value in state.items()}
    hashes = {part: tensor_hash(_restored(state)) for part, state in parts.items()}
    names = ["model.safetensors", "config.json"]
    if tokenizer is not None:
        hashes["tokenizer"] = _file_hash(tokenizer)
        shutil.copyfile(tokenizer, folder / "tokenizer.json.part")
        names.append("tokenizer.json")
    meta = {"format": FORMAT, "parts": {part: dataclasses.asdict(configs[part]) for part in parts}, "sha256": hashes}
    save_file(tensors, folder / "model.safetensors.part")
    (folder / "config.json.part").write_text(json.dumps(meta | extra, indent=2) + "\n", encoding="utf-8")
    for name in names:
        with (folder / f"{name}.part").open("rb+") as file:
            os.fsync(file.fileno())  # what it was made from may be deleted next
    for name in names:
        (folder / f"{name}.part").replace(folder / name)


def in_bytes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with matrices and kernels in int8, and a scale for each of their rows: half of the size in fp16."""
    stored = dict(state)
    for key, value in state.items():
        if value.ndim > 1:
            most = value.float().flatten(1).abs().amax(1).view(_rows(value.shape))
            scale = (most / 127).clamp(min=torch.finfo(torch.half).tiny).half()
            stored |= {key: (value / scale.float()).round().to(torch.int8), key + SCALE: scale}
    return stored


def _rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a matrix or kernel: one for each row, or output channel."""
    return (*shape[:1], *(1 for _ in shape[1:]))


def _restored(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a reader of these tensors is given."""
    scaled = {key.removesuffix(SCALE) for key in state if key.endswith(SCALE)}
    if not scaled:  # so that what lies in a file is read in turn
        return state
    values = {key: state[key] for key in state if not key.endswith(SCALE)}
    return values | {key: state[key] * state[key + SCALE] for key in scaled}


def save_adapters(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of adapters, which lie beside a checkpoint folder's own files."""
    partial = path.with_name(path.name + ".part")
    save_file({key: value.contiguous() for key, value in tensors.items()}, partial)
    partial.replace(path)


def load_adapters(path: Path) -> dict[str, Tensor]:
    """Read what `save_adapters` wrote; raises WeightsError."""
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
