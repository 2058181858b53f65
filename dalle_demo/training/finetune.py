"""a few pictures with captions, a base model -> a tuned model, of either engine: adapters, or all weights.

Training is `loop.Run` with the stage of `dalle_finetune_stage.py` or `unclip_finetune_stage.py`, so it is resumable to
the bit and data-parallel as all stages are. What people see of a run is made in `watch.py`.
"""

import contextlib
import dataclasses
import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from dalle_demo.checkpoints import stored_config
from dalle_demo.config import GenerateParams
from dalle_demo.data import uploads
from dalle_demo.training import loop
from dalle_demo.training.dalle_finetune_stage import DalleFinetuneStage, is_large
from dalle_demo.training.finetune_stage import FinetuneStage
from dalle_demo.training.loop import Plan, Workers
from dalle_demo.training.unclip_finetune_stage import UnclipFinetuneStage
from dalle_demo.training.watch import Watch, previews_of, write_json
from dalle_demo.weights import find, is_unclip

# Steps. A LoRA step of nano takes 0.6 s of 2 cores, so these take about 2, 4 and 14 minutes with previews
EFFORTS = {"try": 100, "balanced": 300, "thorough": 1200}
LEARNING_RATES = {"lora": 5e-4, "full": 2e-4}
BATCH, LARGE_BATCH = 16, 4  # pictures a step, of small and of large decoders
UNCLIP_BATCH, UNCLIP_LEARNING_RATE = 32, 4e-4
CHECKPOINTS = 10
PROBED, PROBED_STEPS = 4, 3
REPLACED = ("previews", "weights", "data")  # folders of a run, which the next one in its place does away with


@dataclass(frozen=True)
class FinetuneSettings:
    """What a run is made from. Raises ValueError that names the flag."""

    base: str
    data: str  # prepared folder, or anything that data/uploads.py reads
    effort: Literal["try", "balanced", "thorough"] = "balanced"
    method: Literal["lora", "full"] | None = None  # as the base has it when None: full for DALL-E 2, else lora
    rank: int = 16
    steps: int | None = None  # as the effort has it when None
    learning_rate: float | None = None  # as the method has it when None
    text_encoder: bool = False  # trained too
    prompt: str = ""  # of the previews
    seed: int = 0

    def __post_init__(self):
        self._settle_method()
        for name, choices in (("effort", EFFORTS), ("method", LEARNING_RATES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} must be one of {', '.join(choices)}")
        for name, low, high in (("rank", 1, 256), ("steps", 1, 10**6), ("seed", 0, 2**31 - 1)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name} must be from {low} to {high}, not {value}")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise ValueError(f"--learning-rate must be between 0 and 1, not {self.learning_rate}")
        if self.prompt:
            GenerateParams(self.prompt)

    def _settle_method(self) -> None:
        """Fill in the base's own method; a DALL-E 2 model has no other, and its text encoder is CLIP's."""
        unclip = is_unclip(self.base)
        if unclip and self.method not in (None, "full"):
            raise ValueError(f"--method must be full for {self.base}: adapters are for DALL-E models only")
        if unclip and self.text_encoder:
            raise ValueError(f"--text-encoder is for DALL-E models only: that of {self.base} is part of its CLIP")
        object.__setattr__(self, "method", self.method or ("full" if unclip else "lora"))

    @classmethod
    def read(cls, out: Path) -> "FinetuneSettings":
        """Settings of a run folder; raises ValueError."""
        try:
            return cls(**json.loads((out / "settings.json").read_text(encoding="utf-8")))
        except (OSError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{out} holds no run that can go on: {error}") from error

    def lasting(self) -> dict[str, str]:
        """Flags that a run which goes on must share; steps and learning rate may change."""
        names = ("base", "method", "rank", "text_encoder", "seed")
        return {f"--{name.replace('_', '-')}": str(getattr(self, name)) for name in names}

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of a DALL-E model that are trained."""
        return ("text_encoder", "image_decoder") if self.text_encoder else ("image_decoder",)

    def plan(self) -> Plan:
        """Batch, steps and rate; large models are checkpointed and logged as often by the clock, not by the step."""
        steps, large = self.steps or EFFORTS[self.effort], is_large(self.base)
        plan = Plan(
            batch=LARGE_BATCH if large else BATCH,
            learning_rate=self.learning_rate or LEARNING_RATES[self.method],
            steps=steps,
            warmup=max(1, steps // 20),
            checkpoint_minutes=math.inf,
            checkpoint_steps=math.ceil(steps / CHECKPOINTS),
            log_steps=1 if large else 5,
            precision="auto" if large else "fp32",
        )
        if not is_unclip(self.base):
            return plan
        rate = self.learning_rate or UNCLIP_LEARNING_RATE
        return dataclasses.replace(plan, batch=UNCLIP_BATCH, learning_rate=rate, betas=(0.5, 0.9))


@dataclass(frozen=True)
class Estimate:
    """What a run will take on this machine."""

    seconds_per_step: float
    seconds: float  # in all: tokens, steps and previews
    memory: int  # bytes, at most

    def __str__(self):
        minutes, pace = math.ceil(self.seconds / 60), self.seconds_per_step
        about = f"about {minutes} minute{'s' * (minutes > 1)} at {pace:.2f} seconds a step"
        return f"{about}, and {self.memory / 1e9:.1f} GB of memory"


def finetune(
    settings: FinetuneSettings, out: Path, resume: bool = False, say: Callable[[str], None] = lambda message: None
) -> None:
    """Run from data to weights; see README for what `out` then holds. `say` is told what it does beside the steps.

    Raises:
        ValueError: a setting, the data or the base cannot be used, `out` holds a run and `resume` is false or holds
            other things, or memory runs out.
    """
    check_out(settings, out)
    if resume and (out / "settings.json").exists():
        loop.check_same(out, FinetuneSettings.read(out).lasting(), settings.lasting())
    plan, watch = settings.plan(), Watch(out, say)
    check_encoder(settings.base)

    def make(workers: Workers) -> FinetuneStage:
        if workers.rank == 0:
            watch.begin(plan.steps)
            bring_data(settings, out, resume)
        workers.wait()
        return stage_of(settings)(settings, plan, out, workers, tell=watch.preparing)

    try:
        with memory_in_words(settings.base):
            loop.train(make, plan, out, resume, watch)
    except BaseException as error:
        watch.broke(error)
        raise
    watch.end()


def stage_of(settings: FinetuneSettings) -> type[FinetuneStage]:
    """The stage that trains models of the base's engine."""
    return UnclipFinetuneStage if is_unclip(settings.base) else DalleFinetuneStage


def check_encoder(base: str) -> None:
    """Raise ValueError for a model that turns tokens into pixels, but not pixels into tokens."""
    if not is_unclip(base) and not stored_config(find(base), "vqgan").encoder:
        raise ValueError(
            f"{base} cannot be trained on pictures, since its VQGAN was published without an encoder for them: "
            "`python -m dalle_demo weights pull mini-flax` fetches a mini that has one, for --base mini-flax"
        )


def check_out(settings: FinetuneSettings, out: Path) -> None:
    """Raise ValueError where a run would replace what is not its own, or the pictures that it is to read."""
    foreign = [name for name in REPLACED if (out / name).exists()]
    if foreign and not (out / "settings.json").exists():
        raise ValueError(f"{out} holds {foreign[0]}, which no run of fine-tuning made; choose another --out")
    source, data = Path(settings.data).resolve(), (out / "data").resolve()
    if data in source.parents:
        raise ValueError(f"--data {settings.data} lies inside {out / 'data'}, which a run replaces; move it elsewhere")


def bring_data(settings: FinetuneSettings, out: Path, resume: bool) -> None:
    """Write settings.json and data/; what an earlier attempt left is replaced unless the run goes on."""
    out.mkdir(parents=True, exist_ok=True)
    source, folder = Path(settings.data), out / "data"
    if not resume and (out / "settings.json").exists():
        for name in REPLACED:
            if source.resolve() != (out / name).resolve():
                shutil.rmtree(out / name, ignore_errors=True)
    write_json(out / "settings.json", dataclasses.asdict(settings))
    if uploads.is_prepared(folder):
        return
    if uploads.is_prepared(source):
        partial_copy = out / "data.part"
        shutil.rmtree(partial_copy, ignore_errors=True)
        shutil.copytree(source, partial_copy)
        partial_copy.replace(folder)
    else:
        uploads.prepare([source], folder)


def probe(settings: FinetuneSettings, data: Path) -> Estimate:
    """Measure three real steps on a prepared folder, in a process of its own, whose memory is that of a run.

    Raises ValueError when the base cannot be trained, or there is not enough memory.
    """
    check_encoder(settings.base)
    with (
        memory_in_words(settings.base),
        tempfile.TemporaryDirectory() as scratch,  # made here, since the process may be killed for its memory
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        return pool.submit(_measure, settings, data, Path(scratch)).result()


@contextlib.contextmanager
def memory_in_words(base: str) -> Iterator[None]:
    """Raise ValueError where memory runs out, for which torch has a mere RuntimeError, and the system kills."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = re.search("allocate memory|(not enough|out of) memory", str(error))
        if not told and not isinstance(error, MemoryError | BrokenProcessPool):
            raise
        raise ValueError(
            f"there is not enough memory to train {base}: close other programs, or choose a smaller model"
        ) from error


def estimate(settings: FinetuneSettings) -> Estimate:
    """`probe` of whatever `settings.data` is."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(settings.data)
        if not uploads.is_prepared(folder):
            folder = Path(scratch, "data")
            uploads.prepare([Path(settings.data)], folder)
        return probe(settings, folder)


def _measure(settings: FinetuneSettings, data: Path, out: Path) -> Estimate:
    plan, examples = settings.plan(), [example for example in uploads.load(data) if example.caption]
    alone = Workers()
    alone.count, alone.rank = 1, 0
    shutil.copytree(data, out / "data", ignore=lambda *_: {Path(example.file).name for example in examples[PROBED:]})
    lines = (json.dumps(dataclasses.asdict(example)) + "\n" for example in examples[:PROBED])
    (out / "data" / "examples.jsonl").write_text("".join(lines), encoding="utf-8")
    start = time.monotonic()
    stage = stage_of(settings)(settings, plan, out, alone, most_kept=1)
    prepared = time.monotonic() - start
    run = loop.Run(stage, plan, out, alone, loop.Monitor())
    run.done = 0.0
    times = [_seconds(run.take_step) for _ in range(PROBED_STEPS)]
    step = min(times)
    engine = stage.engine(run.ema)  # also for the memory that it takes
    picture = _seconds(lambda: stage.encode(range(1)))
    drawn = len(stage.names_to_keep(examples)) + (CHECKPOINTS + 1) * previews_of(stage.config)
    drawing = drawn * stage.seconds_per_picture(engine)
    seconds = prepared + max(0, len(examples) - PROBED) * picture + plan.steps * step + drawing
    return Estimate(step, seconds, _peak_memory())


def high_water(process: int | str = "self") -> int | None:
    """Bytes that a process has had at most, as Linux tells while it runs; None elsewhere.

    `getrusage` would count the parent's too, which started the process as a copy of itself.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def _peak_memory() -> int:
    if (most := high_water()) is not None:
        return most
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _seconds(run: Callable[[], object]) -> float:
    start = time.monotonic()
    run()
    return time.monotonic() - start
