"""prompt and settings -> pictures on the page: the Generate tab, whose sliders are made from GenerateParams."""

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
from dalle_demo.images import save_png, slug
from dalle_demo.ui.strings import EXAMPLES, say

FRAMES_PER_SECOND = 4  # of previews; each costs the page a tenth of a second that the drawing then waits for
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

    def __init__(self, engine: DalleEngine, i18n: gr.I18n):
        self.engine = engine
        self.runs = Runs()
        self._lay_out(i18n)
        self._wire()

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
                self.status = gr.Markdown(elem_id="status")
            with gr.Column(elem_id="settings"):
                self.controls = {"prompt": prompt} | self._settings(t)

    def _settings(self, t: gr.I18n) -> dict[str, gr.components.Component]:
        """One control per remaining field of GenerateParams, named after it."""
        controls = {}
        with gr.Accordion(t("settings"), elem_id="advanced"):
            for spec in dataclasses.fields(GenerateParams):
                if spec.name == "seed":
                    controls["seed"], self.randomise = _seed(t)
                elif spec.metadata:
                    controls[spec.name] = _slider(spec, self.engine.config.defaults.get(spec.name, spec.default), t)
        return controls

    def _wire(self) -> None:
        """Check the settings at once, then draw in the queue, then give the Generate button back."""
        buttons = [self.go, self.stop]
        hidden = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        starts = [self.go.click, self.controls["prompt"].submit, self.examples.load_input_event.then]
        for start in starts:
            begun = start(
                self.begin,
                [self.randomise],
                [*buttons, self.gallery, self.controls["seed"], self.status],
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
            drawn.success(self.finish, None, buttons, **hidden)
            drawn.failure(self.fail, None, [*buttons, self.status], **hidden)
        self.stop.click(self.press_stop, **hidden)

    def validate(self, randomise: bool, **settings: Any) -> list[dict]:
        """Verdict on each input of `begin`, shown by the page beside the control."""
        try:
            self._params(randomise, settings)
        except ParamError as error:
            log.info("refused a request: %s", error)
            return [gr.validate(name != error.field, _explain(error)) for name in ("randomise", *settings)]
        return [gr.validate(True, "") for _ in ("randomise", *settings)]

    def begin(self, request: gr.Request, randomise: bool, **settings: Any) -> tuple:
        """Show that a request is on its way."""
        params = self._checked(settings | ({"seed": None} if randomise else {}))
        self.runs.begin(request.session_hash)
        columns = gr.Gallery(columns=math.ceil(math.sqrt(params.n)))
        return *_buttons(running=True), columns, params.seed, say("waiting", _language(request))

    def generate(self, request: gr.Request, seed: int | None = None, **settings: Any) -> Iterator[tuple]:
        """Draw pictures for a prompt. Yields previews, at last PNG files that hold their settings.

        The settings are the fields of GenerateParams; `seed` is named only to tell the API that it may be left out.

        Returns:
            pictures with captions, the seed of the first one, and a sentence on the state of the run.
        """
        flag = self.runs.enter(request.session_hash)
        try:
            yield from self._draw(self._checked({"seed": seed, **settings}), flag, _language(request))
        finally:  # also when the tab is closed
            self.runs.leave(request.session_hash, flag)

    def finish(self, request: gr.Request) -> tuple:
        """Give the Generate button back, unless the next run has been asked for meanwhile."""
        return _buttons(running=request.session_hash in self.runs)

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

    def _draw(self, params: GenerateParams, stop: threading.Event, language: str) -> Iterator[tuple]:
        start, shown, update = time.monotonic(), 0.0, None
        yield gr.skip(), gr.skip(), say("starting", language)
        with closing(self.engine.generate(params, stop)) as updates:
            for update in updates:
                if update.final:
                    seconds = time.monotonic() - start
                    yield from self._save(update, params, self._summary(params, update.seeds[0], seconds, language))
                    return
                if time.monotonic() - shown >= 1 / FRAMES_PER_SECOND:
                    shown = time.monotonic()
                    drawing = say("drawing", language, percent=_percent(update))
                    yield _captioned(update.images, update), update.seeds[0], drawing
        if update is None:
            yield gr.skip(), gr.skip(), say("stopped", language)
        else:
            at = say("stopped_at", language, percent=_percent(update), seed=update.seeds[0])
            yield _captioned(update.images, update), update.seeds[0], at

    def _save(self, update: Update, params: GenerateParams, summary: str) -> Iterator[tuple]:
        """Show the pictures as PNG files, which gradio has copied to its cache by the time it asks for more."""
        with tempfile.TemporaryDirectory(prefix="dalle_demo-") as folder:
            paths = []
            for picture, seed in zip(update.images, update.seeds, strict=True):
                request = dataclasses.asdict(params) | {"n": 1, "seed": seed}
                path = Path(folder, f"{slug(params.prompt)}-{seed}.png")
                paths.append(save_png(picture, path, request, self.engine.origin))
            yield _captioned(paths, update), update.seeds[0], summary

    def _summary(self, params: GenerateParams, seed: int, seconds: float, language: str) -> str:
        key = "one" if params.n == 1 else "many"
        done = say(key, language, n=params.n, seconds=seconds, each=seconds / params.n, seed=seed)
        return " ".join(filter(None, [done, self.engine.left_out(params.prompt)]))

    def _params(self, randomise: bool, settings: dict[str, Any]) -> GenerateParams:
        return self.engine.params(**settings | ({"seed": None} if randomise else {}))

    def _checked(self, settings: dict[str, Any]) -> GenerateParams:
        """Request made of the page's or a caller's values; a gr.Error that names the field where one is unusable."""
        try:
            return self.engine.params(**settings)
        except ParamError as error:
            log.info("refused a request: %s", error)
            raise gr.Error(_explain(error), print_exception=False) from error


def _slider(spec: dataclasses.Field, value: float, t: gr.I18n) -> gr.Slider:
    low, high, step = (spec.metadata[key] for key in ("low", "high", "step"))
    return gr.Slider(low, high, value, step=step, label=t(spec.name), info=t(f"{spec.name}_help"), elem_id=spec.name)


def _seed(t: gr.I18n) -> tuple[gr.Number, gr.Checkbox]:
    seed = gr.Number(
        value=None, precision=0, label=t("seed"), info=t("seed_help"), placeholder=t("seed_placeholder"), elem_id="seed"
    )
    randomise = gr.Checkbox(True, label=t("randomise"), info=t("randomise_help"), elem_id="randomise")
    return seed, randomise


def _buttons(running: bool) -> tuple[gr.Button, gr.Button]:
    return gr.Button(visible=not running), gr.Button(visible=running)


def _captioned(pictures: list, update: Update) -> list[tuple]:
    return [(picture, f"seed {seed}") for picture, seed in zip(pictures, update.seeds, strict=True)]


def _percent(update: Update) -> int:
    return 100 * update.step // update.total


def _language(request: gr.Request) -> str:
    return request.headers.get("accept-language", "")


def _explain(error: ParamError) -> str:
    """Message with the label that the page shows, and the name that a caller of the API used where it differs."""
    spec = GenerateParams.__dataclass_fields__[error.field]
    label = spec.metadata.get("label", error.field.capitalize())
    name = label if label.lower() == error.field else f"{label} ({error.field})"
    return html.escape(f"{name}: {str(error).removeprefix(error.field + ': ')}", quote=False)
