"""controls -> pictures that follow them: the DALL-E 2 tab, whose grid is drawn anew while a slider moves.

A frame does not go through gradio's events but through a function of the server that the script below calls. It asks
for the next one when the last has come, with the values of that moment: so none is drawn for values that have moved on,
none overtakes another, and the last one always belongs to the last values. Two of gradio's events in quick succession
may come back in the wrong order, and each costs the browser more than the drawing.
"""

import html
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from dalle_demo.config import UNCLIP_PRESETS, ParamError, UnclipParams
from dalle_demo.engines import UnclipEngine
from dalle_demo.shelf import UNCLIP, Shelf, ShelfError
from dalle_demo.ui import frames
from dalle_demo.ui.frames import SECTIONS, SLIDERS, MissingError, Scene, Source, Sources, Values
from dalle_demo.ui.generate import GenerateTab
from dalle_demo.ui.models import language_of
from dalle_demo.ui.strings import STYLES, duration, footer, label, say, why

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
WARNING = QUIET | {"queue": True}  # of an event that may warn, which reaches the page through the queue alone
PREFIX = "unclip_"  # of the ids on the page, where other tabs have a prompt, too
FROM_WORDS = ("words", "walk")
PARAMS = ("truncation", "guidance_scale")  # sliders made from UnclipParams

NEW_SEED = "Math.floor(Math.random() * 2147483600)"  # which leaves room for the grid

# `draw` is the page's; `server.draw` and `server.save` are methods of the tab.
SCRIPT = """
const wall = element.appendChild(document.createElement("div"));
const line = element.appendChild(document.createElement("p"));
const blank = document.createElement("template");
blank.innerHTML = `<figure><button class="pick"><img></button><button class="save">⤓</button><figcaption></figcaption>
  </figure>`;
let wanted = null, last = "", shown = null;
wall.className = "wall";
wall.dataset.section = "words";
for (let i = 0; i < 4; i++) wall.append(blank.content.cloneNode(true));

const tell = (sentence, wrong) => {
  line.textContent = sentence;
  line.classList.toggle("failed", wrong);
  line.setAttribute("role", "alert");
  wall.classList.toggle("stale", wrong);  // else the sentence asks for something, perhaps for a click on a picture
};
const lost = () => tell(document.querySelector("#unclip_lost").textContent.trim(), true);

const show = (frame) => {
  shown = frame;
  wall.dataset.section = frame.values.section;
  wall.classList.remove("stale");
  line.textContent = frame.line;
  line.classList.remove("failed");
  line.removeAttribute("role");
  while (wall.children.length > frame.pictures.length) wall.lastElementChild.remove();
  while (wall.children.length < frame.pictures.length) wall.append(blank.content.cloneNode(true));
  frame.pictures.forEach(({url, title, caption}, i) => {
    const [pick, save, below] = wall.children[i].children;
    Object.assign(pick.firstChild, {src: url, alt: title});
    pick.title = frame.pick;
    save.title = save.ariaLabel = frame.save;
    below.textContent = caption;
  });
};

const ask = async () => {
  const now = wanted;
  wanted = null;
  return [await server.draw(now), now];
};

element.closest("#stage").draw = async (values) => {
  const text = JSON.stringify(values);
  if (text === last) return;
  [wanted, last] = [values, text];
  if (wall.ariaBusy === "true") return;
  wall.ariaBusy = "true";
  for (let coming = ask(); coming; ) {
    const [frame, now] = await coming;
    coming = wanted && ask();  // on its way while this one is shown
    if (!frame) { last = ""; lost(); }
    else if (frame.said) tell(frame.said, frame.wrong);
    else show({...frame, values: now});
  }
  wall.ariaBusy = "false";
};

element.addEventListener("click", async ({target}) => {
  const button = target.closest("button");
  if (!button || !shown) return;
  const index = [...wall.children].indexOf(button.parentElement), values = {...shown.values, index};
  if (button.className === "pick") return trigger("select", values);
  const file = shown.file ? {name: shown.file, url: shown.pictures[0].url} : await server.save(values);
  if (!file) return lost();
  if (file.said) return tell(file.said, file.wrong);
  Object.assign(document.createElement("a"), {href: file.url, download: file.name}).click();
});

trigger("submit");
"""


class UnclipTab:
    """Components and events of the tab; create it inside `gr.Blocks`."""

    def __init__(self, shelf: Shelf, t: gr.I18n, generate: GenerateTab, tabs: gr.Tabs):
        self.shelf = shelf
        self.sources = Sources()
        self.own: Callable[[gr.Request], list[str]] = lambda request: []  # names of the visitor's own models
        names = shelf.unclips()
        self.model = gr.Dropdown(
            names or [shelf.unclip_home],
            value=shelf.unclip_home,
            label=t("model"),
            visible=len(names) > 1,
            filterable=False,
            elem_id="unclip_model",
            render=False,
        )
        if not names:
            gr.Markdown(t("unclip_missing"), elem_id="unclip_missing")
            self.model.render()
            return
        self.controls: dict[str, gr.components.Component] = {"model": self.model}
        self.groups: list[tuple[Any, tuple[str, ...]]] = []
        self._lay_out(t)
        self._wire()
        self._wire_generate(generate, tabs)

    def _lay_out(self, t: gr.I18n) -> None:
        """Sections, pictures, controls: in the order of a phone's single column, where the pictures stay in sight."""
        with gr.Column(elem_id="unclip"):
            with gr.Column(elem_id="unclip_top"):
                gr.Markdown(t("unclip_intro"))
                sections = [(t(f"section_{name}"), name) for name in SECTIONS]
                self._add("section", gr.Radio(sections, value="words", label=t("section"), elem_id="unclip_section"))
            with gr.Column(elem_id="unclip_result"):
                self.stage = gr.HTML(
                    html_template="",
                    apply_default_css=False,
                    js_on_load=SCRIPT,
                    server_functions=[*self._server_functions()],
                    elem_id="stage",
                )
                gr.HTML(t("lost"), elem_id="unclip_lost")
            with gr.Column(elem_id="unclip_controls"):
                self.model.render()
                self._lay_out_words(t)
                self._lay_out_pictures(t)
                self._lay_out_noise(t)
            gr.Markdown(t("unclip_honest"), elem_id="unclip_honest")

    def _lay_out_words(self, t: gr.I18n) -> None:
        """Prompt and style, and the prior's and the generator's own settings."""
        with self._group(gr.Column(), *FROM_WORDS):
            self._box("prompt", t("prompt"), t("prompt_placeholder"))
            styles = [(t("style_any"), ""), *((t(f"style_{word}"), word) for word in STYLES)]
            style = gr.Dropdown(styles, value="", label=t("style"), filterable=False, elem_id="unclip_style")
            self._add("style", style)
            for name in PARAMS:
                self._param(name, t)
        with self._group(gr.Accordion(t("second_prompt"), open=False, elem_id="unclip_mix"), "words"):
            self._box("second", t("second"), t("second_placeholder"))
            self._slider("share", t("share"))
        with self._group(gr.Accordion(t("change"), open=False, elem_id="unclip_change"), "words"):
            self._lay_out_change("change", t)

    def _lay_out_pictures(self, t: gr.I18n) -> None:
        """Pictures to go on from, and what to do with them."""
        with self._group(gr.Row(), "variations", "blend", "edit"):
            self.uploads = {}
            for name in ("source", "other"):
                options = {"format": "png", "sources": ["upload", "clipboard"], "buttons": [], "height": 170}
                self.uploads[name] = gr.Image(
                    label=t(name), min_width=120, visible=name == "source", elem_id=PREFIX + name, **options
                )
                self._add(name, gr.Textbox(visible=False, elem_id=f"unclip_{name}_kept"))
        with self._group(gr.Column(), "blend"):
            self._slider("blend", t("blend"))
        with self._group(gr.Column(), "variations"):
            self._slider("distance", t("distance"), t("distance_help"))
        with self._group(gr.Column(), "edit"):
            self._lay_out_change("edit", t)

    def _lay_out_change(self, name: str, t: gr.I18n) -> None:
        """From which words to which, and how far."""
        with gr.Row():
            self._box(f"{name}_from", t(f"{name}_from"), t("from_placeholder"))
            self._box(f"{name}_to", t(f"{name}_to"), t("to_placeholder"))
        self._slider(f"{name}_strength", t(f"{name}_strength"), t("strength_of_change_help"))

    def _lay_out_noise(self, t: gr.I18n) -> None:
        """Seed, and the length of a walk."""
        with self._group(gr.Column(), "walk"):
            self._slider("frames", t("frames"), t("frames_help"))
        with self._group(gr.Row(), "words", "variations", "walk"):
            seed = gr.Number(
                1, precision=0, label=t("seed"), info=t("noise_help"), min_width=120, elem_id="unclip_seed"
            )
            self._add("seed", seed)
            self.dice = gr.Button(t("dice"), min_width=120, elem_id="unclip_dice")
        with self._group(gr.Column(), *FROM_WORDS):
            self.keep = gr.Checkbox(True, label=t("keep_noise"), info=t("keep_noise_help"), elem_id="unclip_keep")

    def _group(self, group: Any, *sections: str) -> Any:
        """Controls that are there in some sections only."""
        group.visible = "words" in sections
        self.groups.append((group, sections))
        return group

    def _add(self, name: str, control: gr.components.Component) -> None:
        self.controls[name] = control

    def _box(self, name: str, title: Any, placeholder: Any) -> None:
        box = gr.Textbox(
            label=title, placeholder=placeholder, lines=1, max_lines=3, min_width=120, elem_id=PREFIX + name
        )
        self._add(name, box)

    def _slider(self, name: str, title: Any, info: Any = None) -> None:
        low, high, step, value = SLIDERS[name]
        self._add(name, gr.Slider(low, high, value, step=step, label=title, info=info, elem_id=PREFIX + name))

    def _param(self, name: str, t: gr.I18n) -> None:
        """Slider of a field of UnclipParams; `open` brings the value that the model is served with."""
        spec = UnclipParams.__dataclass_fields__[name]
        info = t(f"{PREFIX}{name}_help" if name == "guidance_scale" else f"{name}_help")
        low, high, step = (spec.metadata[key] for key in ("low", "high", "step"))
        value = UNCLIP_PRESETS[UNCLIP].defaults.get(name, spec.default)
        slider = gr.Slider(low, high, value, step=step, label=t(name), info=info, elem_id=PREFIX + name)
        self._add(name, slider)

    def _wire(self) -> None:
        """Draw when a control changes; the script knows when to ask for it."""
        inputs = list(self.controls.values())
        draw = f"""(...given) => {{
          const names = {json.dumps(list(self.controls))};
          const values = Object.fromEntries(names.map((name, i) => [name, given[i]]));
          values.seed ??= window.unclipSeed ??= {NEW_SEED};
          document.querySelector("#stage")?.draw?.(values);
        }}"""
        self.draw = {"fn": None, "inputs": inputs, "outputs": None, "js": draw, "api_visibility": "private"}
        gr.on([control.change for control in inputs], **self.draw)
        brought = [self.controls[name] for name in ("prompt", *PARAMS)]
        opened = self.stage.submit(self.open, [self.controls["prompt"], self.model], brought, **QUIET)
        opened.then(**self.draw)
        section, seed = self.controls["section"], self.controls["seed"]
        groups = [group for group, _ in self.groups]
        section.change(self.show, [section], [*groups, self.uploads["other"]], **QUIET)
        self.dice.click(None, None, [seed], js=f"() => {NEW_SEED}", api_visibility="private")
        self.controls["prompt"].submit(
            None,
            [self.keep, seed],
            [seed],
            js=f"(keep, seed) => keep ? seed : {NEW_SEED}",
            api_visibility="private",
        )
        for name, upload in self.uploads.items():
            # As it was sent: what gradio's own reading says of a damaged file is no sentence.
            seen = upload.upload(
                self.see, [upload, self.model], [upload, self.controls[name]], preprocess=False, **WARNING
            )
            seen.then(**self.draw)
            upload.clear(lambda: "", None, [self.controls[name]], **QUIET).then(**self.draw)
        kept = [self.controls[name] for name in self.uploads]
        taken = [section, *self.uploads.values(), *kept]
        self.stage.select(self.take, [section, *kept], taken, **QUIET).then(**self.draw)

    def _wire_generate(self, generate: GenerateTab, tabs: gr.Tabs) -> None:
        """A way over from the pictures of the Generate tab."""
        section, upload, kept = self.controls["section"], self.uploads["source"], self.controls["source"]
        generate.gallery.select(self.choose, None, [generate.selected, generate.vary], **QUIET)
        generate.vary.click(
            self.come_over, [generate.gallery, generate.selected, self.model], [tabs, section, upload, kept], **WARNING
        ).then(**self.draw)

    def _server_functions(self) -> list[Callable]:
        """What the script may call; gradio marks functions, which methods do not allow."""

        def draw(values: Any, request: gr.Request) -> dict:
            return self._answer(self.frame, values, request)

        def save(values: Any, request: gr.Request) -> dict:
            return self._answer(self.file, values, request)

        return [draw, save]

    def _answer(self, make: Callable, given: Any, request: gr.Request) -> dict:
        """What `make` makes of values, or the sentence that says what is wrong with them."""
        language, values = language_of(request), Values.of(given, self.sources)
        try:
            return make(self.shelf.unclip(self._model_of(values)), values, language)
        except ParamError as error:
            reason = f"{label(error.field, language)}: {why(error, language)}"
            return {"said": say("bad_value", language, reason=reason), "wrong": True}
        except MissingError as error:
            return {"said": say(error.key, language), "wrong": False}
        except ShelfError as error:
            return {"said": self._not_loaded(self._model_of(values), error, language), "wrong": True}

    def frame(self, engine: UnclipEngine, values: Values, language: str) -> dict:
        """Pictures of the chosen section, and a line on them."""
        start, section = time.perf_counter(), values.given.get("section")
        scene = frames.scene_of(engine, values)
        pictures = scene.draw(engine)
        if section == "walk":
            urls = [frames.data_url(frames.animation(pictures), "webp")]
        else:
            urls = [frames.data_url(frames.jpeg(picture), "jpeg") for picture in pictures]
        line = _line(scene, values, time.perf_counter() - start, engine, language)
        titles = [request["prompt"] for request in scene.requests[: len(urls)]]
        captions = scene.captions or [""] * len(urls)
        answer = {
            "pictures": [
                {"url": url, "title": title, "caption": caption}
                for url, title, caption in zip(urls, titles, captions, strict=True)
            ],
            "line": line,
            "pick": say("pick", language),
            "save": say("save", language),
        }
        if section == "walk":
            answer["file"] = frames.file_name(scene.requests[0], "webp")
        return answer

    def file(self, engine: UnclipEngine, values: Values, language: str) -> dict:
        """One picture as PNG, with its settings."""
        scene = frames.scene_of(engine, values)
        index = _index(values, scene)
        data = frames.png(engine, scene, index)
        return {"name": frames.file_name(scene.requests[index], "png"), "url": frames.data_url(data, "png")}

    def offer(self, request: gr.Request, name: str) -> gr.Dropdown:
        """The visitor's models beside everybody's, to choose from where there are several; `name`, if there is such."""
        names = [*self.shelf.unclips(), *self.own(request)]
        choices = [(self.shelf.title(one), one) for one in names]
        value = name if name in names else self.shelf.unclip_home
        return gr.Dropdown(choices, value=value, visible=len(names) > 1)

    def footer(self, request: gr.Request, name: str) -> str:
        """The page's last line, of the model that draws here."""
        return footer(self.shelf.title(name), self.shelf.unclip_facts(name), language_of(request))

    def open(self, request: gr.Request, prompt: str, model: str) -> tuple:
        """Something to see when the tab is opened, and the settings that the model is served with."""
        prompt = prompt or say("unclip_first", language_of(request))
        try:
            params = self.shelf.unclip(model).params("picture")
        except ShelfError:  # which the frame says
            return prompt, *(gr.skip() for _ in PARAMS)
        return prompt, *(getattr(params, name) for name in PARAMS)

    def show(self, section: str) -> list:
        """Show the controls of a section."""
        groups = [gr.update(visible=section in sections) for _, sections in self.groups]
        return [*groups, gr.update(visible=section == "blend")]

    def see(self, request: gr.Request, upload: Any, model: str) -> tuple:
        """Keep what is seen in a picture that was chosen."""
        try:
            return gr.skip(), self._keep_file(request, _path_of(upload), model)
        except (ValueError, OSError) as error:
            self._warn(error, model, request)
            return None, ""

    def take(self, request: gr.Request, event: gr.EventData, section: str, source: str, other: str) -> tuple:
        """Go on in a section from a picture that was clicked, with exactly what it was drawn from.

        It takes the place of the picture that is there, except where a blend has one and lacks the second.

        Returns:
            section, and what is in the two places, as pictures and as names.
        """
        values = Values.of(event._data, self.sources)
        try:
            engine = self.shelf.unclip(self._model_of(values))
            scene = frames.scene_of(engine, values)
            index = _index(values, scene)
        except (ParamError, MissingError, ShelfError):  # the next frame says so, too
            return tuple(gr.skip() for _ in range(5))
        kept = self.sources.keep(request.session_hash, Source(scene.seen[index], scene.requests[index]["prompt"]))
        (picture,) = scene.draw(engine, [index])
        if section == "blend" and source and not other:
            return section, gr.skip(), picture, gr.skip(), kept
        return "variations" if section in FROM_WORDS else section, picture, gr.skip(), kept, gr.skip()

    def choose(self, event: gr.SelectData) -> tuple:
        """Offer variations of a picture of the Generate tab that is looked at."""
        return event.index, gr.Button(visible=True)

    def come_over(self, request: gr.Request, pictures: list | None, index: int, model: str) -> tuple:
        """Bring a picture of the Generate tab, which this model sees as any that is uploaded."""
        try:
            path = Path((pictures or [])[index][0])
            return gr.Tabs(selected="unclip"), "variations", str(path), self._keep_file(request, path, model)
        except IndexError:  # of a grid that is drawn anew
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        except (ValueError, OSError) as error:
            self._warn(error, model, request)
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()

    def _keep_file(self, request: gr.Request, path: Path, model: str) -> str:
        """Name of what is seen in a picture; raises ValueError where it cannot be used."""
        from dalle_demo.data.uploads import decode  # the trainer's, which the page starts without

        picture, _ = decode(path.read_bytes())
        return self.sources.keep(request.session_hash, Source(self.shelf.unclip(model).invert(picture), path.stem))

    def _warn(self, error: Exception, model: str, request: gr.Request) -> None:
        """Say why a picture is not used."""
        from dalle_demo.data.archives import UnusableError  # as above

        language = language_of(request)
        if isinstance(error, UnusableError):
            sentence = say(f"unusable_{error.kind}", language, **error.values)
        elif isinstance(error, ShelfError):
            sentence = self._not_loaded(model, error, language)
        else:  # its file is gone
            sentence = say("picture_gone", language)
        gr.Warning(html.escape(sentence, quote=False))

    def _not_loaded(self, model: str, error: ShelfError, language: str) -> str:
        """Why a model does not draw, without a name that was guessed."""
        if not self.shelf.is_unclip(model):
            return say("model_gone", language)
        return say("load_failed", language, model=self.shelf.title(model), reason=error)

    def _model_of(self, values: Values) -> str:
        """Name of the model to draw with, which the page may lack."""
        return str(values.given.get("model") or self.shelf.unclip_home)


def _path_of(upload: Any) -> Path:
    """File of an upload; raises MissingError unless it is where gradio keeps them."""
    path = Path(str(upload.get("path"))).resolve() if isinstance(upload, dict) else Path()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()):
        raise MissingError("picture_gone")
    return path


def _index(values: Values, scene: Scene) -> int:
    """Number of the picture that was clicked."""
    index = values.given.get("index")
    if not isinstance(index, int) or not 0 <= index < len(scene.seen):
        raise MissingError("picture_gone")
    return index


def _line(scene: Scene, values: Values, seconds: float, engine: UnclipEngine, language: str) -> str:
    """What was drawn, how fast, and what of the words was not read."""
    section, seeds = values.given["section"], [request.get("seed") for request in scene.requests]
    milliseconds = say("milliseconds", language, n=1000 * seconds)
    facts = {
        "model": engine.name,
        "n": len(scene.seen),
        "time": milliseconds if seconds < 1 else duration(seconds, language),
        "first": seeds[0],
        "last": seeds[-1],
    }
    notices = [notice for notice in map(engine.left_out, scene.texts) if notice]
    told = [say(notice.key, language, **vars(notice)) for notice in notices[:1]]
    return " ".join([say(f"drawn_{section}", language, **facts), *told])
