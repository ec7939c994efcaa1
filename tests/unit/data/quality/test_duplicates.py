import random
from collections.abc import Sequence

import pytest

from sftcli.data.conversations.messages import Conversation, Message, PlainText
from sftcli.data.quality.duplicates import DuplicateFinder, Duplicates, mark_rows
from sftcli.data.reading.record import Origin
from tests.support.chat import answer, system, user

WORDS = (
    "ferry",
    "harbour",
    "evening",
    "bell",
    "river",
    "market",
    "bread",
    "window",
    "garden",
    "letter",
    "winter",
)


def text_of(seed: int, words: int = 60) -> str:
    source = random.Random(seed)
    return " ".join(f"{source.choice(WORDS)}{source.randrange(9)}" for _ in range(words))


def row(line: int, *messages: Message) -> Conversation:
    return Conversation(messages=messages, origin=Origin(path="rows.jsonl", line=line))


def rows_of(texts: list[str]) -> list[Conversation]:
    return [row(line, user(text), answer("It is so.")) for line, text in enumerate(texts, 1)]


def found(
    train: Sequence[Conversation | PlainText], heldout: Sequence[Conversation] = (), *, together: int = 1024
) -> tuple[Duplicates, Duplicates]:
    finder = DuplicateFinder()
    for side, is_held in ((train, False), (heldout, True)):
        for begin in range(0, len(side), together):
            rows = side[begin : begin + together]
            finder.add(mark_rows(rows), [row.origin for row in rows], [is_held] * len(rows))
    return finder.find()


def lines(pairs: tuple[tuple[Origin, Origin], ...]) -> list[tuple[int, int]]:
    return [(later.line, earlier.line) for later, earlier in pairs]


def changed(text: str, words: int) -> str:
    parts = text.split()
    return " ".join([*parts[:10], *("other",) * words, *parts[10 + words :]])


def test_without_rows_there_is_nothing():
    assert found([]) == (Duplicates(), Duplicates())


def test_rows_of_their_own_are_no_duplicates():
    train, _ = found(rows_of([text_of(seed) for seed in range(300)]))
    assert (train.exact, train.near) == (0, 0)


def test_an_equal_row_is_a_duplicate_of_the_first_one_whatever_its_case_and_spaces():
    texts = [text_of(1), text_of(2), text_of(1).upper(), f"  {text_of(1)}\n"]
    train, _ = found(rows_of(texts))
    assert (train.exact, train.near) == (2, 0)
    assert lines(train.exact_examples) == [(3, 1), (4, 1)]


def test_a_row_with_another_answer_is_not_equal():
    train, _ = found([row(1, user("u"), answer("yes")), row(2, user("u"), answer("no"))])
    assert train.exact == 0


def test_a_row_with_a_word_changed_is_a_near_duplicate_and_one_with_half_of_them_is_not():
    train, _ = found(rows_of([text_of(1), changed(text_of(1), 1), changed(text_of(1), 30)]))
    assert (train.exact, train.near) == (0, 1)
    assert lines(train.near_examples) == [(2, 1)]


@pytest.mark.parametrize("alphabet", ["東京駅会山川日本語学校先生時間食物", "абвгдежзиклмнопр "])
def test_near_duplicates_are_found_in_other_scripts(alphabet: str):
    text = "".join(random.Random(1).choices(alphabet, k=300))
    train, _ = found(rows_of([text, f"{text[:150]}x{text[151:]}", text[::-1]]))
    assert lines(train.near_examples) == [(2, 1)]


def test_a_system_text_that_all_rows_share_makes_none_of_them_alike():
    shared = system(text_of(0, 200))
    rows = [row(line, shared, user(f"What is {line * 7919}?"), answer(str(line))) for line in range(1, 50)]
    train, _ = found(rows)
    assert train.near == 0


def test_a_held_out_row_that_is_nearly_a_training_row_is_said_apart():
    train, heldout = found(
        rows_of([text_of(seed) for seed in range(20)]), rows_of([text_of(99), changed(text_of(7), 1)])
    )
    assert (train.near, heldout.near, heldout.near_trained) == (0, 0, 1)
    assert lines(heldout.trained_examples) == [(2, 8)]


def test_plain_texts_count_too():
    texts = [PlainText(text=text_of(1), origin=Origin(path="t", line=line)) for line in (1, 2)]
    assert found(texts)[0].exact == 1


def test_it_does_not_matter_how_many_rows_are_marked_together():
    rows = rows_of([text_of(seed % 40) for seed in range(100)])
    together = found(rows)
    assert found(rows, together=7) == together
    assert together[0].exact == 60


def test_many_equal_rows_cost_no_more_than_others():
    train, _ = found(rows_of(["the same question"] * 3000))
    assert (train.exact, train.near) == (2999, 0)


# Which are dropped


def dropped(
    train: Sequence[Conversation],
    heldout: Sequence[Conversation] = (),
    *,
    exact: bool = True,
    near: bool = True,
    seed: int = 0,
) -> list[bool | None]:
    finder = DuplicateFinder()
    for side, is_held in ((train, False), (heldout, True)):
        finder.add(mark_rows(side), [row.origin for row in side], [is_held] * len(side))
    repeated = finder.repeated(exact=exact, near=near, seed=seed)
    return [repeated.is_exact(index) for index in range(len(train) + len(heldout))]


@pytest.mark.parametrize("seed", range(5))
def test_one_of_equal_rows_stays_and_the_seed_draws_it(seed):
    rows = rows_of([text_of(0), text_of(1), text_of(0).upper(), text_of(2), text_of(0)])
    found = dropped(rows, seed=seed)
    assert found == dropped(rows, seed=seed)
    assert [found[1], found[3]] == [None, None]
    assert sorted(map(str, (found[0], found[2], found[4]))) == ["None", "True", "True"]


def test_every_copy_may_be_the_one_that_stays():
    rows = rows_of([text_of(0)] * 3)
    assert {dropped(rows, seed=seed).index(None) for seed in range(30)} == {0, 1, 2}


@pytest.mark.parametrize("seed", range(4))
def test_what_stays_has_no_near_copy_and_what_goes_has_one_that_stays(seed):
    texts = [text_of(0, 80)]
    for step in range(12):
        texts.append(changed(texts[-1], 1 + step % 3))
    texts += [text_of(1), text_of(2), texts[4]]
    rows = rows_of(texts)
    finder = DuplicateFinder()
    finder.add(mark_rows(rows), [row.origin for row in rows], [False] * len(rows))
    repeated = finder.repeated(exact=True, near=True, seed=seed)
    left = [row for index, row in enumerate(rows) if repeated.is_exact(index) is None]
    (again, _) = found(left)
    assert (again.exact, again.near) == (0, 0)
    for index in range(len(rows)):
        if repeated.is_exact(index) is not None:
            (pair, _) = found([rows[index], rows[int(repeated.like[index])]])
            assert pair.exact + pair.near == 1
            assert repeated.named(index).startswith(f"rows.jsonl:{index + 1} like rows.jsonl:")


def test_only_what_is_asked_for_goes():
    texts = [text_of(0), text_of(0), changed(text_of(0), 2)]
    assert dropped(rows_of(texts), exact=False, near=False) == [None] * 3
    assert dropped(rows_of(texts), near=False).count(True) == 1
    assert dropped(rows_of(texts), near=False)[2] is None
    assert dropped([], near=True) == []


def test_no_row_loses_to_one_of_the_other_side():
    texts = [text_of(0), text_of(1)]
    assert dropped(rows_of(texts), rows_of([changed(texts[0], 2), texts[1]])) == [None] * 4
