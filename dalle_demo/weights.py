"""folder -> checked modules, and back: the only place that knows how weights are stored.

A checkpoint is a folder: `config.json` (the sizes of every part, and the hashes of what was trained together),
`model.safetensors` (tensors named `part.key`), `tokenizer.json` and `README.md` (the model card).
"""

import dataclasses
import hashlib
import json
import math
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dalle_demo import hub
from dalle_demo.config import (
    PARTS,
    PRESETS,
    SOURCES,
    DalleConfig,
    GenerateParams,
    RemoteFile,
    Source,
    part_config,
)
from dalle_demo.models.packed import StoredEmbedding, StoredLinear
from dalle_demo.models.transformer import ImageDecoder, TextEncoder
from dalle_demo.models.vqgan import VQGAN
from dalle_demo.text import Tokenizer

SHIPPED = Path(__file__).resolve().parent.parent / "weights"
CLASSES = {"vqgan": VQGAN, "text_encoder": TextEncoder, "image_decoder": ImageDecoder}
FORMAT = 1
LARGE = 64 * 2**20  # weights of a part
FILES = ("config.json", "model.safetensors", "tokenizer.json", "README.md")
REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # user/name


class WeightsError(ValueError):
    """Weights that cannot be used; the message names the file and says what to do."""


@dataclass(frozen=True)
class Dalle:
    """A DALL-E model: config, and modules in evaluation mode, on the CPU, in the types they are stored in."""

    name: str
    sha256: str  # of the image decoder's tensors, which names the model beyond its folder
    config: DalleConfig
    tokenizer: Tokenizer
    vqgan: VQGAN
    text_encoder: TextEncoder
    image_decoder: ImageDecoder


def load_dalle(preset: str) -> Dalle:
    """Load a model from a folder, or the one that `find` has for a preset.

    Most weights of a large Transformer stay in their file until `hardware.place_transformer` takes them from there.

    Raises:
        WeightsError: the folder does not exist, or one of its files is missing, damaged or of another model.
    """
    folder = find(preset)
    meta = _read_config(folder / "config.json")
    missing = [part for part in PARTS if part not in meta["parts"]]
    if missing:
        raise WeightsError(f"{folder / 'config.json'} describes no {missing[0]}; it is not a complete DALL-E model")
    tokenizer = load_tokenizer(folder)
    _check_hash(folder / "tokenizer.json", "tokenizer", _file_hash(folder / "tokenizer.json"), meta)
    _check_parts(folder / "model.safetensors", meta)
    modules = {part: _build(folder, part, meta, large=LARGE) for part in PARTS}
    configs = {part: part_config(part, meta["parts"][part]) for part in PARTS}
    config = DalleConfig(**configs, defaults=meta.get("defaults", {}))
    try:
        GenerateParams("a", **config.defaults)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{folder / 'config.json'}: defaults: {error}") from error
    return Dalle(folder.resolve().name, meta["sha256"]["image_decoder"], config, tokenizer, **modules)


def find(preset: str) -> Path:
    """Folder that holds a preset's weights: one given as such, one beside the package, or what `pull` has left."""
    for folder in (Path(preset), SHIPPED / preset, _pulled(preset)):
        if (folder / "config.json").exists():
            return folder
    pull_command = f"`python -m dalle_demo weights pull {preset}`"
    if preset in SOURCES:
        raise WeightsError(f"the weights of {preset} are not here yet: {pull_command} fetches them")
    if can_pull(preset):
        raise WeightsError(f"{preset} is no folder with a config.json: if it is on the Hub, {pull_command} fetches it")
    shipped = ", ".join(sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))) or "none is here"
    raise WeightsError(f"no weights at {preset!r}: give a folder with a config.json, or one of: {shipped}")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Tokenizer of a checkpoint folder."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise WeightsError(f"{path} is missing")
    ascii_only = _read_config(folder / "config.json")["parts"].get("text_encoder", {}).get("ascii_only", False)
    try:
        return Tokenizer.from_file(path, ascii_only)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise WeightsError(f"{path} is damaged: {error}") from error


def load_part(folder: Path, part: str) -> Any:
    """Load one part of a checkpoint folder, in fp32; raises WeightsError."""
    meta = _read_config(folder / "config.json")
    if part not in meta["parts"]:
        raise WeightsError(f"{folder / 'config.json'} describes no {part}")
    _check_parts(folder / "model.safetensors", meta)
    return _build(folder, part, meta).float()


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
    """Tensors of one part of a file, each read when it is asked for."""

    def __init__(self, path: Path, part: str):
        self.path, self._prefix = path, f"{part}."
        with _opened(path) as file:
            names = [key for key in file.keys() if key.startswith(self._prefix)]  # noqa: SIM118, it is no mapping
            self.shapes = {key.removeprefix(self._prefix): tuple(file.get_slice(key).get_shape()) for key in names}

    def __getitem__(self, key: str) -> Tensor:
        """Tensor whose pages leave memory with it."""
        with _opened(self.path) as file:
            return file.get_tensor(self._prefix + key)

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
        parts: state dict of every part's module, stored in the types given.
        tokenizer: tokenizer.json to copy along.
        extra: further entries of config.json, such as `defaults`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{part}.{key}": value.contiguous() for part, state in parts.items() for key, value in state.items()}
    hashes = {part: tensor_hash(state) for part, state in parts.items()}
    names = ["model.safetensors", "config.json"]
    if tokenizer is not None:
        hashes["tokenizer"] = _file_hash(tokenizer)
        shutil.copyfile(tokenizer, folder / "tokenizer.json.part")
        names.append("tokenizer.json")
    meta = {"format": FORMAT, "parts": {part: dataclasses.asdict(configs[part]) for part in parts}, "sha256": hashes}
    save_file(tensors, folder / "model.safetensors.part")
    (folder / "config.json.part").write_text(json.dumps(meta | extra, indent=2) + "\n", encoding="utf-8")
    for name in names:
        (folder / f"{name}.part").replace(folder / name)


def pull(
    name: str,
    report: Callable[[int, int], None] = lambda done, total: None,
    stop: threading.Event | None = None,
    update: bool = False,
    revision: str | None = None,
) -> Path:
    """Folder with the weights of a preset, or of a repository `user/name` of our format, fetched if they are not here.

    Weights that are here are left alone, and the network too, unless `update` asks for what `main` is now or `revision`
    for a certain commit. A call that was stopped or killed leaves nothing that loads; the next one goes on.

    Args:
        report: called with the bytes that are here and those of the whole download.
        stop: when set, hub.StoppedError is raised.

    Raises:
        WeightsError, HubError, ConvertError: each a ValueError whose message says what to do.
    """
    if (SHIPPED / name / "config.json").exists():
        return SHIPPED / name
    source, folder, raw = source_of(name), _pulled(name), hub.cache_root() / "downloads" / name
    if revision is not None and not re.fullmatch("[0-9a-f]{40}", revision):
        raise WeightsError(f"revision {revision!r} must be the 40 hexadecimal digits of a commit")
    wanted = hub.head(source.repo, stop) if update and revision is None else revision
    if not _is_pulled(folder, wanted):
        with hub.alone(raw):
            if not _is_pulled(folder, wanted):  # by another, in the meantime
                hub.download(dataclasses.replace(source, revision=wanted or source.revision), raw, report, stop)
                if source.form == "dalle_demo":
                    _read_config(raw / "config.json")
                    _put(raw, folder)
                else:
                    convert_folder(raw, source.form, name, folder)
                    shutil.rmtree(raw)
    return folder


def can_pull(name: str) -> bool:
    """Whether a name is one that `pull` knows how to look for."""
    return name in SOURCES or REPO.fullmatch(name) is not None


def source_of(name: str) -> Source:
    """Where a preset, or a repository of our format, is on the Hub; raises WeightsError."""
    if name in SOURCES:
        return SOURCES[name]
    if can_pull(name):
        return Source(name, {file: RemoteFile(file) for file in FILES}, "dalle_demo", "see its model card")
    raise WeightsError(f"{name!r} cannot be fetched: give one of {', '.join(SOURCES)}, or a repository as user/name")


def convert_folder(folder: Path, form: str, preset: str, out: Path) -> None:
    """Write files of another program as a checkpoint folder of ours, which takes its place once it is whole."""
    from dalle_demo.convert import convert  # the only caller; loading weights must not wait for it

    converted = convert(folder, form, PRESETS[preset])
    partial = out.with_name(f".{out.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    converted.tokenizer.save(partial / "tokenizer.json")
    config = converted.config
    configs = {part: getattr(config, part) for part in PARTS}
    extra = {"defaults": config.defaults}
    save_tensors(partial, configs, converted.tensors, partial / "tokenizer.json", **extra)
    (partial / "README.md").write_text(_card(preset, form, hub.read_lock(folder)), encoding="utf-8")
    if (folder / hub.LOCK).exists():
        shutil.copyfile(folder / hub.LOCK, partial / hub.LOCK)
    _put(partial, out)


def push(name: str, repo: str, private: bool = False) -> str:
    """Upload a folder of weights that loads, with its model card, to a repository; returns its address."""
    folder = find(name)
    load_dalle(str(folder))
    if not (folder / "README.md").exists():
        raise WeightsError(f"{folder / 'README.md'} is missing: write the model card first, it is what people read")
    return hub.upload(folder, repo, [*FILES, "*.png"], private)


@dataclass(frozen=True)
class Listed:
    """What there is to know of weights without loading them."""

    name: str
    folder: Path | None  # None: not here
    size: int  # bytes on the disk, or to download
    licence: str
    repo: str | None  # on the Hub
    commit: str | None  # that was fetched


def listing() -> list[Listed]:
    """Every preset, and every repository that was pulled."""
    models = hub.cache_root() / "models"
    pulled = [path.parent for depth in ("*", "*/*") for path in sorted(models.glob(f"{depth}/config.json"))]
    names = [folder.relative_to(models).as_posix() for folder in pulled if not folder.name.startswith(".")]
    return [_listed(name) for name in dict.fromkeys([*PRESETS, *names])]


def _listed(name: str) -> Listed:
    source = SOURCES.get(name)
    folder = next((one for one in (SHIPPED / name, _pulled(name)) if (one / "config.json").exists()), None)
    if folder is None:
        size = sum(file.size or 0 for file in source.files.values()) if source else 0
        return Listed(name, None, size, source.licence if source else "", source.repo if source else None, None)
    lock, size = hub.read_lock(folder), sum(path.stat().st_size for path in folder.iterdir())
    card = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").exists() else ""
    found = re.findall(r"^license(?:_name)?: *(\S+)$", card, re.MULTILINE)  # the name follows `other`
    return Listed(name, folder, size, found[-1] if found else "", lock and lock.repo, lock and lock.commit)


def _pulled(name: str) -> Path:
    return hub.cache_root() / "models" / name


def _is_pulled(folder: Path, commit: str | None) -> bool:
    """Whether weights are here, of a certain commit if one is given."""
    lock = hub.read_lock(folder)
    return (folder / "config.json").exists() and (commit is None or (lock is not None and lock.commit == commit))


def _put(made: Path, folder: Path) -> None:
    """Give a folder that is whole its place; what was there goes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    made.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _card(preset: str, form: str, lock: hub.Lock | None) -> str:
    """Model card of converted weights."""
    origin = f"files in the form of {form}"
    if lock is not None:
        origin = f"[{lock.repo}](https://huggingface.co/{lock.repo}) at commit `{lock.commit}`"
    return f"""---
license: {SOURCES[preset].licence.lower()}
tags: [text-to-image, dall-e, pytorch]
library_name: dalle_demo
---

# {preset}, in the format of dalle_demo

The same numbers as in {origin}, stored as safetensors. Licence of the weights: {SOURCES[preset].licence}.

```python
from dalle_demo import DalleEngine

engine = DalleEngine.load("{preset}")  # or this folder
*_, last = engine.generate(engine.params("a red apple"))
last.images[0].save("apple.png")
```
"""
