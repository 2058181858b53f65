"""uploaded pictures with captions -> a tuned model in the Generate tab: the Train tab.

Each handler is given the owner's secret by the visitor's browser, and the job that the page shows; what is done is done
by training/jobs.py, so that the page may be closed at any moment.
"""

import dataclasses
import html
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from dalle_demo.config import ParamError
from dalle_demo.hub import HubError
from dalle_demo.images import slug
from dalle_demo.shelf import Shelf, ShelfError
from dalle_demo.turns import Engine
from dalle_demo.ui import train_views as views
from dalle_demo.ui.models import ModelChoice, language_of
from dalle_demo.ui.strings import label, megabytes, say, why
from dalle_demo.ui.train_plan import EFFORTS, Plans, efforts, seconds_of, steps_of
from dalle_demo.ui.unclip import UnclipTab
from dalle_demo.weights import is_unclip, name_of

if TYPE_CHECKING:
    from dalle_demo.training.jobs import Job, Jobs

ACTIVE = ("waiting", "preparing", "running", "pausing", "stopping")
BUTTONS = {  # that make sense in a state
    "pause": ("waiting", "running"),
    "resume": ("paused", "failed"),
    "save_now": ("running",),
    "stop_training": ("waiting", "preparing", "running", "pausing", "paused"),
}
COLOURS = ("#047857", "#d97706", "#a7c4b9")  # training, validation, each value
RANKS = [4, 8, 16, 32, 64]  # each is measured when it is chosen
VISITORS = 10_000  # of whom it is known whose models are theirs
SAMPLES = 4  # pictures before, and as many after
EMPTY: Any = ""  # of a number: gradio's page makes a 0 of None
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

log = logging.getLogger(__name__)


class TrainTab:
    """Components and events of the tab; create it inside its `gr.Tab`."""

    def __init__(
        self,
        shelf: Shelf,
        t: gr.I18n,
        page: gr.Blocks,
        models: ModelChoice,
        unclip: UnclipTab,
        tabs: gr.Tabs,
        owner: gr.BrowserState,
    ):
        self.shelf, self.models, self.unclip, self.tabs = shelf, models, unclip, tabs
        self.jobs = open_jobs()
        self._owners: dict[str, str] = {}  # of browser sessions, the oldest first
        self._comparing: dict[str, threading.Event] = {}  # their stop flags
        self.plans = Plans(shelf, self.jobs)
        self.owner = owner
        self.viewed, self.seen = gr.State(""), gr.State({})
        self.timer = gr.Timer(1.0, active=False)
        with gr.Column(elem_id="train"):
            gr.Markdown(t("train_intro"), elem_id="train_intro")
            with gr.Row(visible=False, elem_id="trainings_row") as self.chooser:
                self.picker = gr.Dropdown([], label=t("trainings"), filterable=False, scale=3, elem_id="trainings")
                self.new = gr.Button(t("new"), size="sm", scale=1, elem_id="new_training")
            self._lay_out_draft(t)
            self._lay_out_run(t)
            self._lay_out_after(t)
        models.own, models.training = self.own, lambda: self.jobs.running() is not None
        unclip.own = self.own_unclips
        self._wire(page)

    def _lay_out_draft(self, t: gr.I18n) -> None:
        """Pictures, captions and the plan."""
        with gr.Column(visible=False, elem_id="draft") as self.draft:  # until it is known whose it is
            self.upload = gr.File(label=t("upload"), file_count="multiple", height=190, elem_id="upload")
            self.report = gr.HTML(elem_id="report")
            with gr.Column(visible=False, elem_id="prepared") as self.prepared:
                gr.Markdown(t("captions_help"))
                self.captions = gr.HTML(js_on_load=views.SAVE_CAPTIONS, elem_id="captions")
                self.words = gr.HTML(elem_id="words")
                with gr.Row():
                    self.title = gr.Textbox(
                        label=t("title"), placeholder=t("title_placeholder"), max_length=60, elem_id="title"
                    )
                    self.prompt = gr.Textbox(
                        label=t("preview_prompt"),
                        placeholder=t("preview_prompt_placeholder"),
                        max_length=1000,
                        elem_id="preview_prompt",
                    )
                self.effort = gr.Radio(list(EFFORTS), value="balanced", label=t("effort"), elem_id="effort")
                with gr.Accordion(t("advanced"), open=False, elem_id="train_advanced"):
                    self._lay_out_advanced(t)
                self.plan = gr.Markdown(elem_id="plan")
            self.consent = gr.Checkbox(False, label=t("consent"), elem_id="consent")
            self.start = gr.Button(t("start"), variant="primary", interactive=False, elem_id="start")
            self.hint = gr.Markdown(elem_id="hint")

    def _lay_out_advanced(self, t: gr.I18n) -> None:
        bases = list(self.shelf.trainable())
        base = next(iter(bases), None)
        adaptable = not self.shelf.is_unclip(base)
        methods = [(t("method_lora"), "lora"), (t("method_full"), "full")]
        with gr.Row():
            self.base = gr.Dropdown(bases, value=base, label=t("base"), info=t("base_help"), elem_id="base")
            self.method = gr.Radio(
                methods,
                value="lora",
                label=t("method"),
                info=t("method_help"),
                visible=adaptable,
                elem_id="method",
            )
        with gr.Row(visible=adaptable) as self.adapters:
            self.rank = gr.Radio(RANKS, value=16, label=t("rank"), info=t("rank_help"), elem_id="rank")
            self.text_encoder = gr.Checkbox(
                False, label=t("text_encoder"), info=t("text_encoder_help"), elem_id="text_encoder"
            )
        with gr.Row():
            self.steps = gr.Number(
                EMPTY,
                label=t("steps"),
                info=t("steps_help"),
                placeholder=t("automatic"),
                elem_id="steps",
            )
            self.rate = gr.Number(
                EMPTY,
                label=t("learning_rate"),
                info=t("learning_rate_help"),
                placeholder=t("automatic"),
                elem_id="learning_rate",
            )
            self.seed = gr.Number(
                EMPTY,
                label=t("train_seed"),
                info=t("train_seed_help"),
                placeholder=t("automatic"),
                elem_id="train_seed",
            )

    def _lay_out_run(self, t: gr.I18n) -> None:
        """What is seen of a run, in the order in which it comes to be."""
        with gr.Column(visible=False, elem_id="run") as self.run:
            self.status = gr.HTML(elem_id="train_status")
            with gr.Row(elem_id="train_buttons"):
                self.buttons = {
                    name: gr.Button(t(name), size="sm", elem_id=name, variant="stop" if "stop" in name else "secondary")
                    for name in BUTTONS
                }
            self.reconstruction = gr.HTML(elem_id="reconstruction")
            with gr.Column(visible=False, elem_id="losses") as self.losses:
                self.plot = gr.LinePlot(
                    label=t("loss_plot"), x="step", y="loss", color="series", height=260, elem_id="loss_plot"
                )
                with gr.Row():
                    self.raw = gr.Checkbox(False, label=t("raw"), container=False, elem_id="raw")
                    self.logarithmic = gr.Checkbox(
                        False, label=t("logarithmic"), container=False, elem_id="logarithmic"
                    )
            self.previews = gr.HTML(elem_id="previews")

    def _lay_out_after(self, t: gr.I18n) -> None:
        """What can be done with a tuned model."""
        with gr.Column(visible=False, elem_id="after") as self.after:
            with gr.Column(elem_id="compare"):
                gr.Markdown(t("compare"), elem_classes="heading")
                with gr.Row():
                    self.compare_prompt = gr.Textbox(label=t("compare_prompt"), max_lines=3, elem_id="compare_prompt")
                    self.strength = gr.Slider(
                        0, 1.5, 1.0, step=0.05, label=t("strength"), info=t("strength_help"), elem_id="strength"
                    )
                with gr.Row():
                    self.draw_both = gr.Button(t("draw_both"), elem_id="draw_both")
                    self.use = gr.Button(t("use"), variant="primary", elem_id="use")
                self.compared = gr.Markdown(elem_id="compared")
                with gr.Row(visible=False) as self.pairs:
                    looks = {"columns": 2, "height": "auto", "format": "png", "object_fit": "contain"}
                    self.before = gr.Gallery(label=t("before"), elem_id="before", interactive=False, **looks)
                    self.tuned = gr.Gallery(label=t("after"), elem_id="tuned", interactive=False, **looks)
            with gr.Accordion(t("manage"), open=False, elem_id="manage"):
                with gr.Row():
                    self.new_title = gr.Textbox(label=t("title"), max_length=60, scale=3, elem_id="new_title")
                    self.rename = gr.Button(t("rename"), size="sm", scale=1, elem_id="rename")
                self.licence = gr.Textbox(label=t("licence"), info=t("licence_help"), max_length=40, elem_id="licence")
                with gr.Row():
                    self.export = gr.Button(t("export"), size="sm", elem_id="export")
                    self.zip = gr.DownloadButton(
                        t("download_export"), size="sm", variant="primary", visible=False, elem_id="download_export"
                    )
                with gr.Row():
                    self.repo = gr.Textbox(label=t("repo"), placeholder="name/model", elem_id="repo")
                    self.token = gr.Textbox(label=t("token"), info=t("token_help"), type="password", elem_id="token")
                    self.private = gr.Checkbox(True, label=t("private"), info=t("private_help"), elem_id="private")
                self.push = gr.Button(t("push"), size="sm", elem_id="push")
                self.told = gr.Markdown(elem_id="told")
        with gr.Row(visible=False, elem_id="delete_row") as self.delete_row:
            self.delete = gr.Button(t("delete"), size="sm", elem_id="delete")
            self.delete_sure = gr.Button(
                t("delete_sure"), size="sm", variant="stop", visible=False, elem_id="delete_sure"
            )

    def _wire(self, page: gr.Blocks) -> None:
        """Connect the events; those that must keep their order share the queue named `captions`."""
        me, at_once = [self.owner, self.viewed], QUIET | {"queue": False}
        in_order = QUIET | {"concurrency_limit": 1, "concurrency_id": "captions"}
        # Without a queue an older plan could come back last, and leave a start that is ready disabled
        planning = QUIET | {"concurrency_limit": 1, "concurrency_id": "plan", "trigger_mode": "always_last"}
        planned = [self.effort, self.plan, self.words, self.start, self.hint]
        self.everything = [
            *(self.viewed, self.seen, self.timer, self.chooser, self.picker, self.new, self.draft, self.upload),
            *(self.report, self.prepared, self.captions, self.title, self.prompt, *planned, self.run, self.status),
            *(*self.buttons.values(), self.reconstruction, self.losses, self.plot, self.previews, self.after),
            *(self.compare_prompt, self.strength, self.compared, self.pairs, self.new_title, self.zip, self.told),
            *(self.delete_row, self.delete, self.delete_sure, self.models.model, self.models.notice, self.base),
            *(self.use, self.unclip.model),
        ]
        looks = [self.raw, self.logarithmic]
        probed = [*me, self.consent, self.effort, self.steps, self.base, self.method, self.text_encoder, self.rank]

        arrived = page.load(self.arrive, [self.owner], [self.owner, *self.everything], **at_once)
        own_models = [self.models.model, self.unclip.model]
        self.models.arrived.then(self.offer_own, [self.owner], own_models, **at_once)
        read = self.upload.upload(self.prepare, [*me, self.upload], self.everything, **QUIET, concurrency_limit=2)
        picked = self.picker.input(self.pick, [self.owner, self.picker], self.everything, **at_once)
        renewed = self.new.click(self.renew, [self.owner], self.everything, **QUIET)  # gr.Info needs the queue
        for event in (arrived, read, picked, renewed):
            self._measure(event, probed, planned, planning)
        self.base.input(self.fit, [self.base], [self.method, self.adapters], **at_once)
        for choose in (self.base.input, self.method.input, self.text_encoder.input, self.rank.input):
            self._measure(choose(self.show_plan, probed, planned, **planning), probed, planned, planning)
        for choice in (self.effort, self.steps, self.consent):
            choice.input(self.show_plan, probed, planned, **planning)
        written = self.captions.input(self.save_caption, me, None, trigger_mode="multiple", **in_order)
        written.then(self.show_plan, probed, planned, **planning)
        plan = [self.title, *probed[3:], self.prompt, self.rate, self.seed]
        self.start.click(self.begin, [*me, self.consent, *plan], self.everything, **in_order)
        for name, button in self.buttons.items():
            button.click(getattr(self, f"press_{name}"), [*me, *looks], self.everything, **at_once)
        self.timer.tick(self.poll, [*me, self.seen, *looks], self.everything, **at_once)
        for box in looks:
            box.input(self.poll, [*me, self.seen, *looks], self.everything, **at_once)
        compared = gr.on(
            [self.draw_both.click, self.compare_prompt.submit, self.strength.release],
            self.compare,
            [*me, self.compare_prompt, self.strength],
            [self.compared, self.pairs, self.before, self.tuned],
            **QUIET,
            trigger_mode="always_last",
            concurrency_limit=1,
            concurrency_id="engine",
        )
        used = [*self.models.shown, self.unclip.model, self.tabs]
        self.use.click(self.use_model, [*me, self.strength], used, **at_once)
        renamed = self.rename.click(self.press_rename, [*me, self.new_title], self.everything, **at_once)
        self.export.click(self.press_export, [*me, self.licence], [self.zip, self.told], **QUIET)
        self.push.click(
            self.press_push,
            [*me, self.repo, self.token, self.private, self.licence],
            [self.told, self.token],
            **QUIET,
            concurrency_limit=4,
        )
        self.delete.click(lambda: gr.Button(visible=True), None, self.delete_sure, **at_once)
        deleted = self.delete_sure.click(self.press_delete, me, self.everything, **QUIET)
        for event in (compared, renamed, deleted):
            chosen = [self.owner, self.models.chosen, self.unclip.model]
            event.then(self.follow, chosen, [*self.models.shown, self.unclip.model], **at_once)
        page.unload(self.leave)

    # the visitor's jobs

    def arrive(self, request: gr.Request, owner: str) -> dict:
        """Show the newest job of the visitor, if there is one; give a new visitor a secret."""
        from dalle_demo.training.jobs import new_owner

        owner = owner if isinstance(owner, str) and owner else new_owner()
        self._belongs(request, owner)
        job = next(iter(self.jobs.of(owner)), None)
        return {self.owner: owner} | self._view(request, owner, job)

    def offer_own(self, request: gr.Request, owner: str) -> tuple:
        """Put the visitor's models among those of the other tabs."""
        self._belongs(request, owner)
        dalles = gr.Dropdown(self.models.choices(request)) if self.own(request) else gr.skip()
        return dalles, self.unclip.offer(request, self.shelf.unclip_home) if self.own_unclips(request) else gr.skip()

    def leave(self, request: gr.Request) -> None:
        """Draw no more for a closed page; its jobs go on.

        Whose it is stays known: gradio calls a page closed, too, whose connection broke for a moment.
        """
        if comparing := self._comparing.get(request.session_hash):
            comparing.set()

    def _belongs(self, request: gr.Request, owner: str) -> None:
        """Remember whose a page is."""
        self._owners[request.session_hash] = owner
        if len(self._owners) > VISITORS:
            del self._owners[next(iter(self._owners))]

    def own(self, request: gr.Request) -> list[str]:
        """Names on the shelf of the visitor's tuned DALL-E models."""
        return [name for name in self._adopted(request) if not self.shelf.is_unclip(name)]

    def own_unclips(self, request: gr.Request) -> list[str]:
        """Names on the shelf of the visitor's tuned DALL-E 2 models."""
        return [name for name in self._adopted(request) if self.shelf.is_unclip(name)]

    def _adopted(self, request: gr.Request) -> list[str]:
        """Names of all the visitor's tuned models, once they are on the shelf."""
        owner = self._owners.get(request.session_hash)
        jobs = self.jobs.of(owner) if owner else []
        names = []
        for job in jobs:
            if self.jobs.weights(job):
                try:
                    names.append(self._adopt(job))
                except (ValueError, OSError) as error:  # damaged, or of an older version: the others can be used
                    log.warning("the model of a training cannot be read: %s", error)
        return names

    def follow(self, request: gr.Request, owner: str, chosen: str, unclip: str) -> dict:
        """Keep the choice of the other tabs a model that there is, when the visitor's have changed."""
        self._belongs(request, owner)
        offered = {self.unclip.model: self.unclip.offer(request, unclip)}
        own = {name.partition("@")[0]: name for name in self.own(request)}
        now = chosen if chosen in self.shelf.names() else own.get(chosen.partition("@")[0], self.shelf.home)
        if now != chosen:
            return offered | self.models.select(request, self.shelf.find(now))
        return offered | {self.models.model: gr.Dropdown(self.models.choices(request), value=now)}

    def pick(self, request: gr.Request, owner: str, name: str) -> dict:
        """Show another job."""
        return self._view(request, owner, self._job(request, owner, name))

    def renew(self, request: gr.Request, owner: str) -> dict:
        """Show the draft, of which a visitor has one, or an empty form."""
        job = next((job for job in self.jobs.of(owner) if job.wish == "draft"), None)
        if job is not None and self.plans.pictures(job):
            gr.Info(say("draft_kept", language_of(request)))
        return self._view(request, owner, job)

    def _adopt(self, job: "Job") -> str:
        """Put a tuned model on the shelf; its name there, which nobody can guess."""
        name, folder, title, strength = f"{job.id}@{job.strength:g}", self._weights(job), job.title, job.strength
        if is_unclip(str(folder)):
            self.shelf.adopt_unclip(name, title, folder)
            return name

        def change(model: Any) -> Any:
            if strength != 1:
                from dalle_demo.training import lora  # brings the trainer

                model = lora.scale(model, folder, strength)
            return dataclasses.replace(model, name=title)

        self.shelf.adopt(name, title, folder, change)
        return name

    def _weights(self, job: "Job") -> Path:
        """Folder of the tuned model; JobError where there is none."""
        from dalle_demo.training.jobs import JobError

        if (folder := self.jobs.weights(job)) is None:
            raise JobError("not_tuned")
        return folder

    def _tuned(self, request: gr.Request, job: "Job") -> str:
        """Name on the shelf of the tuned model; gr.Error where it cannot be used."""
        try:
            return self._adopt(job)
        except (ValueError, OSError) as error:
            raise _refusal(error, request, self.jobs.run(job), "not_done") from error

    def _job(self, request: gr.Request, owner: str, name: str) -> "Job":
        """The job that the page shows; gr.Error where it is not this visitor's."""
        self._belongs(request, owner)
        try:
            return self.jobs.get(owner, name)
        except ValueError as error:
            raise _refusal(error, request) from error

    # what the page shows

    def _view(self, request: gr.Request, owner: str, job: "Job | None", told: str = "") -> dict:
        """All of the tab for a job, or for none yet."""
        draft, begun = job is None or job.wish == "draft", job is not None and self._begun(job)
        choices = self._choices(request, owner)
        shown = {
            self.viewed: job.id if job else "",
            self.seen: {},
            self.chooser: gr.Row(visible=bool(choices)),
            self.picker: gr.Dropdown(choices, value=job.id if job and begun else None),
            self.new: gr.Button(visible=not draft),
            self.draft: gr.Column(visible=draft),
            self.run: gr.Column(visible=not draft),
            self.after: gr.Column(visible=False),
            self.delete_row: gr.Row(visible=begun),
            self.delete_sure: gr.Button(visible=False),
            self.upload: None,
            self.timer: gr.Timer(active=False),
            self.models.notice: self.models.noticed(request),
        }
        if draft:
            return shown | self._view_draft(request, job, told)
        outcome = {self.compared: "", self.pairs: gr.Row(visible=False), self.zip: gr.DownloadButton(visible=False)}
        return shown | outcome | {self.told: ""} | self._changes(request, owner, job, {})

    def _view_draft(self, request: gr.Request, job: "Job | None", told: str) -> dict:
        """The form, with the pictures that have been uploaded; `estimate` and `show_plan` say whether it can start."""
        language, report, cards = language_of(request), "", ""
        if job is not None and (folder := self.plans.pictures(job)):
            from dalle_demo.data import uploads

            examples = uploads.load(folder)
            training, held_out = uploads.split(examples)
            report = views.report_of(uploads.load_report(folder), (len(training), len(held_out)), language)
            cards = views.cards_of(folder, examples, language)
        return {
            self.base: gr.Dropdown(list(self.shelf.trainable())),  # some may have been pulled since
            self.report: told + report,
            self.prepared: gr.Column(visible=bool(cards)),
            self.captions: cards,
            self.effort: gr.Radio(efforts(None, language)),
            self.plan: "",
            self.words: "",
            self.start: gr.Button(interactive=False),
            self.hint: "" if cards else say("need_pictures", language),
        }

    def _changes(
        self, request: gr.Request, owner: str, job: "Job", seen: dict, raw: bool = False, logarithmic: bool = False
    ) -> dict:
        """What is new about a started job since the page was last told."""
        language, state, run = language_of(request), self.jobs.state(job), self.jobs.run(job)
        lines, previews, weights = self.jobs.log(job), self.jobs.previews(job), self.jobs.weights(job)
        pace = next((line["images_per_second"] for line in reversed(lines) if "images_per_second" in line), None)
        facts = {
            "status": views.progress_of(state, pace, job.expected, weights is not None, language),
            "state": [state.state, job.title, weights is not None],
            "plot": [len(lines), raw, logarithmic],
            "reconstruction": (run / "reconstruction.png").exists(),
            "previews": [preview["step"] for preview in previews],
        }
        new = {name for name, fact in facts.items() if seen.get(name) != fact}
        changes: dict = {self.seen: facts} if new else {}
        if "status" in new:
            changes[self.status] = facts["status"]
        if "plot" in new:
            changes |= self._plotted(lines, raw, logarithmic, language)
        if "reconstruction" in new:
            changes[self.reconstruction] = views.reconstruction_of(run / "reconstruction.png", language)
        if "previews" in new:
            changes[self.previews] = views.previews_of(self.jobs.data(job), previews, language)
        if "state" in new:
            changes |= self._turned(request, owner, job, state.state, weights)
        return changes

    def _turned(self, request: gr.Request, owner: str, job: "Job", state: str, weights: Path | None) -> dict:
        """What depends on the state that a job has come to."""
        language = language_of(request)
        changes = {button: gr.Button(visible=state in BUTTONS[name]) for name, button in self.buttons.items()}
        begun = state not in ("waiting", "preparing")
        changes |= {
            self.buttons["stop_training"]: gr.Button(
                say("stop_keep" if begun else "stop_now", language), visible=state in BUTTONS["stop_training"]
            ),
            self.models.notice: self.models.noticed(request),
            self.timer: gr.Timer(active=state in ACTIVE),
            self.picker: gr.Dropdown(self._choices(request, owner), value=job.id),
            self.after: gr.Column(visible=weights is not None),
        }
        if weights is not None:
            previews = self.jobs.previews(job)
            prompt = previews[-1]["rows"][0]["prompt"] if previews else ""
            adapted = (weights / "lora.safetensors").exists()
            changes |= {
                self.compare_prompt: prompt,
                self.strength: gr.Slider(value=job.strength, visible=adapted),
                self.new_title: job.title,
                self.models.model: gr.Dropdown(self.models.choices(request), visible=True),
                self.use: gr.Button(label("use_unclip" if _is_unclip(weights) else "use", language)),
            }
        return changes

    def _plotted(self, lines: list[dict], raw: bool, logarithmic: bool, language: str) -> dict:
        import pandas  # of gradio, which draws nothing else

        from dalle_demo.training.jobs import smoothed

        table = pandas.DataFrame(views.losses(lines, smoothed, raw, logarithmic, language))
        names = [say(f"series_{name}", language) for name in ("training", "validation", "training_raw")]
        plot = gr.LinePlot(
            table,
            x="step",
            y="loss",
            color="series",
            x_title=say("axis_step", language),
            y_title=say("axis_log_loss" if logarithmic else "axis_loss", language),
            color_title="",
            caption=say("legend", language),  # gradio's own legend stays empty
            color_map=dict(zip(names, COLOURS, strict=True)),
        )
        return {self.losses: gr.Column(visible=len(table) > 1), self.plot: plot}

    def _choices(self, request: gr.Request, owner: str) -> list[tuple[str, str]]:
        """Line and id of each training of the visitor."""
        return [(self._line(job, language_of(request)), job.id) for job in self.jobs.of(owner) if self._begun(job)]

    def _begun(self, job: "Job") -> bool:
        """Whether a job is a training yet: a draft whose upload was refused is none."""
        return job.wish != "draft" or self.plans.pictures(job) is not None

    def _line(self, job: "Job", language: str) -> str:
        """Line of the list of trainings."""
        state = say(f"short_{self.jobs.state(job).state}", language)
        return f"{job.title}: {state}" if job.title else say("new_training", language)

    # before the start

    def fit(self, base: str) -> tuple:
        """Show the controls that a model to start from knows."""
        adaptable = not self.shelf.is_unclip(base)
        return gr.Radio(visible=adaptable), gr.Row(visible=adaptable)

    def prepare(self, request: gr.Request, owner: str, name: str, files: list[str] | None) -> Iterator[dict]:
        """Read what was uploaded; the files themselves are deleted."""
        from dalle_demo.data import uploads
        from dalle_demo.training.jobs import JobError

        language, sources = language_of(request), [Path(file) for file in files or []]
        try:
            yield {self.report: _paragraph(say("reading_upload", language)), self.start: gr.Button(interactive=False)}
            job = self._job(request, owner, name) if name else None
            if job is None or job.wish != "draft":
                job = self.jobs.create(owner)
                if self.plans.pictures(job):  # of another tab: to be replaced where it is seen only
                    raise JobError("draft_kept")
            self._belongs(request, owner)
            with tempfile.TemporaryDirectory(dir=self.jobs.run(job), ignore_cleanup_errors=True) as folder:
                uploads.prepare(sources, Path(folder, "data"))
                self.jobs.put_data(job, Path(folder, "data"))
            self.plans.forget(job)
        except (JobError, uploads.UploadError, OSError) as error:
            log.info("refused an upload: %s", type(error).__name__)
            if isinstance(error, JobError):  # started or deleted meanwhile, or `draft_kept`
                failed = say(error.key, language, **error.values)
                job = next((one for one in self.jobs.of(owner) if job and one.id == job.id), None)
            else:
                failed = say("upload_failed", language, reason=_without_folders(error, sources))
            yield self._view(request, owner, job, _paragraph(failed, failed=True))
        else:
            title = sources[0].stem if len(sources) == 1 else ""
            yield self._view(request, owner, job) | {self.title: title.replace("_", " ")}
        finally:
            for source in sources:
                source.unlink(missing_ok=True)

    def save_caption(self, request: gr.Request, owner: str, name: str, event: gr.EventData) -> None:
        """Write a caption that has just been typed."""
        from dalle_demo.data import uploads
        from dalle_demo.training.jobs import JobError

        job, language = self._job(request, owner, name), language_of(request)
        try:
            with self.jobs.editing(job):
                uploads.save_captions(self.jobs.data(job), {str(event.file): str(event.caption)})
        except JobError as error:
            raise _refusal(error, request) from error
        except (uploads.UploadError, OSError) as error:
            raise gr.Error(say("caption_lost", language, reason=_safe(error)), print_exception=False) from error

    def _measure(self, event: Any, probed: list, planned: list, planning: dict[str, Any]) -> None:
        """Measure after an event, and show what it means for what is chosen by then."""
        measured = event.then(self.estimate, probed, planned, **planning | {"concurrency_id": "probe"})
        measured.then(self.show_plan, probed, planned, **planning)

    def estimate(self, request: gr.Request, owner: str, name: str, *plan: Any) -> Iterator[dict]:
        """Measure how long training takes here, unless that is known, and show it."""
        job, (_, _, _, *settings) = self._draft(request, owner, name), plan
        if job is None:
            yield {self.plan: gr.skip()}
            return
        known = self.plans.measured(job, *settings)
        if known is None or isinstance(known, str):  # what failed may succeed now
            self.plans.forget(job, *settings)
            yield self.show_plan(request, owner, name, *plan)
            self.plans.measure(job, *settings)
        yield self.show_plan(request, owner, name, *plan)

    def show_plan(
        self,
        request: gr.Request,
        owner: str,
        name: str,
        consent: bool,
        effort: str,
        steps: float | str | None,
        base: str,
        *settings: Any,
    ) -> dict:
        """Time of each effort and memory, once they are measured, and what is missing before training can start."""
        language, job = language_of(request), self._draft(request, owner, name)
        if job is None:
            return {self.plan: gr.skip()}
        measured = self.plans.measured(job, base, *settings)
        missing = self.plans.missing(job, consent, measured)
        return {
            self.effort: gr.Radio(efforts(measured, language)),
            self.plan: _safe(self.plans.described(measured, steps_of(effort, steps), language)),
            self.words: views.words_of(self.plans.unknown_words(job, base), base, language),
            self.start: gr.Button(interactive=missing is None),
            self.hint: say(missing or "ready", language),
        }

    def _draft(self, request: gr.Request, owner: str, name: str) -> "Job | None":
        """The job that the page shows, if it has pictures and is not started."""
        job = self._job(request, owner, name) if name else None
        return job if job is not None and job.wish == "draft" and self.plans.pictures(job) else None

    def begin(
        self,
        request: gr.Request,
        owner: str,
        name: str,
        consent: bool,
        title: str,
        effort: str,
        steps: float | str | None,
        base: str,
        method: str,
        text_encoder: bool,
        rank: float,
        prompt: str,
        rate: float | str | None,
        seed: float | str | None,
    ) -> dict:
        """Start, or put into the queue."""
        from dalle_demo.training.finetune import FinetuneSettings

        job, language = self._job(request, owner, name), language_of(request)
        measured = self.plans.measured(job, base, method, text_encoder, rank)
        if missing := self.plans.missing(job, consent, measured):
            raise gr.Error(say(missing, language), print_exception=False)
        if room := self.plans.shortage(measured):
            reason = say("no_memory", language, memory=megabytes(measured.memory), room=room)
            raise gr.Error(reason, print_exception=False)
        given = self.plans.chosen(base, method, text_encoder, rank) | {"effort": effort, "prompt": prompt.strip()}
        given |= {"steps": int(steps)} if steps else {}
        given |= {"learning_rate": rate} if rate else {}
        given |= {"seed": int(seed)} if seed else {}
        try:
            FinetuneSettings(**given, data=str(self.jobs.data(job)))
            title = title.strip() or say("untitled", language, number=len(self.jobs.of(owner)))
            job = self.jobs.start(job, title, given, seconds_of(measured, steps_of(effort, steps)))
        except ValueError as error:
            raise _refusal(error, request) from error
        return self._view(request, owner, job)

    # while it runs

    def poll(self, request: gr.Request, owner: str, name: str, seen: dict, raw: bool, logarithmic: bool) -> dict:
        """What has changed since the last look."""
        try:
            job = self.jobs.get(owner, name)
        except ValueError:  # deleted in another tab, or gradio has forgotten which
            return self._view(request, owner, next(iter(self.jobs.of(owner)), None))
        self._belongs(request, owner)
        return self._changes(request, owner, job, seen, raw, logarithmic) or {self.seen: gr.skip()}

    def press_pause(self, request: gr.Request, owner: str, name: str, *looks: bool) -> dict:
        """Let the job rest."""
        return self._changes(request, owner, self.jobs.pause(self._job(request, owner, name)), {}, *looks)

    def press_resume(self, request: gr.Request, owner: str, name: str, *looks: bool) -> dict:
        """Let the job go on."""
        try:
            job = self.jobs.resume(self._job(request, owner, name))
        except ValueError as error:
            raise _refusal(error, request) from error
        return self._changes(request, owner, job, {}, *looks)

    def press_stop_training(self, request: gr.Request, owner: str, name: str, *looks: bool) -> dict:
        """End the job."""
        return self._changes(request, owner, self.jobs.stop(self._job(request, owner, name)), {}, *looks)

    def press_save_now(self, request: gr.Request, owner: str, name: str, *looks: bool) -> dict:
        """Have the job save and draw."""
        self.jobs.save(self._job(request, owner, name))
        return {self.seen: gr.skip()}

    # afterwards

    def compare(self, request: gr.Request, owner: str, name: str, prompt: str, strength: float) -> Iterator[tuple]:
        """Draw with the model from before and with the tuned one, from the same seeds."""
        language, job = language_of(request), self._job(request, owner, name)
        tuned = self._tuned(request, self.jobs.set_strength(job, float(strength)))
        preset = self.jobs.settings(job)["base"]
        known = next((one for one, at in self.shelf.trainable().items() if at == preset), None)
        drawn_with = [*self.shelf.names(), *self.shelf.unclips()]  # some are there to be trained only
        base = known if known in drawn_with else None
        self._comparing[request.session_hash] = stop = threading.Event()
        try:
            yield say("drawing_before", language), gr.Row(visible=True), gr.skip(), gr.skip()
            before = self._draw(base, prompt, stop) if base else []
            yield say("drawing_after", language), gr.skip(), before, gr.skip()
            after = self._draw(tuned, prompt, stop)
        except ParamError as error:
            reason = f"{label(error.field, language)}: {why(error, language)}"
            raise gr.Error(_safe(reason), print_exception=False) from error
        except ShelfError as error:
            reason = say("load_failed", language, model=job.title, reason=error)
            raise gr.Error(_safe(reason), print_exception=False) from error
        finally:
            self._comparing.pop(request.session_hash, None)
        key = "compared" if base else "base_not_drawn" if known else "base_gone"
        yield say(key, language, seed=1, base=name_of(Path(preset))), gr.skip(), before, after

    def _draw(self, model: str, prompt: str, stop: threading.Event) -> list[Any]:
        """Pictures to compare; none once `stop` is set."""
        if self.shelf.is_unclip(model):
            return _drawn(self.shelf.unclip(model), prompt, stop)
        with self.shelf.lend(model, stop) as engine:
            return _drawn(engine, prompt, stop) if engine else []

    def use_model(self, request: gr.Request, owner: str, name: str, strength: float) -> dict:
        """Choose the tuned model in the tab of its engine, and go there."""
        job = self.jobs.set_strength(self._job(request, owner, name), float(strength))
        tuned = self._tuned(request, job)
        if self.shelf.is_unclip(tuned):
            return {self.unclip.model: self.unclip.offer(request, tuned), self.tabs: gr.Tabs(selected="unclip")}
        return self.models.select(request, self.shelf.find(tuned)) | {self.tabs: gr.Tabs(selected="generate")}

    def press_rename(self, request: gr.Request, owner: str, name: str, title: str) -> dict:
        """Give the model another name."""
        job = self.jobs.rename(self._job(request, owner, name), title)
        turned = self._turned(request, owner, job, self.jobs.state(job).state, self.jobs.weights(job))
        return turned | {self.told: say("renamed", language_of(request))}

    def press_export(self, request: gr.Request, owner: str, name: str, licence: str) -> Iterator[tuple]:
        """Make a zip to download."""
        from dalle_demo.training import export

        job, language = self._job(request, owner, name), language_of(request)
        yield gr.DownloadButton(visible=False), say("packing", language)
        try:
            self._weights(job)
            self._licensed(job, licence)
            stem = slug(job.title)
            with tempfile.TemporaryDirectory(prefix="dalle_demo-") as folder:
                file = export.pack(self.jobs.run(job), stem, Path(folder, f"{stem}.zip"))
                command = f'`python -m dalle_demo generate "..." --preset {stem} --out pictures`'
                told = say("exported", language, size=megabytes(file.stat().st_size), command=command)
                yield gr.DownloadButton(value=str(file), visible=True), told  # copied when gradio asks for more
        except (ValueError, OSError) as error:
            yield gr.skip(), ""
            raise _refusal(error, request, self.jobs.run(job), "not_done") from error

    def press_push(
        self, request: gr.Request, owner: str, name: str, repo: str, token: str, private: bool, licence: str
    ) -> Iterator[tuple]:
        """Upload to the visitor's repository; the token is used for that and forgotten."""
        from dalle_demo import repos
        from dalle_demo.training.jobs import JobError

        job, language = self._job(request, owner, name), language_of(request)
        if not repo.strip() or not token.strip():
            yield say("need_token", language), gr.skip()
            return
        yield say("pushing", language, repo=_safe(repo.strip())), gr.skip()
        try:
            self._weights(job)
            self._licensed(job, licence)
            address = repos.push(str(self._weights(job)), repo.strip(), private, token.strip())
        except JobError as error:
            yield "", ""
            raise _refusal(error, request) from error
        except (ValueError, OSError) as error:
            log.info("a push failed: %s", type(error).__name__)
            yield say("push_failed", language, reason=_push_failure(error, self.jobs.run(job), language)), ""
        else:
            yield say("pushed", language, address=address), ""

    def _licensed(self, job: "Job", licence: str) -> None:
        from dalle_demo.training import export

        if licence.strip():
            export.set_licence(self._weights(job), licence.strip())

    def press_delete(self, request: gr.Request, owner: str, name: str) -> dict:
        """Leave nothing of the job."""
        job = self._job(request, owner, name)
        self.jobs.delete(job)
        for adopted in self.shelf.adopted():
            if adopted.startswith(f"{job.id}@"):
                self.shelf.drop(adopted)
        gr.Info(say("deleted", language_of(request)))
        return self._view(request, owner, next(iter(self.jobs.of(owner)), None))


def open_jobs() -> "Jobs":
    """Those of this computer; what another server has left running goes on."""
    from dalle_demo.training.jobs import Jobs

    return Jobs()


def _drawn(engine: Engine, prompt: str, stop: threading.Event) -> list[Any]:
    updates = engine.generate(engine.params(prompt, n=SAMPLES, seed=1), stop, previews=False)
    return [picture for update in updates for picture in update.images]  # of the only one


def _is_unclip(folder: Path) -> bool:
    """Whether a tuned model is a DALL-E 2; a damaged one is none of either kind."""
    try:
        return is_unclip(str(folder))
    except ValueError:
        return False


def _push_failure(error: Exception, run: Path, language: str) -> str:
    """Why nothing was published, for a visitor, who cannot change what the server is started with."""
    if isinstance(error, HubError) and error.reason == "refused":
        return say("push_refused", language)
    return _safe(str(error).replace(f"{run}{os.sep}", ""))


def _refusal(error: Exception, request: gr.Request, run: Path | None = None, key: str = "bad_setting") -> gr.Error:
    """What the page says of something that cannot be done, without the folder that a run is in."""
    from dalle_demo.training.jobs import JobError

    if isinstance(error, JobError):
        sentence = say(error.key, language_of(request), **error.values)
    else:
        sentence = say(key, language_of(request), reason=str(error).removeprefix("--"))
    if run is not None:
        sentence = sentence.replace(f"{run}{os.sep}", "")
    return gr.Error(_safe(sentence), print_exception=False)


def _without_folders(error: Exception, sources: list[Path]) -> str:
    """Message that names files as the visitor knows them."""
    text = str(error)
    for source in sources:
        text = text.replace(f"{source.parent}/", "")
    return text


def _paragraph(text: str, failed: bool = False) -> str:
    kind = ' class="failed" role="alert"' if failed else ""
    return f"<p{kind}>{html.escape(text, quote=False)}</p>"


def _safe(text: object) -> str:
    """The page shows messages as HTML."""
    return html.escape(str(text), quote=False)
