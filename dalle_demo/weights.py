"""preset | folder -> a checked model: where weights are found, and which of them belong together.

A DALL-E model is one checkpoint folder. A DALL-E 2 model is two: its own, and that of the CLIP it was trained with,
which it names by hash.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_demo import hub
from dalle_demo.checkpoints import (
    WeightsError,
    in_bytes,
    load_parts,
    load_tokenizer,
    read_config,
    save_tensors,
    stored_config,
    stored_hash,
)
from dalle_demo.config import (
    CLIP_PARTS,
    CLIP_PRESET,
    PARTS,
    SOURCES,
    UNCLIP_PARTS,
    UNCLIP_PRESETS,
    CLIPConfig,
    DalleConfig,
    GenerateParams,
    TextEncoderConfig,
    UnclipConfig,
    UnclipParams,
)
from dalle_demo.models.clip import CLIP
from dalle_demo.models.transformer import ImageDecoder, TextEncoder
from dalle_demo.models.unclip import Generator, NoiseEncoder, Prior
from dalle_demo.models.vqgan import VAE, VQGAN
from dalle_demo.text import Tokenizer

SHIPPED = Path(__file__).resolve().parent.parent / "weights"
LARGE = 64 * 2**20  # weights of a part
DRAWING_PARTS = tuple(part for part in UNCLIP_PARTS if part != "discriminator")  # which is kept for fine-tuning
REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # user/name


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


@dataclass(frozen=True)
class Clip:
    """A CLIP, whose two halves meet in one space: configs, and modules in evaluation mode, in fp32 on the CPU."""

    name: str
    sha256: str  # of the tensors of its part `clip`
    text_config: TextEncoderConfig
    config: CLIPConfig
    tokenizer: Tokenizer
    text_encoder: TextEncoder
    clip: CLIP


@dataclass(frozen=True)
class Unclip:
    """A DALL-E 2 model: config, its CLIP, and modules in evaluation mode, in fp32 on the CPU."""

    name: str
    sha256: str  # of the sha256 of all that takes part in drawing
    config: UnclipConfig
    clip: Clip
    vae: VAE
    prior: Prior
    generator: Generator
    noise_encoder: NoiseEncoder

    @property
    def tokenizer(self) -> Tokenizer:
        """That of its CLIP."""
        return self.clip.tokenizer


def load_dalle(preset: str) -> Dalle:
    """Load a model from a folder, or the one that `find` has for a preset.

    Most weights of a large Transformer stay in their file until `hardware.place_transformer` takes them from there.

    Raises:
        WeightsError: the folder does not exist, or one of its files is missing, damaged or of another model.
    """
    folder = find(preset)
    with _advice(folder):
        modules = load_parts(folder, PARTS, "DALL-E", LARGE)
        sha256 = stored_hash(folder, "image_decoder")
        return Dalle(name_of(folder), sha256, stored_model(folder), load_tokenizer(folder), **modules)


def load_clip(preset: str = CLIP_PRESET) -> Clip:
    """Load a CLIP from a folder, or the one that `find` has for a preset; raises WeightsError."""
    folder = find(preset)
    with _advice(folder):
        modules = {part: module.float() for part, module in load_parts(folder, CLIP_PARTS, "CLIP").items()}
        configs = [stored_config(folder, part) for part in CLIP_PARTS]
        return Clip(name_of(folder), stored_hash(folder, "clip"), *configs, load_tokenizer(folder), **modules)


def load_unclip(preset: str = "unclip-nano") -> Unclip:
    """Load a DALL-E 2 model with its CLIP, which is looked for beside its folder and then by name.

    Raises:
        WeightsError: as `load_dalle`, and when the CLIP is not the one that the model was trained with.
    """
    folder = find(preset)
    with _advice(folder):
        modules = {part: module.float() for part, module in load_parts(folder, DRAWING_PARTS, "DALL-E 2").items()}
        clip = _clip_of(folder)
        hashes = [*(stored_hash(folder, part) for part in DRAWING_PARTS), clip.sha256]
        sha256 = hashlib.sha256(" ".join(hashes).encode()).hexdigest()
        return Unclip(name_of(folder), sha256, _unclip_config(folder, clip), clip, **modules)


def is_unclip(preset: str) -> bool:
    """Whether a folder, or what `find` has for a preset, is a DALL-E 2 model; raises WeightsError."""
    return "generator" in read_config(find(preset))["parts"]


def tokenizer_of(preset: str) -> Tokenizer:
    """What a model reads prompts with, which is that of its CLIP for a DALL-E 2 model; raises WeightsError."""
    folder = find(preset)
    return load_tokenizer(_clip_folder(folder) if is_unclip(str(folder)) else folder)


def check(folder: Path) -> None:
    """Raise WeightsError unless a folder loads as the kind of model that it holds."""
    load = load_clip if "clip" in read_config(folder)["parts"] else load_dalle
    (load_unclip if is_unclip(str(folder)) else load)(str(folder))


def stored_model(folder: Path) -> DalleConfig:
    """Config of the whole model in a checkpoint folder; raises WeightsError."""
    configs = {part: stored_config(folder, part) for part in PARTS}
    return DalleConfig(**configs, defaults=_defaults(folder, GenerateParams))


def _unclip_config(folder: Path, clip: Clip) -> UnclipConfig:
    """Config of a DALL-E 2 model, whose parts must fit each other."""
    vae, prior, generator, noise_encoder = (stored_config(folder, part) for part in DRAWING_PARTS)
    if not (
        prior.embed_dim == generator.embed_dim == clip.config.embed_dim
        and (generator.latent_dim, generator.grid) == (vae.latent_dim, vae.grid)
        and noise_encoder == generator
    ):
        raise WeightsError(f"{folder / 'config.json'} describes parts whose sizes do not fit each other")
    return UnclipConfig(clip.text_config, clip.config, vae, prior, generator, _defaults(folder, UnclipParams))


def _defaults(folder: Path, request: Callable[..., Any]) -> dict[str, float]:
    """Settings that a model is served with, which must make a request."""
    defaults = read_config(folder).get("defaults", {})
    try:
        request("a", **defaults)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{folder / 'config.json'}: defaults: {error}") from error
    return defaults


def _clip_of(folder: Path) -> Clip:
    """The CLIP that a DALL-E 2 model was trained with."""
    named = _clip_named(folder)
    try:
        home = _clip_folder(folder)
        clip, known = load_clip(str(home)), clip_hashes(home)
    except WeightsError as error:
        raise WeightsError(f"{folder.name} needs {named['name']}: {error}") from error
    if named["sha256"] not in known:
        raise WeightsError(
            f"{folder / 'config.json'} was written for a {named['name']} of sha256 {named['sha256'][:12]}…, "
            f"not {clip.sha256[:12]}…"
        )
    return clip


def clip_hashes(folder: Path) -> list[str]:
    """Sha256 of a CLIP's part `clip`, and of those that the stage `tower` began from, whose space it has kept."""
    return [stored_hash(folder, "clip"), *read_config(folder).get("continues", [])]


def _clip_folder(folder: Path) -> Path:
    """Where that CLIP is: beside the model, or where `find` has its name; raises WeightsError."""
    name = _clip_named(folder)["name"]
    beside = folder.parent / name
    return beside if (beside / "config.json").exists() else find(name)


def _clip_named(folder: Path) -> dict[str, str]:
    """Name and sha256 of that CLIP; raises WeightsError."""
    try:
        named = read_config(folder)["clip"]
        return {key: str(named[key]) for key in ("name", "sha256")}
    except (KeyError, TypeError) as error:
        raise WeightsError(f"{folder / 'config.json'} does not say which CLIP it was trained with") from error


def assemble_unclip(prior: Path, unclip: Path, clip: Path, out: Path, defaults: Mapping[str, float]) -> None:
    """Write the parts of a DALL-E 2 model, trained one after another, as one folder.

    Args:
        prior: weights folder that the stage of this name has written.
        unclip: that of this stage, with all other parts.
        clip: what both were trained with; to be found by its name, or beside `out`, when the model is loaded.
        out: folder to write.
        defaults: settings of UnclipParams that the model is served with.

    Raises:
        WeightsError: weights are missing or damaged, or were trained with another CLIP.
    """
    known = clip_hashes(clip)
    for home in (prior, unclip):
        if read_config(home).get("clip_part", known[0]) not in known:  # folders of older versions do not tell
            raise WeightsError(f"{home} was trained with another CLIP than {clip}: give the one it was trained with")
    homes = {part: prior if part == "prior" else unclip for part in UNCLIP_PARTS}
    configs = {part: stored_config(home, part) for part, home in homes.items()}
    modules = {part: load_parts(home, [part], "DALL-E 2")[part] for part, home in homes.items()}
    states = {part: module.state_dict() for part, module in modules.items()}
    states |= {part: in_bytes(states[part]) for part in UNCLIP_PARTS if part != "vae"}  # in which it would be seen
    trained_with = load_clip(str(clip))
    named = {"name": _found_by(clip), "sha256": trained_with.sha256}
    save_tensors(out, configs, states, clip=named, defaults=dict(defaults))
    load_unclip(str(out))


@contextmanager
def _advice(folder: Path) -> Iterator[None]:
    """Say of weights that were pulled and cannot be used how they are fetched anew."""
    try:
        yield
    except WeightsError as error:
        name = name_of(folder)
        if folder.resolve() != pulled(name).resolve():
            raise
        update = f"`python -m dalle_demo weights pull {name} --update`"
        raise WeightsError(f"{error}; {update} fetches these weights anew") from error


def find(preset: str) -> Path:
    """Folder that holds a preset's weights: given as such, beside the package, or what `repos.pull` has left."""
    for folder in (Path(preset), SHIPPED / preset, pulled(preset)):
        if (folder / "config.json").exists():
            return folder
    pull_command = f"`python -m dalle_demo weights pull {preset}`"
    if preset in SOURCES:
        raise WeightsError(f"the weights of {preset} are not here yet: {pull_command} fetches them")
    if preset in (*UNCLIP_PRESETS, CLIP_PRESET):
        raise WeightsError(f"the weights of {preset} are not here; a checkout of this program has them in weights/")
    if REPO.fullmatch(preset):
        raise WeightsError(f"{preset} is no folder with a config.json: if it is on the Hub, {pull_command} fetches it")
    shipped = sorted({path.parent.name for path in SHIPPED.glob("*/config.json")} - {CLIP_PRESET})
    known = ", ".join(dict.fromkeys([*shipped, *SOURCES]))
    advice = f"give a folder with a config.json, or one of {known}; `python -m dalle_demo weights list` says more"
    raise WeightsError(f"no weights at {preset!r}: {advice}")


def pulled(name: str) -> Path:
    """Folder of what `repos.pull` fetches by this name."""
    return hub.cache_root() / "models" / name


def _found_by(folder: Path) -> str:
    """What `find` finds a folder by: user/name of a repository that was pulled, else the folder's own name."""
    folder, models = folder.resolve(), pulled(".").resolve()
    return folder.relative_to(models).as_posix() if folder.is_relative_to(models) else folder.name


def name_of(folder: Path) -> str:
    """What a folder's model is called: the run whose weights it holds, which are in a folder of one name, or itself."""
    run = folder.resolve().parent
    of_run = folder.resolve().name == "weights" and (run / "log.jsonl").exists()
    return run.name if of_run else _found_by(folder)
