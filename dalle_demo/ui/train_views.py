"""what a job has in its folder -> the HTML that the Train tab shows of it; pictures are in it as data."""

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dalle_demo.ui.strings import duration, say

CARDS = 200  # captions on the page
WORDS = 12  # unknown ones that are named
THUMBNAIL = 160  # pixels
GAP = 2  # pixels between the pictures of a sheet that `images.grid` has laid out

# A caption is saved a moment after the last key, and at once when its box is left.
SAVE_CAPTIONS = """
const waiting = new Map();
const save = (box) => {
  clearTimeout(waiting.get(box));
  waiting.delete(box);
  box.closest(".card").classList.toggle("bare", !box.value.trim());
  trigger("input", {file: box.dataset.file, caption: box.value});
};
element.addEventListener("input", ({target}) => {
  clearTimeout(waiting.get(target));
  waiting.set(target, setTimeout(save, 400, target));
});
element.addEventListener("focusout", ({target}) => waiting.has(target) && save(target));
"""


def report_of(report: Any, split: tuple[int, int], language: str) -> str:
    """What was found in an upload and what becomes of it."""
    training, held_out = split
    found = say("report", language, layout=report.layout, found=report.found, used=report.used)
    sides = say("split" if held_out else "split_none", language, training=training, held_out=held_out)
    skipped = [f"{one.name} {one.reason}" for one in report.skipped]
    return (
        f"<p>{_text(found)}</p><p>{_text(sides)}</p>"
        + _folded(say("report_warnings", language, count=len(report.warnings)), report.warnings, opened=True)
        + _folded(say("report_skipped", language, count=len(skipped)), skipped, opened=len(skipped) <= 5)
    )


def words_of(words: Sequence[str], model: str, language: str) -> str:
    """What to know of words that a model does not know."""
    if not words:
        return ""
    named = ", ".join(words[:WORDS]) + (" …" if len(words) > WORDS else "")
    return f"<p>{_text(say('unknown_words', language, model=model, words=named))}</p>"


def cards_of(folder: Path, examples: Sequence[Any], language: str) -> str:
    """Pictures, each with its caption to be edited."""
    cards = []
    for example in examples[:CARDS]:
        name, bare = _text(say("caption_of", language, name=example.name)), "" if example.caption else " bare"
        cards.append(
            f'<div class="card{bare}"><img src="{_thumbnail(folder / example.file)}" alt="">'
            f'<textarea rows="2" maxlength="1000" aria-label="{name}" title="{_text(example.name)}" '
            f'placeholder="{_text(say("no_caption", language))}" data-file="{_text(example.file)}">'
            f"{_text(example.caption)}</textarea></div>"
        )
    more = say("more_cards", language, shown=CARDS, count=len(examples)) if len(examples) > CARDS else ""
    return f'<div class="cards">{"".join(cards)}</div><p>{more}</p>'


def progress_of(state: Any, pace: float | None, expected: float | None, has_weights: bool, language: str) -> str:
    """How far a job is, and how it goes, in words; `expected` are the seconds that it was thought to take in all."""
    key = f"state_{state.state}"
    if state.state == "waiting" and not state.ahead:
        key = "state_waiting_next"
    if state.state == "stopped" and not has_weights:
        key = "state_stopped_empty"
    reason = say(state.message, language) if state.message in ("killed", "not_started") else state.message
    line = say(key, language, ahead=state.ahead, reason=reason)
    figures, done, total = [], state.step, state.steps
    if state.doing:
        doing, counts = state.doing
        line, done, total = say(f"doing_{doing}", language, **counts), counts["done"], counts["total"] or 1
    if state.state in ("waiting", "preparing"):
        if expected:
            figures.append(say("progress_expected", language, time=duration(expected, language)))
    elif state.steps:
        figures.append(say("progress", language, step=state.step, steps=state.steps))
    if state.state == "running":
        if pace:
            figures.append(say("progress_pace", language, pace=f"{pace:.1f}"))
        if state.seconds_left:
            figures.append(say("progress_left", language, time=duration(state.seconds_left, language)))
    bar = f'<progress value="{done}" max="{total}"></progress>' if total and state.state != "waiting" else ""
    alert = ' class="failed" role="alert"' if state.state == "failed" else ""
    notice, values = state.notice
    going = say(f"watch_{notice}", language, **values) if state.step else ""
    shown = [f"<p{alert}>{_text(line)}</p>", bar, f'<p class="figures">{_text(" · ".join(figures))}</p>']
    return "".join([*shown, f'<p class="watch">{_text(going)}</p>'])


def reconstruction_of(path: Path, language: str) -> str:
    """Originals above what the image decoder makes of them; empty until it is there."""
    if not path.exists():
        return ""
    with Image.open(path) as sheet:
        height, side = sheet.height, (sheet.height - GAP) // 2
        columns = [_data(sheet.crop((x, 0, x + side, height))) for x in range(0, sheet.width, side + GAP)]
    pairs = "".join(f'<img src="{column}" alt="">' for column in columns)
    caption = _text(say("reconstruction", language))
    return f'<figure><div class="pairs">{pairs}</div><figcaption>{caption}</figcaption></figure>'


def previews_of(data: Path, previews: Sequence[Mapping[str, Any]], language: str) -> str:
    """Pictures of the last checkpoint beside the nearest training ones, then the first picture of each checkpoint."""
    if not previews:
        return ""
    last = previews[-1]
    tiles = [_cut(preview) for preview in previews]
    parts = [f"<p>{_text(say('previews_at', language, step=last['step']))}</p>"]
    for number, row in enumerate(last["rows"]):
        drawn = tiles[-1][number]
        heading = f"<b>{_text(say('row_' + row['kind'], language))}</b> {_text(row['prompt'])}"
        pairs = []
        for picture, facts in zip(drawn, row["pictures"], strict=True):
            copy = f'<span class="copy">{_text(say("is_copy", language))}</span>' if facts["copy"] else ""
            nearest = f'<img class="nearest" src="{_thumbnail(data / facts["nearest"], 96)}" alt="">'
            pairs.append(f'<div class="pair"><img src="{_data(picture)}" alt="">{nearest}{copy}</div>')
        strip = []
        for preview, tile in zip(previews, tiles, strict=True):
            step = _text(say("at_step", language, step=preview["step"]))
            small = _data(_smaller(tile[number][0], 96))
            strip.append(f'<figure><img src="{small}" alt=""><figcaption>{step}</figcaption></figure>')
        parts.append(
            f'<section><p>{heading}</p><div class="pairs">{"".join(pairs)}</div>'
            f'<div class="strip">{"".join(strip)}</div></section>'
        )
    return "".join(parts)


def losses(lines: Iterable[Mapping[str, float]], smooth: Any, raw: bool, logarithmic: bool, language: str) -> dict:
    """Columns of the plot, for which pandas makes a table."""
    lines = list(lines)
    # Of tokens alone where there is more, as the loss of held-out pictures is
    trained = [(line["step"], line.get("token_loss", line["loss"])) for line in lines if "loss" in line]
    averages = zip([step for step, _ in trained], smooth([loss for _, loss in trained]), strict=True)
    series = {"series_training": list(averages)}
    series["series_validation"] = [
        (line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line
    ]
    if raw:
        series["series_training_raw"] = trained
    scale = math.log10 if logarithmic else float
    points = [
        (step, scale(loss), say(name, language)) for name, pairs in series.items() for step, loss in pairs if loss > 0
    ]
    return {name: [point[i] for point in points] for i, name in enumerate(("step", "loss", "series"))}


def _cut(preview: Mapping[str, Any]) -> list[list[Image.Image]]:
    """Rows of pictures of a sheet that `images.grid` has laid out."""
    columns, rows = preview["columns"], len(preview["rows"])
    with Image.open(preview["path"]) as sheet:
        width, height = (sheet.width + GAP) // columns, (sheet.height + GAP) // rows
        corners = [[(x * width, y * height) for x in range(columns)] for y in range(rows)]
        return [[sheet.crop((x, y, x + width - GAP, y + height - GAP)) for x, y in row] for row in corners]


def _thumbnail(path: Path, side: int = THUMBNAIL) -> str:
    with Image.open(path) as picture:
        small = _smaller(picture.convert("RGBA"), side)
    canvas = Image.new("RGBA", small.size, "white")
    canvas.alpha_composite(small)
    return _data(canvas.convert("RGB"))


def _smaller(picture: Image.Image, side: int) -> Image.Image:
    small = picture.copy()
    small.thumbnail((side, side))
    return small


def _data(picture: Image.Image) -> str:
    """Address that is the picture itself: nothing of it is left in a folder that others can ask for."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _folded(title: str, lines: Sequence[str], opened: bool) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f"<details{' open' if opened else ''}><summary>{_text(title)}</summary><ul>{items}</ul></details>"


def _text(text: str) -> str:
    return html.escape(str(text))
