"""What a person should see under templates of one habit each: trained text in ⟦ ⟧, for each setting of thinking where that differs."""

import functools
import json
import tempfile
from pathlib import Path

import pytest

from sftcli.config.schema.data import Thinking
from sftcli.data.conversations.messages import Conversation
from sftcli.data.example import Example
from sftcli.data.rendering.render import Renderer, encode_prompt
from sftcli.modeling.tokenizer.chat_tokenizer import HFChatTokenizer, load_chat_tokenizer
from tests.models.tokens import HABITS, tokens_of
from tests.support.chat import answer, conversation, marked, system, tool, user
from tests.support.golden import assert_golden
from tests.support.tiny_tokenizer import build_tiny_tokenizer

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
def habit_tokenizer(name: str) -> HFChatTokenizer:
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
        return load_chat_tokenizer(Path(folder))


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
