"""shelf of models -> the whole page, and the options to launch it with."""

import logging
from typing import Any

import gradio as gr

from dalle_demo.shelf import Shelf
from dalle_demo.ui.generate import SLIDERS, GenerateTab
from dalle_demo.ui.strings import TITLE, translations
from dalle_demo.ui.theme import CSS, JS, theme
from dalle_demo.ui.train import TrainTab
from dalle_demo.ui.unclip import UnclipTab

HOUR = 3600  # seconds
log = logging.getLogger(__name__)


class Page(gr.Blocks):
    """Blocks that turn down a call with missing values in one sentence; gradio's own message logs the prompt."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        """Raise gr.Error unless there is a value for each input."""
        if len(inputs) < len(block_fn.inputs):
            log.info("refused a request: %d of %d values", len(inputs), len(block_fn.inputs))
            raise gr.Error(f"{block_fn.api_name} needs {len(block_fn.inputs)} values", print_exception=False)

    def get_api_info(self, *args: Any, **options: Any) -> Any:
        """Description of the API, where settings default to null: to the value of whichever model is asked for."""
        info = super().get_api_info(*args, **options)
        for endpoint in info["named_endpoints"].values():
            for parameter in endpoint["parameters"]:
                if parameter["parameter_name"] in SLIDERS:
                    parameter["parameter_default"] = None
        return info


def build(shelf: Shelf) -> tuple[gr.Blocks, dict[str, Any]]:
    """Page that draws with the models of a shelf, with a queue, and what its `launch` needs."""
    i18n = gr.I18n(**translations())
    with Page(title=TITLE, delete_cache=(HOUR, 23 * HOUR), analytics_enabled=False) as page:
        with gr.Column(elem_id="heading"):
            gr.Markdown(f"# {TITLE}")
            gr.Markdown(i18n("subtitle"))
        # Outside the tabs, which are not there before they are opened. Its `secret` is fixed, so that what the browser
        # keeps can be read after the server was started again.
        owner = gr.BrowserState("", storage_key="dalle_demo_owner", secret="dalle_demo")
        with gr.Tabs(selected="unclip" if shelf.unclip_given else "generate", elem_id="tabs") as tabs:
            with gr.Tab(i18n("tab_generate"), id="generate") as first:
                tab = GenerateTab(shelf, i18n, page)
            with gr.Tab(i18n("tab_unclip"), id="unclip") as second:
                unclip = UnclipTab(shelf, i18n, tab, tabs)
            with gr.Tab(i18n("tab_train"), id="train"):
                TrainTab(shelf, i18n, page, tab.models, unclip, tabs, owner)
        tab.models.footer.render()
        shown = {"outputs": tab.models.footer, "show_progress": "hidden", "api_visibility": "private", "queue": False}
        first.select(tab.models.named, [tab.models.chosen], **shown)
        gr.on([second.select, unclip.model.input], unclip.footer, [unclip.model], **shown)
        if shelf.unclip_given:
            tab.models.arrived.then(unclip.footer, [unclip.model], **shown)
        page.unload(tab.leave)
    page.queue(max_size=32)
    return page, {
        "i18n": i18n,
        "theme": theme(),
        "css": CSS,
        "js": JS,
        "footer_links": ["api", "settings"],
        "run_history": False,
        "max_file_size": "1gb",  # of an upload
        "enable_monitoring": False,
        "ssr_mode": False,  # its proxy would stand before our port and take long to start
    }
