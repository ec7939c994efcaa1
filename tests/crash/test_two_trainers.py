"""Two trainings of one run that start at the same moment: one trains, the other is told so."""

import os
import signal
from pathlib import Path

import pytest

from sftcli.errors import SftError
from sftcli.events import Ending
from sftcli.services.runs.lock import RunLock
from tests.support.recording import RecordingSink
from tests.support.runs import StopAtStep, numbers_of, settings_of, train, write_rows
from tests.support.tiny_model import build_tiny_model

TIMES = 20


def start_together(works) -> list[int]:
    """Fork a child for each of ``works``, let them go at one moment, and return their exit codes."""
    reader, writer = os.pipe()
    children = []
    for work in works:
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)  # ends when the parent closes its end
            code = 1
            try:
                work()
                code = 0
            except SftError as error:
                code = error.exit_code
            finally:
                os._exit(code)
        children.append(child)
    os.close(reader)
    os.close(writer)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_of_four_that_take_the_lock_together_exactly_one_has_it(tmp_path: Path) -> None:
    for number in range(TIMES):
        run = tmp_path / str(number)
        run.mkdir()
        (run / "done").mkdir()

        def hold(run: Path = run) -> None:
            with RunLock(run, RecordingSink()):
                (run / "done" / str(os.getpid())).touch()
                signal.sigtimedwait([signal.SIGUSR1], 0.15)  # long enough for the others to come

        assert sorted(start_together([hold] * 4)) == [0, 73, 73, 73]
        assert len(list((run / "done").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_of_two_trainings_started_together_one_trains_and_one_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    model = build_tiny_model(tmp_path / "model")
    train(settings_of(tmp_path, model, "run.name=alone"), StopAtStep(99))
    alone = numbers_of(tmp_path / "runs" / "alone")
    for number in range(TIMES):
        name = f"both-{number}"

        def work(name: str = name) -> None:
            outcome = train(settings_of(tmp_path, model, f"run.name={name}"), StopAtStep(99), auto=True)
            assert outcome.ending is Ending.FINISHED

        assert sorted(start_together([work, work])) == [0, 73]
        assert numbers_of(tmp_path / "runs" / name) == alone
