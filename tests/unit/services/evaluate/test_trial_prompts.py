"""Prompts with examples: what stands in them, in every format of rows, and what never does."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from sftcli.config.resolve import parse_set, resolve
from sftcli.data.quality.duplicates import HASHES, NEAR, Marks, repeated_in
from sftcli.errors import DataError, UsageError
from sftcli.events import NeverStop, Notice, Session
from sftcli.services.evaluate.trial.trial import (
    ALONE,
    NEAREST,
    RANDOM,
    TrialPrompts,
    TrialRequest,
    make_prompts,
    rows_with_messages,
)
from sftcli.services.models.choose import start_of
from tests.support.tiny_model import build_tiny_model, tiny_config
from tests.support.tiny_tokenizer import build_family_tokenizer

Row = tuple[str, str]
SHOTS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    return folder


class Prompts:
    """The prompts that were made, as text, and what was told."""

    def __init__(self, model: Path, *changes: str, shots: int = SHOTS, most_tokens: int = 8000) -> None:
        self.told: list[str] = []
        session = Session(self._hear, NeverStop())
        sets = [parse_set(text) for text in (f"model.name={model}", *changes)]
        settings = resolve(preset=None, config_file=None, overrides=sets, environ={}).settings
        request = TrialRequest(
            settings=settings, shots=shots, max_rows=60, max_prompt_tokens=most_tokens, precision="fp32"
        )
        choice = start_of(settings, session.emit)
        prepared = rows_with_messages(settings, choice, session)
        self.made: TrialPrompts = make_prompts(request, choice, prepared, session)
        self.tokenizer = prepared.tokenizer

    def _hear(self, event: object, /) -> None:
        if isinstance(event, Notice):
            self.told.append(event.text)

    def texts(self, way: str) -> list[str]:
        made = self.made.ways[way]
        return [self.tokenizer.decode(one.question.prompt_ids, skip_special=False) for one in made]


def turns(user: str, answer: str, *, role: str, text: str, names: tuple[str, str]) -> list[dict[str, str]]:
    return [{role: names[0], text: user}, {role: names[1], text: answer}]


def messages(question: str, answer: str) -> list[dict[str, str]]:
    return turns(question, answer, role="role", text="content", names=("user", "assistant"))


FORMATS: dict[str, Callable[[str, str], dict[str, object]]] = {
    "question_answer": lambda q, a: {"question": q, "answer": a},
    "prompt_response": lambda q, a: {"prompt": q, "response": a},
    "prompt_completion": lambda q, a: {"prompt": q, "completion": a},
    "alpaca": lambda q, a: {"instruction": "Say it.", "input": q, "output": a},
    "alpaca_history": lambda q, a: {"instruction": "And?", "output": a, "history": [[q, f"no, {a}"]]},
    "dolly": lambda q, a: {"instruction": "Say it.", "context": q, "response": a},
    "input_output": lambda q, a: {"input": q, "output": a},
    "openorca": lambda q, a: {"system_prompt": "Be brief.", "question": q, "response": a},
    "sharegpt": lambda q, a: {
        "conversations": turns(q, a, role="from", text="value", names=("human", "gpt"))
    },
    "messages": lambda q, a: {"messages": messages(q, a)},
    "messages_of_several_turns": lambda q, a: {"messages": messages(q, f"no, {a}") + messages("And?", a)},
    "messages_with_system": lambda q, a: {
        "messages": [{"role": "system", "content": "Be brief."}, *messages(q, a)]
    },
    "preference": lambda q, a: {"prompt": q, "chosen": a, "rejected": "no"},
    "openai_preference": lambda q, a: {
        "input": {"messages": messages(q, a)[:1]},
        "preferred_output": messages(q, a)[1:],
        "non_preferred_output": messages(q, "no")[1:],
    },
    "instances": lambda q, a: {"instruction": q, "instances": [{"input": "", "output": a}]},
}


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def words(count: int, seed: int) -> str:
    """Return words that no other seed gives."""
    letters = random.Random(seed)
    return " ".join("".join(letters.choices("abcdefghijklm", k=5)) for _ in range(count))


HELD = [(f"Which is held{number:02d}? {words(3, number)}", f"{words(2, 100 + number)}.") for number in range(5)]  # fmt: skip
HELD[0] = (HELD[0][0], words(60, 200))
TRAINED = [(f"Which is own{number:02d}? {words(3, 300 + number)}", f"{words(2, 400 + number)}.") for number in range(9)]  # fmt: skip
# A near copy under another prompt, a copy in other letters and spaces, and another answer to a held-out prompt.
NEAR_COPY = (HELD[0][0].replace("Which", "What"), HELD[0][1].replace(HELD[0][1].split()[30], "pear"))
REPEATS = [NEAR_COPY, (HELD[1][0].upper() + " ", HELD[1][1].upper()), (HELD[2][0], "something else.")]


def files(folder: Path, fields: Callable[[str, str], dict[str, object]]) -> tuple[str, ...]:
    """Write held-out rows, and training rows among which some repeat them; return the settings that name both."""
    train = write_jsonl(folder / "train.jsonl", [fields(*row) for row in (*REPEATS, *TRAINED)])
    held = write_jsonl(folder / "held.jsonl", [fields(*row) for row in HELD])
    return (
        f"data.sources={train}",
        f"data.heldout_sources={held}",
        "data.allow_leak=true",
        "data.max_tokens=4096",
    )


def assert_nothing_held_out(prompts: Prompts) -> None:
    """See that the examples hold no text of a held-out row, and that there are as many as were asked for."""
    marks = re.compile(r"(?i)held\d\d")
    secrets = [answer for _, answer in HELD]
    for way in (RANDOM, NEAREST):
        for alone, made, shown in zip(
            prompts.texts(ALONE), prompts.texts(way), prompts.made.ways[way], strict=True
        ):
            assert shown.shots == SHOTS
            assert made.endswith(alone[-60:])
            assert marks.findall(made) == marks.findall(alone)
            assert len(set(re.findall(r"own\d\d", made))) == SHOTS
            lowered = made.casefold()
            assert sum(lowered.count(secret.casefold()[:20]) for secret in secrets) == sum(
                alone.casefold().count(secret.casefold()[:20]) for secret in secrets
            )


@pytest.mark.parametrize("name", FORMATS)
def test_no_example_repeats_a_held_out_row_in_any_format(model: Path, tmp_path: Path, name: str):
    prompts = Prompts(model, *files(tmp_path, FORMATS[name]))
    assert len(prompts.made.ways[ALONE]) == len(HELD)
    assert prompts.made.repeats == len(REPEATS)
    assert f"{len(REPEATS)} training rows are no examples: they repeat a held-out row" in prompts.told
    assert_nothing_held_out(prompts)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_no_example_repeats_a_held_out_row_in_any_kind_of_file(model: Path, tmp_path: Path, suffix: str):
    fields = FORMATS["question_answer"]
    train = write_table(tmp_path / f"train{suffix}", [fields(*row) for row in (*REPEATS, *TRAINED)])
    held = write_table(tmp_path / f"held{suffix}", [fields(*row) for row in HELD])
    named = (f"data.sources={train}", f"data.heldout_sources={held}", "data.allow_leak=true")
    assert_nothing_held_out(Prompts(model, *named))


def test_rows_are_split_as_prepare_splits_them(model: Path, tmp_path: Path):
    rows = write_jsonl(
        tmp_path / "rows.jsonl", [FORMATS["question_answer"](*row) for row in (*HELD, *TRAINED)]
    )
    prompts = Prompts(model, f"data.sources={rows}", "data.heldout_fraction=0.3")
    asked = {one.question.expected for one in prompts.made.ways[ALONE]}
    assert len(asked) == 4
    shown = {
        answer for _, answer in (*HELD, *TRAINED) if any(answer in text for text in prompts.texts(RANDOM))
    }
    assert shown
    assert not asked & shown


def test_the_nearest_row_stands_last_and_nothing_else_of_the_question_moves(model: Path, tmp_path: Path):
    near = [(f"{question} now", f"own{number}") for number, (question, _) in enumerate(HELD)]
    train = write_jsonl(
        tmp_path / "train.jsonl", [FORMATS["openorca"](*row) for row in (*TRAINED, *near, *TRAINED)]
    )
    held = write_jsonl(tmp_path / "held.jsonl", [FORMATS["openorca"](*row) for row in HELD])
    prompts = Prompts(model, f"data.sources={train}", f"data.heldout_sources={held}")
    for alone, made, (question, answer) in zip(
        prompts.texts(ALONE), prompts.texts(NEAREST), near, strict=True
    ):
        system, _, asked = alone.partition("<|im_start|>user")
        last = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        assert made.startswith(system)
        assert made.count("<|im_start|>system") == 1
        assert made.endswith(f"{last}<|im_start|>user{asked}")
        assert len(set(made.split("<|im_start|>"))) == len(made.split("<|im_start|>"))  # no row twice


def test_rows_of_other_system_texts_are_no_examples(model: Path, tmp_path: Path):
    def fields(system: str, row: Row) -> dict[str, object]:
        return FORMATS["openorca"](*row) | {"system_prompt": system}

    train = [fields("Be brief.", row) for row in TRAINED[:2]] + [
        fields("Be long.", row) for row in TRAINED[2:]
    ]
    held = [fields("Be brief.", row) for row in HELD[:2]] + [fields("Be rude.", row) for row in HELD[2:]]
    named = (
        f"data.sources={write_jsonl(tmp_path / 'train.jsonl', train)}",
        f"data.heldout_sources={write_jsonl(tmp_path / 'held.jsonl', held)}",
    )
    prompts = Prompts(model, *named)
    assert [one.shots for one in prompts.made.ways[RANDOM]] == [2, 2, 0, 0, 0]
    assert prompts.made.ways[NEAREST][4].question == prompts.made.ways[ALONE][4].question
    assert not any("Be long." in text for text in prompts.texts(RANDOM))
    why = "no more training rows have their system text and tools"
    assert f"10 of 10 prompts have fewer than 4 examples: {why}" in prompts.told


def test_examples_that_do_not_fit_are_left_out_and_told(model: Path, tmp_path: Path):
    named = files(tmp_path, FORMATS["question_answer"])
    whole = Prompts(model, *named)
    longest = max(len(one.question.prompt_ids) for one in whole.made.ways[NEAREST])
    prompts = Prompts(model, *named, most_tokens=longest - 1)
    for way in (RANDOM, NEAREST):
        for one, unclipped in zip(prompts.made.ways[way], whole.made.ways[way], strict=True):
            assert len(one.question.prompt_ids) <= longest - 1
            assert one.is_clipped == (len(unclipped.question.prompt_ids) >= longest)
            assert one.shots == (SHOTS - 1 if one.is_clipped else SHOTS)
    assert any(f"more than {longest - 1:,} tokens are not allowed" in text for text in prompts.told)


def test_a_prompt_leaves_room_for_an_answer_within_the_positions(model: Path, tmp_path: Path):
    short = build_tiny_model(tmp_path / "short")
    prompts = Prompts(short, *files(tmp_path, FORMATS["question_answer"]))
    longest = max(len(one.question.answer_ids) for one in prompts.made.ways[ALONE])
    assert prompts.made.room == 512 - longest - 8
    assert Prompts(short, *files(tmp_path, FORMATS["question_answer"]), shots=0).made.ways.keys() == {ALONE}


REFUSING = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
TEMPLATES = {
    "refuses": (REFUSING, "one turn only"),
    "forgets": ("{% set messages = messages[-2:] if messages[-1].role == 'assistant' else messages[-1:] %}", "it leaves them out"),
}  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_where_every_training_row_repeats_a_held_out_one_that_is_the_reason(model: Path, tmp_path: Path):
    rows = [FORMATS["question_answer"](question.lower(), answer) for question, answer in HELD]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    held = write_jsonl(tmp_path / "held.jsonl", [FORMATS["question_answer"](*row) for row in HELD])
    named = (f"data.sources={train}", f"data.heldout_sources={held}", "data.allow_leak=true")
    with pytest.raises(
        DataError, match=r"no prompt can have an example: .* without the 5 that repeat"
    ) as refused:
        Prompts(model, *named)
    assert "--shots 0" in refused.value.hint


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_takes_no_earlier_turns_is_refused_by_name(model: Path, tmp_path: Path, name: str):
    habit, why = TEMPLATES[name]
    if name == "refuses":
        habit = habit.replace("messages|length > 1", "messages|length > 2")
    template = tmp_path / "habit.jinja"
    template.write_text(habit + CHATML, encoding="utf-8")
    named = (*files(tmp_path, FORMATS["question_answer"]), f"data.template={template}")
    with pytest.raises(UsageError, match=rf"habit.jinja takes no earlier turns \({why}\)"):
        Prompts(model, *named)
    assert len(Prompts(model, *named, shots=0).made.ways[ALONE]) == len(HELD)


def test_rows_that_are_no_turns_are_refused_by_name(model: Path, tmp_path: Path):
    tokens = [{"input_ids": [5, 6, 7, 2], "labels": [-100, -100, 7, 2]} for _ in range(9)]
    with pytest.raises(DataError, match=r"rows.jsonl:1: as messages") as refused:
        Prompts(model, f"data.sources={write_jsonl(tmp_path / 'rows.jsonl', tokens)}")
    assert "token ids" in refused.value.hint
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": words(9, number)} for number in range(9)])
    with pytest.raises(DataError, match="pretraining text"):
        Prompts(model, f"data.sources={text}", "data.heldout_fraction=0.3")


def test_held_out_rows_whose_answer_begins_before_it_is_asked_for_are_left_out_and_told(
    model: Path, tmp_path: Path
):
    def fields(question: str, answer: str) -> dict[str, object]:
        parts = [{"type": "text", "text": "So: ", "weight": 0}, {"type": "text", "text": answer}]
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]}

    held = [fields(*HELD[0]), *(FORMATS["messages"](*row) for row in HELD[1:])]
    train = write_jsonl(tmp_path / "train.jsonl", [FORMATS["messages"](*row) for row in TRAINED])
    some = write_jsonl(tmp_path / "some.jsonl", held)
    none = write_jsonl(tmp_path / "none.jsonl", held[:1])
    prompts = Prompts(model, f"data.sources={train}", f"data.heldout_sources={some}")
    assert len(prompts.made.ways[ALONE]) == len(HELD) - 1
    assert any(text.startswith("1 of 5 held-out rows are not asked") for text in prompts.told)
    with pytest.raises(DataError, match="none of 1 held-out rows can be asked"):
        Prompts(model, f"data.sources={train}", f"data.heldout_sources={none}")


def test_a_model_that_is_trained_not_to_think_is_asked_not_to_think(tmp_path: Path):
    config = tiny_config()
    config.vocab_size, config.max_position_embeddings = 640, 8192
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    model = build_family_tokenizer(tmp_path / "model", "qwen3")

    def fields(question: str, answer: str) -> dict[str, object]:
        asked, answered = messages(question, answer)
        return {"messages": [asked, answered | {"reasoning_content": f"Hm, {answer}"}]}

    prompts = Prompts(model, *files(tmp_path, fields), 'data.thinking="drop"')
    theirs = AutoTokenizer.from_pretrained(model)
    turn = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", re.DOTALL)
    for way, shots in ((ALONE, 0), (NEAREST, SHOTS)):
        for one, text in zip(prompts.made.ways[way], prompts.texts(way), strict=True):
            turns = [{"role": role, "content": content} for role, content in turn.findall(text)]
            assert len(turns) == 2 * shots + 1
            assert list(one.question.prompt_ids) == theirs.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=False
            ) + theirs.encode("<think>\n\n</think>\n\n", add_special_tokens=False)


def test_every_row_at_the_limit_or_above_it_is_found_and_no_other():
    """Signatures with any number of hashes apart, at any places, against a look at every pair."""
    numbers = np.random.default_rng(1)
    others = numbers.integers(0, 1 << 16, size=(20, HASHES), dtype=np.uint16)
    rows = others[numbers.integers(0, 20, size=400)].copy()
    for row, apart in zip(rows, numbers.integers(0, 30, size=400), strict=True):
        row[numbers.choice(HASHES, size=apart, replace=False)] ^= 1
    keys = np.arange(420, dtype=np.uint64)
    keys[7] = 405  # equal in all but the signature
    found = repeated_in(Marks(keys=keys[:400], signatures=rows), Marks(keys=keys[400:], signatures=others))
    wanted = np.array([max((row == other).mean() for other in others) >= NEAR for row in rows])
    wanted[7] = True
    assert 100 < wanted.sum() < 300
    assert (found == wanted).all()
