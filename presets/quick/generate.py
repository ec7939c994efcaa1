"""Writes the rows of the preset `quick`: an everyday order sentence in, one line of strict JSON out.

The rows are a pure function of the seed and of `words.toml`; the training and the held-out rows share
no customer, item, city or quantity and no sentence frame. Run it to rewrite `train.jsonl` and
`heldout.jsonl` next to this file:

    python presets/quick/generate.py
"""

from __future__ import annotations

import json
import random
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

HERE = Path(__file__).resolve().parent
KEYS = ("quantity", "item", "customer", "city")
SEED = 20
TRAIN_ROWS = 1400
HELDOUT_ROWS = 120
INVENTED = 0.6  # of the names in training rows; they must be copied letter by letter
KINDS = ("dry", "wet", "jar", "thing", "flat", "worn")
KIND_WEIGHTS = (22, 10, 9, 46, 7, 6)
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety"
DOZENS = {"half a dozen": 6, "a dozen": 12, "two dozen": 24, "a couple of": 2, "a hundred": 100}
_SINGULAR_CLASH = re.compile(r"\b(are|were|have|go|reach|them|these|it all)\b", re.IGNORECASE)


class Row(TypedDict):
    """One training or held-out row."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Vocabulary:
    """The words and frames of one split, plus the units and titles that both splits use."""

    first: list[str]
    last: list[str]
    company: list[str]
    city: list[str]
    adjective: list[str]
    items: dict[str, list[str]]
    frames: list[str]
    when: list[str]
    opener: list[str]
    closer: list[str]
    invented: dict[str, list[str]]
    titles: list[str]
    units: dict[str, list[tuple[str, str]]]


def _commas(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _bars(text: str) -> list[str]:
    return [part.strip("\n") for part in text.replace("\n", "").split("|") if part.strip()]


def load_vocabulary(split: str) -> Vocabulary:
    """Reads one split of `words.toml`.

    Args:
        split: `train` or `heldout`.
    """
    words: dict[str, Any] = tomllib.loads((HERE / "words.toml").read_text(encoding="utf-8"))
    part: dict[str, str] = words[split]
    invented: dict[str, str] = words["invented"] if split == "train" else {}
    units: dict[str, list[tuple[str, str]]] = {}
    for kind in KINDS:
        pairs = (pair.split(":") for pair in _commas(words["units"][kind]))
        units[kind] = [(one, many) for one, many in pairs]
    return Vocabulary(
        first=_commas(part["first"]),
        last=_commas(part["last"]),
        company=_commas(part["company"]),
        city=_commas(part["city"]),
        adjective=_commas(part["adjective"]),
        items={kind: _commas(part[kind]) for kind in KINDS},
        frames=part["frames"].strip().splitlines(),
        when=_bars(part["when"]),
        opener=_bars(part["opener"]),
        closer=_bars(part["closer"]),
        invented={key: text.split(", ") for key, text in invented.items()},
        titles=_commas(words["common"]["titles"]),
        units=units,
    )


def number_word(value: int) -> str:
    """Spells a number from 1 to 100, or a multiple of 100 below 1,000."""
    ones, tens = ONES.split(), TENS.split()
    if value < 20:
        return ones[value]
    if value < 100:
        return tens[value // 10] + (f"-{ones[value % 10]}" if value % 10 else "")
    return f"{ones[value // 100]} hundred"


def heldout_quantities(seed: int) -> set[int]:
    """The quantities that only held-out rows use: no small and no round number is among them."""
    pool = [n for n in range(21, 100) if n % 10 and n not in DOZENS.values()]
    rng = random.Random(f"quantities {seed}")
    large = [n for n in range(101, 1000) if n % 10]
    return {*rng.sample(pool, 24), *rng.sample(large, 160), 1350, 2750, 3450, 4150, 5850, 7250, 8650}


def _quantity(rng: random.Random, allowed: list[int], train: bool) -> tuple[str, int]:
    """Draws a quantity and how the sentence writes it."""
    kind = rng.random()
    if train and kind < 0.05:
        return rng.choice(list(DOZENS.items()))
    if kind < 0.09:
        value = rng.choice([n for n in allowed if n >= 1000])
        return f"{value:,}", value
    if kind < 0.30:
        value = rng.choice([n for n in allowed if n <= 100 or (n < 1000 and n % 100 == 0)])
        return number_word(value), value
    low, high = rng.choice([(1, 60), (1, 60), (20, 300), (100, 999)])
    value = rng.choice([n for n in allowed if low <= n <= high])
    return str(value), value


def _name(rng: random.Random, vocabulary: Vocabulary, known: list[str], place: bool = False) -> str:
    """Draws a known name or, in a part of the training rows, an invented one."""
    parts = vocabulary.invented
    if not parts or rng.random() >= INVENTED:
        return rng.choice(known)
    middle = "".join(rng.choices(parts["middle"], k=rng.choice((0, 1, 1, 2))))
    name = rng.choice(parts["start"]) + middle + rng.choice(parts["end"])
    return name.capitalize() + (rng.choice(parts["place"]) if place else "")


def _customer(rng: random.Random, vocabulary: Vocabulary) -> tuple[str, str]:
    """Draws a customer: the words of the sentence and the value of the JSON (without an article)."""
    first, last = (_name(rng, vocabulary, known) for known in (vocabulary.first, vocabulary.last))
    kind = rng.random()
    if kind < 0.45:
        name = f"{rng.choice(vocabulary.titles)} {last}"
    elif kind < 0.52:
        name = f"{rng.choice(vocabulary.titles)} {first} {last}"
    elif kind < 0.74:
        name = f"{first} {last}"
    elif kind < 0.88:
        name = first
    else:
        company = rng.choice(vocabulary.company)
        if vocabulary.invented and rng.random() < INVENTED:
            company = f"{_name(rng, vocabulary, vocabulary.last)} {company.split()[-1]}"
        return company, company.removeprefix("the ")
    return name, name


def _goods(rng: random.Random, vocabulary: Vocabulary, number: str, value: int) -> tuple[str, str]:
    """Draws what is ordered, with a unit where the kind of item wants one: the phrase and the item."""
    kind = rng.choices(KINDS, KIND_WEIGHTS)[0]
    item = rng.choice(vocabulary.items[kind])
    if kind == "thing" and rng.random() < 0.25:
        brand_or_adjective = _name(rng, vocabulary, vocabulary.adjective)
        item = f"{brand_or_adjective} {item}"
    if kind == "thing" and value > 1 and (number == "a couple of" or rng.random() < 0.8):
        return f"{number} {item}", item
    one, many = rng.choice(vocabulary.units[kind])
    unit = one if value == 1 else many
    if value == 1 and number == "one" and rng.random() < 0.6:
        number = "an" if unit[0] in "aeiou" else "a"
    gap = "" if unit == "kg" and number.isdigit() and rng.random() < 0.4 else " "
    return f"{number}{gap}{unit} of {item}", f"{unit} of {item}"


def _row(rng: random.Random, vocabulary: Vocabulary, frame: str, allowed: list[int], train: bool) -> Row:
    number, value = _quantity(rng, allowed, train)
    while value == 1 and _SINGULAR_CLASH.search(frame):
        number, value = _quantity(rng, allowed, train)
    goods, item = _goods(rng, vocabulary, number, value)
    who, customer = _customer(rng, vocabulary)
    city = _name(rng, vocabulary, vocabulary.city, place=True)
    when = rng.choice(vocabulary.when) if rng.random() < 0.45 else ""
    text = frame.format(goods=goods, who=who, where=city, when=when)
    text = text[0].upper() + text[1:]
    if rng.random() < 0.08:
        text = rng.choice(vocabulary.opener) + text
    if text.endswith((".", "?")) and rng.random() < 0.10:
        text += rng.choice(vocabulary.closer)
    fields = {
        "quantity": value,
        "item": item,
        "customer": customer if "{who}" in frame else None,
        "city": city if "{where}" in frame else None,
    }
    return {"prompt": text, "completion": json.dumps(fields, ensure_ascii=False, separators=(",", ":"))}


def _split_rows(seed: int, split: str, count: int) -> list[Row]:
    train = split == "train"
    rng = random.Random(f"{split} {seed}")
    vocabulary = load_vocabulary(split)
    held = heldout_quantities(seed)
    everything = [*range(1, 1000), *range(1000, 10000, 50)]
    allowed = [n for n in everything if n not in held] if train else sorted(held)
    rows: list[Row] = []
    seen: set[str] = set()
    frames: list[str] = []
    while len(rows) < count:
        if not frames:  # every frame once before any frame again
            frames = rng.sample(vocabulary.frames, len(vocabulary.frames))
        row = _row(rng, vocabulary, frames.pop(), allowed, train)
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            rows.append(row)
    return rows


def make_rows(seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """Makes the training rows and the held-out rows.

    Args:
        seed: The seed of every draw; the committed files use the default.
    """
    return _split_rows(seed, "train", TRAIN_ROWS), _split_rows(seed, "heldout", HELDOUT_ROWS)


def to_jsonl(rows: list[Row]) -> str:
    """Renders rows as the text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    """Rewrites `train.jsonl` and `heldout.jsonl` next to this file."""
    train, heldout = make_rows()
    for name, rows in (("train.jsonl", train), ("heldout.jsonl", heldout)):
        (HERE / name).write_text(to_jsonl(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
