"""``sft train --set training.context_processes=N``: processes that share rows train as one."""

from pathlib import Path

import pytest

from tests.support.several import assert_same_training, flags, make_place, sft, train_here


@pytest.mark.slow  # each process reads all libraries
def test_the_command_shares_rows_and_says_so(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    train_here(place, place / "model", "alone")
    two = ("--processes", "2", "--set", "training.context_processes=2")
    done = sft(place, "train", *flags(place / "model", "two"), *two)
    assert done.code == 0, done.err
    assert "2 of them share each row" in done.err
    assert_same_training(place, "two", "alone")
    done = sft(place, "resume", "two", "--checkpoint", "4", "--processes", "1")
    assert done.code == 2
    assert "training.context_processes is 2, and 1 process cannot be divided by it" in done.err
