"""What scripts read: the keys of every ``--json`` object and of every event, and the types under them.

Real commands run on the tiny model, and what they print is written down by shape. A key may be added on purpose; one that
moves or goes breaks the scripts of others, so golden/surface/json.txt must not change without a word in CHANGELOG.md.
"""

import json
from collections.abc import Iterator
from dataclasses import fields
from typing import get_args

import pytest

from sftcli.events import Event
from sftcli.services.evaluate.tasks import TasksReport
from tests.cli.conftest import flags, rows, sft, tiny_model  # noqa: F401 - fixtures
from tests.support.golden import assert_golden

FREE = "(any name)"
OF_EXTRAS = {"rouge_l", "chrf"}  # null where their library is not installed
# Objects whose keys are data and not names of ours.
NAMED_BY_DATA = {
    "settings",
    "schemas",
    "paths",
    "seconds_of_a_run",
    "sources",
    "source_rows",
    "rejected",
    "rejected_rows",
    "remedies",
    "flagged_rows",
    "flags",
    "parts",
    "reasons",
    "counts",
}


def shape_of(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield every place in a JSON value with its type, such as ``runs[].step`` and ``int``."""
    if isinstance(value, dict):
        is_free = place.rpartition(".")[2] in NAMED_BY_DATA
        if not value:
            yield place, "{}"
        for key, item in value.items():
            name = FREE if is_free else key
            yield from shape_of(item, f"{place}.{name}" if place else name)
    elif isinstance(value, list):
        if not value:
            yield f"{place}[]", "-"
        for item in value:
            yield from shape_of(item, f"{place}[]")
    elif place.rpartition(".")[2] in OF_EXTRAS:
        yield place, "float | null"
    else:
        yield place, {"NoneType": "null", "str": "text"}.get(type(value).__name__, type(value).__name__)


def described(title: str, text: str) -> str:
    """Return the shape of one JSON object as lines under a title."""
    found: dict[str, set[str]] = {}
    for place, kind in shape_of(json.loads(text)):
        found.setdefault(place, set()).add(kind)
    return "\n".join([title, *(f"  {place}: {' | '.join(sorted(kinds))}" for place, kinds in found.items())])


def test_keys_of_json_objects_do_not_move(sft, flags, rows, tiny_model, tmp_path):  # noqa: F811
    runs, text = ["--runs", tmp_path / "runs"], tmp_path / "text.txt"
    text.write_text("some running text")
    commands = [
        ("sft prepare ROWS --show 1", ["prepare", rows, "--show", "1", "--model", tiny_model]),
        ("sft try ROWS", ["try", rows, "--model", tiny_model, "--max-rows", "4", "--shots", "2"]),
        ("sft train --plan", ["train", "--data", rows, *flags, "--plan"]),
        ("sft train", ["train", "--data", rows, *flags, "--run", "one", "--set", "checkpoint.every_steps=2", "--set", "data.heldout_fraction=0.4", "--set", "training.eval_answers=2"]),
        ("sft train --print-config", ["train", "--print-config"]),
        ("sft train --compare", ["train", "--data", rows, *flags, "--run", "two", "--compare", "rows=50%,100%", "--max-steps", "2"]),
        ("sft train --compare --plan", ["train", "--data", rows, *flags, "--compare", "rows=50%,100%", "--plan"]),
        ("sft resume --verify", ["resume", "one", *runs, "--verify"]),
        ("sft generate PROMPT", ["generate", "a", "--max-new-tokens", "2", *runs]),
        ("sft generate PROMPT --samples 2", ["generate", "a", "--max-new-tokens", "2", "--samples", "2", *runs]),
        ("sft generate --file", ["generate", "--file", rows, "--out", "a.jsonl", "--max-new-tokens", "2", *runs]),
        ("sft eval", ["eval", *runs, "--max-rows", "4", "--try", "--shots", "2"]),
        ("sft eval --text", ["eval", *runs, "--text", text]),
        ("sft export", ["export", "--to", "hf", "--out", "hf", *runs]),
        ("sft report", ["report", *runs]),
        ("sft report --rows", ["report", *runs, "--rows"]),
        ("sft runs", ["runs", tmp_path / "runs"]),
        ("sft show", ["show", *runs]),
        ("sft diff", ["diff", "one", "one", *runs]),
        ("sft presets", ["presets"]),
        ("sft presets NAME", ["presets", "gpu"]),
        ("sft env", ["env"]),
        ("any failure", ["train", "--preset", "qick"]),
    ]  # fmt: skip
    told = []
    for title, arguments in commands:
        _, out, _ = sft(*arguments, "--json")
        told.append(described(title, out))
    names = ", ".join(field.name for field in fields(TasksReport))
    told.append(f"sft eval --tasks\n  {names}")
    assert_golden("surface/json.txt", "\n\n".join(told) + "\n")


def test_names_of_events_and_their_keys_do_not_move():
    kinds = [
        f"{kind.__name__}: {', '.join(f'{field.name} {_name(field.type)}' for field in fields(kind))}"
        for kind in get_args(Event)
    ]
    assert_golden("surface/events.txt", "every event has: event str, time str\n" + "\n".join(kinds) + "\n")


def _name(kind: object) -> str:
    is_generic = hasattr(kind, "__args__")
    return str(kind) if is_generic else getattr(kind, "__name__", str(kind))


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--pakcing"], ["show", "no-such-run"], ["eval"]])
def test_a_failure_is_one_object_with_the_exit_code_of_the_process(sft, arguments):  # noqa: F811
    code, out, err = sft(*arguments, "--json")
    assert (json.loads(out)["ok"], json.loads(out)["exit_code"], err) == (False, code, "")
