"""() -> theme, style sheet and key bindings of the page; nothing of it is fetched from another host."""

import gradio as gr

# The three parts stand one below the other on a phone, in the order in which they are used, and the pictures beside
# the other two on anything wider, where four of them fit into the window's height.
CSS = """
.gradio-container { width: 100% !important; max-width: 1120px !important; margin: 0 auto !important; }
.gradio-container { overflow: clip !important; } /* hidden, nothing in it could stay in sight */
#heading { gap: 0; }
#heading h1 { font-size: 1.75rem; letter-spacing: -.02em; margin: .5rem 0 0; }
#heading p, #status p, #notice p, #footer p { color: var(--body-text-color-subdued); }
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
#notice p { margin: 0; font-size: .85rem; }
#status p { font-variant-numeric: tabular-nums; }
[data-testid=status-tracker].hide { display: none; } /* else screen readers say the seconds of each event */
footer { gap: 1rem; }
footer .divider { display: none; } /* on a phone gradio leaves out what it would part */
#footer p { text-align: center; font-size: .8rem; }
#train, #draft, #prepared, #run, #after { gap: 14px; min-width: 0 !important; }
#trainings_row { align-items: end; }
#trainings_row button, #delete_row button { flex: 0 0 auto; }
#delete_row { justify-content: flex-end; }
#consent { padding-block: 10px; }
#draft:has(.card) #upload, #draft:has(.card) #upload button { height: 64px !important; } /* it has been used */
#draft:has(.card) #upload label { display: none; }
#draft:has(.card) #upload .wrap { flex-direction: row; gap: 8px; min-height: 0; padding: 0; }
#draft:has(.card) #upload .icon-wrap { width: 20px; margin: 0; }
#report:not(:has(p)), #words:not(:has(p)) { display: none; }
#words p { margin: 0; }
#train p { margin: 0 0 .4rem; }
#train details { margin: .2rem 0; }
#train details ul { margin: .2rem 0 .4rem; padding-left: 1.4rem; list-style: disc; overflow-wrap: anywhere; }
#report, #captions, #words, #train_status, #reconstruction, #previews { padding: 0 !important; }
#report p.failed, #train_status p.failed { color: var(--error-text-color); }
.cards {
  display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(148px, 1fr));
  max-height: 560px; overflow-y: auto; padding: 2px;
}
.card {
  display: flex; flex-direction: column; overflow: hidden;
  border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); background: white;
}
.card.bare { border-color: var(--primary-600); border-style: dashed; }
.card img { width: 100%; height: 132px; padding: 8px; object-fit: contain; }
.card textarea {
  width: 100%; flex: 1; padding: 6px 8px; border: 0; border-top: 1px solid var(--border-color-primary);
  font: inherit; font-size: .8rem; line-height: 1.35; resize: vertical;
  color: var(--body-text-color); background: var(--input-background-fill);
}
.card textarea:focus { outline: 2px solid var(--primary-600); outline-offset: -2px; }
#train_status progress {
  appearance: none; display: block; width: 100%; height: 8px; margin: .5rem 0; overflow: hidden;
  border: 0; border-radius: 4px; background: var(--neutral-200);
}
#train_status progress::-webkit-progress-bar { background: var(--neutral-200); }
#train_status progress::-webkit-progress-value { background: var(--primary-600); }
#train_status progress::-moz-progress-bar { background: var(--primary-600); }
#train_status .figures { color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
#train_buttons button { flex: 0 1 auto; min-width: 110px; }
#reconstruction figure { margin: 0; }
#reconstruction figcaption { margin-top: 4px; color: var(--body-text-color-subdued); font-size: .85rem; }
#reconstruction .pairs { display: flex; flex-wrap: wrap; gap: 4px; }
#reconstruction img { height: 200px; }
#previews section { margin: 0 0 1rem; }
#previews .pairs { display: flex; flex-wrap: wrap; gap: 10px; }
#previews .pair { position: relative; width: 112px; }
#previews .pair img { width: 112px; height: 112px; border-radius: var(--radius-md); object-fit: contain; }
#previews .pair .nearest { width: 56px; height: 56px; margin: 4px auto 0; opacity: .85; }
#previews .copy {
  position: absolute; top: 4px; left: 4px; padding: 0 6px; border-radius: var(--radius-sm); font-size: .75rem;
  color: white; background: var(--neutral-700);
}
#previews .strip { display: flex; flex-wrap: wrap; gap: 6px; margin-top: 6px; }
#previews .strip figure { width: 64px; margin: 0; text-align: center; }
#previews .strip img { width: 56px; height: 56px; margin: 0 auto; }
#previews .strip figcaption { color: var(--body-text-color-subdued); font-size: .7rem; }
#compare { gap: 12px; }
#compare .heading p { font-weight: 600; }
#before .caption-label, #tuned .caption-label { display: none; }
#unclip {
  display: grid; gap: 12px 20px;
  grid-template-areas: "top top" "controls result" "honest honest"; grid-template-rows: auto 1fr auto;
  grid-template-columns: minmax(300px, 1fr) minmax(320px, min(56%, 100vh - 220px));
}
#unclip_top { grid-area: top; gap: 8px; }
#unclip_controls { grid-area: controls; }
#unclip_controls > * { flex-grow: 0 !important; }
#unclip_dice { align-self: end; }
#unclip_result { grid-area: result; position: sticky; top: 8px; align-self: start; gap: 0; }
#unclip_honest { grid-area: honest; }
#unclip_top, #unclip_controls, #unclip_result { min-width: 0 !important; }
#unclip_intro p, #unclip_honest p, #stage p { color: var(--body-text-color-subdued); }
#unclip_honest p { font-size: .85rem; }
#unclip_lost { display: none; }
#unclip .icon-wrap { display: none; } /* of an empty picture: its label would lie on it */
#stage .html-container { padding: 0 !important; }
#stage p { min-height: 1.5rem; margin: 8px 0 0; font-variant-numeric: tabular-nums; }
#stage p.failed { color: var(--error-text-color); }
.wall { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; align-items: center; }
.wall[data-section=variations] { grid-template-columns: repeat(4, 1fr); gap: 6px; }
.wall[data-section=blend] { grid-template-columns: 1fr 2fr 1fr; }
.wall[data-section=edit] { grid-template-columns: 1fr 2fr; }
.wall[data-section=walk] { grid-template-columns: 1fr; }
.wall.stale { opacity: .45; }
.wall figure { position: relative; margin: 0; }
.wall .pick {
  display: block; width: 100%; padding: 0; aspect-ratio: 1; overflow: hidden; cursor: pointer;
  border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); background: var(--neutral-100);
}
.wall .pick:hover, .wall .pick:focus-visible { outline: 2px solid var(--primary-600); }
.wall img { display: block; width: 100%; height: 100%; margin: 0; border-radius: 0; }
.wall img:not([src]) { visibility: hidden; }
.wall .save {
  position: absolute; top: 6px; right: 6px; width: 28px; height: 28px; padding: 0; border: 0; border-radius: 50%;
  line-height: 1; color: white; background: rgb(30 41 59 / .45); cursor: pointer;
}
.wall .save:hover, .wall .save:focus-visible { background: rgb(30 41 59 / .9); }
.wall[data-section=variations] .save { width: 24px; height: 24px; font-size: .75rem; }
.wall figure:has(img:not([src])) .save { display: none; }
.wall figcaption { font-size: .75rem; text-align: center; color: var(--body-text-color-subdued); }
@media (max-width: 767px) {
  #reconstruction img { height: 120px; }
  #previews .pairs { gap: 6px; }
  #previews .pair, #previews .pair img { width: 70px; }
  #previews .pair > img:first-child { height: 70px; }
  #studio { grid-template: "compose" "result" "settings" / 100%; }
  #gallery .grid-wrap { height: auto; }
  #status { order: -1; } /* above the pictures, in sight */
  #unclip { display: flex; } /* in a grid of one column the pictures could not stay in sight */
  /* above gradio's labels, which have 40 */
  #unclip_result { top: 0; z-index: 50; width: 100%; padding-bottom: 6px; background: var(--body-background-fill); }
  .wall { max-width: 46vh; margin: 0 auto; } /* the slider below stays in sight */
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
