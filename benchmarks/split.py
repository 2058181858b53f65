"""data set -> dalle_demo/data/held_out.json: concepts and styles that no training sees, words that no noun is.

    python benchmarks/split.py --data data/emoji

Drawn by the hash of names, so that it does not depend on what is in the data set besides. A concept leaves with all
its styles, and persons with all their genders and ages. The words are the synonyms of prompts.py.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prompts import SYNONYMS

from dalle_demo.data import pairs

CONCEPT_SHARE, STYLE_SHARE = 0.04, 0.02
PERSONS = re.compile(r"\b(wo)?m[ae]n\b|\bpersons?\b|\bpeople\b|\bboys?\b|\bgirls?\b|\badults?\b|\bchild(ren)?\b")


def concept(name: str) -> str:
    """What a drawing shows, whoever does it: `man: beard`, `woman: beard` -> `beard`."""
    return " ".join(re.findall(r"\w+", PERSONS.sub("", name))) or "person"


def chance(key: str) -> float:
    """Number in [0, 1) that follows from the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32


def main() -> None:
    """Write the file and print how much is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder written by `data emoji`")
    rows = pairs.load(parser.parse_args().data).rows
    concepts = sorted({row["hex"] for row in rows if chance(concept(row["name"])) < CONCEPT_SHARE})
    keys = {f"{row['hex']}/{row['style']}" for row in rows if row["hex"] not in concepts}
    styles = sorted(key for key in keys if chance(key) < STYLE_SHARE)
    words = sorted(word for word in SYNONYMS if word.isascii())
    pairs.HELD_OUT.write_text(json.dumps({"concepts": concepts, "styles": styles, "words": words}, indent=0) + "\n")
    names = {row["hex"]: row["name"] for row in rows}
    print(f"{len(concepts)} concepts ({', '.join(names[code] for code in concepts)}) and {len(styles)} drawings")


if __name__ == "__main__":
    main()
