import pytest
from pydantic import ValidationError

from sftcli.config.fields import kinds
from sftcli.config.schema.section import Section
from sftcli.config.schema.settings import FIELDS
from sftcli.config.schema.training import TrainingSettings


class Flags(Section):
    flag: bool = False


def test_every_field_has_a_description():
    assert [key for key, field in FIELDS.items() if not field.description] == []


def test_every_key_that_may_be_unset_is_unset_by_default():
    # Files cannot say "unset", so leaving a key out has to mean it.
    optional = [field for field in FIELDS.values() if type(None) in kinds(field)]
    assert optional
    assert {field.default for field in optional} == {None}


@pytest.mark.parametrize("value", [True, "20", "many", [1], 1.5, float("nan")])
def test_a_number_is_not_made_of_something_else(value):
    with pytest.raises(ValidationError):
        TrainingSettings(batch_size=value)


@pytest.mark.parametrize("value", [1, 0, "true", "yes", None])
def test_true_and_false_are_not_made_of_something_else(value):
    with pytest.raises(ValidationError):
        Flags(flag=value)
    assert Flags(flag=True).flag


def test_a_whole_float_is_a_whole_number():
    assert TrainingSettings(max_steps=1e3).max_steps == 1000


def test_epochs_become_steps_when_the_number_of_rows_is_known():
    settings = TrainingSettings(epochs=1.5, batch_size=4, micro_batch_size=4)
    assert settings.for_rows(10).max_steps == 4
    assert settings.for_rows(1).max_steps == 1
    assert TrainingSettings(max_steps=7).for_rows(10).max_steps == 7
