"""What is said about flags of other trainers can be typed here."""

import re

import pytest

from sftcli.cli.commands.train import TRAIN_FLAGS
from sftcli.cli.options.flags import FLAGS
from sftcli.config.foreign_names import OURS
from sftcli.config.schema.settings import FIELDS

KNOWN = {*TRAIN_FLAGS, "--set", "--plan", "--resume"}


@pytest.mark.parametrize("ours", sorted(set(OURS.values())))
def test_flags_and_settings_that_are_named_are_there(ours: str):
    assert set(re.findall(r"--[a-z-]+", ours)) <= KNOWN
    assert set(re.findall(r"--set ([\w.]+)", ours)) <= FIELDS.keys()


def test_no_name_of_ours_is_called_foreign():
    own = {
        name.removeprefix("--").replace("-", "_")
        for flag in TRAIN_FLAGS
        for name in FLAGS[flag].names.split()
    }
    assert own.isdisjoint(OURS)
