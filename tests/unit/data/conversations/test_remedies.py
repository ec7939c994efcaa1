"""The help of a rejection: one sentence for each reason, the same in the page, and what was tried keeps the row."""

import re
from pathlib import Path

import pytest

from sftcli.config.schema.data import TrainOn
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import detect_schema
from sftcli.data.conversations.messages import Conversation, Rejected, RejectReason
from sftcli.data.conversations.remedies import NO_SYSTEM, OTHER_COLUMNS, REMEDIES, remedy_of
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.data.rendering.render import Renderer
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer, load_chat_tokenizer
from tests.support.chat import answer, conversation, family_tokenizer, system, user
from tests.support.tiny_tokenizer import CHATML, TEMPLATES, build_tiny_tokenizer

PAGE = Path(__file__).parents[4] / "docs" / "prepare.md"


def render(tokenizer: HFChatTokenizer, row: Conversation) -> Example | Rejected:
    return Renderer(tokenizer, max_tokens=10_000).render_example(row)


def test_every_reason_has_a_remedy_and_the_page_has_the_same():
    rows = re.findall(r"^\| `([a-z-]+)` \| .* \| (.*) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    told = {reason: text.replace("`", "") for reason, text in rows if reason in list(RejectReason)}
    assert told == {reason.value: REMEDIES[reason] for reason in RejectReason}


def test_training_the_last_answer_only_is_the_help_where_it_keeps_the_row(tmp_path):
    shy = CHATML.replace(
        "{% if add", "{% if messages|length == 1 %}{{ raise_exception('ask more') }}{% endif %}{% if add"
    )
    tokenizer = load_chat_tokenizer(build_tiny_tokenizer(tmp_path, template=shy))
    turns = (user("3 boxes?"), answer("12"), user("And 4?"), answer("16"))
    found = render(tokenizer, conversation(*turns))
    assert isinstance(found, Rejected)
    assert found.remedy == "train the last answer of each row only: --train-on last"
    kept = render(tokenizer, conversation(turns[0], answer("12", trained=False), *turns[2:]))
    assert isinstance(kept, Example)


@pytest.mark.parametrize(
    "turns", [(user("Hi"), answer("Hello")), (user("Hi"), answer("Yes"), user("Why?"), answer("So."))]
)
def test_a_system_text_is_named_where_the_row_is_kept_without_it(turns):
    tokenizer = family_tokenizer("gemma")
    found = render(tokenizer, conversation(system("Be brief."), *turns))
    assert isinstance(found, Rejected)
    assert (found.reason, found.remedy) == (RejectReason.TEMPLATE_REFUSED, NO_SYSTEM)
    assert isinstance(render(tokenizer, conversation(*turns)), Example)


def test_a_system_text_is_not_blamed_for_what_is_wrong_without_it_too():
    found = render(
        family_tokenizer("mistral"), conversation(system("Be brief."), user("a"), user("b"), answer("c"))
    )
    assert isinstance(found, Rejected)
    assert found.remedy == ""


@pytest.mark.parametrize(
    "turns", [(user("Hi"), answer("Hello")), (user("Hi"), answer("Yes"), user("Why?"), answer("So."))]
)
def test_the_token_that_ends_an_answer_is_named_with_its_id_and_naming_it_keeps_the_row(tmp_path, turns):
    template = (TEMPLATES / "gemma.jinja").read_text("utf-8")
    extra = {
        "template": template,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "extra_special": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    }
    deaf = load_chat_tokenizer(build_tiny_tokenizer(tmp_path / "deaf", **extra, stop_token="<eos>"))
    found = render(deaf, conversation(*turns))
    assert isinstance(found, Rejected)
    assert found.reason is RejectReason.NO_STOP_TOKEN
    assert "'<end_of_turn>'" in found.remedy
    assert f" {deaf.control_texts['<end_of_turn>']} to eos_token_id" in found.remedy
    heard = load_chat_tokenizer(build_tiny_tokenizer(tmp_path / "heard", **extra, stop_token="<end_of_turn>"))
    assert isinstance(render(heard, conversation(*turns)), Example)


def test_a_template_that_asks_otherwise_than_it_shows_is_to_be_changed(tmp_path):
    opens = CHATML.replace("<|im_start|>assistant\n' }}", "<|im_start|>assistant\nHm: ' }}")
    found = render(
        load_chat_tokenizer(build_tiny_tokenizer(tmp_path, template=opens)),
        conversation(user("Hi"), answer("Hello")),
    )
    assert isinstance(found, Rejected)
    assert (found.reason, found.remedy) == (RejectReason.SPAN_UNPROVABLE, "")
    assert "--template" in REMEDIES[found.reason]


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("good", "bad", "remedy"),
    [
        ({"prompt": "a", "response": "b"}, {"prompt": "a"}, OTHER_COLUMNS),
        ({"prompt": "a", "response": "b"}, {"prompt": "a", "response": 3}, OTHER_COLUMNS),
        ({"prompt": "a", "response": "b"}, {}, OTHER_COLUMNS),
        ({"messages": TURNS}, {"messages": 3}, OTHER_COLUMNS),
        ({"messages": TURNS}, {}, OTHER_COLUMNS),
        ({"messages": TURNS}, {"messages": [*TURNS[:1], {"role": "assistant"}]}, "missing-field"),
        ({"messages": TURNS}, {"messages": [*TURNS[:1], {"role": "assistant", "content": 3}]}, "wrong-type"),
    ],
)
def test_other_columns_are_named_where_a_column_is_at_fault(good, bad, remedy):
    records = [
        RawRecord(fields=fields, origin=Origin(path="a.jsonl", line=line))
        for line, fields in enumerate((good, bad, good), 1)
    ]
    schema = detect_schema(records)
    kept, found, again = [to_conversations(record, schema, train_on=TrainOn.ALL)[0] for record in records]
    assert not isinstance(kept, Rejected)
    assert not isinstance(again, Rejected)
    assert isinstance(found, Rejected)
    assert remedy_of(found) == (remedy if remedy == OTHER_COLUMNS else REMEDIES[RejectReason(remedy)])
