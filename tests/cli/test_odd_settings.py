"""Settings come by files too, which can hold texts that no command line carries: a NUL, half a character."""

import json
from pathlib import Path

import pytest

from sftcli.config.schema.settings import FIELDS
from tests.support.runs import write_rows

ODD = {
    "NUL": "a\0b",
    "half a character": "half\ud800",
    "300 letters": "x" * 300,
    "no such user": "~nosuchuser/x",
}
# Texts that name no place. A new setting that is a text is one, or belongs here.
NO_PATHS = {
    *("model.revision", "model.new_tokens", "data.leave_out", "data.renames", "data.ignored_keys", "data.where"),
    *("data.template_variables", "data.score_column", "training.train", "training.freeze", "adapter.target_modules", "sampling.stop"),
}  # fmt: skip
PATHS = [key for key, field in FIELDS.items() if "str" in str(field.annotation) and key not in NO_PATHS]


def settings_with(key: str, text: str, model: Path) -> dict[str, dict[str, object]]:
    tables: dict[str, dict[str, object]] = {
        "model": {"name": str(model)},
        "data": {"sources": ["rows.jsonl"]},
        "adapter": {"kind": "lora"},
    }
    section, name = key.split(".")
    tables.setdefault(section, {})[name] = [text] if "tuple" in str(FIELDS[key].annotation) else text
    return tables


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("key", PATHS)
def test_text_that_can_be_no_path_is_a_fault_of_the_settings(sft, tiny_model, key, odd):
    write_rows(Path("rows.jsonl"))
    Path("c.json").write_text(json.dumps(settings_with(key, ODD[odd], tiny_model)), encoding="utf-8")
    code, _, err = sft("train", "--config", "c.json", "--plan")
    assert code in {2, 66}, err
    assert "c.json:None" not in err


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("c.toml", '[data]\ntemplate = "a\\u0000b"\n'),
        ("c.yaml", 'data:\n  template: "a\\0b"\n'),
        ("c.json", '{"data": {"template": "a\\u0000b"}}'),
    ],
)
def test_a_nul_in_the_name_of_a_template_is_said_for_each_form_of_settings(sft, tiny_model, file, text):
    write_rows(Path("rows.jsonl"))
    Path(file).write_text(text, encoding="utf-8")
    code, _, err = sft("train", "--config", file, "--data", "rows.jsonl", "--model", tiny_model)
    assert (code, "holds a NUL" in err) == (2, True), err


def test_a_setting_whose_line_is_not_known_is_told_with_its_file_alone(sft):
    Path("c.json").write_text('{"run": {"root": "half\\ud800"}}', encoding="utf-8")
    code, _, err = sft("train", "--config", "c.json")
    assert code == 2
    assert "c.json: run.root is" in err
