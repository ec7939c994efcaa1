import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.data.conversations.messages import (
    Conversation,
    Message,
    PlainText,
    Rejected,
    RejectReason,
    RowFaultError,
)
from sftcli.data.example import CUTS, Example, RowFlag, TooLong
from sftcli.data.rendering.proofs import find_contents, prove_cut_span
from sftcli.data.rendering.render import Renderer
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer
from tests.support.chat import ORIGIN, answer, conversation, family_tokenizer, marked, trained_texts, user

FAMILIES = ("chatml", "llama3", "mistral", "gemma", "qwen3", "alpaca", "modern-llm", "metaspace-first")
TWO_TURNS = conversation(user("one"), answer("first answer"), user("two"), answer("second answer"))


def cut(
    row: Conversation | PlainText, max_tokens: int, tokenizer: object | None = None
) -> Example | Rejected:
    return Renderer(tokenizer or family_tokenizer("chatml"), max_tokens=max_tokens, cuts=True).render_example(
        row
    )


def length(row: Conversation | PlainText, family: str = "chatml") -> int:
    example = Renderer(family_tokenizer(family), max_tokens=99_999).render_example(row)
    assert isinstance(example, Example)
    return len(example.input_ids)


def kept(result: Example | Rejected) -> Example:
    assert isinstance(result, Example), result
    return result


def first_turns(count: int) -> Conversation:
    return dataclasses.replace(TWO_TURNS, messages=TWO_TURNS.messages[:count])


def test_a_row_that_fits_is_not_cut():
    example = kept(cut(TWO_TURNS, length(TWO_TURNS)))
    assert (example.num_cut, example.flags) == (0, frozenset())


def test_turns_that_do_not_fit_are_left_out_whole():
    example = kept(cut(TWO_TURNS, length(TWO_TURNS) - 5))
    assert marked(example, family_tokenizer("chatml")).endswith("assistant\n⟦first answer<|im_end|>⟧\n")
    assert example.flags == {RowFlag.CUT_TURNS}
    assert (example.num_trained_turns, example.num_cut) == (1, length(TWO_TURNS) - len(example.input_ids))


def test_what_is_left_of_a_conversation_is_the_shorter_conversation():
    example = kept(cut(TWO_TURNS, length(TWO_TURNS) - 5))
    shorter = kept(cut(first_turns(2), 999))
    assert example.input_ids.tolist() == shorter.input_ids.tolist()
    assert example.loss_mask.tolist() == shorter.loss_mask.tolist()


def test_an_answer_that_does_not_fit_keeps_its_beginning_and_gets_no_stop_token():
    row = first_turns(2)
    tokenizer = family_tokenizer("chatml")
    example = kept(cut(row, length(row) - 4, tokenizer))
    (text,) = trained_texts(example, tokenizer)
    assert text
    assert "first answer".startswith(text)
    assert example.input_ids[-1] not in tokenizer.stop_ids
    assert example.flags == {RowFlag.CUT_ANSWER}
    assert len(example.input_ids) == length(row) - 4


def test_a_stop_token_that_alone_does_not_fit_is_said_apart():
    row = first_turns(2)
    tokenizer = family_tokenizer("chatml")
    example = kept(cut(row, length(row) - 2, tokenizer))  # the stop token and the line end behind it
    assert trained_texts(example, tokenizer) == ["first answer"]
    assert example.flags == {RowFlag.CUT_STOP}


def test_a_line_end_behind_the_stop_token_costs_no_training():
    row = first_turns(2)
    tokenizer = family_tokenizer("chatml")
    example = kept(cut(row, length(row) - 1, tokenizer))
    assert trained_texts(example, tokenizer) == ["first answer<|im_end|>"]
    assert example.flags == {RowFlag.CUT_END}


def test_a_row_whose_prompt_leaves_no_room_is_left_out():
    row = conversation(user("a question " * 30), answer("an answer"))
    result = cut(row, 40)
    assert isinstance(result, TooLong)
    assert result.detail.endswith("and what comes before the answer leaves no room for it")


def test_a_turn_that_is_not_trained_does_not_count_as_an_answer_that_fits():
    row = conversation(user("one"), answer("first", trained=False), user("two"), answer("second answer"))
    example = kept(cut(row, length(row) - 4))
    (text,) = trained_texts(example, family_tokenizer("chatml"))
    assert "second answer".startswith(text)
    assert example.flags == {RowFlag.CUT_ANSWER}


def test_a_character_is_never_cut_apart():
    tokenizer = family_tokenizer("chatml")
    row = conversation(user("u"), answer("ab🎉🎉"))
    for limit in range(8, length(row)):
        result = cut(row, limit, tokenizer)
        if isinstance(result, Example):
            (text,) = trained_texts(result, tokenizer)
            assert "ab🎉🎉<|im_end|>".startswith(text)


def test_plain_text_is_split_and_loses_nothing():
    tokenizer = family_tokenizer("chatml")
    row = PlainText(text="The ferry leaves the harbour at seven.", origin=ORIGIN)
    batch = Renderer(tokenizer, max_tokens=length(row) - 3, cuts=True).render_batch([row])
    first, second = (kept(result) for result in batch.results)
    assert first.flags == second.flags == {RowFlag.SPLIT_TEXT}
    assert first.num_cut == second.num_cut == 0
    whole = kept(Renderer(tokenizer, max_tokens=9999).render_example(row))
    assert [*first.input_ids, *second.input_ids[1:]] == whole.input_ids.tolist()
    assert first.loss_mask[1:].all()
    assert second.loss_mask[1:].all()
    assert [type(piece) for piece in batch.rows] == [PlainText, PlainText]


@given(
    family=st.sampled_from(FAMILIES),
    texts=st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=2, max_size=6),
    share=st.floats(0.05, 1.0),
)
def test_whatever_is_cut_is_provable(family: str, texts: list[str], share: float):
    tokenizer = family_tokenizer(family)
    turns: list[Message] = []
    for index in range(0, len(texts) - 1, 2):
        turns += [user(texts[index]), answer(texts[index + 1])]
    row = conversation(*turns)
    whole = cut(row, 99_999, tokenizer)
    if isinstance(whole, Rejected):
        return
    limit = max(8, int(share * len(whole.input_ids)))
    example = cut(row, limit, tokenizer)
    if isinstance(example, Rejected):
        assert isinstance(example, TooLong)
        return
    assert len(example.input_ids) <= limit or not example.num_cut
    assert len(example.input_ids) + example.num_cut == len(whole.input_ids)
    assert bool(example.num_cut) == bool(example.flags & CUTS)
    assert example.loss_mask.any()
    ends_open = bool(example.flags & {RowFlag.CUT_ANSWER, RowFlag.CUT_STOP})
    trained = example.input_ids[example.loss_mask]
    assert (trained[-1] not in tokenizer.stop_ids) == ends_open
    answers = trained_texts(example, tokenizer)
    wholes = trained_texts(whole, tokenizer)
    assert answers[:-1] == wholes[: len(answers) - 1]
    if family != "qwen3":  # there the last answer of a conversation is rendered in its own way
        assert wholes[len(answers) - 1].startswith(answers[-1])


class Misread:
    """A tokenizer that reads the tokens of a cut answer otherwise than the whole answer."""

    def __init__(self, tokenizer: HFChatTokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def decode_many(self, rows: Sequence[Sequence[int]]) -> list[str]:
        texts = self._tokenizer.decode_many(rows)
        return [text if "<|im_end|>" in text else "x" + text for text in texts]


def test_p3_catches_a_cut_answer_that_is_not_how_the_answer_begins():
    row = conversation(user("one"), answer("a rather long answer to it, with a reason"))
    result = cut(row, length(row) - 5, Misread(family_tokenizer("chatml")))
    assert isinstance(result, Rejected)
    assert result.reason is RejectReason.SPAN_UNPROVABLE
    assert "do not read as its beginning" in result.detail


@pytest.mark.parametrize(
    ("ids", "decoded", "fault"),
    [
        ([5, 9], "abc", "is cut and holds a stop token"),
        ([9, 5], "abc", "is cut and holds a stop token"),
        ([5, 6], "abd", "do not read as its beginning"),
        ([5], "", "nothing is left"),
        ([5], " ", "do not read as its beginning"),
    ],
)
def test_p3_catches_a_cut_span_that_pretends_or_differs(ids: list[int], decoded: str, fault: str):
    with pytest.raises(RowFaultError, match=fault):
        prove_cut_span(ids, decoded, "abcdef", contents=["abcdef"], stop_ids=frozenset({9}), turn=0)


def test_a_lead_without_any_of_the_answer_is_not_enough():
    with pytest.raises(RowFaultError, match="nothing is left of the content"):
        prove_cut_span([5], "<lead>", "<lead>text", contents=["text"], stop_ids=frozenset({9}), turn=0)


def test_contents_are_found_in_order():
    assert find_contents("xx a thought: a.", ["a thought", "a"]) == (3, 15)
