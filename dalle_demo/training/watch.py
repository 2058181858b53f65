"""a run -> what people see of it and ask of it: state.json, previews, copies, and what they mean in plain words."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dalle_demo.config import DalleConfig, UnclipConfig
from dalle_demo.images import from_pil, grid
from dalle_demo.training.export import overall, read_log
from dalle_demo.training.loop import Monitor, Run

if TYPE_CHECKING:
    from dalle_demo.training.finetune_stage import FinetuneStage

WORDS = ("pause", "stop", "save")
SEED = 1  # of the first preview of each prompt
GENERIC, UNSEEN = "a red apple", "a purple elephant"
THUMBNAIL = 16  # pixels
COPY = 0.1  # distance below which a preview counts as a copy of a training picture
PATIENCE = 3  # checkpoints without a better one
OFTEN = 0.5  # seconds between two writings of state.json
DOINGS = {
    "pictures": "Reading the pictures.",
    "model": "Loading the model.",
    "tokens": "Turning pictures into tokens, {done} of {total}.",
    "latents": "Turning pictures into latents and embeddings, {done} of {total}.",
    "kept": "Drawing what the base can, so that it is not forgotten, {done} of {total}.",
    "previews": "Drawing the first previews, {done} of {total}.",
}
NOTICES = {
    "early": "It is too early to say more.",
    "learning": "Going well: pictures trained on and held out are, taken together, predicted better than ever.",
    "ended": "Pictures trained on and held out were, taken together, predicted best at step {best}, which is what was "
    "kept.",
    "waiting": "Pictures trained on and held out were, taken together, predicted best at step {best}, which is kept; "
    "that often changes again.",
    "worse": "Worse than the base so far: pictures were predicted better before the training.",
    "by_heart": "Pictures trained on and held out were, taken together, predicted best at step {best}, {count} "
    "checkpoints ago: by now it learns your pictures by heart. Step {best} is kept; you can stop.",
    "copies": "{share} % of the samples of a prompt that it has never seen are copies of your pictures: it has learned "
    "them by heart. More pictures or fewer steps help; step {best} is kept.",
    "nothing_held_out": "There are too few different pictures to hold any out, so nothing can tell learning from "
    "learning by heart: judge by the previews.",
}

ADVICE = ("learning", "waiting", "by_heart")  # what to make of a run that has not ended


@dataclass(frozen=True)
class Notice:
    """How a run is doing: one of NOTICES, and the values that it wants; in English as a str."""

    key: str
    values: dict[str, int] = field(default_factory=dict)

    def __str__(self):
        return NOTICES[self.key].format(**self.values)


def judge(lines: Sequence[Mapping[str, Any]], copies: float, held_out: int) -> Notice:
    """Overfitting in words.

    Args:
        lines: validation lines of the log, of the checkpoints that may be the best, that of the base first.
        copies: their share among the previews of an unseen prompt.
        held_out: number of pictures.
    """
    if not held_out:
        return Notice("nothing_held_out")
    after_start = [line for line in lines if line["step"] > 0]
    if not after_start:
        return Notice("early")
    losses = [overall(line) for line in after_start]
    best, last = losses.index(min(losses)), len(losses) - 1
    values = {"best": after_start[best]["step"], "count": last - best}
    if copies >= 0.5:
        return Notice("copies", values | {"share": round(100 * copies)})
    if losses[best] > overall(lines[0]):
        return Notice("worse", values)
    if last - best >= PATIENCE:
        return Notice("by_heart", values)
    return Notice("learning" if best == last else "waiting", values)


class Watch(Monitor):
    """Writes state.json and previews, and reads the file `ask`; `say` is told what is done before and at the end."""

    def __init__(self, out: Path, say: Callable[[str], None] = lambda message: None):
        self.say = say
        self.out, self.word, self.notice = out, None, Notice("early")
        self.began, self.told = False, 0.0
        self.said = ""  # the last of DOINGS
        self.step, self.steps, self.start = 0, 0, None  # `start` is the step and time of the first step made here

    def begin(self, steps: int) -> None:
        """Tell that there is a run, which is being prepared."""
        self.began, self.steps = True, steps
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "ask.taken").unlink(missing_ok=True)  # of a process that was killed
        self.preparing("pictures")

    def preparing(self, key: str, done: int = 0, total: int = 0) -> None:
        """Tell what is being done before the first step: one of DOINGS."""
        if self.began:
            doing = {"key": key, "done": done, "total": total}
            if key != self.said:
                self.said = key
                self.say(DOINGS[key].replace("{done} of ", "").format(**doing))
            self._tell("preparing", DOINGS[key].format(**doing), doing)

    def stepped(self, run: Run) -> bool:
        """Do what was asked for, and tell the step."""
        self.step = run.step
        self.start = self.start or (run.step, time.monotonic())
        word = self._asked()
        if word in ("pause", "stop"):
            self.word = word
            run.stopping, run.stage.stopped = True, word == "stop"
        if time.monotonic() - self.told >= OFTEN:
            self._tell("running", str(self.notice))
        return word == "save"

    def _asked(self) -> str | None:
        taken = self.out / "ask.taken"
        with contextlib.suppress(OSError):  # none is there, or on Windows it is being written
            (self.out / "ask").replace(taken)  # so that what is asked meanwhile is not removed with it
        try:
            word = taken.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        if word:  # else it is being written
            taken.unlink()
        return word if word in WORDS else None

    def checking(self, run: Run) -> None:
        """Draw the previews and say how it goes."""
        self.step = run.step

        def drawn(done: int, total: int) -> None:
            if run.step == 0:
                if run.stopping:  # there is nothing to lose yet, and the rest may take minutes
                    raise KeyboardInterrupt("stopped before the first step")
                self.preparing("previews", done, total)

        copies = draw_previews(run.stage, run.ema, run.step, self.out / "previews", drawn)
        lines = [line for line in read_log(self.out, "validation_loss") if run.stage.counts(line)]
        self.notice = judge(lines, copies, run.stage.held_out_pictures)
        self._tell("running", str(self.notice))

    def end(self) -> None:
        """Tell how a run that was not broken off has ended."""
        if not self.began:  # another process tells
            return
        lines = read_log(self.out, "validation_loss")
        self.step = lines[-1]["step"]
        if self.step >= self.steps:
            for name in ("ask", "ask.taken"):
                (self.out / name).unlink(missing_ok=True)
            state, message = "done", f"The best checkpoint is in {self.out / 'weights'}."
        elif self.word == "stop":
            state, message = "stopped", "What was best until now is kept."
        else:
            state, message = "paused", f"With --resume it goes on at step {self.step} of {self.steps}."
        if state != "paused" and self.notice.key in ADVICE:
            self.notice = Notice("ended", {"best": self.notice.values["best"]})
        self._tell(state, message)
        self.say(message)

    def broke(self, error: BaseException) -> None:
        """Tell of an error, or of Ctrl+C before the first step."""
        if self.began:
            stopped = isinstance(error, KeyboardInterrupt)
            self._tell("paused" if stopped else "failed", str(error) or type(error).__name__)

    def _tell(self, state: str, message: str, doing: Mapping[str, Any] | None = None) -> None:
        left = None
        if self.start and self.step > self.start[0]:
            pace = (time.monotonic() - self.start[1]) / (self.step - self.start[0])
            left = round((self.steps - self.step) * pace, 1)
        told = {"state": state, "step": self.step, "steps": self.steps, "seconds_left": left, "message": message}
        write_json(self.out / "state.json", told | {"notice": vars(self.notice), "doing": doing})
        self.told = time.monotonic()


def previews_of(config: DalleConfig | UnclipConfig) -> int:
    """Number of pictures that a checkpoint draws."""
    return 3 * previews_a_prompt(config)


def previews_a_prompt(config: DalleConfig | UnclipConfig) -> int:
    """As many as the model draws by default: large ones take long."""
    return int(config.defaults.get("n", 4))


def prompts_of(stage: "FinetuneStage") -> dict[str, str]:
    """The user's prompt, else a caption; one that training never sees; and one that has nothing to do with the data."""
    seen = [stage.examples[i].caption for i in stage.training]
    unseen = [stage.examples[i].caption for i in stage.held_out if stage.held_out_pictures]
    unseen = [caption for caption in unseen if caption not in seen] + [UNSEEN]
    yours = stage.settings.prompt or next((caption for caption in seen if is_prompt(caption)), GENERIC)
    return {"yours": yours, "unseen": next(filter(is_prompt, unseen)), "generic": GENERIC}


def is_prompt(caption: str) -> bool:
    """Whether an engine draws it."""
    return any(c.isalnum() for c in caption) and len(caption) <= 1000


def draw_previews(
    stage: "FinetuneStage",
    network: torch.nn.Module,
    step: int,
    folder: Path,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Write STEP.png, a row for each prompt, and STEP.json; returns the share of copies among the unseen ones.

    `tell` is called before each row, with the pictures that are drawn and the number of all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    n, rows, pictures = previews_a_prompt(stage.config), [], []
    engine = stage.engine(network)
    known = thumbnails_of(stage)
    for kind, prompt in prompts_of(stage).items():
        tell(len(pictures), previews_of(stage.config))
        (last,) = engine.generate(engine.params(prompt, n=n, seed=SEED), previews=False)
        pictures += last.images
        distances, nearest = distance(thumbnails(from_pil(last.images)), known).min(1)
        drawn = [
            {"seed": seed, "nearest": stage.examples[stage.training[i]].file, "distance": round(d, 4), "copy": d < COPY}
            for seed, i, d in zip(last.seeds, nearest.tolist(), distances.tolist(), strict=True)
        ]
        rows.append({"kind": kind, "prompt": prompt, "pictures": drawn})
    path = folder / f"{step:06d}.png"
    grid(pictures, n).save(path.with_suffix(".png.part"), "PNG")
    path.with_suffix(".png.part").replace(path)
    write_json(path.with_suffix(".json"), {"step": step, "columns": n, "rows": rows})
    unseen = rows[1]["pictures"]
    return sum(one["copy"] for one in unseen) / len(unseen)


@lru_cache(1)  # of the only stage of a run, which asks at each checkpoint
def thumbnails_of(stage: "FinetuneStage") -> Float[Tensor, "M F"]:
    """Those of the training pictures."""
    known = [stage.examples[i] for i in stage.training]
    return torch.cat([thumbnails(stage.pixels(known[start : start + 64])) for start in range(0, len(known), 64)])


def thumbnails(pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B F"]:
    """Pictures shrunk until small shifts matter little, in 0..1."""
    return F.adaptive_avg_pool2d((pixels + 1) / 2, THUMBNAIL).flatten(1)


def distance(a: Float[Tensor, "A F"], b: Float[Tensor, "B F"]) -> Float[Tensor, "A B"]:
    """Root mean square of differences, 0..1."""
    return torch.cdist(a, b) / a.shape[1] ** 0.5


def write_json(path: Path, value: Any) -> None:
    """Write a file that others read at any moment."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
