"""A conversation that the assistant begins: rejected with the way out, or its first turn is context, or trained."""

import pytest

from sftcli.config.schema.data import FirstTurn, TrainOn
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import detect_schema
from sftcli.data.conversations.messages import Conversation, Rejected, RejectReason
from sftcli.data.reading.record import RawRecord
from sftcli.data.rendering.render import Renderer
from sftcli.modeling.tokenizer.chat_tokenizer import load_chat_tokenizer
from tests.support.chat import ORIGIN, rendered, trained_texts
from tests.support.tiny_tokenizer import CHATML, build_tiny_tokenizer

HELLO = {"role": "assistant", "content": "Harbor office."}
MORE = {"role": "assistant", "content": "What is it?"}
ASKED = {"role": "user", "content": "Is it foggy?"}
ANSWER = {"role": "assistant", "content": "A little."}
SYSTEM = {"role": "system", "content": "Be brief."}


def convert(*turns, first_turn, train_on=TrainOn.ALL):
    record = RawRecord(fields={"messages": list(turns)}, origin=ORIGIN)
    (made,) = to_conversations(record, detect_schema([record]), train_on=train_on, first_turn=first_turn)
    return made


@pytest.fixture
def chatml(tmp_path):
    return load_chat_tokenizer(build_tiny_tokenizer(tmp_path, template=CHATML))


def test_it_is_rejected_with_the_flag_that_keeps_it():
    made = convert(HELLO, ASKED, ANSWER, first_turn=FirstTurn.REJECT)
    assert isinstance(made, Rejected)
    assert made.reason is RejectReason.ROLE_ORDER
    assert "--first-turn untrained" in made.remedy


@pytest.mark.parametrize("front", [(), (SYSTEM,)])
@pytest.mark.parametrize(
    ("first_turn", "trained"),
    [
        (FirstTurn.UNTRAINED, ["A little.<|im_end|>"]),
        (FirstTurn.TRAINED, ["Harbor office.<|im_end|>", "A little.<|im_end|>"]),
    ],
)
def test_it_is_context_or_trained_as_asked(chatml, front, first_turn, trained):
    row = convert(*front, HELLO, ASKED, ANSWER, first_turn=first_turn)
    assert isinstance(row, Conversation)
    (example,) = rendered(chatml, row)
    assert trained_texts(example, chatml) == trained
    (text,) = chatml.decode_many([example.input_ids.tolist()])
    assert "<|im_start|>assistant\nHarbor office.<|im_end|>\n<|im_start|>user\nIs it foggy?" in text


def test_all_turns_in_front_of_the_first_question_are_context(chatml):
    row = convert(HELLO, MORE, ASKED, ANSWER, first_turn=FirstTurn.UNTRAINED)
    assert isinstance(row, Conversation)
    assert [turn.trained for turn in row.messages] == [False, False, False, True]


def test_nothing_changes_where_the_user_begins():
    rows = {
        first_turn: convert(SYSTEM, ASKED, ANSWER, ASKED, HELLO, first_turn=first_turn)
        for first_turn in FirstTurn
    }
    assert rows[FirstTurn.REJECT] == rows[FirstTurn.UNTRAINED] == rows[FirstTurn.TRAINED]


@pytest.mark.parametrize("first_turn", list(FirstTurn))
def test_the_result_of_a_tool_never_begins(first_turn):
    made = convert({"role": "tool", "content": "fog"}, ASKED, ANSWER, first_turn=first_turn)
    assert isinstance(made, Rejected)
    assert not made.remedy


def test_a_conversation_of_that_turn_alone_has_nothing_to_train():
    made = convert(HELLO, first_turn=FirstTurn.UNTRAINED)
    assert isinstance(made, Rejected)
    assert made.reason is RejectReason.NOTHING_TRAINED


def test_a_template_that_wants_a_question_first_rejects_the_row(tmp_path):
    strict = (
        "{%- if messages[0].role != 'user' %}{{- raise_exception('a question first') }}{%- endif %}" + CHATML
    )
    tokenizer = load_chat_tokenizer(build_tiny_tokenizer(tmp_path, template=strict))
    row = convert(HELLO, ASKED, ANSWER, first_turn=FirstTurn.TRAINED)
    made = Renderer(tokenizer, max_tokens=999).render_example(row)
    assert isinstance(made, Rejected)
    assert "a question first" in made.detail
