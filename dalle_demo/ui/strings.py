"""key, language -> text: every word that the page shows, in English and in Chinese.

Labels are translated by the browser (`translations`), sentences with numbers in them by the server (`say`). Labels
and help of the settings come from GenerateParams; here are only their Chinese versions, and one that is missing
shows in English.
"""

import dataclasses
from typing import Any

from dalle_demo.config import GenerateParams
from dalle_demo.engines import LEFT_OUT

TITLE = "dalle_demo"
EXAMPLES = [
    "a red apple",
    "a smiling cat",
    "a slice of pizza",
    "a snowy mountain at night",
    "一朵粉红色的花",
    "蓝色的鱼",
]

LABELS = {
    "en": {
        "subtitle": "Type what you would like to see. A model of the DALL·E family draws it, on this computer alone.",
        "prompt": "Prompt",
        "prompt_placeholder": "a red apple",
        "go": "Generate",
        "stop": "Stop",
        "examples": "Or try one of these",
        "gallery": "Pictures",
        "settings": "Settings",
        "seed_help": "The same seed, prompt and settings draw the same pictures again.",
        "seed_placeholder": "random",
        "randomise": "New seed each time",
        "randomise_help": "Untick to draw the same pictures again.",
        "model": "Model",
        "model_help": "Each has settings of its own, which choosing it brings back.",
        "download": "Download",
        "not_now": "Not now",
        "cancel": "Cancel",
    },
    "zh": {
        "subtitle": "写下想看的画面，DALL·E 家族的模型就在这台电脑上为你画出来。",
        "prompt": "描述",
        "prompt_placeholder": "一个红苹果",
        "go": "生成",
        "stop": "停止",
        "examples": "或者试试这些",
        "gallery": "图片",
        "settings": "设置",
        "seed_placeholder": "随机",
        "randomise": "每次换一个种子",
        "randomise_help": "取消勾选，就能再画出同样的图片。",
        "model": "模型",
        "model_help": "每个模型有自己的默认设置，选中后即恢复。",
        "download": "下载",
        "not_now": "暂不",
        "cancel": "取消",
        "n": "张数",
        "n_help": "一次画几张。",
        "seed": "种子",
        "seed_help": "种子、描述和设置都相同，画出的图片就相同。",
        "temperature": "温度",
        "temperature_help": "越低越稳妥、越相似，越高越大胆、越多样。",
        "top_k": "Top-k",
        "top_k_help": "每一步只在最可能的 k 个图块中选择；0 为关闭。",
        "top_p": "Top-p",
        "top_p_help": "每一步舍弃累计概率之外的图块；1 为关闭。",
        "guidance_scale": "引导强度",
        "guidance_scale_help": "贴合描述的程度；1 为关闭，过高会使画面粗糙。",
    },
}

SENTENCES = {
    "en": LEFT_OUT
    | {
        "waiting": "Waiting for a turn…",
        "starting": "Reading the prompt…",
        "loading": "Loading {model}…",
        "drawing": "Drawing, {percent} %",
        "one": "1 picture in {seconds:.1f} s, seed {seed}.",
        "many": "{n} pictures in {seconds:.1f} s, {each:.1f} s each, seed {seed}.",
        "stopped": "Stopped.",
        "stopped_at": "Stopped at {percent} %, seed {seed}.",
        "label_here": "{model}: {seconds} a picture, {licence}",
        "label_away": "{model}: {seconds} a picture, {licence}, {size} download",
        "label_too_big": "{model}: needs {memory} of memory, too much here",
        "own_licence": "licence in its model card",
        "offer": "{model} is not on this computer yet: {size} download, {licence}, about {seconds} a picture here, "
        "needs {memory} of memory.",
        "under_way": " It is being downloaded already.",
        "too_big": "{model} needs {memory} of memory, and this computer has {room} free for it. Close other programs "
        "or use a larger computer.",
        "busy": "One download at a time: wait for it, or cancel it first.",
        "connecting": "Asking for {model}…",
        "downloading": "Downloading {model}: {done} of {total}, {percent} %",
        "downloading_left": "Downloading {model}: {done} of {total}, {percent} %, {left} left",
        "converting": "Checking and preparing {model}…",
        "download_failed": "{model} was not downloaded: {reason}",
        "load_failed": "{model} could not be loaded: {reason}",
        "close": "Close",
        "not_now": "Not now",
        "model_unknown": "Model: there is no {model!r} here; choose one of: {names}",
        "model_missing": "Model: {model} is not on this computer yet; fetch it with: {command}",
        "footer": "Model {model}{facts}. Prompts are not logged; pictures are deleted within a day.",
        "fact_one": ", {format}, 1 processor thread",
        "fact_many": ", {format}, {threads} processor threads",
        "seconds": "{n:.{digits}f} s",
        "minutes": "{n:.0f} min",
    },
    "zh": {
        "waiting": "正在排队……",
        "starting": "正在读描述……",
        "loading": "正在载入 {model}……",
        "drawing": "正在画，{percent} %",
        "one": "1 张图片，用时 {seconds:.1f} 秒，种子 {seed}。",
        "many": "{n} 张图片，用时 {seconds:.1f} 秒，每张 {each:.1f} 秒，种子 {seed}。",
        "stopped": "已停止。",
        "stopped_at": "停在 {percent} %，种子 {seed}。",
        "nothing_read": "这个模型只读英文，这段描述一个字也没有读懂：图片与它无关。",
        "unread": "这个模型略去了它读不懂的字符（{unread}）。",
        "cut": "这个模型略去了描述的末尾（共 {tokens} 个词元，只读 {length} 个）。",
        "unread_and_cut": "这个模型略去了它读不懂的字符（{unread}）和描述的末尾"
        "（共 {tokens} 个词元，只读 {length} 个）。",
        "label_here": "{model}：每张 {seconds}，{licence}",
        "label_away": "{model}：每张 {seconds}，{licence}，需下载 {size}",
        "label_too_big": "{model}：需要 {memory} 内存，这台电脑不够",
        "own_licence": "许可见模型卡",
        "offer": "{model} 还不在这台电脑上：需下载 {size}，{licence}，在这里每张约 {seconds}，占用 {memory} 内存。",
        "under_way": "已经在下载了。",
        "too_big": "{model} 需要 {memory} 内存，这台电脑只剩 {room} 可用。请关闭其他程序，或换一台内存更大的电脑。",
        "busy": "一次只能下载一个：请等它完成，或先取消。",
        "connecting": "正在请求 {model}……",
        "downloading": "正在下载 {model}：{done} / {total}，{percent} %",
        "downloading_left": "正在下载 {model}：{done} / {total}，{percent} %，还需 {left}",
        "converting": "正在检查并准备 {model}……",
        "download_failed": "{model} 没有下载成功：{reason}",
        "load_failed": "{model} 无法载入：{reason}",
        "close": "关闭",
        "not_now": "暂不",
        "model_unknown": "模型（model）：这里没有 {model!r}；请选择：{names}",
        "model_missing": "模型（model）：{model} 还不在这台电脑上；请用此命令下载：{command}",
        "footer": "模型 {model}{facts}。描述不会被记录；图片一天之内删除。",
        "fact_one": "，{format}，1 个处理器线程",
        "fact_many": "，{format}，{threads} 个处理器线程",
        "seconds": "{n:.{digits}f} 秒",
        "minutes": "{n:.0f} 分钟",
    },
}


def footer(model: str, facts: tuple[str, int] | None, accept_language: str) -> str:
    """Small print in Markdown: which model runs, how once that is known, and what becomes of a prompt."""
    how = ""
    if facts is not None:
        number_format, threads = facts
        key = "fact_one" if threads == 1 else "fact_many"
        how = say(key, accept_language, format=number_format, threads=threads)
    return say("footer", accept_language, model=model, facts=how)


def duration(seconds: float, accept_language: str) -> str:
    """Time in the unit that a person would use."""
    if seconds >= 100:
        return say("minutes", accept_language, n=max(2, seconds / 60))
    return say("seconds", accept_language, n=seconds, digits=0 if seconds >= 2 else 1)


def megabytes(size: int) -> str:
    """Size of files or memory, in thousands as disks and downloads are counted."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def label(field: str, accept_language: str) -> str:
    """Name of a setting as the page shows it in the visitor's language."""
    spec = GenerateParams.__dataclass_fields__[field]
    own = LABELS[_language(accept_language)].get(field)
    return own or spec.metadata.get("label") or field.capitalize()


def translations() -> dict[str, dict[str, str]]:
    """Texts of every label per language, as `gr.I18n` wants them."""
    fields = {}
    for spec in dataclasses.fields(GenerateParams):
        if spec.metadata:
            fields |= {spec.name: spec.metadata["label"], f"{spec.name}_help": spec.metadata["help"]}
    english = fields | LABELS["en"]
    chinese = english | LABELS["zh"]
    return {"en": english, "zh": chinese, "zh-CN": chinese}


def say(key: str, accept_language: str, /, **values: Any) -> str:
    """Sentence in a browser's first language, known from its Accept-Language header; English if it is not Chinese."""
    return SENTENCES[_language(accept_language)][key].format(**values)


def _language(accept_language: str) -> str:
    return "zh" if accept_language.lower().startswith("zh") else "en"
