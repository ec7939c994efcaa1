"""The text of a stop token at the end of answers is told, and taken away on request."""

import pytest

from sftcli.data.conversations.messages import Rejected
from sftcli.data.example import RowFlag
from sftcli.data.rendering.render import Renderer
from tests.support.chat import answer, conversation, family_tokenizer, marked, rendered, user

ENDS = ["<|im_end|>", "<|endoftext|>", "</s>", "<|eot_id|>", "<end_of_turn>"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("space", ["", "\n", " "])
def test_it_is_told_and_can_be_taken_away(end, space):
    tokenizer = family_tokenizer("chatml")
    (kept,) = rendered(tokenizer, conversation(user("Hi"), answer(f"Four.{end}{space}")))
    assert RowFlag.STOP_TEXT in kept.flags
    assert RowFlag.STOP_STRIPPED not in kept.flags
    row = conversation(user(f"Hi{end}"), answer(f"Four.{end}{space}{end}"))
    (stripped,) = rendered(tokenizer, row, strips_stop_text=True)
    assert RowFlag.STOP_STRIPPED in stripped.flags
    assert RowFlag.STOP_TEXT not in stripped.flags
    assert marked(stripped, tokenizer).endswith("⟦Four.<|im_end|>⟧\n")
    assert f"Hi{end}" in marked(stripped, tokenizer)


def test_other_rows_stay_as_they_are():
    tokenizer = family_tokenizer("chatml")
    row = conversation(user("Hi"), answer("A </s> tag, and space \n"))
    (kept,), (stripped,) = rendered(tokenizer, row), rendered(tokenizer, row, strips_stop_text=True)
    assert kept.input_ids.tolist() == stripped.input_ids.tolist()
    assert kept.flags == stripped.flags


def test_answer_that_is_nothing_else_is_rejected():
    row = conversation(user("Hi"), answer("</s>"))
    made = Renderer(family_tokenizer("chatml"), max_tokens=99, strips_stop_text=True).render_example(row)
    assert isinstance(made, Rejected)
    assert made.reason.value == "empty-answer"
