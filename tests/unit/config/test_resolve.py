import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sftcli.config.auto import AUTO_KEYS, ORIGIN
from sftcli.config.fields import choices, kinds
from sftcli.config.layers import NON_SETTING_VARIABLES, Override, environment_name
from sftcli.config.resolve import TYPED_KEYS, parse_set, resolve, to_toml
from sftcli.config.schema.settings import FIELDS, Settings
from sftcli.errors import NotFoundError, UsageError

KEY = "training.max_steps"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes `my.toml` and returns its name relative to the current folder."""
    monkeypatch.chdir(tmp_path)

    def config(text):
        Path("my.toml").write_text(text)
        return Path("my.toml")

    return config


def resolved(*, preset=None, file=None, overrides=(), environ=None):
    return resolve(preset=preset, config_file=file, overrides=overrides, environ=environ or {})


def refusal(**sources) -> UsageError:
    with pytest.raises(UsageError) as caught:
        resolved(**sources)
    return caught.value


def value_and_origin(result, key=KEY):
    return next((row.value, row.origin) for row in result.rows() if row.key == key)


# Precedence: each source beats its neighbor below.


def test_without_sources_every_value_is_the_default():
    result = resolved()
    assert result.settings == Settings()
    assert {key for key, origin in result.origins.items() if origin != "default"} == set(AUTO_KEYS)
    assert list(result.origins) == [row.key for row in result.rows()] == list(FIELDS)


def test_preset_beats_default():
    assert value_and_origin(resolved(preset="local-smoke")) == (50, "preset local-smoke")


def test_preset_beats_the_preset_that_it_extends():
    result = resolved(preset="gpu-smoke")
    assert value_and_origin(result) == (50, "preset gpu-smoke")
    assert value_and_origin(result, "data.max_tokens") == (1024, "preset gpu")


def test_file_beats_preset(config):
    file = config("[training]\n\nmax_steps = 77\n")
    assert value_and_origin(resolved(preset="local-smoke", file=file)) == (77, "my.toml:3")


def test_environment_beats_file(config):
    file = config("training.max_steps = 77")
    environ = {"SFT_TRAINING__MAX_STEPS": "78"}
    assert value_and_origin(resolved(file=file, environ=environ)) == (78, "SFT_TRAINING__MAX_STEPS")


def test_flag_beats_environment():
    flag = Override(key=KEY, value=79, origin="--max-steps")
    environ = {"SFT_TRAINING__MAX_STEPS": "78"}
    assert value_and_origin(resolved(overrides=[flag], environ=environ)) == (79, "--max-steps")


def test_later_set_beats_earlier_set():
    overrides = [parse_set(f"{KEY}=80"), parse_set(f"{KEY}=81")]
    assert value_and_origin(resolved(overrides=overrides)) == (81, "--set")


def test_a_key_of_one_source_leaves_the_other_keys_of_its_section(config):
    result = resolved(preset="quick", file=config("training.max_steps = 77"))
    assert result.settings.training.learning_rate == 3e-4


def test_settings_made_directly_read_no_environment(monkeypatch):
    monkeypatch.setenv("SFT_TRAINING__MAX_STEPS", "5")
    monkeypatch.setenv("TRAINING", '{"max_steps": 5}')
    assert Settings().training.max_steps == FIELDS[KEY].default


def test_the_environment_is_the_one_that_was_passed(monkeypatch):
    monkeypatch.setenv("SFT_TRAINING__MAX_STEPS", "5")
    assert value_and_origin(resolved())[1] == "default"


# Values given as text.


def test_numbers_choices_and_lists_are_read_from_the_environment():
    environ = {
        "SFT_TRAINING__MAX_STEPS": "20",
        "SFT_TRAINING__LEARNING_RATE": "1e-4",
        "SFT_TRAINING__PRECISION": "fp32",
        "SFT_DATA__SOURCES": json.dumps(["a.jsonl", "b.jsonl"]),
        "SFT_DATA__HELDOUT_SOURCES": "c.jsonl",
        "SFT_RUN__NAME": "20240101",
        "SFT_DEBUG": "1",
        "PATH": "/bin",
    }
    settings = resolved(environ=environ).settings
    assert (settings.training.max_steps, settings.training.learning_rate) == (20, 1e-4)
    assert settings.training.precision == "fp32"
    assert settings.data.sources == ("a.jsonl", "b.jsonl")
    assert settings.data.heldout_sources == ("c.jsonl",)
    assert settings.run.name == "20240101"


def test_none_unsets_what_an_earlier_source_set():
    result = resolved(preset="quick", overrides=[parse_set("training.warmup_steps=none")])
    assert value_and_origin(result, "training.warmup_steps") == (None, "--set")


def test_set_takes_the_text_after_the_first_equals_sign():
    assert parse_set("run.root = a=b").value == " a=b"
    assert parse_set("training.learning_rate=1e-4") == Override(
        key="training.learning_rate", value=1e-4, origin="--set"
    )


@pytest.mark.parametrize("text", ["", "=", "=5", "training.max_steps"])
def test_set_without_key_and_value_is_refused(text):
    with pytest.raises(UsageError, match="has no key and value"):
        parse_set(text)


# Unknown keys, in every place where one can be written.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[training]\nlearning_rte = 1e-4",
            "my.toml:2: unknown key 'training.learning_rte' (did you mean 'training.learning_rate'?)",
        ),
        ("[trainig]\nmax_steps = 5", "my.toml:1: unknown key 'trainig' (did you mean 'training'?)"),
        (
            "\nlearning_rate = 1e-4",
            "my.toml:2: unknown key 'learning_rate' (did you mean 'training.learning_rate'?)",
        ),
        (
            "training = { beta3 = 0.9 }",
            "my.toml:1: unknown key 'training.beta3' (did you mean 'training.beta1' or 'training.beta2'?)",
        ),
        (
            '"training.max_steps" = 1',
            "my.toml:1: unknown key '\"training.max_steps\"' (did you mean 'training.max_steps'?)",
        ),
        ("[training.nested]\nx = 1", "my.toml:1: unknown key 'training.nested'"),
        (
            "training = 5",
            "my.toml:1: 'training' is a section and takes no value; set its keys, such as training.max_steps",
        ),
        ('extends = "gpu"', "my.toml:1: 'extends' belongs in a preset; name the preset with --preset"),
    ],
)
def test_unknown_key_in_a_file_is_refused_at_its_line(config, text, message):
    error = refusal(file=config(text))
    assert error.message == message
    assert (error.location.file, str(error.location.line)) == ("my.toml", message.split(":")[1])


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("SFT_TRAINING__MAX_STEP", " (did you mean 'SFT_TRAINING__MAX_STEPS'?)"),
        ("SFT_TRAINING_MAX_STEPS", " (did you mean 'SFT_TRAINING__MAX_STEPS'?)"),
        ("SFT_training__max_steps", " (did you mean 'SFT_TRAINING__MAX_STEPS'?)"),
        ("SFT_LEARNING_RATE", " (did you mean 'SFT_TRAINING__LEARNING_RATE'?)"),
        ("SFT_DEBUGG", " (did you mean 'SFT_DEBUG'?)"),
        ("SFT_QQQ", ""),
    ],
)
def test_unknown_environment_variable_is_refused(name, suggestion):
    error = refusal(environ={name: "1"})
    assert error.message == f"unknown environment variable {name}{suggestion}"
    assert str(error.location) == name


def test_variables_that_are_no_settings_are_left_alone():
    assert resolved(environ=dict.fromkeys(NON_SETTING_VARIABLES, "x")).settings == Settings()


def test_unknown_key_of_set_and_of_a_flag_is_refused():
    error = refusal(overrides=[parse_set("training.max_step=5")])
    assert error.message == "--set: unknown key 'training.max_step' (did you mean 'training.max_steps'?)"
    error = refusal(overrides=[Override(key="training.max_step", value=5, origin="--max-steps")])
    assert error.message.startswith("--max-steps: unknown key")


def test_unknown_preset_is_refused_with_the_list():
    error = refusal(preset="qick")
    assert error.message == "no preset 'qick' (did you mean 'quick'?)"
    assert error.hint.startswith("Presets are gpu, ")


# Wrong values.


def wrong_numbers():
    for key, field in FIELDS.items():
        if not {int, float} & set(kinds(field)):
            continue
        bounds = {type(bound).__name__: bound for bound in field.metadata}
        values = ["nan", "inf", "-inf", "", "many", "true", "[1]"]
        values += [str(bound.ge - 1) for name, bound in bounds.items() if name == "Ge"]
        values += [str(bound.gt) for name, bound in bounds.items() if name == "Gt"]
        values += [str(bound.le + 1) for name, bound in bounds.items() if name == "Le"]
        values += [str(bound.lt) for name, bound in bounds.items() if name == "Lt"]
        values += ["1.5"] if int in kinds(field) else []
        yield from ((key, value) for value in values)


@pytest.mark.parametrize(("key", "text"), list(wrong_numbers()))
def test_a_wrong_number_is_refused_with_its_key_its_source_and_what_is_allowed(key, text):
    name = environment_name(key)
    error = refusal(environ={name: text})
    assert error.message.startswith(f"{name}: {key} is ")
    assert " but must be a " in error.message
    assert "pydantic" not in error.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "training.learning_rate = 5",
            "my.toml:1: training.learning_rate is 5 but must be a number, more than 0 and at most 1",
        ),
        (
            'training.batch_size = "20"',
            "my.toml:1: training.batch_size is '20' but must be a whole number, at least 1",
        ),
        (
            "training.batch_size = true",
            "my.toml:1: training.batch_size is true but must be a whole number, at least 1",
        ),
        (
            "[training.batch_size]\na = 1",
            "my.toml:1: training.batch_size is a table but must be a whole number, at least 1",
        ),
        (
            'training.precision = "bf61"',
            "my.toml:1: training.precision is 'bf61' but must be one of auto, bf16, fp16, fp32 (did you mean 'bf16'?)",
        ),
        (
            'data.sources = "rows.jsonl"',
            "my.toml:1: data.sources is 'rows.jsonl' but must be a list of texts, such as [\"rows.jsonl\"]",
        ),
        ('data.sources = ["a", ""]', "my.toml:1: data.sources[1] is '' but must be text that is not empty"),
        ("model.name = 5", "my.toml:1: model.name is 5 but must be text that is not empty"),
        (
            'run.name = "../x"',
            "my.toml:1: run.name is '../x' but must be at most 64 letters, digits, '.', '_' and '-', "
            "the first a letter or a digit",
        ),
    ],
)
def test_a_wrong_value_in_a_file_is_refused_at_its_line(config, text, message):
    assert refusal(file=config(text)).message == message


def test_a_wrong_value_of_a_flag_names_the_flag():
    error = refusal(overrides=[Override(key=KEY, value=-1, origin="--max-steps")])
    assert error.message.startswith("--max-steps: training.max_steps is -1 but must be a whole number")


def test_values_that_contradict_each_other_are_refused_with_both_sources(config):
    error = refusal(file=config("training.micro_batch_size = 8"), environ={"SFT_TRAINING__BATCH_SIZE": "4"})
    assert error.message == (
        "training: micro_batch_size (8) is larger than batch_size (4); "
        "training.batch_size is from SFT_TRAINING__BATCH_SIZE; training.micro_batch_size is from my.toml:1"
    )


# Several problems at once.


def test_all_problems_are_told_at_once(config):
    error = refusal(
        preset="qick",
        file=config("[training]\nmax_stps = 5\nbeta1 = 2"),
        environ={"SFT_SEED": "1"},
        overrides=[parse_set("sampling.top_p=7")],
    )
    assert error.message.split("\n") == [
        "5 problems with the settings:",
        "  no preset 'qick' (did you mean 'quick'?)",
        "  my.toml:2: unknown key 'training.max_stps' (did you mean 'training.max_steps'?)",
        "  unknown environment variable SFT_SEED "
        "(did you mean 'SFT_TRAINING__SEED' or 'SFT_SAMPLING__SEED'?)",
        "  my.toml:3: training.beta1 is 2 but must be a number, at least 0 and less than 1",
        "  --set: sampling.top_p is 7 but must be a number, more than 0 and at most 1",
    ]


def test_at_most_five_problems_are_listed(config):
    error = refusal(file=config("\n".join(f"q{number} = 1" for number in range(8))))
    assert len(error.message.split("\n")) == 7
    assert error.message.endswith("\n  and 3 more")


def test_a_contradiction_is_not_told_while_a_misspelled_key_may_be_its_cause(config):
    error = refusal(file=config("[training]\nmicro_batch_siz = 2\nbatch_size = 8\nmicro_batch_size = 9"))
    assert "\n" not in error.message
    assert "unknown key 'training.micro_batch_siz'" in error.message


def test_a_broken_file_is_told_together_with_the_rest(config):
    error = refusal(file=config("training ="), environ={"SFT_QQQ": "1"})
    assert "my.toml:1:11: invalid value" in error.message
    assert "SFT_QQQ" in error.message


def test_a_missing_file_is_not_found():
    with pytest.raises(NotFoundError, match=r"no\.toml: no such file"):
        resolved(file=Path("no.toml"))


def test_a_preset_given_as_a_file_is_answered_with_the_flag_for_presets():
    with pytest.raises(NotFoundError) as caught:
        resolved(file=Path("local"))
    assert "--preset local" in caught.value.hint


# Writing settings.


def values(key, field):
    accepted = kinds(field)
    if words := choices(field):
        return st.sampled_from(words)
    if tuple in accepted:
        return st.lists(st.text(min_size=1), max_size=3)
    if int in accepted:
        bounds = {type(bound).__name__: bound for bound in field.metadata}
        numbers = st.integers(bounds["Ge"].ge, 2**32 - 1)
        return st.none() | numbers if type(None) in accepted else numbers
    if float in accepted:
        return st.floats(0, 1)
    if bool in accepted:
        return st.booleans()
    text = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z") if key == "run.name" else st.text(min_size=1)
    return st.none() | text if type(None) in accepted else text


@st.composite
def valid_settings(draw):
    sections: dict[str, dict[str, object]] = {}
    for key in draw(st.sets(st.sampled_from(sorted(FIELDS)))):
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = draw(values(key, FIELDS[key]))
    try:
        settings = Settings.model_validate(sections)
    except (ValidationError, UsageError):  # the latter of a path that is none
        assume(False)
    assume(not settings.adapter.is_on or settings.training.learning_rate is not None)  # it brings its own
    return settings


@hypothesis_settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow], deadline=None)
@given(settings=valid_settings(), with_origins=st.booleans())
def test_written_settings_alone_give_equal_settings(tmp_path_factory, settings, with_origins):
    file = tmp_path_factory.mktemp("config") / "my.toml"
    origins = dict.fromkeys(FIELDS, "a\nb.toml:1") if with_origins else None
    file.write_text(to_toml(settings, origins), encoding="utf-8", newline="")
    result = resolved(file=file)
    assert result.settings == settings
    unset = {row.key for row in result.rows() if row.value is None}
    assert {
        key for key, origin in result.origins.items() if origin.startswith(("default", ORIGIN))
    } == unset | TYPED_KEYS


@pytest.mark.parametrize("preset", ["quick", "gpu-smoke"])
def test_written_settings_of_a_preset_do_not_need_the_preset(config, preset):
    settings = resolved(preset=preset).settings
    assert resolved(file=config(to_toml(settings))).settings == settings


def test_written_settings_show_origins_as_comments():
    result = resolved(preset="quick", environ={"SFT_TRAINING__SEED": "3"})
    lines = to_toml(result.settings, result.origins).splitlines()
    assert "seed = 3  # SFT_TRAINING__SEED" in lines
    assert "batch_size = 8  # preset quick" in lines
    assert "keep_last = 2  # default" in lines


def test_one_resolution_leaves_nothing_behind_for_the_next():
    resolved(preset="quick", environ={"SFT_TRAINING__SEED": "3"})
    refusal(environ={"SFT_TRAINING__SEED": "x"})
    assert resolved().settings == Settings()


def test_this_process_environment_can_be_passed_as_it_is():
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SFT_")}
    assert resolved(environ=clean).settings == Settings()
