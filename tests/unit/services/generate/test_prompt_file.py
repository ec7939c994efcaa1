"""Files of prompts: what is asked is read, or the row is refused by name."""

import json

import pytest

from sftcli.errors import DataError
from sftcli.services.generate.prompt_file import read_prompts

ASKED = {"role": "user", "content": "And now?"}
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def read(tmp_path):
    def run(row, **options):
        path = tmp_path / "prompts.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        (prompt,) = read_prompts(path, system="", **options)
        return [(turn.role, turn.content) for turn in prompt.messages]

    return run


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("history", {"instruction": "Shorter.", "history": [["Long?", "Rain."]]}),
        ("chat_template_kwargs", {"messages": [ASKED], "chat_template_kwargs": {"enable_thinking": False}}),
        ("images", {"prompt": "What is this?", "images": ["a.png"]}),
        ("tools", {"messages": [ASKED], "tools": [{"name": "f"}]}),
        ("context", {"question": "How long?", "context": "The bridge is 40 m long."}),
        ("input", {"prompt": "Translate.", "input": "Hallo"}),
        ("context", {"instruction": "Compare.", "input": "This", "context": "That"}),
        ("reasoning", {"messages": [*EARLIER, ASKED | {"reasoning": "Hm."}]}),
        ("tools", {"messages": [{"role": "system", "content": "Help.", "tools": [{"name": "f"}]}, ASKED]}),
    ],
)
def test_row_that_asks_something_that_is_not_read_is_refused_and_asked_without_it(read, key, row):
    with pytest.raises(DataError) as caught:
        read(row)
    assert caught.value.message.startswith(f'"{key}"')
    assert caught.value.location.line == 1
    assert caught.value.hint.endswith(f"--ignore {key}")
    assert read(row, ignored=[key])


def test_calls_of_tools_are_refused(read):
    with pytest.raises(DataError, match='"tool_calls" of turns is not read'):
        read({"messages": [EARLIER[0], EARLIER[1] | {"tool_calls": [{"name": "f"}]}, ASKED]})


@pytest.mark.parametrize(
    "keys",
    [
        {"weight": 0, "train": False},
        {"label": False},
        {"tools": [], "history": None, "images": [], "context": ""},
        {"id": 3, "answer": "Yes", "reasoning": "Hm.", "completion": "No"},
    ],
)
def test_what_is_said_of_answers_and_training_changes_no_prompt(read, keys):
    assert read({"prompt": "Hi", **keys}) == [("user", "Hi")]
    marked = EARLIER[1] | {key: keys[key] for key in keys if key in ("weight", "train")}
    assert read({"messages": [EARLIER[0], marked, ASKED, EARLIER[1]], **keys})[1:] == [
        ("assistant", "Hello"),
        ("user", "And now?"),
    ]


def test_system_texts_and_what_a_prompt_is_about_are_read_as_in_training(read):
    assert read(
        {"instruction": "How long?", "context": "The bridge is 40 m long.", "system_prompt": "Be brief."}
    ) == [
        ("system", "Be brief."),
        ("user", "How long?\n\nThe bridge is 40 m long."),
    ]
    assert read({"messages": [ASKED], "system": "Be brief."}) == [
        ("system", "Be brief."),
        ("user", "And now?"),
    ]
