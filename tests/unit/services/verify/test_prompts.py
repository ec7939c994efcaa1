"""How prompts differ, for templates of several families: what was done to a prompt is what is said of it."""

import pytest

from sftcli.data.conversations.messages import Message
from sftcli.data.rendering.encode import encode_prompt
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer, load_chat_tokenizer
from sftcli.services.server.dialects import ServerPrompt
from sftcli.services.verify import prompts
from sftcli.services.verify.prompts import PromptComparer
from tests.support.tiny_tokenizer import FAMILIES, build_family_tokenizer

QUESTION = (Message(role="user", content="What is 2 plus 2?"),)
SYSTEM = Message(role="system", content="Speak plainly.")
OTHER = Message(role="system", content="Speak like a pirate.")
WITH_SYSTEM = {
    "chatml": True,
    "llama3": True,
    "qwen3": False,
}  # whether the template has a system text of its own


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request, tmp_path_factory) -> tuple[str, HFChatTokenizer]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, load_chat_tokenizer(build_family_tokenizer(folder, request.param))


def found(tokenizer: HFChatTokenizer, turns, ids, *, text: str | None = None) -> str:
    ours = encode_prompt(tokenizer, turns)
    difference = PromptComparer(tokenizer).compare(turns, ours, ServerPrompt(ids=tuple(ids), text=text))
    return "" if difference is None else difference.what


def test_equal_ids_differ_in_nothing(family):
    _, tokenizer = family
    assert found(tokenizer, QUESTION, encode_prompt(tokenizer, QUESTION)) == ""


def test_a_token_in_front_or_none_is_told(family):
    _, tokenizer = family
    ours = encode_prompt(tokenizer, QUESTION)
    assert found(tokenizer, QUESTION, [ours[0], *ours]) == prompts.TOKEN_ADDED
    assert found(tokenizer, QUESTION, ours[1:]) == prompts.TOKEN_LOST


def test_what_stands_before_the_answer_is_told(family):
    _, tokenizer = family
    ours = encode_prompt(tokenizer, QUESTION)
    more = tokenizer.encode("Sure: ")
    assert found(tokenizer, QUESTION, [*ours, *more]) == prompts.END_ADDED
    assert found(tokenizer, QUESTION, ours[:-2]) == prompts.END_LOST


def test_the_same_text_as_other_tokens_is_told(family):
    _, tokenizer = family
    ours = encode_prompt(tokenizer, QUESTION)
    text = tokenizer.decode_many([ours])[0]
    letters = [token for char in text for token in tokenizer.encode(char, reading="answer")]
    assert found(tokenizer, QUESTION, letters, text=text) == prompts.TOKENS_OTHER


def test_a_server_that_tells_the_text_alone_is_compared_by_it(family):
    _, tokenizer = family
    ours = encode_prompt(tokenizer, QUESTION)
    text = tokenizer.decode_many([ours])[0]

    def compare(theirs: str) -> str:
        difference = PromptComparer(tokenizer).compare(QUESTION, ours, ServerPrompt(text=theirs))
        return "" if difference is None else difference.what

    assert compare(text) == ""
    assert compare(text + "Sure: ") == prompts.END_ADDED
    assert compare("User: What is 2 plus 2?") == prompts.TEMPLATE_OTHER


@pytest.mark.parametrize("tells_text", [True, False])
def test_system_messages_are_told_apart(family, tells_text):
    name, tokenizer = family
    if name not in WITH_SYSTEM:
        pytest.skip("the template has no place of its own for a system message")

    def case(turns, sent) -> str:
        ids = encode_prompt(tokenizer, sent)
        return found(tokenizer, turns, ids, text=tokenizer.decode_many([ids])[0] if tells_text else None)

    has_own = WITH_SYSTEM[name]
    assert case(QUESTION, (OTHER, *QUESTION)) == (prompts.SYSTEM_OTHER if has_own else prompts.SYSTEM_ADDED)
    assert case((SYSTEM, *QUESTION), (OTHER, *QUESTION)) == prompts.SYSTEM_OTHER
    assert case((SYSTEM, *QUESTION), QUESTION) == (prompts.SYSTEM_OTHER if has_own else prompts.SYSTEM_LOST)


def test_a_system_text_of_the_template_that_a_server_lacks_is_told_as_such(family):
    name, tokenizer = family
    if not WITH_SYSTEM.get(name):
        pytest.skip("the template has no system text of its own")
    ours = tokenizer.decode_many([encode_prompt(tokenizer, QUESTION)])[0]
    bare = ours[ours.index({"chatml": "<|im_start|>user", "llama3": "<|start_header_id|>user"}[name]) :]
    difference = PromptComparer(tokenizer).compare(
        QUESTION, encode_prompt(tokenizer, QUESTION), ServerPrompt(text=bare)
    )
    assert difference is not None
    assert difference.what == prompts.SYSTEM_LOST


def test_another_template_is_told_with_the_place(family):
    _, tokenizer = family
    ours = encode_prompt(tokenizer, QUESTION)
    theirs = tokenizer.encode("User: What is 2 plus 2?\nAnswer: ")
    difference = PromptComparer(tokenizer).compare(QUESTION, ours, ServerPrompt(ids=tuple(theirs)))
    assert difference is not None
    assert difference.what == prompts.TEMPLATE_OTHER
    assert "User:" in difference.detail
