import os
import signal
import sys
import threading

import pytest

from sftcli.cli.options.shared import Output
from sftcli.cli.session.session import is_signalled_twice, open_view, session
from sftcli.cli.session.signals import STOP_SIGNALS, CommandStopped, SignalStop, stop_on_signals
from sftcli.cli.views.plain import PlainView, SilentView
from sftcli.errors import StoppedError


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in sorted(STOP_SIGNALS)]


def test_without_a_signal_nothing_is_asked() -> None:
    stop = SignalStop()
    assert not stop.requested()
    assert stop.exit_code == 75


@pytest.mark.parametrize(
    ("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 75)]
)
def test_the_exit_code_tells_the_signal(name: str, code: int) -> None:
    with session(Output(quiet=True)) as current:
        signal.raise_signal(signal.Signals[name])
        assert current.stop.requested()
    assert current.stop.exit_code == code


def test_the_first_signal_counts() -> None:
    with session(Output(quiet=True)) as current:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert current.stop.exit_code == 143


def interrupted_twice() -> None:
    with session(Output(quiet=True)):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def keeping_nothing() -> None:
    with session(Output(quiet=True)):
        signal.raise_signal(signal.SIGTERM)
        raise StoppedError


def test_the_second_interrupt_ends_at_once() -> None:
    with pytest.raises(CommandStopped) as caught:
        interrupted_twice()
    assert caught.value.exit_code == 130


def test_signals_that_come_twice_by_themselves_are_no_impatience() -> None:
    assert is_signalled_twice({"SLURM_JOB_ID": "7", "TORCHELASTIC_RUN_ID": "none"})
    assert not is_signalled_twice({"SLURM_JOB_ID": "7"})
    stop = SignalStop(enough=3)
    for _ in range(2):
        stop.handle(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGTERM, None)


def test_two_interrupts_that_reach_the_handler_as_one_are_two() -> None:
    stop = SignalStop()
    stop.count_received(signal.SIGINT)
    stop.count_received(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT, None)


def interrupted_once_more_before_the_handler_ran() -> None:
    answered = threading.Event()
    stop = SignalStop()
    with stop_on_signals(stop, answered.set):
        signal.raise_signal(signal.SIGINT)
        assert answered.wait(timeout=5)
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        os.write(wakeup, bytes([signal.SIGINT]))  # all that is left of a signal taken for the one before
        threading.Event().wait(timeout=5)


def test_an_interrupt_that_the_handler_was_called_too_early_for_ends_at_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_once_more_before_the_handler_ran()


def test_two_interrupts_end_once() -> None:
    with stop_on_signals(SignalStop(), lambda: None):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        threading.Event().wait(timeout=0.1)


def test_a_command_that_keeps_nothing_ends_with_the_code_of_the_signal() -> None:
    with pytest.raises(CommandStopped, match="nothing was kept") as caught:
        keeping_nothing()
    assert caught.value.exit_code == 143


@pytest.mark.parametrize("error", [None, ValueError("x")], ids=["done", "failed"])
def test_handlers_are_restored(error: Exception | None) -> None:
    before = handlers()
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    try:
        with session(Output(quiet=True)):
            assert handlers() != before
            if error:
                raise error
    except ValueError:
        pass
    assert handlers() == before
    assert signal.set_wakeup_fd(wakeup) == wakeup


def test_a_signal_that_was_ignored_from_outside_stays_ignored() -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with session(Output(quiet=True)) as current:
            signal.raise_signal(signal.SIGHUP)
        assert not current.stop.requested()
    finally:
        signal.signal(signal.SIGHUP, old)


def test_the_user_is_answered_before_the_handler_can_run() -> None:
    answered = threading.Event()
    stop = SignalStop()
    with stop_on_signals(stop, answered.set):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert answered.wait(timeout=5)


def test_the_user_is_answered_once() -> None:
    answers: list[int] = []
    with stop_on_signals(SignalStop(), lambda: answers.append(1)):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.raise_signal(number)
    assert answers == [1]


def test_another_thread_leaves_signals_alone() -> None:
    seen: list[object] = []

    def work() -> None:
        with stop_on_signals(SignalStop(), lambda: None):
            seen.extend(handlers())

    before = handlers()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python warns of every fork beside threads")
def test_a_forked_worker_dies_of_sigterm_and_does_not_stop_its_parent() -> None:
    answered = threading.Event()
    with stop_on_signals(SignalStop(), answered.set):
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert not answered.is_set()


def test_a_log_gets_lines_and_a_quiet_one_warnings() -> None:
    assert isinstance(open_view(Output(), every_steps=7), PlainView)
    assert isinstance(open_view(Output(quiet=True), every_steps=7), SilentView)
    assert isinstance(open_view(Output(json=True), every_steps=7), SilentView)


def test_verbose_gets_a_line_for_every_step() -> None:
    views = [open_view(Output(verbose=verbose), every_steps=7) for verbose in (False, True)]
    assert [view.every_steps for view in views if isinstance(view, PlainView)] == [7, 1]


def test_while_torch_is_loaded_the_first_interrupt_ends_at_once_and_later_two_are_needed(capsys) -> None:
    with pytest.raises(CommandStopped, match="interrupted while loading: nothing was begun") as caught:  # noqa: SIM117
        with session(Output()) as current, current.loading():
            signal.raise_signal(signal.SIGINT)
    assert caught.value.exit_code == 130
    assert "stopping" not in capsys.readouterr().err
    with session(Output(quiet=True)) as current:
        with current.loading():
            pass
        signal.raise_signal(signal.SIGINT)
        assert current.stop.requested()
