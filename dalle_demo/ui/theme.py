"""() -> theme, style sheet and key bindings of the page; nothing of it is fetched from another host."""

import gradio as gr

# The three parts stand one below the other on a phone, in the order in which they are used, and the pictures beside
# the other two on anything wider, where four of them fit into the window's height.
CSS = """
.gradio-container { max-width: 1120px !important; margin: 0 auto !important; }
#heading { gap: 0; }
#heading h1 { font-size: 1.75rem; letter-spacing: -.02em; margin: .5rem 0 0; }
#heading p, #status p, #footer p { color: var(--body-text-color-subdued); }
#studio {
  display: grid; gap: 16px 20px;
  grid-template-areas: "compose result" "settings result"; grid-template-rows: auto 1fr;
  grid-template-columns: minmax(300px, 1fr) minmax(320px, min(60%, 100vh - 180px));
}
#compose { grid-area: compose; }
#result { grid-area: result; gap: 8px; }
#settings { grid-area: settings; }
#compose, #result, #settings { min-width: 0 !important; }
#gallery { aspect-ratio: 1; }
#gallery .grid-wrap { max-height: none; height: 100%; }
#gallery .caption-label { display: none; }
#settings input[type=range]::-webkit-slider-thumb { border: 1px solid var(--neutral-400); }
#advanced .block:has(.wrap .validation-error) { padding-top: 3.25rem; } /* gradio lays the message over the label */
#advanced .wrap .validation-error {
  left: 0; font-size: var(--text-sm); text-align: left;
  border: 1px solid var(--error-border-color); border-radius: var(--radius-sm);
}
#model input { padding-right: 1.75rem; text-overflow: ellipsis; } /* the arrow lies over it */
#offer {
  gap: 10px; padding: 12px 14px; border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg);
  background: var(--block-background-fill);
}
#offer_text, #offer_text div { padding: 0 !important; }
#offer p { margin: 0; font-variant-numeric: tabular-nums; }
#offer p.failed { color: var(--error-text-color); }
#offer progress {
  appearance: none; display: block; width: 100%; height: 8px; margin-top: 8px; overflow: hidden;
  border: 0; border-radius: 4px; background: var(--neutral-200);
}
#offer progress::-webkit-progress-bar { background: var(--neutral-200); }
#offer progress::-webkit-progress-value { background: var(--primary-600); }
#offer progress::-moz-progress-bar { background: var(--primary-600); }
#status { min-height: 1.75rem; }
#status p { font-variant-numeric: tabular-nums; }
footer { gap: 1rem; }
footer .divider { display: none; } /* on a phone gradio leaves out what it would part */
#footer p { text-align: center; font-size: .8rem; }
@media (max-width: 767px) {
  #studio { grid-template: "compose" "result" "settings" / 100%; }
  #gallery .grid-wrap { height: auto; }
  #status { order: -1; } /* above the pictures, in sight */
}
"""

# Ctrl+Enter draws from any field; the status line is announced by screen readers.
JS = """() => {
  document.addEventListener("keydown", (event) => {
    const go = document.querySelector("#go");
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter" && go?.closest("#studio").offsetParent) go.click();
  });
  document.querySelector("#status")?.setAttribute("role", "status");
}"""


def theme() -> gr.themes.Base:
    """Calm colours, plain labels and the reader's own system font."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    return gr.themes.Soft(primary_hue="emerald", neutral_hue="slate", **fonts).set(
        background_fill_primary="*neutral_50",  # Soft's own, which `set` would turn white
        checkbox_border_color="*neutral_400",
        input_border_color="*neutral_200",
        input_border_width="1px",
        # Text and buttons a shade darker than Soft's: at least 4.5 : 1 against what is behind them.
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        slider_color="*primary_600",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_label_text_color="*body_text_color_subdued",
    )
