"""What becomes of inherited values that a later source has made meaningless."""

import pytest

from sftcli.config.resolve import parse_set, resolve
from sftcli.errors import UsageError


@pytest.fixture
def resolved(tmp_path):
    def resolved(*, preset=None, file=None, sets=(), environ=None):
        path = tmp_path / "my.toml"
        if file is not None:
            path.write_text(file)
        return resolve(
            preset=preset,
            config_file=path if file is not None else None,
            overrides=[parse_set(text) for text in sets],
            environ=environ or {},
        )

    return resolved


def test_own_data_does_not_keep_the_held_out_rows_of_the_preset(resolved):
    result = resolved(preset="quick", sets=["data.sources=rows.jsonl"])
    assert result.settings.data.heldout_sources == ()
    assert result.origins["data.heldout_sources"] == "default"


def test_own_held_out_rows_stay_with_own_data(resolved):
    file = '[data]\nsources = ["a.jsonl"]\nheldout_sources = ["b.jsonl"]\n'
    assert resolved(preset="quick", file=file).settings.data.heldout_sources == ("b.jsonl",)


def test_another_model_does_not_keep_the_revision_of_the_first(resolved):
    file = '[model]\nname = "a"\nrevision = "abc"\n'
    model = resolved(file=file, environ={"SFT_MODEL__NAME": "b"}).settings.model
    assert (model.name, model.revision) == ("b", None)


def test_epochs_replace_the_inherited_number_of_steps(resolved):
    result = resolved(preset="quick", sets=["training.epochs=2"])
    assert result.settings.training.max_steps == 0
    assert result.origins["training.max_steps"] == "default"


def test_a_share_of_warm_up_replaces_the_inherited_number_of_steps(resolved):
    training = resolved(preset="quick", sets=["training.warmup_fraction=0.5"]).settings.training
    assert training.warmup_steps is None
    assert training.num_warmup_steps == training.max_steps / 2


def test_a_smaller_batch_lowers_the_inherited_micro_batch(resolved):
    for preset in (None, "quick"):
        result = resolved(preset=preset, sets=["training.batch_size=4"])
        assert result.settings.training.micro_batch_size == 4
        assert result.origins["training.micro_batch_size"] == "limited by --set"


def test_a_larger_batch_leaves_the_inherited_micro_batch(resolved):
    result = resolved(preset="local", sets=["training.batch_size=64"])
    assert result.settings.training.micro_batch_size == 2


def test_fewer_steps_than_the_inherited_warm_up_leave_the_default_share(resolved):
    result = resolved(preset="local", sets=["training.max_steps=50"])
    assert result.settings.training.warmup_steps is None
    assert result.origins["training.warmup_steps"] == "default"


@pytest.mark.parametrize(
    ("file", "sets"),
    [
        ("training.micro_batch_size = 8", ["training.batch_size=4"]),
        ("training.batch_size = 4", ["training.micro_batch_size=8"]),
        ("training.warmup_steps = 8", ["training.max_steps=4"]),
    ],
)
def test_what_the_user_wrote_is_not_changed_to_fit_but_refused_with_both_sources(resolved, file, sets):
    with pytest.raises(UsageError) as caught:
        resolved(file=file, sets=sets)
    own = file.split(" ")[0]
    other = sets[0].split("=")[0]
    assert f"{other} is from --set" in caught.value.message
    assert f"{own} is from" in caught.value.message
    assert "my.toml:1" in caught.value.message


def test_a_wrong_limit_is_reported_itself_and_changes_nothing(resolved):
    with pytest.raises(UsageError) as caught:
        resolved(preset="quick", sets=["training.batch_size=0"])
    assert caught.value.message == "--set: training.batch_size is 0 but must be a whole number, at least 1"


def test_adapter_takes_a_rate_of_its_own_unless_someone_chose_one_for_it(resolved):
    def rate(**sources):
        result = resolved(**sources)
        return result.settings.training.learning_rate, result.origins["training.learning_rate"]

    lora = "adapter.kind=lora"
    assert rate(sets=[lora]) == (2e-4, "goes with --set")
    assert rate(preset="quick", sets=[lora]) == (2e-4, "goes with --set")
    assert rate(preset="lora") == (1e-3, "preset lora")
    assert rate(file="[training]\nlearning_rate = 1e-5\n", sets=[lora])[0] == 1e-5
    assert rate(sets=["adapter.kind=none"]) == (None, "auto: follows from the size of the model")


def test_shape_of_an_adapter_needs_an_adapter(resolved):
    with pytest.raises(UsageError, match="quantize is set, but kind is none"):
        resolved(sets=["adapter.quantize=4bit"])
