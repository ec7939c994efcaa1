"""Files behind --config: our own shape in three notations gives the same settings, and those of other trainers are read or refused by key."""

import json
import string
from contextlib import suppress

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftcli.config.foreign_config import _EXPECTED, _INSTEAD, ROWS, read_foreign
from sftcli.config.foreign_names import OURS
from sftcli.config.layers import Override
from sftcli.config.resolve import resolve
from sftcli.config.schema.settings import FIELDS, Settings
from sftcli.errors import NotFoundError, UsageError

OWN = {
    "training": {"learning_rate": 2e-5, "max_steps": 7, "packing": "on"},
    "data": {"sources": ["a.jsonl", "b.csv"], "heldout_fraction": 0.1},
    "run": {"name": "no"},
}
YAML = """\
training:
  learning_rate: 2e-5
  max_steps: 7
  packing: on
data:
  sources: [a.jsonl, b.csv]
  heldout_fraction: .1
run:
  name: no   # a word, and not false
"""
TRL = """\
model_name_or_path: org/model
dataset_name: org/rows
learning_rate: 2.0e-4
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
packing: true
use_peft: true
lora_r: 32
lora_target_modules: all-linear
output_dir: out/mine
report_to: none
bf16: true
eval_strategy: steps
eval_steps: 50
resume_from_checkpoint: null
"""
AXOLOTL = """\
base_model: org/model
adapter: qlora
load_in_4bit: true
datasets:
  - path: rows.jsonl
    type: alpaca
val_set_size: 0.05
sequence_len: 4096
sample_packing: true
lora_r: 16
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
wandb_project:
flash_attention: true
train_on_inputs: false
"""
FACTORY = """\
model_name_or_path: org/model
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
dataset: identity
template: llama3
cutoff_len: 2048
max_samples: 1000
learning_rate: 1.0e-4
"""


def settings_of(tmp_path, name: str, text: str):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return resolve(preset=None, config_file=path, overrides=(), environ={})


def test_one_configuration_in_three_notations_is_the_same_settings(tmp_path):
    texts = {"c.toml": tomli_w.dumps(OWN), "c.json": json.dumps(OWN, indent=1), "c.yaml": YAML, "c.yml": YAML}
    found = {name: settings_of(tmp_path, name, text) for name, text in texts.items()}
    assert {resolved.settings for resolved in found.values()} == {found["c.toml"].settings}
    assert found["c.toml"].settings.run.name == "no"
    assert found["c.yaml"].origins["training.max_steps"] == f"{tmp_path}/c.yaml:3"
    assert found["c.json"].origins["training.max_steps"] == f"{tmp_path}/c.json:4"


@pytest.mark.parametrize("name", ["c.toml", "c.yaml", "c.json"])
def test_a_file_without_one_known_key_is_refused(tmp_path, name):
    text = {"c.toml": "foo = 1\n", "c.yaml": "foo: 1\n", "c.json": '{"foo": 1}'}[name]
    with pytest.raises(UsageError, match=r":1: unknown key 'foo'"):
        settings_of(tmp_path, name, text)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("c.yaml", "training:\n  learning_rat: 1\n", r"c\.yaml:2: unknown key 'training\.learning_rat'"),
        ("c.yaml", "training: [\n", r"c\.yaml:2:1: broken YAML"),
        ("c.yaml", "- a\n", r"expected one YAML document"),
        ("c.yaml", "a: 1\n---\nb: 1\n", r"expected one YAML document"),
        ("c.yaml", "a: &b [1]\nc: [*b, *b]\n", r"c\.yaml:2: the alias \*b repeats a list"),
        ("c.yaml", "a: !!python/name:os.system x\n", r"could not determine a constructor"),
        ("c.yaml", "training:\n  7: 1\n", r"c\.yaml:2: unknown key 'training\.7'"),
        ("c.yaml", "training:\n  yes please: 1\n  true: 1\n", r"c\.yaml:3: unknown key 'training\.true'"),
        ("c.yaml", "training:\n  ? [a]\n  : 1\n", r"c\.yaml:2:5: broken YAML: found unhashable key"),
        ("c.yaml", "7: 1\n", r"c\.yaml:1: unknown key '7'"),
        ("c.yaml", "training:\n  max_steps: !!int x\n", r"c\.yaml:2:14: broken YAML: the value is no int"),
        (
            "c.yaml",
            f"training: {{max_steps: {'9' * 5000}}}",
            r"c\.yaml:1:23: broken YAML: the value is no int",
        ),
        ("c.yaml", "a: !!timestamp 2020-99-99\n", r"c\.yaml:1:4: broken YAML: the value is no timestamp"),
        ("c.yaml", "a: !!timestamp soon\n", r"c\.yaml:1:4: broken YAML: the value is no timestamp"),
        ("c.yaml", "a: !!bool maybe\n", r"c\.yaml:1:4: broken YAML: the value is no bool"),
        ("c.yaml", "a: !!int ''\n", r"c\.yaml:1:4: broken YAML: the value is no int"),
        ("c.json", '{"training": {"learning_rat": 1}}', r"c\.json:1: unknown key"),
        ("c.json", '{"training": ', r"c\.json:1:14: not JSON"),
        ("c.json", "[]", r"not a JSON object"),
        ("c.json", "", r"the file is empty"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path, name, text, told):
    with pytest.raises(UsageError, match=told):
        settings_of(tmp_path, name, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"c\.yaml: no such file"):
        resolve(preset=None, config_file=tmp_path / "c.yaml", overrides=(), environ={})


def test_a_configuration_of_trl_becomes_settings_with_their_lines(tmp_path):
    found = settings_of(tmp_path, "trl.yaml", TRL)
    settings, training = found.settings, found.settings.training
    assert (settings.model.name, settings.data.sources) == ("org/model", ("org/rows",))
    assert (training.batch_size, training.micro_batch_size) == (16, 2)
    assert (training.learning_rate, training.epochs, training.eval_every_steps) == (2e-4, 1, 50)
    assert (training.packing, training.precision) == ("on", "bf16")
    assert (settings.adapter.kind, settings.adapter.rank, settings.adapter.target_modules) == (
        "lora",
        32,
        ("auto",),
    )
    assert (settings.run.root, settings.run.name) == ("out", "mine")
    assert found.origins["training.learning_rate"] == f"{tmp_path}/trl.yaml:3"
    (notice,) = found.notices
    assert "without meaning here: gradient_accumulation_steps, report_to, eval_strategy" in notice


def test_precisions_of_other_trainers_become_ours(tmp_path):
    text = "model_name_or_path: org/model\nbf16: false\nfp16: true\ntf32: true\nfull_determinism: false\n"
    training = settings_of(tmp_path, "trl.yaml", text).settings.training
    assert (training.precision, training.tf32, training.deterministic) == ("fp16", True, False)
    text = "model_name_or_path: org/model\ndtype: float16\n"
    assert settings_of(tmp_path, "trl.yaml", text).settings.training.precision == "fp16"


def test_a_configuration_of_axolotl_becomes_settings(tmp_path):
    settings = settings_of(tmp_path, "axolotl.yml", AXOLOTL).settings
    assert (settings.adapter.kind, settings.adapter.quantize, settings.adapter.rank) == ("lora", "4bit", 16)
    assert (settings.data.sources, settings.data.heldout_fraction, settings.data.max_tokens) == (
        ("rows.jsonl",),
        0.05,
        4096,
    )
    assert (settings.training.batch_size, settings.training.optimizer) == (8, "adamw_8bit")


def test_keys_that_cannot_be_taken_are_all_named_with_what_to_write(tmp_path):
    with pytest.raises(UsageError) as refused:
        settings_of(tmp_path, "factory.yaml", FACTORY)
    assert refused.value.message.splitlines()[1:] == [
        f"  {tmp_path}/factory.yaml:7:1: dataset: 'identity' is a name of dataset_info.json: name the files with --data",
        f"  {tmp_path}/factory.yaml:10:1: max_samples: here it is --data FILE:N, which takes N rows",
    ]
    text = FACTORY.replace("dataset: identity\n", "").replace("max_samples: 1000\n", "")
    found = settings_of(tmp_path, "factory.yaml", text)
    assert found.settings.adapter.target_modules == ("q_proj", "v_proj")
    assert "template (the model's own chat template is used: --template NAME)" in found.notices[0]


def test_rows_of_the_command_line_stand_for_names_of_a_registry(tmp_path):
    path = tmp_path / "factory.yaml"
    path.write_text("dataset: identity\nstage: sft\n", encoding="utf-8")
    typed = Override(key="data.sources", value=["mails.jsonl"], origin="--data")
    for overrides, sets in (((typed,), ()), ((), ("data.sources=['mails.jsonl']",))):
        found = resolve(preset=None, config_file=path, overrides=overrides, sets=sets, environ={})
        assert found.settings.data.sources == ("mails.jsonl",)
        assert "dataset (the command line has data.sources)" in found.notices[0]


@pytest.mark.parametrize(
    ("key", "ours"), [("dataset", "data.sources"), ("eval_dataset", "data.heldout_sources")]
)
def test_files_of_llama_factory_are_taken_and_names_are_not(tmp_path, monkeypatch, key, ours):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    assert read_foreign({key: "a.jsonl, b.csv,rows"}).settings[ours][0] == ["a.jsonl", "b.csv", "rows"]
    (why,) = read_foreign({key: "a.jsonl,alpaca_v1.5"}).refused.values()
    assert why.startswith("'alpaca_v1.5' is a name of dataset_info.json")


def test_what_a_table_of_rows_asks_for_beside_its_path_is_refused():
    table = {"path": "rows.jsonl", "type": "alpaca"}
    assert read_foreign({"datasets": [table]}).settings["data.sources"][0] == ["rows.jsonl"]
    (why,) = read_foreign({"datasets": [table | {"split": "train[:5%]"}]}).refused.values()
    assert why.startswith("split of rows.jsonl cannot be taken")


@pytest.mark.parametrize("key", sorted(_INSTEAD))
def test_what_is_done_in_place_of_a_value_is_told(key):
    asked, instead = _INSTEAD[key]
    found = read_foreign({key: asked or "surprise"})
    assert found.ignored == [f"{key} ({instead})"]
    assert not found.refused


def test_a_slip_in_a_key_of_theirs_is_told_the_key():
    (why,) = read_foreign({"num_train_epoch": 3}).refused.values()
    assert why == "there is no such setting here (did you mean 'num_train_epochs'?)"


def test_every_row_names_a_setting_that_exists():
    assert {ours for _, ours, _ in ROWS} <= FIELDS.keys()


_NAMES = sorted({name for names, *_ in ROWS for name in names} | OURS.keys() | {"stage", "fsdp", "surprise"})
_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5000), st.floats(0, 10), st.text(string.ascii_lowercase, max_size=8),
    st.sampled_from(["lora", "cosine", "auto", "steps", "none", "adamw_torch", "rows.jsonl"]), st.lists(st.text(max_size=3), max_size=2),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=8))
def test_no_key_with_a_value_goes_without_a_word(content):
    found = read_foreign(content)
    said = (
        {theirs for _, theirs in found.settings.values()}
        | found.refused.keys()
        | {name.split()[0] for name in found.ignored}
    )
    assert said == {key for key, value in content.items() if value not in (None, "", [], {})}
    assert found.settings.keys() <= set(FIELDS)


_SCALARS = st.tuples(
    st.sampled_from(["", "!!int ", "!!float ", "!!bool ", "!!null ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!merge "]),
    st.sampled_from(["x", "''", "1e999", "9" * 4400, "2020-99-99", "0x", "-", "1:2", "true", "~", "<<", "[a]", "{a: 1}", "é"]),
).map("".join)  # fmt: skip


@given(st.lists(st.tuples(_SCALARS, _SCALARS), min_size=1, max_size=4))
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_yaml_holds_it_is_settings_or_a_usage_error(tmp_path, pairs):
    text = "training:\n" + "".join(f"  ? {key}\n  : {value}\n" for key, value in pairs)
    for whole in (text, f"lr: {pairs[0][1]}\n", f"{pairs[0][0]}: 1\n"):
        with suppress(UsageError):
            settings_of(tmp_path, "c.yaml", whole)


@pytest.mark.parametrize("key", sorted(_EXPECTED))
def test_a_value_that_is_refused_is_told_what_to_write(key):
    (why,) = read_foreign({key: "surprise"}).refused.values()
    assert why


def test_settings_written_as_toml_are_read_back_from_yaml(tmp_path):
    defaults = Settings().model_dump(mode="json", exclude_none=True)
    text = json.dumps(defaults)  # JSON is YAML
    assert (
        settings_of(tmp_path, "all.yaml", text.replace('"trust_remote_code": false, ', "")).settings
        == Settings()
    )
