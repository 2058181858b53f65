"""a draft and its settings -> what its training takes here, and what keeps it from starting, in words."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_demo.shelf import Shelf, free_memory, memory_limit
from dalle_demo.ui.strings import duration, megabytes, say

if TYPE_CHECKING:
    from dalle_demo.training.finetune import Estimate
    from dalle_demo.training.jobs import Job, Jobs

EFFORTS = ("try", "balanced", "thorough")


class Plans:
    """What was measured of drafts, by their pictures and settings: base, method, text_encoder and rank."""

    def __init__(self, shelf: Shelf, jobs: "Jobs"):
        self.shelf, self.jobs = shelf, jobs
        self._measured: dict[tuple, Estimate | str] = {}

    def measured(self, job: "Job", *settings: Any) -> "Estimate | str | None":
        """Estimate, or why there is none; None where it is not measured yet."""
        return self._measured.get(self._key(job, settings)) if self.pictures(job) else None

    def measure(self, job: "Job", *settings: Any) -> None:
        """Take three steps, which takes from seconds to a minute."""
        from dalle_demo.training import finetune  # brings the trainer

        key, data = self._key(job, settings), self.jobs.data(job)
        try:
            given = finetune.FinetuneSettings(data=str(data), **self.chosen(*settings))
            self._measured[key] = finetune.probe(given, data)
        except (ValueError, OSError) as error:
            self._measured[key] = str(error)

    def forget(self, job: "Job", *settings: Any) -> None:
        """Measure a draft with these settings, or with any, anew."""
        keys = [self._key(job, settings)] if settings else [key for key in list(self._measured) if key[0] == job.id]
        for key in keys:
            self._measured.pop(key, None)

    def _key(self, job: "Job", settings: tuple) -> tuple:
        return job.id, *settings, (self.jobs.data(job) / "report.json").stat().st_mtime_ns

    def pictures(self, job: "Job") -> Path | None:
        """Folder of the pictures of a job, if there are any."""
        folder = self.jobs.data(job)
        return folder if (folder / "examples.jsonl").exists() else None

    def preset(self, base: str) -> str:
        """Preset or folder of a model to start from."""
        return self.shelf.trainable().get(base, str(base))

    def chosen(self, base: str, method: str, text_encoder: bool, rank: float) -> dict[str, Any]:
        """What of the form makes FinetuneSettings; a DALL-E 2 model knows one method, and has no text encoder."""
        given = {"base": self.preset(base)}
        if self.shelf.is_unclip(base):
            return given
        return given | {"method": method, "text_encoder": text_encoder, "rank": int(rank)}

    def missing(self, job: "Job", consent: bool, measured: "Estimate | str | None") -> str | None:
        """Key of the sentence that says what is missing before a draft can start."""
        from dalle_demo.data import uploads

        folder = self.pictures(job)
        if folder is None:
            return "need_pictures"
        if not any(example.caption for example in uploads.load(folder)):
            return "need_captions"
        if not consent:
            return "need_consent"
        if measured is None:
            return "need_estimate"
        return "need_other_plan" if isinstance(measured, str) else None

    def shortage(self, measured: "Estimate") -> str | None:
        """Memory that there is at a training's turn, where that is less than it takes."""
        room = memory_limit() if self.jobs.running() else free_memory()
        return megabytes(room) if room is not None and room < measured.memory else None

    def unknown_words(self, job: "Job", base: str) -> list[str]:
        """Words of the captions that the model to start from does not know."""
        from dalle_demo import weights
        from dalle_demo.data import uploads

        try:
            tokenizer = weights.tokenizer_of(self.preset(base))
        except (ValueError, OSError):  # which the estimate tells
            return []
        return tokenizer.unknown_words(" ".join(example.caption for example in uploads.load(self.jobs.data(job))))

    def described(self, measured: "Estimate | str | None", steps: int, language: str) -> str:
        """Time and memory."""
        if measured is None:
            return say("measuring", language)
        if isinstance(measured, str):
            return say("plan_failed", language, reason=measured)
        time, memory = duration(seconds_of(measured, steps), language), megabytes(measured.memory)
        plan = say("plan_time", language, time=time, steps=steps, memory=memory)
        room = self.shortage(measured)
        return plan if room is None else f"{plan} {say('plan_memory', language, room=room)}"


def efforts(measured: "Estimate | str | None", language: str) -> list[tuple[str, str]]:
    """Line and name of each effort, with its time if that is measured."""
    lines = {effort: say(f"effort_{effort}", language) for effort in EFFORTS}
    if measured is not None and not isinstance(measured, str):
        for effort, line in lines.items():
            time = duration(seconds_of(measured, steps_of(effort)), language)
            lines[effort] = say("effort_about", language, effort=line, time=time)
    return [(line, effort) for effort, line in lines.items()]


def steps_of(effort: str, steps: float | str | None = None) -> int:
    """Those that are given, else those of an effort."""
    from dalle_demo.training.finetune import EFFORTS as STEPS

    return int(steps or STEPS[effort])


def seconds_of(measured: "Estimate", steps: int) -> float:
    """How long so many steps take, where those of `balanced` were measured."""
    return measured.seconds + (steps - steps_of("balanced")) * measured.seconds_per_step
