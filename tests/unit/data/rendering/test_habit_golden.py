"""What a person should see under templates of one habit each: trained text in ⟦ ⟧, for each setting of thinking where that differs."""

import functools
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sftcli.config.schema.data import Thinking, TrainOn
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import detect_schema
from sftcli.data.conversations.messages import Conversation, Rejected
from sftcli.data.conversations.remedies import remedy_of
from sftcli.data.example import Example
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.data.reading.records import read_records
from sftcli.data.reading.source import parse_source
from sftcli.data.rendering.encode import encode_prompt
from sftcli.data.rendering.render import Renderer
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer, load_chat_tokenizer
from tests.models.rows import read_rows
from tests.models.tokens import HABITS, tokens_of
from tests.support.chat import answer, conversation, family_tokenizer, marked, system, tool, user
from tests.support.followed import options_in
from tests.support.golden import assert_golden
from tests.support.tiny_tokenizer import build_tiny_tokenizer

SHARED = Path(__file__).parents[4].parent / "shared" / "data"
CALL = json.dumps([{"id": "c1", "function": {"name": "add", "arguments": {"a": 2, "note": 'say "hi"'}}}])
TOOLS = json.dumps([{"type": "function", "function": {"name": "add"}}])
TURNS = conversation(system("Be brief."), user("2 + 2?"), answer("4"), user("And 3 + 3?"), answer("6"))
SPACED = conversation(user(" Hi \n"), answer("\n  Hello. \n"))
CALLED = conversation(
    user("2 + 2?"),
    answer("I add.", tool_calls=CALL),
    tool('{"sum": "4"}\n'),
    answer("It is 4."),
    tools=TOOLS,
)
THINKING = conversation(
    user("2 + 2?"), answer("Four.", thinking="Easy."), user("Sure?"), answer("Yes.", thinking="Very.")
)
ROWS: dict[str, dict[str, Conversation]] = {
    "calls-first": {"a tool call": CALLED},
    "channels": {"two turns": TURNS, "thinking": THINKING},
    "json-results": {"a tool call": CALLED},
    "late-system": {"system and two turns": TURNS},
    "named-again": {"a tool call": CALLED},
    "no-stop-between": {"two turns": TURNS},
    "prompt-closes-thought": {"two turns": TURNS, "thinking": THINKING},
    "prompt-opens-thought": {"two turns": TURNS, "thinking": THINKING},
    "prompt-sentence": {"two turns": TURNS},
    "rstrip": {"two turns": TURNS, "white space around contents": SPACED},
    "token-before-stop": {"two turns": TURNS, "white space around contents": SPACED},
    "trimmed": {"system and two turns": TURNS, "white space around contents": SPACED},
    "two-stops": {"a tool call": CALLED},
}


@functools.cache
def habit_tokenizer(name: str, **variables: Any) -> HFChatTokenizer:
    tokens = tokens_of(f"habit-{name}")
    assert tokens
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_tokenizer(
            Path(folder),
            template=(HABITS / f"habit-{name}.jinja").read_text("utf-8"),
            bos_token="<|turn|>",
            eos_token=tokens["eos"],
            pad_token=None,
            stop_token=tokens.get("stop", [tokens["eos"]])[-1],
            extra_special=tuple(tokens["special"]),
            swallowing=tuple(tokens.get("swallowing", ())),
        )
        return load_chat_tokenizer(Path(folder), variables=variables)


def shown(title: str, row: Conversation, tokenizer: HFChatTokenizer, thinking: Thinking) -> list[str]:
    blocks = []
    for result in Renderer(tokenizer, max_tokens=9999, thinking=thinking).render_batch([row]).results:
        if isinstance(result, Example):
            flags = f" ({', '.join(sorted(result.flags))})" if result.flags else ""
            blocks.append(f"# {title}: kept{flags}\n{marked(result, tokenizer)}")
        else:
            help_ = f"\n{result.remedy}" if result.remedy else ""
            blocks.append(f"# {title}: {result.reason.value}\n{result.detail}{help_}")
    return blocks


@pytest.mark.parametrize("habit", ROWS)
def test_masks_under_each_habit_are_what_a_person_read_and_found_good(habit: str):
    tokenizer = habit_tokenizer(habit)
    blocks = []
    for title, row in ROWS[habit].items():
        modes = list(Thinking) if title == "thinking" else [Thinking.TRAIN]
        for mode in modes:
            name = f"{title}, --thinking {mode.value}" if title == "thinking" else title
            blocks += shown(name, row, tokenizer, mode)
    assert_golden(f"masks/habit-{habit}.txt", "\n\n".join(block.rstrip("\n") for block in blocks) + "\n")


def test_every_template_of_a_habit_has_its_rows():
    assert {f"habit-{name}.jinja" for name in ROWS} == {file.name for file in HABITS.glob("*.jinja")}


def test_rows_of_a_habit_are_cut_where_generation_starts():
    """The tokens in front of an answer are those of the prompt alone, also behind a token that swallows white space."""
    tokenizer = habit_tokenizer("rstrip")
    (example,) = Renderer(tokenizer, max_tokens=9999).render_batch([SPACED]).results
    assert isinstance(example, Example)
    ids = encode_prompt(tokenizer, SPACED.messages[:1])
    assert example.input_ids[: len(ids)].tolist() == ids
    assert not example.loss_mask[: len(ids)].any()
    assert example.loss_mask[len(ids)]


@pytest.mark.parametrize("habit", ROWS)
def test_following_the_help_of_a_refusal_keeps_the_row(habit: str):
    told = []
    for row, record in zip(read_rows(), records_of([row.fields for row in read_rows()]), strict=True):
        refused = followed(record, functools.partial(habit_tokenizer, habit))
        told += [f"{row.name}: {refused.reason.value}: {remedy_of(refused)}"] if refused else []
    assert_golden(f"masks/help-{habit}.txt", "\n".join(told or ["nothing is refused"]) + "\n")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data files are not here")
@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral", "gemma", "qwen3"])
def test_following_the_help_keeps_rows_of_real_files(family: str):
    files = [file for file in SHARED.glob("*/*.json*") if file.parent.name != "text"]
    assert files
    for file in files:
        for record in itertools.islice(read_records(parse_source(str(file)), seed=0), 5):
            followed(record, lambda **variables: family_tokenizer(family))


def records_of(rows: list[dict[str, Any]]) -> list[RawRecord]:
    return [
        RawRecord(fields=fields, origin=Origin(path="rows", line=line)) for line, fields in enumerate(rows, 1)
    ]


def followed(record: RawRecord, tokenizer: Callable[..., HFChatTokenizer]) -> Rejected | None:
    """Return the refusal of a row after its help was followed, where that names settings; None where the row is kept."""
    refused = kept_or_refused(record, tokenizer())
    if refused and (options := options_in(refused.remedy)):
        again = kept_or_refused(record, tokenizer(**options.pop("variables", {})), **options)
        assert again is None, (refused, again)
    return refused


def kept_or_refused(
    record: RawRecord,
    tokenizer: HFChatTokenizer,
    *,
    train_on: TrainOn = TrainOn.ALL,
    thinking: Thinking = Thinking.TRAIN,
) -> Rejected | None:
    marks = TrainOn.ALL if train_on is TrainOn.EACH else train_on
    rows = to_conversations(record, detect_schema([record]), train_on=marks)
    renderer = Renderer(tokenizer, max_tokens=99_999, train_on=train_on, thinking=thinking)
    results = [result for row in rows for result in renderer.render_batch([row]).results]
    return next((result for result in results if isinstance(result, Rejected)), None)
