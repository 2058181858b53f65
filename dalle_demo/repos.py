"""name -> weights on the Hugging Face Hub: fetched, converted into our format, listed, and published."""

import contextlib
import dataclasses
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dalle_demo import hub, weights
from dalle_demo.checkpoints import WeightsError, save_tensors
from dalle_demo.config import CLIP_PRESET, PARTS, PRESETS, SOURCES, UNCLIP_PRESETS, RemoteFile, Source
from dalle_demo.weights import REPO, check, find, pulled

FILES = ("config.json", "model.safetensors", "tokenizer.json", "README.md")


def pull(
    name: str,
    report: Callable[[int, int], None] = lambda done, total: None,
    stop: threading.Event | None = None,
    update: bool = False,
    revision: str | None = None,
) -> Path:
    """Folder with the weights of a preset, or of a repository `user/name` of our format, fetched if they are not here.

    Weights that are here are left alone, and the network too, unless `update` asks for what `main` is now or `revision`
    for a certain commit; both also replace what is here and does not load. A call that was stopped or killed leaves
    nothing that loads; the next one goes on.

    Args:
        report: called with the bytes that are here and those of the whole download.
        stop: when set, hub.StoppedError is raised.

    Raises:
        WeightsError, HubError, ConvertError: each a ValueError whose message says what to do.
    """
    if (weights.SHIPPED / name / "config.json").exists():
        return weights.SHIPPED / name
    source, folder, raw = source_of(name), pulled(name), hub.cache_root() / "downloads" / name
    if revision is not None and not re.fullmatch("[0-9a-f]{40}", revision):
        raise WeightsError(f"revision {revision!r} must be the 40 hexadecimal digits of a commit")
    wanted = hub.head(source.repo, stop) if update and revision is None else revision
    if not _is_pulled(folder, wanted):
        with hub.alone(raw):
            if not _is_pulled(folder, wanted):  # by another, in the meantime
                hub.download(dataclasses.replace(source, revision=wanted or source.revision), raw, report, stop)
                if source.form == "dalle_demo":
                    _check(raw, name)
                    _put(raw, folder)
                else:
                    convert_folder(raw, source.form, name, folder, stop)
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


def convert_folder(folder: Path, form: str, preset: str, out: Path, stop: threading.Event | None = None) -> None:
    """Write files of another program as a checkpoint folder of ours, which takes its place once it is whole.

    Raises hub.StoppedError between its steps, some of which take a minute, when `stop` is set.
    """
    from dalle_demo.convert import convert  # the only caller; loading weights must not wait for it

    partial = out.with_name(f".{out.name}.part")
    _heed(stop, partial)
    converted = convert(folder, form, PRESETS[SOURCES[preset].preset or preset])
    _heed(stop, partial)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    converted.tokenizer.save(partial / "tokenizer.json")
    config = converted.config
    configs = {part: getattr(config, part) for part in PARTS}
    extra = {"defaults": config.defaults}
    save_tensors(partial, configs, converted.tensors, partial / "tokenizer.json", **extra)
    (partial / "README.md").write_text(_card(preset, form, folder), encoding="utf-8")
    for lock, name in ((folder / hub.LOCK, hub.LOCK), (folder / "vqgan" / hub.LOCK, f"vqgan-{hub.LOCK}")):
        if lock.exists():
            shutil.copyfile(lock, partial / name)
    _heed(stop, partial)
    _put(partial, out)


def _heed(stop: threading.Event | None, partial: Path) -> None:
    """Raise hub.StoppedError when `stop` is set, and leave nothing of what was being made."""
    if stop is not None and stop.is_set():
        shutil.rmtree(partial, ignore_errors=True)
        raise hub.StoppedError(hub.STOPPED)


def push(name: str, repo: str, private: bool = False, token: str | None = None) -> str:
    """Upload a folder of weights that loads, with its model card, to a repository; returns its address."""
    folder = find(name)
    check(folder)
    if not (folder / "README.md").exists():
        raise WeightsError(f"{folder / 'README.md'} is missing: write the model card first, it is what people read")
    return hub.upload(folder, repo, [*FILES, "samples.png", "lora.safetensors"], private, token)


@dataclass(frozen=True)
class Listed:
    """What there is to know of weights without loading them."""

    name: str
    folder: Path | None  # None: not here
    size: int  # bytes on the disk, or to download; 0 where that is not known before
    licence: str
    repo: str | None  # on the Hub
    commit: str | None  # that was fetched


def listing() -> list[Listed]:
    """Every preset, everything else that `pull` knows, and every repository that was pulled."""
    models = pulled(".")
    folders = [path.parent for depth in ("*", "*/*") for path in sorted(models.glob(f"{depth}/config.json"))]
    names = [folder.relative_to(models).as_posix() for folder in folders if not folder.name.startswith(".")]
    return [listed(name) for name in dict.fromkeys([*PRESETS, *UNCLIP_PRESETS, CLIP_PRESET, *SOURCES, *names])]


def listed(name: str) -> Listed:
    """What there is to know of one of these names."""
    source = SOURCES.get(name)
    folder = next((one for one in (weights.SHIPPED / name, pulled(name)) if (one / "config.json").exists()), None)
    if folder is not None:
        with contextlib.suppress(OSError):  # gone: another process is putting other weights in its place
            return _listed_here(name, folder)
    size = sum(file.size or 0 for file in source.files.values()) if source else 0
    return Listed(name, None, size, source.licence if source else "", source.repo if source else None, None)


def _listed_here(name: str, folder: Path) -> Listed:
    lock, size = hub.read_lock(folder), sum(path.stat().st_size for path in folder.iterdir())
    readme = folder / "README.md"
    card = readme.read_text(encoding="utf-8", errors="replace") if readme.exists() else ""  # the words of anybody
    found = re.findall(r"^license(?:_name)?: *(\S+)$", card, re.MULTILINE)  # the name follows `other`
    return Listed(name, folder, size, found[-1] if found else "", lock and lock.repo, lock and lock.commit)


def _is_pulled(folder: Path, commit: str | None) -> bool:
    """Whether weights are here; of a certain commit, if one is given, and fit to be loaded."""
    if commit is None:
        return (folder / "config.json").exists()
    lock = hub.read_lock(folder)
    if lock is None or lock.commit != commit:
        return False
    try:
        check(folder)
    except WeightsError:
        return False
    return True


def _check(folder: Path, name: str) -> None:
    """Raise WeightsError for files of a repository that do not load although they are what it holds."""
    try:
        check(folder)
    except WeightsError as error:
        update = f"`python -m dalle_demo weights pull {name} --update`"
        raise WeightsError(f"{error}; so it is in {name}: once that is mended there, {update} fetches it") from error


def _put(made: Path, folder: Path) -> None:
    """Give a folder that is whole its place; what was there goes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    made.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _card(preset: str, form: str, folder: Path) -> str:
    """Model card of weights that are converted from the files in a folder."""
    locks = [lock for lock in map(hub.read_lock, (folder, folder / "vqgan")) if lock is not None]
    repos = [f"[{lock.repo}](https://huggingface.co/{lock.repo}) at commit `{lock.commit}`" for lock in locks]
    origin = " and ".join(repos) or f"files in the form of {form}"
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
