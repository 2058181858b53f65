"""data set -> prompts.json: the fixed prompts of quality.py, what each asks for, and how many pictures are drawn.

    python benchmarks/prompts.py --data data/emoji

Run again only when the split of data/pairs.py changes: figures of other prompts cannot be compared.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dalle_demo.data import pairs
from dalle_demo.data.pairs import BACKGROUNDS

FILE = Path(__file__).with_suffix(".json")
HELD_OUT = 120  # drawings at most
# Common things that hang together in most styles: the attributes are asked of these
THINGS = {
    "1F34E": ("apple", "苹果"), "1F408": ("cat", "猫"), "1F415": ("dog", "狗"), "1F697": ("car", "汽车"),
    "1F3E0": ("house", "房子"), "1F333": ("tree", "树"), "1F41F": ("fish", "鱼"), "1F680": ("rocket", "火箭"),
    "1F344": ("mushroom", "蘑菇"), "1F388": ("balloon", "气球"), "1F438": ("frog", "青蛙"), "1F339": ("rose", "玫瑰"),
    "1F916": ("robot", "机器人"), "1F47B": ("ghost", "鬼"), "1F355": ("pizza", "披萨"), "1F381": ("gift", "礼物"),
    "1F418": ("elephant", "大象"), "1F416": ("pig", "猪"), "2764": ("heart", "心"), "1F353": ("strawberry", "草莓"),
}  # fmt: skip
COLOURABLE = ("1F34E", "1F697", "1F333", "1F41F", "1F388", "1F438", "1F339", "2764")
COLOURS = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色",
    "pink": "粉色",
}  # fmt: skip
NUMBERS = {1: ("one", "一个"), 2: ("two", "两个"), 3: ("three", "三个"), 4: ("four", "四个")}
PLURALS = {"fish": "fish", "strawberry": "strawberries"}
SIDES = {
    "left": ("to the left of", "{}在{}左边"), "right": ("to the right of", "{}在{}右边"),
    "above": ("above", "{}在{}上面"), "below": ("below", "{}在{}下面"),
}  # fmt: skip
SYNONYMS = {  # words and phrases that no caption of the data set is; the program checks it
    "doggy": "1F415", "pooch": "1F415", "kitty cat": "1F408", "motorcar": "1F697", "hatchback": "1F697",
    "bunny rabbit": "1F407", "cottage": "1F3E0", "piglet": "1F416", "edible fungus": "1F344", "spacecraft": "1F680",
    "android": "1F916", "phantom": "1F47B", "bullfrog": "1F438", "stallion": "1F40E", "bovine": "1F404",
    "rattlesnake": "1F40D", "sea turtle": "1F422", "aeroplane jet": "2708", "pushbike": "1F6B2", "omnibus": "1F68C",
    "moving van": "1F69A", "beefburger": "1F354", "loaf of bread": "1F35E", "trainers": "1F45F", "knapsack": "1F392",
    "jewel stone": "1F48E", "lightbulb": "1F4A1", "notebook computer": "1F4BB", "cellular phone": "1F4F1",
    "martian": "1F47D", "blaze": "1F525", "raindrop": "1F4A7", "cranium": "1F480", "parasol": "2602",
    "sailing ship": "26F5", "pachyderm": "1F418", "wasp": "1F41D", "conifer": "1F332", "birthday parcel": "1F381",
    "cuttlefish": "1F419", "小狗狗": "1F415", "小猫咪": "1F408", "小轿车": "1F697", "宇宙飞船": "1F680",
    "两轮车": "1F6B2", "便携电脑": "1F4BB", "行动电话": "1F4F1", "小兔子": "1F407",
}  # fmt: skip


def main() -> None:
    """Write the prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder written by `data emoji`")
    data = pairs.load(parser.parse_args().data)
    groups = {
        "held_out": {"pictures": 2, "prompts": held_out(data)},
        "names": {"pictures": 4, "prompts": names(data)},
        "synonyms": {"pictures": 2, "prompts": synonyms(data)},
        "background": {"pictures": 1, "prompts": backgrounds()},
        "object_colour": {"pictures": 1, "prompts": object_colours()},
        "count": {"pictures": 1, "prompts": counts()},
        "relation": {"pictures": 1, "prompts": relations()},
    }
    FILE.write_text(dumps(groups), encoding="utf-8")
    print({name: len(group["prompts"]) for name, group in groups.items()})


def dumps(groups: dict) -> str:
    """JSON with a prompt a line."""
    parts = []
    for name, group in groups.items():
        lines = ",\n".join("  " + json.dumps(prompt, ensure_ascii=False) for prompt in group["prompts"])
        parts.append(f'{json.dumps(name)}: {{"pictures": {group["pictures"]}, "prompts": [\n{lines}\n]}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def held_out(data: pairs.Pairs) -> list[dict]:
    """Drawings held out in one style, their concepts seen in others: asked for by name and style, in both languages."""
    indices = [i for i in pairs.split(data)[1] if data.rows[i]["name_zh"]]
    chosen = np.random.default_rng(0).permutation(indices)[:HELD_OUT]
    prompts = []
    for row in (data.rows[i] for i in sorted(chosen)):
        asked = {"hex": row["hex"], "style": row["style"]}
        prompts.append({"prompt": f"{row['style']} {row['name']}", **asked})
        prompts.append({"prompt": f"{row['style_zh']}风格的{row['name_zh']}", **asked, "chinese": True})
    return prompts


def names(data: pairs.Pairs) -> list[dict]:
    """The things of THINGS and some more by their plain names, which training saw."""
    rows = {row["hex"]: row for row in data.rows}
    return [{"prompt": rows[code]["name"], "hex": code} for code in sorted({*THINGS, *SYNONYMS.values()})]


def synonyms(data: pairs.Pairs) -> list[dict]:
    """Words and phrases for things that are in the data set, none of them a caption of it."""
    known = {text for text, _ in pairs.all_captions(data)}
    seen = sorted(known & set(SYNONYMS))
    if seen:
        raise SystemExit(f"{seen} are captions of the data set; take them out of SYNONYMS in {__file__}")
    return [{"prompt": word, "hex": code, "chinese": not word.isascii()} for word, code in SYNONYMS.items()]


def backgrounds() -> list[dict]:
    """Each colour behind eight things, two of them in Chinese."""
    prompts = []
    for number, (colour, (colour_zh, _)) in enumerate(BACKGROUNDS.items()):
        for i, code in enumerate(_things(8, number)):
            name, name_zh = THINGS[code]
            text = f"{colour_zh}背景的{name_zh}" if i > 5 else f"{_a(name)} on {_a(colour)} background"
            prompts.append({"prompt": text, "hex": code, "background": colour, "chinese": i > 5})
    return prompts


def object_colours() -> list[dict]:
    """Each of eight things in each colour, two things in Chinese."""
    prompts = []
    for i, code in enumerate(COLOURABLE):
        name, name_zh = THINGS[code]
        for colour, colour_zh in COLOURS.items():
            text = f"{colour_zh}的{name_zh}" if i > 5 else f"{_a(colour)} {name}"
            prompts.append({"prompt": text, "hex": code, "colour": colour, "chinese": i > 5})
    return prompts


def counts() -> list[dict]:
    """One to four of fifteen things, five of them in Chinese."""
    prompts = []
    for i, code in enumerate(_things(15, 0)):
        name, name_zh = THINGS[code]
        for number, (word, word_zh) in NUMBERS.items():
            several = name if number == 1 else PLURALS.get(name, name + "s")
            text = f"{word_zh}{name_zh}" if i > 9 else f"{word} {several}"
            prompts.append({"prompt": text, "hex": code, "count": number, "chinese": i > 9})
    return prompts


def relations() -> list[dict]:
    """Fifteen pairs of things on each side of one another, five of them in Chinese."""
    prompts, codes = [], list(THINGS)
    for i in range(15):
        pair = codes[i], codes[(i + 7) % len(codes)]
        (name, name_zh), (other, other_zh) = THINGS[pair[0]], THINGS[pair[1]]
        for side, (words, words_zh) in SIDES.items():
            text = words_zh.format(name_zh, other_zh) if i > 9 else f"{_a(name)} {words} {_a(other)}"
            prompts.append({"prompt": text, "hex": pair[0], "other": pair[1], "relation": side, "chinese": i > 9})
    return prompts


def _things(number: int, start: int) -> list[str]:
    codes = list(THINGS)
    return [codes[(start * 3 + i) % len(codes)] for i in range(number)]


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


if __name__ == "__main__":
    main()
