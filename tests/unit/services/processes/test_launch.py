"""What a launcher makes of a first process that was ended: what had happened is shown once, by whoever still can."""

import signal
import sys
from collections.abc import Iterator

import pytest

from sftcli.errors import DataError, ResourceError, UsageError
from sftcli.services.processes.launch import FORWARDED, run_processes

FAILS = """
import os, signal, sys
import torch.distributed as dist
from sftcli.errors import DataError
from sftcli.services.processes.failures import describe_failure
from sftcli.services.processes.meeting import PREFIX
from sftcli.services.processes.peers import OVER
from sftcli.services.processes.pulse import FAILURE

words = dist.PrefixStore(f"{PREFIX}/0", dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False))
if os.environ["RANK"] == "1":
    words.set(FAILURE, describe_failure(DataError("row 7 cannot be read"), rank=1))
    sys.exit(DataError.exit_code)
words.wait([FAILURE])
"""
SHOWS_IT_AND_IS_ENDED = "words.set(OVER, '1'); os.kill(os.getpid(), signal.SIGTERM)"
IS_ENDED = "signal.pause()"
KILLED = "import os, signal; os.environ['RANK'] == '0' and os.kill(os.getpid(), signal.SIGTERM)"


@pytest.fixture(autouse=True)
def own_signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give signals and variables that a launcher takes for itself back."""
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "")
    handlers = {number: signal.getsignal(number) for number in FORWARDED}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def two(program: str) -> int:
    return run_processes(2, [sys.executable, "-c", program])


@pytest.mark.slow
def test_millions_of_processes_are_refused_before_anything_is_made_for_them():
    with pytest.raises(
        UsageError, match="2147483648 processes were requested; one machine takes up to 1,024"
    ):
        run_processes(2**31, ["true"])


def test_error_that_the_first_process_had_shown_before_it_was_ended_is_not_shown_again():
    assert two(FAILS + SHOWS_IT_AND_IS_ENDED) == 65


@pytest.mark.slow
def test_error_that_it_had_not_shown_is_shown_for_it():
    with pytest.raises(DataError, match="row 7"):
        two(FAILS + IS_ENDED)


def test_first_process_that_ended_without_a_word_is_told_of():
    with pytest.raises(ResourceError, match="process 0 of 2 was killed by SIGTERM"):
        two(KILLED)
