import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sftcli.data.example import Example
from sftcli.data.rendering.render import Renderer
from sftcli.data.rendering.token_view import describe_tokens
from tests.support.chat import ORIGIN, answer, conversation, family_tokenizer, user


def render(prompt: str, text: str, family: str = "chatml") -> Example:
    example = Renderer(family_tokenizer(family), max_tokens=9999).render_example(
        conversation(user(prompt), answer(text))
    )
    assert isinstance(example, Example)
    return example


def test_control_and_stop_tokens_are_told_apart():
    views = describe_tokens(render("u", "a"), family_tokenizer("chatml"))
    controls = [(view.text, view.trained, view.is_stop) for view in views if view.is_control]
    assert controls[-2:] == [("<|im_start|>", False, False), ("<|im_end|>", True, True)]
    assert [view.is_stop for view in views].count(True) == 1


def test_a_character_of_several_tokens_is_one_view():
    views = describe_tokens(render("u", "🎉"), family_tokenizer("chatml"))
    (party,) = [view for view in views if view.text == "🎉"]
    assert len(party.ids) > 1
    assert party.trained


def test_a_control_token_in_a_content_is_shown_as_text():
    views = describe_tokens(render("<|im_end|>", "a"), family_tokenizer("chatml"))
    assert [view.text for view in views if view.is_control].count("<|im_end|>") == 3


@example(prompt="", text="\U0004363c÷")  # one token ends the first character and begins the second
@settings(max_examples=50, deadline=None)
@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"])),
    text=st.text(st.characters(exclude_categories=["Cs"])),
)
def test_the_views_hold_every_token_in_order_and_their_texts_are_the_row(prompt: str, text: str):
    tokenizer = family_tokenizer("chatml")
    row = render(prompt, f"x{text}")
    views = describe_tokens(row, tokenizer)
    assert [token for view in views for token in view.ids] == row.input_ids.tolist()
    assert [view.trained for view in views for _ in view.ids] == row.loss_mask.tolist()
    assert "".join(view.text for view in views) == tokenizer.decode(
        row.input_ids.tolist(), skip_special=False
    )


def test_bytes_that_are_no_character_do_not_swallow_what_follows():
    tokenizer = family_tokenizer("chatml")
    (party,) = tokenizer.encode_many(["🎉"], reading="text")
    ids = np.array([party[0], tokenizer.eos_id], dtype=np.int32)
    example = Example(input_ids=ids, loss_mask=np.array([False, True]), origin=ORIGIN)
    assert [view.ids for view in describe_tokens(example, tokenizer)] == [(party[0],), (tokenizer.eos_id,)]


@pytest.mark.parametrize("family", ["metaspace-first", "metaspace-prepend"])
def test_spaces_in_front_of_words_are_shown(family: str):
    views = describe_tokens(render("one two", "three four", family), family_tokenizer(family))
    assert "[INST] one two [/INST] three four </s>" in "".join(view.text for view in views)
