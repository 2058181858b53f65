"""prompt, model, settings -> pictures on the page: the Generate tab, its sliders made from GenerateParams."""

import dataclasses
import html
import logging
import math
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from dalle_demo.config import GenerateParams, ParamError
from dalle_demo.engines import DalleEngine, Update
from dalle_demo.images import save_each, slug
from dalle_demo.shelf import Entry, Shelf, ShelfError
from dalle_demo.ui.models import ModelChoice, language_of, usable, value_and_top
from dalle_demo.ui.strings import EXAMPLES, label, say, why

FRAMES_PER_SECOND = 4  # of previews; each costs the page a tenth of a second that the drawing then waits for
SLIDERS = [spec.name for spec in dataclasses.fields(GenerateParams) if spec.metadata and spec.name != "seed"]
log = logging.getLogger(__name__)


class Runs:
    """Stop flags of the runs that each browser session has asked for, in their order, queued ones included.

    Gradio's own `cancels` leaves error badges and lets late frames through; a flag that the engine reads does not.
    """

    def __init__(self):
        self._waiting: dict[str, list[threading.Event]] = {}
        self._drawing: dict[str, list[threading.Event]] = {}

    def begin(self, session: str | None) -> None:
        """Announce a run, which ends those that the session asked for before."""
        self.stop(session)
        if session:
            self._waiting.setdefault(session, []).append(threading.Event())

    def enter(self, session: str | None) -> threading.Event:
        """Flag for the run that starts now: the first one announced, or a new one for a caller of the API."""
        waiting = self._waiting.get(session)
        flag = waiting.pop(0) if waiting else threading.Event()
        if session:
            self._drawing.setdefault(session, []).append(flag)
        return flag

    def leave(self, session: str | None, flag: threading.Event) -> None:
        """Forget a run that is over, and a session that has no others."""
        drawing = self._drawing.get(session, [])
        if flag in drawing:
            drawing.remove(flag)
        for runs in (self._waiting, self._drawing):
            if session in runs and not runs[session]:
                del runs[session]

    def stop(self, session: str | None) -> None:
        """End the session's runs, and keep those that wait from starting."""
        for runs in (self._waiting, self._drawing):
            for flag in runs.get(session, []):
                flag.set()

    def forget(self, session: str | None) -> None:
        """Stop and drop whatever the session has."""
        self.stop(session)
        self._waiting.pop(session, None)
        self._drawing.pop(session, None)

    def __contains__(self, session: str | None) -> bool:
        return session in self._waiting or session in self._drawing


class GenerateTab:
    """Components and events of the tab; create it inside `gr.Blocks`."""

    def __init__(self, shelf: Shelf, i18n: gr.I18n, page: gr.Blocks):
        self.shelf = shelf
        self.runs = Runs()
        self._lay_out(i18n)
        self._wire()
        self.models.wire(page, {name: slider for name, slider in self.controls.items() if name in SLIDERS})

    def _lay_out(self, t: gr.I18n) -> None:
        """Prompt and buttons, pictures, settings: in the order of a phone's single column."""
        with gr.Row(elem_id="studio"):
            with gr.Column(elem_id="compose"):
                prompt = gr.Textbox(
                    label=t("prompt"),
                    placeholder=t("prompt_placeholder"),
                    lines=1,  # Enter submits
                    max_lines=4,
                    autofocus=True,
                    elem_id="prompt",
                )
                self.go = gr.Button(t("go"), variant="primary", elem_id="go")
                self.stop = gr.Button(t("stop"), variant="stop", visible=False, elem_id="stop")
                texts = [[text] for text in EXAMPLES]
                self.examples = gr.Examples(texts, prompt, label=t("examples"), elem_id="examples")
            with gr.Column(elem_id="result"):
                self.gallery = gr.Gallery(
                    label=t("gallery"),
                    show_label=False,
                    columns=2,
                    format="jpeg",  # of previews; finished pictures are files, which are passed on as they are
                    object_fit="contain",
                    interactive=False,
                    buttons=["download", "download_all", "fullscreen"],
                    elem_id="gallery",
                )
                self.selected = gr.State(0)  # number of the picture that is looked at
                self.vary = gr.Button(t("vary"), size="sm", visible=False, elem_id="vary")  # of the DALL-E 2 tab
                self.status = gr.Markdown(elem_id="status")
            with gr.Column(elem_id="settings"):
                self.models = ModelChoice(self.shelf, t)
                self.controls = {"prompt": prompt} | self._settings(t) | {"model": self.models.model}

    def _settings(self, t: gr.I18n) -> dict[str, gr.components.Component]:
        """One control per remaining field of GenerateParams, named after it."""
        controls, defaults, codes = {}, self.shelf.defaults(self.shelf.home), self.shelf.codes(self.shelf.home)
        with gr.Accordion(t("settings"), elem_id="advanced"):
            for spec in dataclasses.fields(GenerateParams):
                if spec.name == "seed":
                    controls["seed"], self.randomise = _seed(t)
                elif spec.name in SLIDERS:
                    controls[spec.name] = _slider(spec, t, **value_and_top(spec, defaults, codes))
        return controls

    def _wire(self) -> None:
        """Check the settings at once, then draw in the queue, then give the Generate button back."""
        buttons = [self.go, self.stop]
        hidden = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        starts = [self.go.click, self.controls["prompt"].submit, self.examples.load_input_event.then]
        for start in starts:
            start(self.refuse, [self.randomise], self.status, inputs_kwargs=self.controls, preprocess=False, **hidden)
            begun = start(
                self.begin,
                [self.randomise],
                [*buttons, self.gallery, self.controls["seed"], self.status, self.vary],
                inputs_kwargs=self.controls,
                preprocess=False,
                validator=self.validate,
                concurrency_limit=None,
                **hidden | {"queue": True},
            )
            drawn = begun.success(
                self.generate,
                None,
                [self.gallery, self.controls["seed"], self.status],
                inputs_kwargs=self.controls,
                # Values come as they were sent: the components' own range checks do not name the field.
                preprocess=False,
                api_name="generate",
                api_visibility="public" if start is starts[0] else "private",
                show_progress="hidden",
                trigger_mode="multiple",  # a new run waits in the queue while the former one ends
                concurrency_limit=1,
                concurrency_id="engine",
            )
            told = [*buttons, self.models.footer, self.models.notice]
            drawn.success(self.finish, [self.models.model], told, preprocess=False, **hidden)
            drawn.failure(self.fail, None, [*buttons, self.status], **hidden)
        self.stop.click(self.press_stop, **hidden)

    def validate(self, request: gr.Request, randomise: bool, **settings: Any) -> list[dict]:
        """Verdict on each input of `begin`, shown by the page beside the control."""
        wrong, sentence = None, ""
        try:
            self._checked(_with_seed(settings, randomise), language_of(request))
        except RefusedError as error:
            log.info("refused a request: %s", error.__cause__)
            wrong, sentence = error.field, str(error)
        return [gr.validate(name != wrong, sentence) for name in ("randomise", *settings)]

    def begin(self, request: gr.Request, randomise: bool, **settings: Any) -> tuple:
        """Show that a request is on its way."""
        _, params = self._accepted(_with_seed(settings, randomise), language_of(request))
        self.runs.begin(request.session_hash)
        columns = gr.Gallery(columns=math.ceil(math.sqrt(params.n)))
        waiting, vary = say("waiting", language_of(request)), gr.Button(visible=False)  # of a picture that is to go
        return *_buttons(running=True), columns, params.seed, waiting, vary

    def refuse(self, request: gr.Request, randomise: bool, **settings: Any) -> Any:
        """Say beside the pictures too, which are of an earlier request, what stands at a control out of sight."""
        language = language_of(request)
        try:
            self._checked(_with_seed(settings, randomise), language)
        except RefusedError as error:
            return say("not_drawn", language, reason=error)
        return gr.skip()

    def generate(
        self, request: gr.Request, seed: int | None = None, model: str | None = None, **settings: Any
    ) -> Iterator[tuple]:
        """Draw pictures for a prompt. Yields previews, at last PNG files that hold their settings.

        The settings are the fields of GenerateParams. One that is left out takes the value that the model is served
        with; a seed is drawn. `model` is the one that the server was started with unless another is named.

        Returns:
            pictures with captions, the seed of the request, and a sentence on the state of the run.
        """
        flag, language = self.runs.enter(request.session_hash), language_of(request)
        try:
            entry, params = self._accepted({"seed": seed, "model": model, **settings}, language)
            yield from self._draw(entry, params, flag, language)
        finally:  # also when the tab is closed
            self.runs.leave(request.session_hash, flag)

    def finish(self, request: gr.Request, model: str) -> tuple:
        """Give the Generate button back, unless the next run has been asked for meanwhile."""
        return *_buttons(running=request.session_hash in self.runs), *self.models.described(request, model)

    def fail(self, request: gr.Request) -> tuple:
        """Give the Generate button back after an error, or when the queue was full."""
        self.runs.forget(request.session_hash)
        return *_buttons(running=False), ""

    def press_stop(self, request: gr.Request) -> None:
        """End this session's run."""
        self.runs.stop(request.session_hash)

    def leave(self, request: gr.Request) -> None:
        """Free what a closed tab has asked for."""
        self.runs.forget(request.session_hash)

    def _draw(self, entry: Entry, params: GenerateParams, stop: threading.Event, language: str) -> Iterator[tuple]:
        """Borrow the model, which may have to be loaded, and draw with it."""
        key = "starting" if entry.name == self.shelf.loaded else "loading"
        yield gr.skip(), gr.skip(), say(key, language, model=entry.title)
        try:
            with self.shelf.lend(entry.name, stop) as engine:
                if engine is None or stop.is_set():
                    yield gr.skip(), gr.skip(), say("stopped", language)
                else:
                    yield from self._stream(engine, params, stop, language)
        except ParamError as error:  # for which the model would need what is not here
            log.info("refused a request: %s", error.__cause__ or error)
            raise gr.Error(_explain(error, language), print_exception=False) from error
        except ShelfError as error:
            log.warning("%s could not be loaded: %s", entry.title, error.__cause__ or error)
            sentence = html.escape(say("load_failed", language, model=entry.title, reason=error), quote=False)
            raise gr.Error(sentence, print_exception=False) from error

    def _stream(
        self, engine: DalleEngine, params: GenerateParams, stop: threading.Event, language: str
    ) -> Iterator[tuple]:
        start, shown, update, preview = time.monotonic(), 0.0, None, None
        params = params.seeded()
        with closing(engine.generate(params, stop)) as updates:
            for update in updates:
                if update.final:
                    summary = _summary(engine, params, time.monotonic() - start, language)
                    yield from _save(engine, update, params, summary)
                    return
                if time.monotonic() - shown >= 1 / FRAMES_PER_SECOND:
                    shown = time.monotonic()
                    drawing = say("drawing", language, percent=_percent(update))
                    pictures = gr.skip() if update.images is preview else _captioned(update.images, update)
                    preview = update.images  # large models make few; the same one is not sent again
                    yield pictures, params.seed, drawing
        if update is None:
            yield gr.skip(), gr.skip(), say("stopped", language)
        else:
            at = say("stopped_at", language, percent=_percent(update), seed=params.seed)
            yield _captioned(update.images, update), params.seed, at

    def _checked(self, settings: dict[str, Any], language: str) -> tuple[Entry, GenerateParams]:
        """Model and request made of the page's or a caller's values; RefusedError where one is unusable."""
        given = {name: value for name, value in settings.items() if value is not None or name == "prompt"}
        try:
            entry = usable(self.shelf, given.pop("model", self.shelf.home), language)
            return entry, GenerateParams(**{**entry.defaults, **given})
        except ParamError as error:
            raise RefusedError(error.field, _explain(error, language)) from error
        except ShelfError as error:
            raise RefusedError("model", html.escape(str(error), quote=False)) from error

    def _accepted(self, settings: dict[str, Any], language: str) -> tuple[Entry, GenerateParams]:
        """The same, for events: a gr.Error that names the field."""
        try:
            return self._checked(settings, language)
        except RefusedError as error:
            log.info("refused a request: %s", error.__cause__)
            raise gr.Error(str(error), print_exception=False) from error


class RefusedError(ValueError):
    """A request that cannot be drawn; the message is for the page, `field` is the control that it stands beside."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


def _save(engine: DalleEngine, update: Update, params: GenerateParams, summary: str) -> Iterator[tuple]:
    """Show the pictures as PNG files, which gradio has copied to its cache by the time it asks for more."""
    with tempfile.TemporaryDirectory(prefix="dalle_demo-") as folder:
        stem = Path(folder, slug(params.prompt))
        paths = save_each(update.images, update.seeds, params.alone(), engine.origin, stem)
        yield _captioned(paths, update), params.seed, summary


def _summary(engine: DalleEngine, params: GenerateParams, seconds: float, language: str) -> str:
    n, key = params.drawn, "one" if params.drawn == 1 else "many"
    done = say(key, language, model=engine.name, n=n, seconds=seconds, each=seconds / n, seed=params.seed)
    notice = engine.left_out(params.prompt)
    return done if notice is None else f"{done} {say(notice.key, language, **vars(notice))}"


def _with_seed(settings: dict[str, Any], randomise: bool) -> dict[str, Any]:
    return settings | ({"seed": None} if randomise else {})


def _slider(spec: dataclasses.Field, t: gr.I18n, **shown: float) -> gr.Slider:
    low, step = spec.metadata["low"], spec.metadata["step"]
    return gr.Slider(low, step=step, label=t(spec.name), info=t(f"{spec.name}_help"), elem_id=spec.name, **shown)


def _seed(t: gr.I18n) -> tuple[gr.Number, gr.Checkbox]:
    seed = gr.Number(
        value=None, precision=0, label=t("seed"), info=t("seed_help"), placeholder=t("seed_placeholder"), elem_id="seed"
    )
    randomise = gr.Checkbox(True, label=t("randomise"), info=t("randomise_help"), elem_id="randomise")
    return seed, randomise


def _buttons(running: bool) -> tuple[gr.Button, gr.Button]:
    return gr.Button(visible=not running), gr.Button(visible=running)


def _captioned(pictures: list, update: Update) -> list[tuple]:
    captions = [f"seed {seed}" for seed in update.seeds]
    if update.scores is not None:
        captions = [f"{caption}, match {score:.2f}" for caption, score in zip(captions, update.scores, strict=True)]
    return list(zip(pictures, captions, strict=True))


def _percent(update: Update) -> int:
    return 100 * update.step // update.total


def _explain(error: ParamError, language: str) -> str:
    """Message with the label that the page shows, and the name that a caller of the API used where it differs."""
    shown = label(error.field, language)
    name = shown if shown.lower() == error.field else f"{shown} ({error.field})"
    return html.escape(f"{name}: {why(error, language)}", quote=False)
