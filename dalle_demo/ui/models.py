"""model name -> its own settings on the page, or an offer to download it: the choice of a model."""

import dataclasses
import html
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

import gradio as gr

from dalle_demo.config import GenerateParams
from dalle_demo.hub import HubError
from dalle_demo.shelf import Entry, Shelf, ShelfError
from dalle_demo.ui.strings import duration, footer, megabytes, say

log = logging.getLogger(__name__)


class ModelChoice:
    """Dropdown, the panel below it, and the page's last line; create it inside `gr.Blocks`, then `wire` it.

    The dropdown always shows the model that would draw: choosing one that is not here opens the panel and leaves the
    dropdown as it was, until the download is over.
    """

    def __init__(self, shelf: Shelf, t: gr.I18n):
        self.shelf = shelf
        self.own: Callable[[gr.Request], list[str]] = lambda request: []  # names of the visitor's own models
        self.training: Callable[[], bool] = lambda: False  # whether one takes its share of the processor
        self._cancels: dict[str, threading.Event] = {}  # of the download that each browser session waits for
        self.chosen, self.offered = gr.State(shelf.home), gr.State("")
        names = shelf.names()
        self.model = gr.Dropdown(
            names,  # `arrive` says more: what must be estimated would keep the server from starting
            value=None,  # `arrive` sets it: a line that stands there already would not be translated
            label=t("model"),
            info=t("model_help"),
            visible=len(names) > 1,
            filterable=False,
            elem_id="model",
        )
        self.notice = gr.Markdown(visible=False, elem_id="notice")
        with gr.Column(visible=False, elem_id="offer") as self.panel:
            self.text = gr.HTML(elem_id="offer_text")
            with gr.Row():
                self.download = gr.Button(t("download"), variant="primary", size="sm", elem_id="download")
                self.dismiss = gr.Button(t("not_now"), size="sm", elem_id="dismiss")
                self.cancel = gr.Button(t("cancel"), variant="stop", size="sm", elem_id="cancel")
        self.footer = gr.Markdown(self._footer(shelf.home, "en"), elem_id="footer", render=False)

    def wire(self, page: gr.Blocks, sliders: dict[str, gr.components.Component]) -> None:
        """Connect the events; `sliders` are the controls of GenerateParams that follow the model."""
        self.sliders = sliders
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        panel = [self.panel, self.text, self.download, self.dismiss, self.cancel]
        self.shown = shown = [self.model, self.chosen, self.offered, self.footer, *panel, *sliders.values()]
        self.model.input(self.choose, [self.model, self.chosen], shown, **quiet)  # gr.Info needs the queue
        self.download.click(
            self.fetch,
            [self.offered],
            shown,
            concurrency_limit=8,  # visitors that wait for a download, not downloads: the shelf makes one at a time
            concurrency_id="download",
            **quiet,
        )
        self.dismiss.click(lambda: gr.Column(visible=False), None, self.panel, queue=False, **quiet)
        self.cancel.click(self.press_cancel, None, None, queue=False, **quiet)
        told = [self.model, self.footer, self.notice]
        self.arrived = page.load(self.arrive, [self.chosen], told, queue=False, **quiet)
        page.unload(self.press_cancel)

    def arrive(self, request: gr.Request, chosen: str) -> tuple:
        """Say what is here in the visitor's language."""
        language = language_of(request)
        choices = self.choices(request)
        model = gr.Dropdown(choices, value=chosen, visible=len(choices) > 1)
        return model, self._footer(chosen, language), self.noticed(request)

    def choose(self, request: gr.Request, wanted: str, chosen: str) -> dict:
        """Select a model that is here, with its own settings; offer one that is not."""
        language, entry = language_of(request), self.shelf.find(wanted)
        former = {self.model: gr.Dropdown(value=chosen)}
        if entry is None:  # of a page that is older than the server
            return former
        if request.session_hash in self._cancels and not entry.here:
            gr.Info(say("busy", language))
            return former
        if not entry.fits:
            refusal = too_big(entry, language) + say("instead", language, model=self.shelf.title(chosen))
            return former | self._panel(refusal, dismiss=say("close", language))
        if entry.here:
            return self.select(request, entry)
        offer = say("offer", language, **facts(entry, language))
        if self.shelf.fetching() == entry.name:
            offer += say("under_way", language)
        offer += say("meanwhile", language, model=self.shelf.title(chosen))
        return former | {self.offered: wanted} | self._panel(offer, download=True, dismiss=say("not_now", language))

    def fetch(self, request: gr.Request, name: str) -> Iterator[dict]:
        """Download a model and select it; yields the state of the download."""
        language, cancel = language_of(request), threading.Event()
        self._cancels[request.session_hash] = cancel
        start, first = time.monotonic(), None
        try:
            yield self._panel(say("connecting", language, model=name), progress=(0, 0), cancel=True)
            with closing(self.shelf.fetch(name, cancel)) as states:
                for done, total in states:
                    first = done if first is None and total else first  # what an earlier download has left here
                    pace = (done - first) / (time.monotonic() - start) if first is not None else 0
                    text = _state(name, done, total, pace, language)
                    yield self._panel(text, progress=(done, total), cancel=True)
            if cancel.is_set():
                yield {self.panel: gr.Column(visible=False)}
            else:
                yield self.select(request, self.shelf.find(name))
        except (ValueError, OSError) as error:
            log.warning("download of %s: %s", name, error.__cause__ or error)
            text = say("download_failed", language, model=name, reason=reason(error, language))
            yield self._panel(text, download=True, dismiss=say("close", language), failed=True)
        finally:  # also when the tab is closed
            self._cancels.pop(request.session_hash, None)

    def press_cancel(self, request: gr.Request) -> None:
        """End this session's wait for a download."""
        if cancel := self._cancels.get(request.session_hash):
            cancel.set()

    def described(self, request: gr.Request, model: str) -> tuple[str, gr.Markdown]:
        """Page's last line, once more is known of a model, and whether anything slows it down."""
        return self.named(request, model), self.noticed(request)

    def named(self, request: gr.Request, model: str) -> str:
        """Page's last line."""
        return self._footer(model, language_of(request))

    def noticed(self, request: gr.Request) -> gr.Markdown:
        """Why drawing takes longer than it says."""
        return gr.Markdown(say("while_training", language_of(request)), visible=self.training())

    def select(self, request: gr.Request, entry: Entry) -> dict:
        """Show a model that is here, with its own settings."""
        language = language_of(request)
        specs = [spec for spec in dataclasses.fields(GenerateParams) if spec.name in self.sliders]
        shown = {spec.name: value_and_top(spec, entry.defaults, entry.codes) for spec in specs}
        return {
            self.model: gr.Dropdown(self.choices(request), value=entry.name, visible=True),
            self.chosen: entry.name,
            self.footer: self._footer(entry.name, language),
            self.panel: gr.Column(visible=False),
        } | {self.sliders[name]: gr.Slider(**values) for name, values in shown.items()}

    def _panel(
        self,
        text: str,
        progress: tuple[int, int] | None = None,
        download: bool = False,
        dismiss: str = "",
        cancel: bool = False,
        failed: bool = False,
    ) -> dict:
        """Updates that show the panel with a text, a bar and the buttons named."""
        kind = ' class="failed" role="alert"' if failed else ""
        bar = "" if progress is None else _bar(*progress)
        return {
            self.panel: gr.Column(visible=True),
            self.text: f"<p{kind}>{html.escape(text, quote=False)}</p>{bar}",
            self.download: gr.Button(visible=download),
            self.dismiss: gr.Button(dismiss, visible=bool(dismiss)),
            self.cancel: gr.Button(visible=cancel),
        }

    def choices(self, request: gr.Request) -> list[tuple[str, str]]:
        """Models that the visitor can choose from, and the line of each."""
        language, own = language_of(request), filter(None, map(self.shelf.find, self.own(request)))
        public = [(_label(entry, language), entry.name) for entry in self.shelf.models()]
        return public + [(_label(entry, language, own=True), entry.name) for entry in own]

    def _footer(self, model: str, language: str) -> str:
        return footer(self.shelf.title(model), self.shelf.facts(model), language)


def language_of(request: gr.Request) -> str:
    """Languages that a visitor's browser asks for."""
    return request.headers.get("accept-language", "")


def usable(shelf: Shelf, name: Any, language: str) -> Entry:
    """Entry of a model that a request may draw with; a ShelfError in the visitor's language otherwise."""
    entry = shelf.find(name)
    if entry is None:
        names = ", ".join(shelf.names())
        raise ShelfError(say("model_unknown", language, model=str(name)[:40], names=names))
    if not entry.here:
        command = f"python -m dalle_demo weights pull {name}"
        raise ShelfError(say("model_missing", language, model=name, command=command))
    if not entry.fits:
        raise ShelfError(too_big(entry, language))
    return entry


def value_and_top(spec: dataclasses.Field, defaults: Mapping[str, float], codes: int) -> dict[str, float]:
    """What a slider shows for a model of these defaults and as many codes, beyond which top-k chooses no more."""
    top = min(spec.metadata["high"], codes) if spec.name == "top_k" else spec.metadata["high"]
    return {"value": defaults.get(spec.name, spec.default), "maximum": top}


def reason(error: Exception, language: str) -> str:
    """Why a download failed: what often happens in the visitor's language, and with the page's own advice."""
    cause = error.__cause__
    if isinstance(cause, HubError) and cause.reason:
        return say(cause.reason, language, **cause.values)
    return str(error)


def too_big(entry: Entry, language: str) -> str:
    """Sentence on a model for which there is no memory."""
    return say("too_big", language, **facts(entry, language))


def facts(entry: Entry, language: str) -> dict[str, str]:
    """What sentences say of a model."""
    named = entry.licence and not entry.licence.startswith("see")
    return {
        "model": entry.title,
        "size": megabytes(entry.size),
        "memory": megabytes(entry.memory),
        "room": megabytes(entry.room or 0),
        "seconds": duration(entry.seconds, language),
        "licence": entry.licence if named else say("licence_in_card", language),
    }


def _label(entry: Entry, language: str, own: bool = False) -> str:
    """Line of the dropdown; the visitor's own models have no licence yet."""
    if not entry.fits:
        return say("label_too_big", language, **facts(entry, language))
    if own:
        return say("label_own", language, **facts(entry, language))
    return say("label_here" if entry.here else "label_away", language, **facts(entry, language))


def _state(name: str, done: int, total: int, pace: float, language: str) -> str:
    """Sentence on a download of so many bytes a second."""
    if not total:
        return say("connecting", language, model=name)
    if done >= total:
        return say("converting", language, model=name)
    amounts = {"model": name, "done": megabytes(done), "total": megabytes(total), "percent": 100 * done // total}
    if not pace:
        return say("downloading", language, **amounts)
    return say("downloading_left", language, left=duration((total - done) / pace, language), **amounts)


def _bar(done: int, total: int) -> str:
    """Progress bar, empty while there is nothing to count."""
    return f'<progress value="{done}" max="{total or 1}"></progress>'
