"""What is told of the settings that nobody chose."""

from sftcli.config.auto import decide_open
from sftcli.config.schema.settings import Settings
from sftcli.services.train.start.open_settings import decided_text


def told(**training: object) -> str:
    settings = Settings.model_validate({"training": training})
    return decided_text(decide_open(settings, rows=1400, parameters=134_000_000, heldout_fraction=None))


def test_nothing_is_told_where_a_number_of_steps_leaves_nothing_to_decide():
    chosen = {"max_steps": 16, "batch_size": 8, "learning_rate": 3e-4}
    settings = Settings.model_validate({"training": chosen, "data": {"heldout_fraction": 0.1}})
    assert decided_text(decide_open(settings, rows=1400, parameters=1, heldout_fraction=0.1)) == ""


def test_what_was_decided_is_told_with_its_reason():
    assert told(batch_size=8, learning_rate=3e-4).startswith("auto: 1,400 rows: 3 epochs")
