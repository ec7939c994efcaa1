"""What a launcher makes of the first process that was ended: shown once, by whoever still can."""

import signal

import pytest

from sftcli.errors import DataError, ResourceError
from sftcli.services.processes.failures import describe_failure
from sftcli.services.processes.launch import _ending


class Ended:
    """Processes of which the first was ended by the launcher, after another one had failed."""

    dead = frozenset({1})

    def __init__(self, *, is_over: bool, failure: str | None) -> None:
        self._is_over, self._failure = is_over, failure

    def is_over(self) -> bool:
        return self._is_over

    def failure(self) -> str | None:
        return self._failure

    def death_of(self, rank: int) -> ResourceError:
        return ResourceError(f"process {rank} was killed")


FAILED = describe_failure(DataError("row 7 cannot be read"), rank=1)
CODES = {0: -signal.SIGTERM, 1: 65}


def test_error_that_the_first_process_had_shown_before_it_was_ended_is_not_shown_again():
    assert _ending(Ended(is_over=True, failure=FAILED), CODES, []) == 65


def test_error_that_it_had_not_shown_is_shown_for_it():
    with pytest.raises(DataError, match="row 7"):
        _ending(Ended(is_over=False, failure=FAILED), CODES, [])


def test_first_process_that_ended_without_a_word_is_told_of():
    with pytest.raises(ResourceError, match="process 0 was killed"):
        _ending(Ended(is_over=False, failure=None), CODES, [])
