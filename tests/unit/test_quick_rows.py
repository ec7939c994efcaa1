"""The rows of the preset `quick` are what its generator writes, and its two splits share nothing."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

PRESET = Path(__file__).resolve().parents[2] / "presets" / "quick"
KEYS = ["quantity", "item", "customer", "city"]
SPLITS = ("train", "heldout")
Rows = list[dict[str, str]]


@cache
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quick_generate", PRESET / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def committed(split: str) -> Rows:
    lines = (PRESET / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def answers(split: str) -> list[dict[str, Any]]:
    return [json.loads(row["completion"]) for row in committed(split)]


def values(split: str, key: str) -> set[Any]:
    return {answer[key] for answer in answers(split) if answer[key] is not None}


def name_words(split: str) -> set[str]:
    titles = set(generator().load_vocabulary("train").titles)
    joining = {"Van", "De", "Le"}
    return {word for name in values(split, "customer") for word in name.split()} - titles - joining


def layout(row: dict[str, str]) -> str:
    """The sentence of a row with a mark in place of each value of its answer and of every number."""
    text = row["prompt"].lower()
    answer = json.loads(row["completion"])
    for key in ("customer", "city", "item"):
        if answer[key] is not None:
            text = text.replace(answer[key].lower(), f"<{key}>")
    number = generator().number_word(answer["quantity"]) if answer["quantity"] <= 100 else "hundred"
    return re.sub(rf"{re.escape(number)}\b|\d[\d,]*", "<n>", text)


def test_committed_rows_are_what_the_generator_writes() -> None:
    train, heldout = generator().make_rows()
    assert (PRESET / "train.jsonl").read_text(encoding="utf-8") == generator().to_jsonl(train)
    assert (PRESET / "heldout.jsonl").read_text(encoding="utf-8") == generator().to_jsonl(heldout)


def test_the_generator_is_a_function_of_its_seed() -> None:
    assert generator().make_rows(seed=3) == generator().make_rows(seed=3)
    assert generator().make_rows(seed=3) != generator().make_rows(seed=4)


def test_sizes() -> None:
    assert (len(committed("train")), len(committed("heldout"))) == (1400, 120)


@pytest.mark.parametrize("split", SPLITS)
def test_completion_is_one_line_of_compact_json_with_fixed_keys(split: str) -> None:
    for row in committed(split):
        assert list(row) == ["prompt", "completion"]
        answer = json.loads(row["completion"])
        assert list(answer) == KEYS
        assert row["completion"] == json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
        assert type(answer["quantity"]) is int
        assert answer["quantity"] > 0
        assert isinstance(answer["item"], str)
        assert all(answer[key] is None or isinstance(answer[key], str) for key in ("customer", "city"))


@pytest.mark.parametrize("split", SPLITS)
def test_every_text_value_stands_in_the_sentence(split: str) -> None:
    for row in committed(split):
        answer = json.loads(row["completion"])
        for key in ("item", "customer", "city"):
            if answer[key] is not None:
                assert answer[key].lower() in row["prompt"].lower(), row


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_distinct_single_lines(split: str) -> None:
    prompts = [row["prompt"] for row in committed(split)]
    assert len(set(prompts)) == len(prompts)
    assert not any("\n" in prompt or "{" in prompt or "  " in prompt for prompt in prompts)


@pytest.mark.parametrize("key", ["item", "quantity", "customer", "city"])
def test_splits_share_no_value(key: str) -> None:
    train, heldout = values("train", key), values("heldout", key)
    assert train
    assert heldout
    assert not train & heldout


def test_splits_share_no_word_of_a_name() -> None:
    assert not name_words("train") & name_words("heldout")


def test_splits_share_no_frame_by_structure() -> None:
    train, heldout = (generator().load_vocabulary(split) for split in SPLITS)
    assert len(set(train.frames)) == len(train.frames) >= 60
    assert len(set(heldout.frames)) == len(heldout.frames) >= 15
    bare = [{re.sub(r"\{\w+\}|\W", "", frame).lower() for frame in v.frames} for v in (train, heldout)]
    assert not bare[0] & bare[1]
    for part in ("when", "opener", "closer", "first", "last", "company", "city", "adjective"):
        assert not set(getattr(train, part)) & set(getattr(heldout, part)), part
    for kind, items in train.items.items():
        assert not set(items) & set(heldout.items[kind])


def test_splits_share_no_frame_by_committed_text() -> None:
    train, heldout = ({layout(row) for row in committed(split)} for split in SPLITS)
    assert not train & heldout


def test_lists_hold_no_word_twice_and_enough_of_each() -> None:
    train = generator().load_vocabulary("train")
    items = [item for part in train.items.values() for item in part]
    for words, least in ((train.first + train.last, 300), (items, 150), (train.city, 150)):
        assert len(set(words)) == len(words) >= least
