import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.data.conversations.heldout_split import (
    Overlap,
    OverlapFinder,
    choose_heldout,
    normalize,
    row_key,
    split_key,
)
from sftcli.data.conversations.messages import Conversation, Message
from sftcli.data.reading.record import Origin


def conversation(*texts, line=1, system=""):
    roles = ("user", "assistant") * len(texts)
    turns = [Message(role=role, content=text) for role, text in zip(roles, texts, strict=False)]
    head = [Message(role="system", content=system)] if system else []
    return Conversation(messages=(*head, *turns), origin=Origin(path="rows.jsonl", line=line))


@given(st.text(), st.text(), st.text())
def test_same_prompts_share_a_side_whatever_the_rest_is(prompt, answer, other):
    one, two = (
        conversation(prompt, answer, line=1),
        conversation(prompt, other, "and", line=9, system="Be short."),
    )
    assert split_key(one) == split_key(two)


@pytest.mark.parametrize(
    "copy", ["what is  an E\u0301?", "What is an é?\n", "WHAT IS AN É?", "What\u00a0is an é?"]
)
def test_case_white_space_and_unicode_form_do_not_make_another_prompt(copy):
    assert normalize(copy) == normalize("What is an é?")


def test_keys_are_these_bytes_on_every_machine():
    assert split_key(conversation("Hello  World", "x")).hex() == "c050a57766802ed6cd82bda00360653a"
    assert row_key(conversation("Hello", "x")).hex() == "0d9e10b220efc42eed8e9ae008a71205"


def held_out(texts, *, fraction, seed):
    keys = {split_key(conversation(text, "x")): text for text in texts}
    chosen = choose_heldout(dict.fromkeys(keys, 1), fraction=fraction, max_rows=9999, seed=seed)
    return [text for key, text in keys.items() if key in chosen]


def test_the_same_prompts_are_held_out_on_every_machine():
    held = held_out([f"prompt {n}" for n in range(100)], fraction=0.05, seed=7)
    assert held == [f"prompt {n}" for n in (0, 2, 30, 87, 89)]


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_a_larger_fraction_holds_out_the_same_prompts_and_more(seed, one, other):
    small, large = sorted((one, other))
    prompts = [f"prompt {n}" for n in range(50)]
    more = held_out(prompts, fraction=large, seed=seed)
    assert set(held_out(prompts, fraction=small, seed=seed)) <= set(more)


@given(
    st.dictionaries(st.binary(min_size=1, max_size=4), st.integers(1, 9), min_size=2, max_size=40),
    st.floats(0.01, 0.5),
    st.integers(1, 50),
    st.integers(0, 99),
)
def test_chosen_keys_fit_the_limits_leave_some_for_training_and_do_not_depend_on_order(
    counts, fraction, most, seed
):
    chosen = choose_heldout(counts, fraction=fraction, max_rows=most, seed=seed)
    rows = sum(counts[key] for key in chosen)
    assert 1 <= len(chosen) < len(counts)
    assert rows <= max(min(most, round(fraction * sum(counts.values()))), min(counts.values()))
    shuffled = random.Random(seed).sample(sorted(counts.items()), len(counts))
    assert choose_heldout(dict(shuffled), fraction=fraction, max_rows=most, seed=seed) == chosen


@pytest.mark.parametrize(("counts", "fraction"), [({b"a": 9}, 0.5), ({}, 0.5), ({b"a": 1, b"b": 1}, 0.0)])
def test_nothing_is_held_out_when_there_is_nothing_to_choose_from(counts, fraction):
    assert choose_heldout(counts, fraction=fraction, max_rows=9, seed=0) == frozenset()


def overlap(train: Sequence[Conversation], heldout: Sequence[Conversation]) -> Overlap:
    finder = OverlapFinder()
    for row in heldout:
        finder.add_heldout(split_key(row), row_key(row), row.origin)
    for row in train:
        finder.add_trained(split_key(row), row_key(row), row.origin)
    return finder.find()


def test_overlap_tells_same_prompts_from_same_rows_and_shows_where():
    train = [conversation("A", "1", line=1), conversation("b", "2", line=2), conversation("c", "3", line=3)]
    heldout = [
        conversation("a ", "1", line=10),
        conversation("B", "other", line=11),
        conversation("d", "3", line=12),
    ]
    found = overlap(train, heldout)
    assert (found.heldout_rows, found.same_prompt, found.same_row) == (3, 2, 1)
    assert [(train.line, held.line) for train, held in found.examples] == [(1, 10), (2, 11)]


def test_a_split_by_prompt_has_no_overlap():
    rows = [conversation(f"prompt {n % 50}", f"answer {n}", line=n + 1) for n in range(400)]
    counts = Counter(map(split_key, rows))
    chosen = choose_heldout(counts, fraction=0.2, max_rows=400, seed=3)
    held = [row for row in rows if split_key(row) in chosen]
    train = [row for row in rows if split_key(row) not in chosen]
    assert held
    assert train
    assert overlap(train, held).same_prompt == 0
