"""key, language -> text: every word that the page shows, in English and in Chinese.

Labels are translated by the browser (`translations`), sentences with numbers in them by the server (`say`). Labels
and help of the settings come from GenerateParams; here are only their Chinese versions, and one that is missing
shows in English.
"""

import dataclasses
from typing import Any

from dalle_demo.config import GenerateParams

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
        "subtitle": "Type what you would like to see. A small model of the DALL·E family draws it, "
        "on this computer's processor alone.",
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
    },
    "zh": {
        "subtitle": "写下想看的画面，DALL·E 家族的小模型就在这台电脑的处理器上为你画出来。",
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
    "en": {
        "waiting": "Waiting for a turn…",
        "starting": "Reading the prompt…",
        "drawing": "Drawing, {percent} %",
        "one": "1 picture in {seconds:.1f} s, seed {seed}.",
        "many": "{n} pictures in {seconds:.1f} s, {each:.1f} s each, seed {seed}.",
        "stopped": "Stopped.",
        "stopped_at": "Stopped at {percent} %, seed {seed}.",
    },
    "zh": {
        "waiting": "正在排队……",
        "starting": "正在读描述……",
        "drawing": "正在画，{percent} %",
        "one": "1 张图片，用时 {seconds:.1f} 秒，种子 {seed}。",
        "many": "{n} 张图片，用时 {seconds:.1f} 秒，每张 {each:.1f} 秒，种子 {seed}。",
        "stopped": "已停止。",
        "stopped_at": "停在 {percent} %，种子 {seed}。",
    },
}


def footer(model: str, dtype: str, threads: int) -> str:
    """Small print in Markdown: which model runs, how, and what becomes of a prompt."""
    plural = "thread" if threads == 1 else "threads"
    return (
        f"Model {model}, {dtype}, {threads} processor {plural}. "
        "Prompts are not logged; pictures are deleted within a day."
    )


def translations() -> dict[str, dict[str, str]]:
    """Texts of every label per language, as `gr.I18n` wants them."""
    fields = {}
    for spec in dataclasses.fields(GenerateParams):
        if spec.metadata:
            fields |= {spec.name: spec.metadata["label"], f"{spec.name}_help": spec.metadata["help"]}
    english = fields | LABELS["en"]
    chinese = english | LABELS["zh"]
    return {"en": english, "zh": chinese, "zh-CN": chinese}


def say(key: str, accept_language: str, **values: Any) -> str:
    """Sentence in a browser's first language, known from its Accept-Language header; English if it is not Chinese."""
    language = "zh" if accept_language.lower().startswith("zh") else "en"
    return SENTENCES[language][key].format(**values)
