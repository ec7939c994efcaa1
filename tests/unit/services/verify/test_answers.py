"""How answers differ: what a server did to an answer is what is said of it."""

import pytest
from transformers import LlamaForCausalLM

from sftcli.modeling.decoding.decode import Row
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer, load_chat_tokenizer
from sftcli.services.server.dialects import ServerAnswer
from sftcli.services.verify import answers
from sftcli.services.verify.answers import AnswerComparer, Compared, tie_of
from tests.support.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def comparer(tmp_path_factory: pytest.TempPathFactory) -> AnswerComparer:
    folder = build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    return AnswerComparer(LlamaForCausalLM.from_pretrained(folder).eval(), load_chat_tokenizer(folder))


@pytest.fixture(scope="module")
def tokenizer(comparer: AnswerComparer) -> HFChatTokenizer:
    return comparer._tokenizer


def said(text: str, finish: str) -> ServerAnswer:
    return ServerAnswer(text=text, finish=finish, prompt_tokens=None, new_tokens=None, tokens=None)


def compare(comparer: AnswerComparer, ids: list[int], finish: str, theirs: ServerAnswer) -> Compared:
    return comparer.compare([3, 4], Row(index=0, ids=ids, finish=finish), theirs)


@pytest.mark.parametrize(("finish", "what"), [("stop", answers.ENDS_EARLY), ("length", answers.CUT)])
@pytest.mark.parametrize("ours", ["stop", "length"])
def test_an_answer_that_is_shorter_ended_early_or_was_cut(comparer, tokenizer, ours, finish, what):
    ids = tokenizer.encode("It leaves at seven.", reading="answer")
    assert compare(comparer, ids, ours, said("It leaves", finish)).what == what
    assert compare(comparer, ids, ours, said("It leaves at seven.", ours)).what == ""


def test_a_character_that_the_limit_cuts_is_no_difference(comparer, tokenizer):
    ids = tokenizer.encode("Plug it in \N{ELECTRIC PLUG}", reading="answer")
    assert tokenizer.decode(ids[:-1], skip_special=True).endswith("\ufffd")
    for text in ("Plug it in", "Plug it in \ufffd"):
        assert compare(comparer, ids[:-1], "length", said(text, "length")).what == ""


def test_how_much_rounding_may_turn_around_goes_by_how_far_numbers_are_off():
    assert tie_of([0.001] * 9) == answers.TIE
    assert tie_of([0.016] * 9) == pytest.approx(0.128)  # vLLM in bfloat16, whose answers parted at 0.114 nats
    assert tie_of([0.044] * 9) == answers.MOST_TIE  # an adapter in vLLM, whose answers parted at 0.186 nats
    assert tie_of([0.095] * 9) == answers.TIE  # the base of an adapter of three steps
    assert tie_of([0.288] * 9) == answers.TIE  # four bits
    assert tie_of([]) == answers.MOST_TIE
