"""Samples on the page and wrong answers on the screen: prompts without what they share, answers with their differences."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from sftcli.services.report.samples import compare_texts, samples_of, split_prompts
from sftcli.services.report.score import AnsweredRow, Miss

LINES = st.lists(st.sampled_from(["system", "You are helpful.", "user", "a", "b", "assistant"]), min_size=1)
TEXT = st.text(alphabet="ab c,.\n", max_size=30)


def chat(text: str) -> str:
    return f"system\nYou are helpful.\nuser\n{text}\nassistant\n"


def test_a_prompt_is_shown_without_the_lines_that_all_have():
    found = split_prompts([chat("Capital of Peru?\nIn one word."), chat("Capital of Chile?")])
    assert found.own == ("Capital of Peru?\nIn one word.", "Capital of Chile?")
    assert found.shared == "system\nYou are helpful.\nuser\n...\nassistant"


def test_nothing_is_taken_from_a_single_prompt_or_from_equal_ones():
    for prompts in ([chat("one")], [chat("one"), chat("one")]):
        assert split_prompts(prompts).own == tuple(prompts)
        assert not split_prompts(prompts).shared


@given(st.lists(LINES.map("\n".join), min_size=1, max_size=5))
def test_every_prompt_is_what_all_share_around_its_own(prompts):
    found = split_prompts(prompts)
    head, gap, tail = found.shared.partition("...")
    for prompt, own in zip(prompts, found.own, strict=True):
        assert own.strip("\n")
        assert not gap or f"{head}{own}{tail}" == prompt


@given(TEXT, TEXT)
def test_pieces_give_back_the_answer_and_what_was_expected(expected, answer):
    pieces = compare_texts(expected, answer)
    assert "".join(piece.text for piece in pieces if piece.kind != "missing") == answer
    if len(pieces) > 1:
        assert "".join(piece.text for piece in pieces if piece.kind != "extra") == expected


def test_differences_are_words():
    pieces = compare_texts('{"item": "walnuts", "count": 40}', '{"item": "walnut", "count": 40}')
    marked = [(piece.kind, piece.text) for piece in pieces if piece.kind != "same"]
    assert marked == [("missing", "walnuts"), ("extra", "walnut")]


def test_an_answer_of_another_kind_is_not_marked_word_by_word():
    assert [
        piece.kind for piece in compare_texts('{"item": "walnuts"}', "Sure, I can help you with that!")
    ] == ["same"]


def test_right_is_an_answer_that_is_as_expected_and_has_ended():
    row = AnsweredRow(prompt="p", expected="yes", base="yes", base_cut=True, tuned="yes")
    (sample,) = samples_of([row], []).rows
    assert [(answer.who, answer.is_right, answer.is_cut) for answer in sample.answers] == [
        ("base", False, True),
        ("tuned", True, False),
    ]
    (alone,) = samples_of([replace(row, base=None)], []).rows
    assert [answer.who for answer in alone.answers] == ["tuned"]


def test_wrong_answers_that_are_no_samples_are_shown_as_well():
    row = AnsweredRow(prompt="one", expected="yes", base=None, tuned="no")
    miss = Miss(prompt="one", expected="yes", answer="no", origin="rows.jsonl:1")
    found = samples_of([row], [miss, replace(miss, prompt="two")])
    assert [sample.prompt for sample in found.rows] == ["one"]
    assert [(sample.prompt, sample.answers[0].is_right) for sample in found.wrong] == [("two", False)]
    assert not samples_of([], []).rows
